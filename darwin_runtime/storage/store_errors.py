"""A store's errors: the `RoleError` that each stands for, and which of them are worth retrying."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import ssl
from collections.abc import Iterator, Mapping

from darwin_runtime.errors import ConfigError, RoleError, StoreUnreachable

# The errors of the disk that a file is written to, never of a store.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_HINTS = {
    401: "the credentials were refused: check {credentials}",
    403: "these credentials may not read it: give their user READ permission",
    404: "it does not exist: check the name, the version, alias or stage, and MLFLOW_TRACKING_URI",
}
# What S3 says with its own codes; elsewhere the status tells.
_STORE_CODES = {"AccessDenied": 403, "NoSuchKey": 404, "NoSuchBucket": 404}
_STORE_CODES |= dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"), 401)

# The transport failures of the libraries that stores use, by name, so that none has to be imported for this.
_TRANSPORT = {
    *("ConnectionError", "TimeoutError", "gaierror", "SSLError"),  # built in
    *("Timeout", "ChunkedEncodingError", "RetryError"),  # requests
    *("ProtocolError", "MaxRetryError", "IncompleteRead"),  # urllib3, http.client
    *("HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "RetriesExceededError"),  # botocore
}


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn each error of a store into `StoreUnreachable`, or a `RoleError` with advice."""
    try:
        yield
    except (RoleError, ConfigError):
        raise
    except Exception as error:  # every store raises its own kind
        for one in _chain(error):
            if isinstance(one, OSError) and one.errno in _DISK:
                raise one from error
        raise explain(error, uri) from error


def explain(error: Exception, uri: str) -> RoleError:
    """The error to raise for `error`, met while reading `uri`; `StoreUnreachable` if there was no usable answer."""
    chain = list(_chain(error))
    cause = chain[-1]
    reason = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, ModuleNotFoundError):
        databricks = str(cause.name).partition(".")[0] == "databricks"
        brings = "databricks among its FLAVORS" if databricks else "MODEL_REQUIREMENTS that list what brings it"
        return RoleError(
            f"cannot read {uri}: its store needs the Python package {cause.name!r}, which is not installed: "
            f"build the image with {brings}"
        )
    if any(isinstance(one, ssl.SSLCertVerificationError) for one in chain):
        hint = "the server's certificate is not trusted: check the URI, or set REQUESTS_CA_BUNDLE to its CA"
        return RoleError(f"cannot read {uri}: {hint} ({reason})")
    status = next((found for one in chain if (found := _status(one)) is not None), None)
    if isinstance(cause, FileNotFoundError):
        return RoleError(f"cannot read {uri}: {cause}; a file of its store, or a directory of this machine, is missing")
    lost = any(_TRANSPORT & {base.__name__ for base in type(one).__mro__} for one in chain)
    if status in (408, 429) or (status or 0) >= 500 or (status is None and lost):
        where = f"the tracking server {os.environ.get('MLFLOW_TRACKING_URI')}" if needs_tracking(uri) else "its store"
        return StoreUnreachable(f"cannot read {uri}: no usable answer from {where} ({reason})")
    if status in _HINTS:
        store = any(isinstance(getattr(one, "response", None), Mapping) for one in chain)
        credentials = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        if store:
            credentials = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        if status == 403 and any("Invalid Host header" in str(one) for one in chain):
            hint = "the MLflow server refuses this name for itself: start it with --allowed-hosts and the host and port"
            return RoleError(f"cannot read {uri}: HTTP 403, {hint} of MLFLOW_TRACKING_URI ({reason})")
        return RoleError(
            f"cannot read {uri}: HTTP {status}, {_HINTS[status].format(credentials=credentials)} ({reason})"
        )
    told = str(error) if str(cause) in str(error) else f"{error}, because of {reason}"
    settings = "the URI and MLFLOW_TRACKING_URI" if needs_tracking(uri) else "the URI and its store's own settings"
    return RoleError(f"cannot read {uri}: {told.rstrip('.')}; check {settings}")


def needs_tracking(uri: str) -> bool:
    return uri.startswith(("models:", "runs:", "mlflow-artifacts:"))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the innermost last: MLflow often hides the reason there."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of requests, MLflow or botocore stands for; None where it stands for none."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        code = _STORE_CODES.get(str(response.get("Error", {}).get("Code")))
        return code or response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if (code := getattr(response, "status_code", None)) is not None:
        return int(code)
    if hasattr(error, "get_http_status_code"):
        # MLflow's code for everything that has no better one, whatever the status was.
        if (status := int(error.get_http_status_code())) != 500:
            return status
        told = re.search(r"failed with error code (\d{3})\b", str(error))
        return int(told[1]) if told else None
    return None
