"""The pods of a namespace, listed from inside the cluster through Kubernetes' REST API, and nothing else.

Whoever deletes by this list must be able to trust it: it is either complete and of one moment, or an exception.
Protocol: https://kubernetes.io/docs/reference/using-api/api-concepts/
"""

from __future__ import annotations

import json
import logging
import random
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter

from darwin_runtime.errors import ApiError, NotInCluster

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

# How often a list that expired on the way (410) is begun again.
RESTARTS = 3

# The longest pause that this client chooses, and the shortest one even if the server asks for none.
MAX_PAUSE_SECONDS, MIN_PAUSE_SECONDS = 10.0, 0.1

logger = logging.getLogger("darwin.k8s")


def namespace(directory: Path = SERVICE_ACCOUNT) -> str:
    """The namespace of the pod's service account. Raises `NotInCluster`."""
    return _read(directory / "namespace")


@dataclass
class Client:
    """A connection to the API server at `url` as the service account in `directory`. Use it in a `with`.

    `limit` is the pods per page. `deadline` (seconds) bounds one `list_pods`, with its retries and pauses; each wait
    for the network is bounded by `timeout` (seconds to connect, seconds to read) and by what is left until then.
    `backoff` (seconds) is the first pause before a retry, then doubled.
    """

    url: str
    directory: Path
    limit: int = 500
    deadline: float = 60.0
    timeout: tuple[float, float] = (5.0, 20.0)
    backoff: float = 0.5
    _session: requests.Session = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ca = self.directory / "ca.crt"
        _read(ca)
        try:
            adapter = _Adapter(ca)
        except ssl.SSLError as error:
            raise NotInCluster(f"{ca} holds no PEM certificate ({error}); it should hold the cluster's CA") from error
        self._session = requests.Session()
        # Or else .netrc replaces the token, proxy variables redirect it, and REQUESTS_CA_BUNDLE replaces ca.crt.
        self._session.trust_env = False
        # With True here requests would trust certifi's CAs besides the cluster's.
        self._session.verify = str(ca)
        self._session.mount("https://", adapter)

    @classmethod
    def in_cluster(cls, environ: Mapping[str, str], directory: Path = SERVICE_ACCOUNT) -> Client:
        """The client for the cluster this pod runs in. Raises `NotInCluster`; connects to nothing yet."""
        host = _variable(environ, "KUBERNETES_SERVICE_HOST")
        port = _variable(environ, "KUBERNETES_SERVICE_PORT")
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        _token(directory)
        return cls(f"https://{host}:{port}", directory)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def list_pods(self, namespace: str) -> list[dict[str, Any]]:
        """Every pod of `namespace`, whatever its phase, as decoded Pod objects: all of one moment.

        Kubernetes answers with no pods, not an error, for a namespace that does not exist. Raises `ApiError`, and
        `NotInCluster` if the service account's token has gone.
        """
        if not namespace.strip("."):
            raise ValueError(f"{namespace!r} is not a namespace")  # its path would be another resource's
        url = f"{self.url}/api/v1/namespaces/{quote(namespace, safe='')}/pods"
        until = time.monotonic() + self.deadline
        pods: list[dict[str, Any]] = []
        query, restarts = {"limit": str(self.limit)}, 0
        while True:
            try:
                page = self._get(url, query, until)
            except ApiError as error:
                if error.code != 410 or restarts == RESTARTS:
                    raise
                # The Status offers a token to go on with, but what that lists is of another moment.
                logger.warning("listing pods: %s; starting over", error)
                pods, query, restarts = [], {"limit": str(self.limit)}, restarts + 1
                continue
            pods += page["items"]
            if not page["metadata"].get("continue"):
                return pods
            query["continue"] = page["metadata"]["continue"]

    def _get(self, url: str, query: Mapping[str, str], until: float) -> dict[str, Any]:
        failure, reread = ApiError(0, "Timeout", "the list is not complete yet"), False
        pause, backoff = 0.0, self.backoff
        while True:
            left = until - time.monotonic() - pause
            if left <= 0:
                why = f"gave up: another try, in {pause:.1f} s, would be past the {self.deadline:g} s allowed"
                raise ApiError(failure.code, failure.reason, f"{failure.message}; {why}", failure.details) from failure
            if pause:
                logger.warning("listing pods: %s; trying again in %.1f s", failure, pause)
                time.sleep(pause)
            pause = backoff * random.uniform(0.5, 1)  # noqa: S311 - no secret
            backoff = min(2 * backoff, MAX_PAUSE_SECONDS)
            token = _token(self.directory)
            connect = min(self.timeout[0], left / 2)
            try:
                response = self._session.get(
                    url,
                    params=query,
                    headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
                    timeout=(connect, min(self.timeout[1], left - connect)),
                    allow_redirects=False,
                )
            except requests.RequestException as error:
                failure = self._no_answer(error)
                continue
            if response.status_code == 200:
                return _pod_list(response, token)
            failure = _refusal(response, token)
            if failure.code == 401 and not reread:
                reread, pause = True, 0.0
            elif failure.code != 429 and failure.code < 500:
                raise failure
            for asked in (response.headers.get("Retry-After"), failure.details.get("retryAfterSeconds")):
                if str(asked).isdecimal():
                    pause = max(float(str(asked)), MIN_PAUSE_SECONDS)
                    break

    def _no_answer(self, error: requests.RequestException) -> ApiError:
        """The failure to retry after; raises the one that would only repeat itself."""
        cause: BaseException = error
        while cause.__context__:
            cause = cause.__context__
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = f"{self._session.verify} does not verify {self.url}, so no token was sent: {cause.verify_message}"
            raise ApiError(0, type(cause).__name__, why) from error
        failure = ApiError(0, type(cause).__name__, f"{self.url}: {cause}")
        if isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError):
            return failure
        raise failure from error


class _Adapter(HTTPAdapter):
    """HTTPS that trusts `ca` alone."""

    def __init__(self, ca: Path) -> None:
        self.context = ssl.create_default_context(cafile=str(ca))
        # Python 3.13 turned this on; CAs made by older cluster tools lack extensions it demands.
        self.context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self.context)


def _variable(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        state = "empty" if name in environ else "not set"
        raise NotInCluster(f"{name} is {state}; Kubernetes sets it in every container: run this in a pod")
    return value


def _read(path: Path) -> str:
    hint = "the kubelet mounts it: run this in a pod whose automountServiceAccountToken is not false"
    try:
        text = path.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotInCluster(f"{path} does not exist; {hint}") from error
    except OSError as error:
        raise NotInCluster(f"{path} cannot be read ({error.strerror}); {hint}") from error
    if not text:
        raise NotInCluster(f"{path} is empty; {hint}")
    return text


def _token(directory: Path) -> str:
    token = _read(directory / "token")
    # requests would refuse it with a message that quotes it.
    if not token.isascii() or not token.isprintable():
        raise NotInCluster(f"{directory / 'token'} does not hold a token but other bytes")
    return token


def _pod_list(response: requests.Response, token: str) -> dict[str, Any]:
    """The PodList in an answer; raises `ApiError` for anything else."""
    page = _decoded(response.content)
    items, metadata = page.get("items"), page.get("metadata")
    if (
        page.get("kind") == "PodList"
        and isinstance(items, list)
        and all(isinstance(pod, dict) for pod in items)
        and isinstance(metadata, dict)
        and isinstance(metadata.get("continue", ""), str)
    ):
        return page
    raise _refusal(response, token)


def _refusal(response: requests.Response, token: str) -> ApiError:
    # What answers in the API server's place may quote our request back.
    body = response.content.decode(errors="replace").replace(token, "***")
    status = _decoded(body)
    if status.get("kind") != "Status":
        kind = response.headers.get("Content-Type", "no Content-Type")
        status = {"message": f"expected a PodList, got {len(response.content)} bytes ({kind}): {body[:200]!r}"}
    if 300 <= response.status_code < 400:
        where = response.headers.get("Location", "").replace(token, "***")
        status["message"] = f"redirects to {where!r}; not followed: the token is for the API server alone"
    details = status.get("details")
    return ApiError(
        response.status_code,
        str(status.get("reason") or response.reason),
        str(status.get("message")),
        details if isinstance(details, dict) else None,
    )


def _decoded(body: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
