"""MLflow's login, and the hosts that get it: the check sits where MLflow sends a request.

MLflow sends the login to every HTTP server that a model's source names. Everyone who may register models may name any.
"""

from __future__ import annotations

import base64
import urllib.parse
import warnings
from typing import Any

from darwin_runtime.errors import RoleError
from darwin_runtime.redact import mask_uri

Origin = tuple[str, str | None, int | None]


def guard(uri: str) -> None:
    """Let MLflow send its login to the hosts that the user named: of its two servers, and of `uri`.

    From now on MLflow raises `RoleError` before it sends a request with a login elsewhere. It also returns the last
    answer when its own retries are used up, so that the error can quote the body. Without verification of certificates
    it warns once, not for every request.
    """
    import urllib3
    from mlflow.utils import request_utils, rest_utils

    warnings.simplefilter("once", urllib3.exceptions.InsecureRequestWarning)
    named = named_origins(uri)

    def send(
        method: str,
        url: str,
        max_retries: int,
        backoff_factor: float,
        backoff_jitter: float,
        retry_codes: Any,
        _raise_on_status: bool = True,
        **more: Any,
    ) -> Any:
        has_login = more.get("auth") or more.get("headers", {}).get("Authorization") in _logins()
        if has_login and _origin(url) not in named:
            raise RoleError(
                f"cannot read {uri}: its files are said to be at {mask_uri(url)}, which is not the host of "
                f"MLFLOW_TRACKING_URI and so is not sent its login. If that host is yours, name it in the URI: "
                f"mlflow-artifacts://{urllib.parse.urlsplit(url).netloc.rpartition('@')[2]}/..."
            )
        retries = (max_retries, backoff_factor, backoff_jitter, retry_codes)
        answer = request_utils._get_http_response_with_retries(method, url, *retries, raise_on_status=False, **more)
        if answer.status_code >= 400 and not more.get("stream") and not _is_mlflow_error(answer):
            # MLflow would take it for an error of its server's, whatever the status is.
            request_utils.augmented_raise_for_status(answer)
        return answer

    rest_utils._get_http_response_with_retries = send


# Schemes whose URIs name the host that gets the credentials of a store: where such stores are.
_STORE_HOSTS = {
    "abfss": (".core.windows.net", ".core.chinacloudapi.cn", ".core.usgovcloudapi.net", ".fabric.microsoft.com"),
    "r2": (".r2.cloudflarestorage.com",),
    "b2": (".backblazeb2.com",),
}


def check_source(source: str) -> None:
    """Raise `RoleError` where a registry's `source` names a host that must not get the credentials of a store."""
    there = urllib.parse.urlsplit(source)
    hosts = _STORE_HOSTS.get(there.scheme)
    if hosts and not (there.hostname or "").endswith(hosts):
        raise RoleError(
            f"the files of the model are said to be at {mask_uri(source)}, which is not below {' or '.join(hosts)} and "
            f"so is not sent the credentials of {there.scheme}. If that host is yours, give this URI as the model's"
        )


def named_origins(uri: str) -> set[Origin]:
    """The origins of MLflow's tracking server and registry, and of `uri` where that names a host."""
    from mlflow import get_registry_uri, get_tracking_uri

    tracking = get_tracking_uri()
    found = {_origin(tracking), _origin(get_registry_uri().removeprefix("uc:"))}
    there = urllib.parse.urlsplit(uri)
    if there.scheme == "mlflow-artifacts" and there.netloc:
        # MLflow takes the scheme of its tracking server.
        there = there._replace(scheme=urllib.parse.urlsplit(tracking).scheme)
    if there.scheme in ("http", "https"):
        found.add(_origin(there.geturl()))
    return found


def _is_mlflow_error(answer: Any) -> bool:
    """Whether MLflow takes the status of an answer, which is no success, from the right place."""
    from mlflow.protos.databricks_pb2 import ErrorCode

    try:
        found = answer.json()
    except ValueError:
        return True
    return not isinstance(found, dict) or found.get("error_code") in ErrorCode.keys()  # noqa: SIM118


def _origin(uri: str) -> Origin:
    found = urllib.parse.urlsplit(uri)
    return found.scheme, found.hostname, found.port or {"http": 80, "https": 443}.get(found.scheme)


def _logins() -> set[str]:
    """The Authorization headers that carry the login."""
    from mlflow.utils.credentials import get_default_host_creds

    login = get_default_host_creds("http://any")
    basic = base64.b64encode(f"{login.username}:{login.password}".encode()).decode()
    return {f"Basic {basic}", f"Bearer {login.token}"}
