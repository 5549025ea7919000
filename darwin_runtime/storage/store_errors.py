"""A store's errors: the `RoleError` that each stands for, and which of them pass by themselves.

A line is: what cannot be read, why and what to do, and in brackets the words of the other side. `LINES` has the
advice by store and failure. An error is `StoreUnreachable` only where it is known to pass: no mistake is an outage.
"""

from __future__ import annotations

import contextlib
import errno
import html
import os
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence

from darwin_runtime.errors import ConfigError, RoleError, StoreUnreachable
from darwin_runtime.storage.access import needs_tracking

MLFLOW, S3, GOOGLE, AZURE = "MLflow", "S3", "Google Cloud Storage", "Azure"
DATABRICKS, FTP, LOCAL, OTHER = "Databricks", "FTP", "a local directory", "a store"

# The packages whose errors are a store's, in the order in which they are looked for: they wrap those of `requests`.
_PACKAGES = (
    *(("botocore", S3), ("boto3", S3), ("s3transfer", S3), ("google", GOOGLE), ("azure", AZURE)),
    *(("databricks", DATABRICKS), ("ftplib", FTP), ("paramiko", FTP), ("mlflow", MLFLOW), ("requests", MLFLOW)),
)

_NO_LOGIN = "no login was sent: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_PAGE = (
    "a web page came where MLflow's JSON belongs, of a sign-in or of another server: check MLFLOW_TRACKING_URI, and "
    "give the login that the sign-in takes, such as MLFLOW_TRACKING_TOKEN"
)
_NO_KEY = "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role"
_FOREIGN_KEY = "the credentials were refused: check {login}, and that they belong to this endpoint"
_PROXY = "the proxy wants a login: give it in HTTPS_PROXY or HTTP_PROXY, or name the host in NO_PROXY"
_REGION = "the bucket is in another region: set AWS_DEFAULT_REGION to the region of the bucket"

# Store -> failure -> what it means, and what to do. A failure is a code of the store's own, an HTTP status, the name of
# an exception, or words of the other side. `{login}` is the variable in use that holds the login.
LINES: Mapping[str, Mapping[object, str]] = {
    MLFLOW: {
        "Tunnel connection failed: 407": _PROXY,
        "Invalid Host header": (
            "the MLflow server refuses this name for itself: start it with --allowed-hosts and the host and port of "
            "MLFLOW_TRACKING_URI"
        ),
        "--no-serve-artifacts": (
            "the MLflow server does not serve artifacts: start it with --serve-artifacts, or give the store's own URI"
        ),
        "not in a valid JSON format": _PAGE,
        "JSONDecodeError": _PAGE,
        400: "the server rejects the request: check the URI",
        401: "the credentials were refused: check {login}",
        403: (
            "these credentials may not read it, or it does not exist, as MLflow has one answer for both: check the "
            "name, and give the user of {login} READ permission"
        ),
        404: "it does not exist: check the name, the version, alias or stage, and MLFLOW_TRACKING_URI",
        407: _PROXY,
    },
    S3: {
        "Tunnel connection failed: 407": _PROXY,
        "NoSuchBucket": "the bucket does not exist: check the URI, and MLFLOW_S3_ENDPOINT_URL",
        "RequestTimeTooSkewed": "the clock of this node, or of the store, is wrong: set it (NTP)",
        "InvalidObjectState": "the object is archived: restore it, or copy the model to another storage class",
        "ExpiredToken": "the credentials have expired: renew {login}",
        "InvalidAccessKeyId": _FOREIGN_KEY,
        "SignatureDoesNotMatch": _FOREIGN_KEY,
        "InvalidToken": _FOREIGN_KEY,
        "PermanentRedirect": _REGION,
        "AuthorizationHeaderMalformed": _REGION,
        "IllegalLocationConstraintException": _REGION,
        301: _REGION,
        400: "the store rejects the request: check the URI, AWS_DEFAULT_REGION and MLFLOW_S3_ENDPOINT_URL",
        401: "the credentials were refused: check {login}",
        403: "no READ permission for {login}: allow s3:ListBucket, s3:GetObject, and kms:Decrypt where a key is in use",
        404: "the object does not exist: check the bucket and the path of the URI, and MLFLOW_S3_ENDPOINT_URL",
        "NoCredentialsError": _NO_KEY,
        "PartialCredentialsError": _NO_KEY,
        "ProfileNotFound": "AWS_PROFILE names no profile of AWS_CONFIG_FILE: check both",
        "HTTPClientError": "the request cannot be sent: check {login}, the proxy and MLFLOW_S3_ENDPOINT_URL",
    },
    GOOGLE: {
        401: "the credentials were refused: check {login}",
        403: "no READ permission for {login}: give it the role roles/storage.objectViewer",
        404: "the object does not exist: check the bucket and the path of the URI",
        "DefaultCredentialsError": "there are no credentials: set GOOGLE_APPLICATION_CREDENTIALS to a mounted key",
    },
    AZURE: {
        401: "the credentials were refused: check {login}",
        403: "no READ permission for {login}: give it the role Storage Blob Data Reader",
        404: "the blob does not exist: check the account, the container and the path of the URI",
    },
    DATABRICKS: {
        401: "the credentials were refused: check {login}",
        403: "no READ permission for {login}: grant EXECUTE on the model, and USE on its catalog and schema",
        404: "it does not exist: check the name, the version or alias, and {login}",
    },
    FTP: {
        "error_perm": "the server refuses it: check the user, the password and the path of the URI",
        "AuthenticationException": "the credentials were refused: check the user and the key of the URI",
    },
    LOCAL: {
        "FileNotFoundError": "a file of its store, or a directory of this machine, is missing: check the mount",
        "NotADirectoryError": "a path of its store leads through a file: check the URI",
        "PermissionError": "this user may not read it: set runAsUser or fsGroup to the owner of the store's files",
    },
}

# What S3 says with its own codes where the status says less.
_STORE_CODES = {"AccessDenied": 403, "NoSuchKey": 404, "NoSuchBucket": 404, "RequestTimeout": 408, "SlowDown": 503}
_STORE_CODES |= dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"), 401)

# The errors of the disk that a file is written to, never of a store.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# Statuses that pass: the server asks for patience, or is not there for now. To wait does not help with 501 and 505, nor
# with 511, which wants a sign-in.
_PASSING_STATUS = {408, 425, 429, *range(500, 600)} - {501, 505, 511}

# Errors of the network that pass, by name, so that no library has to be imported for this.
_PASSING = {
    *("TimeoutError", "gaierror", "BrokenPipeError", "ConnectionResetError", "ConnectionRefusedError"),
    *("ConnectionAbortedError", "SSLEOFError", "SSLZeroReturnError", "SSLSyscallError"),
    *("RemoteDisconnected", "IncompleteRead", "ProtocolError", "NewConnectionError"),
    *("Timeout", "ChunkedEncodingError"),
    *("ConnectionClosedError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError"),
    *("IncompleteReadError", "ResponseStreamingError", "ServiceRequestError", "ServiceResponseError", "error_temp"),
}
_PASSING_ERRNO = (
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.EHOSTDOWN,
    errno.ENETRESET,
    errno.EADDRNOTAVAIL,
)

# Answers of a server that speaks another protocol.
_FOREIGN = {"BadStatusLine", "LineTooLong", "UnknownProtocol", "UnknownTransferEncoding"}

# The variables that may hold the login to a store.
_LOGINS = {
    GOOGLE: ("GOOGLE_APPLICATION_CREDENTIALS",),
    AZURE: ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCESS_KEY", "AZURE_CLIENT_ID"),
    DATABRICKS: ("DATABRICKS_TOKEN", "DATABRICKS_CLIENT_ID", "DATABRICKS_CONFIG_PROFILE"),
}

MAX_SAID = 500


@contextlib.contextmanager
def explained(uri: str, file: str = "") -> Iterator[None]:
    """Turn each error of a store into `StoreUnreachable`, or a `RoleError` with advice, about a `file` of `uri`."""
    try:
        yield
    except (RoleError, ConfigError):
        raise
    except Exception as error:  # every store raises its own kind
        for one in _chain(error):
            if isinstance(one, RoleError) or (isinstance(one, OSError) and one.errno in _DISK):
                raise one from error
        raise explain(error, uri, file) from error


def explain(error: Exception, uri: str, file: str = "") -> RoleError:
    """The error to raise for `error`, met while reading `uri`; `StoreUnreachable` if it is known to pass."""
    chain = list(_chain(error))
    cause = chain[-1]
    what = f"cannot read {file} of {uri}" if file else f"cannot read {uri}"
    said = _said(chain)
    if isinstance(cause, ModuleNotFoundError):
        databricks = str(cause.name).partition(".")[0] == "databricks"
        brings = "databricks among its FLAVORS" if databricks else "MODEL_REQUIREMENTS that list what brings it"
        return RoleError(
            f"{what}: its store needs the Python package {cause.name!r}, which is not installed: "
            f"build the image with {brings}"
        )
    if any(isinstance(one, ssl.SSLCertVerificationError) for one in chain):
        hint = "the server's certificate is not trusted: check the URI, or set REQUESTS_CA_BUNDLE to its CA"
        return RoleError(f"{what}: {hint} ({said})")
    store = _store(chain, uri)
    # The store's own answer counts before the code that MLflow gives it.
    answered = sorted(chain, key=lambda one: getattr(one, "response", None) is None)
    status = next((found for one in answered if (found := _status(one)) is not None), None)
    lines = LINES.get(store, {})
    failure = next((one for one in _failures(lines, chain, status) if one in lines), None)
    if _passes(chain, status) and not _is_phrase(failure):
        return StoreUnreachable(f"{what}: no usable answer from {_where(store, uri)} ({said})")
    http = f"HTTP {status}, " if status else ""
    if failure is None:
        settings = "the URI and MLFLOW_TRACKING_URI" if store == MLFLOW else "the URI and its store's own settings"
        # MLflow's own words name the setting, where one is bad.
        if not http:
            said = _plain(str(error)) if str(cause) in str(error) else f"{_plain(str(error))}, because of {said}"
        return RoleError(f"{what}: {http}{said.rstrip('.')}; check {settings}")
    line, login = lines[failure], _login(store)
    if store == MLFLOW and status == 401 and not login:
        line = _NO_LOGIN
    return RoleError(f"{what}: {http}{line.format(login=login or 'this client')} ({said})")


def _is_phrase(failure: object) -> bool:
    """Whether a failure of `LINES` is known by words of the other side."""
    return isinstance(failure, str) and not failure.isidentifier()


def _failures(lines: Iterable[object], chain: Sequence[BaseException], status: int | None) -> Iterator[object]:
    """The failures that an error may be listed as in `LINES`, the most exact ones first."""
    yield from (one for one in lines if _is_phrase(one) and any(str(one) in str(error) for error in chain))
    for one in chain:
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            yield str(response.get("Error", {}).get("Code"))
    yield status
    yield from (base.__name__ for one in reversed(chain) for base in type(one).__mro__)


def _store(chain: Sequence[BaseException], uri: str) -> str:
    packages = {base.__module__.partition(".")[0] for one in chain for base in type(one).__mro__}
    store = next((store for package, store in _PACKAGES if package in packages), OTHER)
    # MLflow's clients wrap the errors of the disk that a local store is on.
    if store in (MLFLOW, OTHER) and isinstance(chain[-1], OSError) and chain[-1].filename is not None:
        return LOCAL
    # They also raise their own errors for stores that no MLflow server has to do with.
    return store if store != MLFLOW or needs_tracking(uri) or uri.startswith("http") else OTHER


def _where(store: str, uri: str) -> str:
    if store == S3:
        endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3")
        return f"its store, S3 at {endpoint}" if endpoint else "its store, S3"
    if needs_tracking(uri) and store in (MLFLOW, OTHER):
        return f"the tracking server {os.environ.get('MLFLOW_TRACKING_URI')}"
    return "its store" if store in (OTHER, LOCAL) else f"its store, {store}"


def _login(store: str) -> str:
    """The variables that hold the login in use; empty where there is none."""

    def has(name: str) -> bool:
        return bool(os.environ.get(name, "").strip())

    if store == MLFLOW:
        if auth := os.environ.get("MLFLOW_TRACKING_AUTH"):
            return f"MLFLOW_TRACKING_AUTH={auth}"
        if os.environ.get("MLFLOW_TRACKING_AWS_SIGV4", "").lower() in ("true", "1"):
            return f"MLFLOW_TRACKING_AWS_SIGV4 with {_login(S3)}"
        from mlflow.utils.credentials import read_mlflow_creds

        found = read_mlflow_creds()
        if found.username and found.password:
            names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            return names if has("MLFLOW_TRACKING_USERNAME") else "the login in ~/.mlflow/credentials"
        return "MLFLOW_TRACKING_TOKEN" if has("MLFLOW_TRACKING_TOKEN") else ""
    if store == S3:
        if has("AWS_ACCESS_KEY_ID"):
            more = ", AWS_SESSION_TOKEN" if has("AWS_SESSION_TOKEN") else ""
            return f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY{more}"
        if has("AWS_WEB_IDENTITY_TOKEN_FILE"):
            return f"the role AWS_ROLE_ARN={os.environ.get('AWS_ROLE_ARN', '')}"
        return f"AWS_PROFILE={os.environ['AWS_PROFILE']}" if has("AWS_PROFILE") else "the role of this pod or node"
    others = _LOGINS.get(store, ())
    return next((name for name in others if has(name)), "the identity of this pod")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the innermost last: MLflow often hides the reason there."""
    current: BaseException | None = error
    while current is not None:
        yield current
        wrapped = next((one for one in current.args if isinstance(one, BaseException)), None)  # as urllib3 does
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__) or wrapped


def _said(chain: Sequence[BaseException]) -> str:
    """The words of the innermost error, and of the answer that it is about."""
    cause = chain[-1]
    bodies = [getattr(one, "doc", None) or getattr(getattr(one, "response", None), "text", None) for one in chain]
    body = next(filter(None, bodies), "")
    return f"{type(cause).__name__}: {_plain(str(cause) if body in str(cause) else f'{cause}: {body}')}"


def _plain(text: str) -> str:
    """A text of bounded length, in which a web page is only its title."""
    if found := re.search(r"<!doctype html|<html", text, re.IGNORECASE):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        named = f" with the title {html.unescape(title[1]).strip()[:100]!r}" if title else ""
        text = f"{text[: found.start()]}a page of HTML{named}"
    if len(text) > MAX_SAID:
        text = f"{text[:MAX_SAID]}... ({len(text)} characters in all)"
    return text


def _passes(chain: Sequence[BaseException], status: int | None) -> bool:
    """Whether a failure is known to pass by itself."""
    if status is not None:
        return status in _PASSING_STATUS
    for one in reversed(chain):
        if isinstance(one, ssl.SSLError) and type(one).__name__ not in _PASSING:
            return False
        if isinstance(one, OSError) and one.errno in _PASSING_ERRNO:
            return True
        if proxy := re.search(r"Tunnel connection failed: (\d{3})", str(one)):
            return int(proxy[1]) in _PASSING_STATUS
        if any(base.__name__ in _PASSING for base in type(one).__mro__):
            return True
        if type(one).__name__ in _FOREIGN:
            return False
    return False


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of requests, MLflow or botocore stands for; None where it stands for none."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        code = str(response.get("Error", {}).get("Code"))
        found = _STORE_CODES.get(code) or response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return int(found) if found else int(code) if code.isdecimal() else None
    if response is not None and hasattr(response, "status_code"):
        return int(response.status_code)
    if hasattr(error, "get_http_status_code"):
        status = int(error.get_http_status_code())
        # MLflow's code for everything that has no better one. From a server, it is the server's.
        if status != 500 or type(error).__name__ == "RestException":
            return status
        told = re.search(r"failed with error code (\d{3})\b", str(error))
        return int(told[1]) if told else None
    # Of Azure's clients; of Google's.
    for number in (getattr(error, "status_code", None), getattr(error, "code", None)):
        if isinstance(number, int) and 400 <= number < 600:
            return int(number)
    return None
