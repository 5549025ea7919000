"""Every error that a client, an operator or a role sees.

An error that a client may see has `status`, its HTTP status, and `code`, MLflow's name of it. An error that ends a role
has `exit_code`. Errors of one room's own, which never leave it, live in that room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# Requests


class RequestError(Exception):
    """An error whose message a client sees, with `headers` that the answer has besides."""

    status = 400
    code = "BAD_REQUEST"
    headers: tuple[tuple[str, str], ...] = ()


class Problem(NamedTuple):
    """One value that the signature does not allow; `row` is None where there is only one, or none."""

    row: int | None
    field: str
    error_type: str
    expected: str
    actual: str | None
    message: str


class InvalidInput(RequestError, ValueError):
    """The body, or a value in it, is at fault."""


class BadRequest(InvalidInput):
    """The body is not what the protocol says, whatever the model."""


class InputError(InvalidInput):
    """The input does not match the signature. `problems` holds the first hundred, `total` counts all of them."""

    def __init__(self, problems: Sequence[Problem], total: int | None = None) -> None:
        self.problems = tuple(problems)
        self.total = len(self.problems) if total is None else total
        more = self.total - len(self.problems)
        super().__init__("; ".join(p.message for p in self.problems) + (f"; and {more} more" if more else ""))


class ParamsError(InputError):
    """The parameters, not the rows, do not match the signature."""

    code = "INVALID_PARAMETER_VALUE"


class InputRejected(RequestError):
    """The model, or MLflow on its behalf, rejects this input. `by_schema` if a check of types did."""

    def __init__(self, message: str, *, by_schema: bool = False) -> None:
        super().__init__(message)
        self.by_schema = by_schema
        self.code = "INVALID_PARAMETER_VALUE" if by_schema else "BAD_REQUEST"


class Unauthorized(RequestError):
    """The request has no valid key. `headers` say how to give one."""

    status = 401
    code = "UNAUTHENTICATED"

    def __init__(self, message: str, headers: tuple[tuple[str, str], ...]) -> None:
        super().__init__(message)
        self.headers = headers


class Forbidden(RequestError):
    """The connection has no client certificate."""

    status = 403
    code = "PERMISSION_DENIED"


class NotFound(RequestError, LookupError):
    """There is no such model here."""

    status = 404


class NotAcceptable(RequestError, ValueError):
    """The Accept header allows nothing that can be written."""

    status = 406


class TooLarge(RequestError, ValueError):
    """The body holds more than may be read."""

    status = 413


class UnsupportedMediaType(RequestError, ValueError):
    """The server cannot read this Content-Type, or this Content-Encoding."""

    status = 415


class NotReady(RequestError):
    """The model has not been loaded yet, or the server shuts down."""

    status = 503
    code = "TEMPORARILY_UNAVAILABLE"


class Overloaded(RequestError):
    """More waits than may wait. `retry_after` is when to come back, in seconds."""

    status = 503
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting: try again in {retry_after} s")
        self.retry_after = retry_after
        self.headers = (("Retry-After", str(retry_after)),)


class DeadlineExceeded(RequestError):
    """The model did not answer in time."""

    status = 504
    code = "DEADLINE_EXCEEDED"


class FeatureStoreError(RequestError):
    """The feature store gave no features. `status` is the answer's HTTP status, and the message gives the reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PredictionFailed(RequestError):
    """The model raised on input that its signature allows. The cause is chained."""

    status = 500
    code = "INTERNAL_ERROR"


class EncodingError(RequestError):
    """The model's answer has no form in the protocol that was spoken."""

    status = 500
    code = "INTERNAL_ERROR"


def as_request_error(error: Exception) -> RequestError:
    """`error` if a client may see its text, else an internal error that shows nothing of it."""
    return error if isinstance(error, RequestError) else PredictionFailed("internal error")


class ClientDisconnected(Exception):
    """Nobody waits for the answer any more."""


# Roles


class ConfigError(Exception):
    """One or more settings are missing or unreadable. `problems` has a sentence for each."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("bad configuration: " + "; ".join(problems))


class RoleError(Exception):
    """An anticipated failure. The message says what happened, to what, and what to do; retrying the role may help."""

    exit_code = 1


class StoreUnreachable(RoleError):
    """MLflow or the artifact store did not answer: connection, timeout, 429 or 5xx. Worth retrying."""


class DamagedDownload(RoleError):
    """The files that arrived differ from the listing. Worth retrying, never worth using."""


# Files


class NotRegularFile(OSError):
    """There is a link, a directory, a pipe, a socket or a device where a file belongs."""


class FileChanged(OSError):
    """A file was written to, or replaced, while it was read."""


class NoLinks(OSError):
    """The file system has no symbolic links."""


class VolumeFull(OSError):
    """A volume, or a quota on it, is used up. `remedy` describes the moment of the error: later there is room again."""

    def __init__(self, error: OSError, remedy: str) -> None:
        super().__init__(error.errno, error.strerror, error.filename, None, error.filename2)
        self.remedy = remedy


class NotACache(Exception):
    """The directory can't be used as a cache; the message says why and what to do."""


class UnusableFile(Exception):
    """A mounted file cannot be read, or is not what it has to be. The message shows nothing of what is in it."""


# Kubernetes


class NotInCluster(Exception):
    """A value that Kubernetes gives every container is missing, empty or unreadable. The message has a remedy."""


_ADVICE = {
    401: "the service account's token was refused, also after reading it again: does the service account still exist?",
    403: "give the pod's service account a Role with the verb list on pods in that namespace, and a RoleBinding",
}


class ApiError(Exception):
    """The API server refused, answered something else than pods, or did not answer.

    `code` is the HTTP status, 0 where there was no answer. `reason`, `message` and `details` are the Status object's
    where the server sent one; without one `reason` is the status line's or the exception's name.
    """

    def __init__(self, code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(code, reason, message, details)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details or {}

    def __str__(self) -> str:
        what = f"{self.code} {self.reason}" if self.code else f"no answer, {self.reason}"
        advice = f" ({_ADVICE[self.code]})" if self.code in _ADVICE else ""
        return f"Kubernetes API: {what}: {self.message}{advice}"
