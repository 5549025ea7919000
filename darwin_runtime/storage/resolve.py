"""Resolve a model URI, list the model's files, open one of them; what a store's errors mean.

Everything goes through MLflow's own clients and artifact stores, so every URI and every kind of authentication that
MLflow knows works here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import random
import re
import ssl
import tempfile
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import requests

from darwin_runtime import mlflow_import
from darwin_runtime.errors import ConfigError, DamagedDownload, FileChanged, NotRegularFile, RoleError, StoreUnreachable
from darwin_runtime.redact import mask_uri
from darwin_runtime.settings import Reader
from darwin_runtime.storage import disk, manifest

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

T = TypeVar("T")

MODEL_FILE = "MLmodel"

# More than the `MLmodel` of any model, whose listing has how many files, has or is worth reading.
MLMODEL_BYTES = 16 << 20
MOST_LISTED = 100_000
MOST_DEPTH = 64

# As much as is read of an answer that is an error.
ERROR_BYTES = 1 << 16

# How the names begin that this runtime itself gives files beside a model's. A model that was logged from a directory
# where it had been served can hold some: they are no part of it.
RESERVED = ".darwin-"

MAX_BACKOFF_SECONDS = 60.0

MODEL_URI_EXAMPLE = "models:/my-model/3"

logger = logging.getLogger("darwin.fetch")


@dataclass(frozen=True)
class Retry:
    """How often to try again after a failure worth retrying, and how long to wait before the first time, in seconds."""

    retries: int = 3
    backoff_seconds: float = 5.0

    def delays(self) -> Iterator[float]:
        """Seconds to wait before each further attempt: doubling, at most 60, less up to a half at random."""
        for attempt in range(self.retries):
            yield min(MAX_BACKOFF_SECONDS, self.backoff_seconds * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.0)  # noqa: S311


@dataclass(frozen=True)
class RemoteFile:
    """A file in the artifact store: path relative to the model's root, size in bytes or None where it isn't told."""

    path: str
    size: int | None


class Store(Protocol):
    """Where a model's files are; paths are relative to the model's root."""

    def list(self, directory: str = "") -> tuple[list[RemoteFile], list[str]]:
        """The files and the directories that are directly in a directory."""

    def open(self, path: str, offset: int) -> BaseHTTPResponse | None:
        """An answer of which the body, not read yet, is the file from `offset` on, or (status 200) all of it.

        None where the store can only `download`.
        """

    def download(self, path: str, local: str) -> None:
        """Write a file to `local`."""


@dataclass(frozen=True)
class Source:
    """A model found: what its URI resolved to, what is at its root, and the store to bring it from.

    `identity` names the model's bytes, not the alias or stage that led to them. With `listing`, the (path, size) of
    what is at the root, where directories end in a slash, it tells models apart.
    """

    uri: str
    identity: Mapping[str, str]
    listing: Sequence[tuple[str, int | None]]
    store: Store = field(repr=False)

    def files(self) -> list[RemoteFile]:
        """All files, at any depth; one request to the store for each directory. Raises as `resolve` does."""
        with explained(self.uri):
            found = [file for file in _walk(self.uri, self.store, self.listing) if not file.path.startswith(RESERVED)]
        _check_listing(self.uri, found)
        return found


def check_uri(uri: str) -> str | None:
    """What is wrong with the form of a model URI; None when nothing is."""
    scheme, _, rest = uri.partition(":/")
    if scheme == "models" and not rest.startswith("/"):
        name, *more = rest.rstrip("/").split("/")
        if len(more) > 1 or not name or (more and not more[0]) or name.endswith("@") or name.startswith("@"):
            return "must name a model and a version, alias or stage (models:/name/3, models:/name@champion)"
        if not more and "@" not in name and not name.startswith("m-"):
            return "names no version, alias or stage (models:/name/3, models:/name@champion, models:/name/latest)"
    if scheme in ("model", "run"):
        return f"has the unknown scheme {scheme}:, {scheme}s: is probably meant"
    if scheme == "runs" and not rest.strip("/").partition("/")[2]:
        return "must name a run and the artifact path of the model in it (runs:/<run id>/model)"
    return None


def check_access(read: Reader, variable: str, uri: str) -> None:
    """Read what `uri`, given as `variable`, needs to be found; problems with it or with them are added to `read`."""
    if uri and (why := check_uri(uri)):
        read.problem(variable, why, example=MODEL_URI_EXAMPLE)
    tracking_uri = read.text("MLFLOW_TRACKING_URI")
    if not tracking_uri and needs_tracking(uri):
        read.problem("MLFLOW_TRACKING_URI", f"is needed to resolve {uri}", example="http://mlflow:5000")
    # MLflow takes host:port for a scheme, or for a path.
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", tracking_uri):
        read.problem("MLFLOW_TRACKING_URI", "must be a URL", example=f"http://{tracking_uri}")
    read.text("MLFLOW_TRACKING_USERNAME")
    read.text("MLFLOW_TRACKING_PASSWORD")


def retry_action(action: Callable[[], T], retry: Retry, wait: Callable[[float], object] = time.sleep) -> T:
    """Run `action`, and again after each failure worth retrying; raises the last one's error."""
    delays = retry.delays()
    while True:
        try:
            return action()
        except (StoreUnreachable, DamagedDownload) as error:
            delay = next(delays, None)
            if delay is None:
                raise
            logger.warning("%s; trying again in %.1f s", error, delay)
            wait(delay)


def resolve(uri: str) -> Source:
    """Find the model at `uri` and list its root.

    Raises `StoreUnreachable` for failures worth retrying, else `RoleError`: it does not exist, access was refused, no
    model is there.
    """
    with explained(uri):
        repository, root, identity = _locate(uri)
        _check_host(uri, repository)
        store = _Artifacts(uri, repository, root)
        files, directories = store.list()
        listing = [(file.path, file.size) for file in files] + [(f"{name}/", None) for name in directories]
        if MODEL_FILE not in (file.path for file in files):
            raise _no_model(uri, [file.path for file in _walk(uri, store, listing)])
        if "name" not in identity:
            # No registry vouches for what is there, and a listing doesn't change when a file does: MLmodel tells models
            # apart, as it holds the id and the time of logging.
            identity = {**identity, "mlmodel": _digest_remote(uri, store)}
    return Source(uri, identity, listing, store)


def _no_model(uri: str, names: Sequence[str]) -> RoleError:
    if not names:
        return RoleError(f"no MLflow model at {uri}: nothing is there")
    nested = next((name for name in names if name.endswith(f"/{MODEL_FILE}")), None)
    hint = f"; there is one at {nested}, ask for {uri.rstrip('/')}/{PurePosixPath(nested).parent}" if nested else ""
    return RoleError(f"no MLflow model at {uri}: no {MODEL_FILE} among its {len(names)} files{hint}")


def _check_listing(uri: str, files: Sequence[RemoteFile]) -> None:
    """Raise `RoleError` for what can't be true of files, or would choose where they go: it is somebody else's word."""
    try:
        manifest.check_names([file.path for file in files])
    except ValueError as error:
        raise RoleError(f"{uri} lists {error}; nothing was downloaded") from error
    for file in files:
        if file.size is not None and file.size < 0:
            raise RoleError(f"{uri} lists {file.path!r} with {file.size} bytes; nothing was downloaded")


def _locate(uri: str) -> tuple[Any, str, dict[str, str]]:
    """The artifact repository of a model, the model's path in it, and the identity it resolved to."""
    mlflow_import.prepare()
    from mlflow import MlflowClient, get_registry_uri
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    scheme, _, rest = uri.partition(":/")
    if rest.startswith("/"):
        return get_artifact_repository(uri), "", {"uri": mask_uri(uri)}
    rest = rest.strip("/")
    if scheme == "models":
        client = MlflowClient()
        name, _, suffix = rest.partition("/")
        if not suffix and "@" not in name:
            return _logged_model(client.get_logged_model(name))
        version = _pinned(client, name, suffix)
        repository = get_artifact_repository(f"models:/{version.name}/{version.version}")
        identity = {
            "registry": mask_uri(get_registry_uri()),
            "name": version.name,
            "version": str(version.version),
            "created": str(version.creation_timestamp),
            "source": mask_uri(str(version.source)),
            "run": version.run_id or "",
        }
        return repository, "", identity
    if scheme == "runs":
        run_id, _, path = rest.partition("/")
        client = MlflowClient()
        info = client.get_run(run_id).info
        # MLflow 3 keeps a run's models apart from its artifacts, under the same path.
        name, _, inner = path.partition("/")
        if model := _model_of_run(client, run_id, info.experiment_id, name):
            repository, _, identity = _logged_model(model)
            return repository, inner, {**identity, "path": inner}
        return get_artifact_repository(info.artifact_uri), path, {"run": run_id, "path": path}
    return get_artifact_repository(uri), "", {"uri": mask_uri(uri)}


def _check_host(uri: str, repository: Any) -> None:
    """Raise `RoleError` where a login would go to a host that the registry chose, and the user never named.

    MLflow sends it to every HTTP server that a model's source names, and who may register models may name any.
    """
    from mlflow import get_registry_uri, get_tracking_uri
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

    inner = getattr(repository, "repo", repository)
    if not isinstance(inner, HttpArtifactRepository) or not uri.startswith(("models:", "runs:")):
        return
    credentials = inner._host_creds
    login = credentials.username or credentials.token or credentials.auth or credentials.aws_sigv4
    there = urllib.parse.urlsplit(inner.artifact_uri)
    if login and _origin(inner.artifact_uri) not in (_origin(get_tracking_uri()), _origin(get_registry_uri())):
        raise RoleError(
            f"cannot read {uri}: its files are said to be at {mask_uri(inner.artifact_uri)}, which is not the host of "
            f"MLFLOW_TRACKING_URI and so is not sent its login. If that host is yours, ask it for the files directly: "
            f"mlflow-artifacts://{there.netloc.rpartition('@')[2]}/..."
        )


def _origin(uri: str) -> tuple[str, str | None, int | None]:
    found = urllib.parse.urlsplit(uri)
    return found.scheme, found.hostname, found.port or {"http": 80, "https": 443}.get(found.scheme)


def _logged_model(model: Any) -> tuple[Any, str, dict[str, str]]:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    identity = {"model_id": model.model_id, "created": str(model.creation_timestamp)}
    return get_artifact_repository(model.artifact_location), "", identity


def _pinned(client: Any, name: str, suffix: str) -> Any:
    """The registered model version that a version, `@alias`, stage or `latest` stands for right now."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    if not suffix:
        try:
            return client.get_model_version_by_alias(*name.rsplit("@", 1))
        except MlflowException as error:
            # Servers answer 400 for an alias that does not exist.
            if error.error_code == "INVALID_PARAMETER_VALUE" and "not found" in str(error):
                raise MlflowException(str(error), RESOURCE_DOES_NOT_EXIST) from error
            raise
    if suffix.isdecimal():
        return client.get_model_version(name, suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # stages are deprecated, and still in use
        versions = client.get_latest_versions(name, None if suffix.lower() == "latest" else [suffix])
    if not versions:
        raise MlflowException(f"model {name!r} has no version in stage {suffix!r}", RESOURCE_DOES_NOT_EXIST)
    return max(versions, key=lambda version: int(version.version))


def _model_of_run(client: Any, run_id: str, experiment_id: str, name: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    if "'" in name:
        return None
    token = None
    while True:
        try:
            page = client.search_logged_models([experiment_id], filter_string=f"name = '{name}'", page_token=token)
        except MlflowException as error:
            if error.get_http_status_code() == 404:
                return None  # a server older than logged models
            raise
        for model in page:
            if model.source_run_id == run_id:
                return model
        token = page.token
        if not token:
            return None


def _walk(uri: str, store: Store, listing: Sequence[tuple[str, int | None]]) -> Iterator[RemoteFile]:
    """All files, at any depth. Raises `RoleError` for a listing that goes round in circles, or has no end."""
    yield from (RemoteFile(path, size) for path, size in listing if not path.endswith("/"))
    waiting = [path.rstrip("/") for path, _ in listing if path.endswith("/")]
    count = len(listing)
    while waiting:
        inside = waiting.pop()
        files, directories = store.list(inside)
        for path in [*(file.path for file in files), *directories]:
            if path.rpartition("/")[0] != inside or path.count("/") > MOST_DEPTH:
                where = f"{path[:300]!r} in the directory {inside[:300]!r}"
                raise RoleError(f"{uri} lists {where}, which is not in it or too deep; nothing was downloaded")
        count += len(files) + len(directories)
        if count > MOST_LISTED:
            raise RoleError(f"{uri} lists more than {MOST_LISTED} files and directories; nothing was downloaded")
        yield from files
        waiting += directories


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory that goes again at the end of the block. Raises `RoleError` where there is no place for one."""
    try:
        made = tempfile.TemporaryDirectory(prefix="darwin-", ignore_cleanup_errors=True)
    except FileNotFoundError as error:  # found by trying to write a file in each place
        place = os.environ.get("TMPDIR", "/tmp")  # noqa: S108  # it is only named
        raise RoleError(
            f"no place for temporary files: {place} cannot be written to, or is full; "
            "mount an emptyDir with free space there"
        ) from error
    with made:
        yield Path(made.name)


def _digest_remote(uri: str, store: Store) -> str:
    answer = store.open(MODEL_FILE, 0)
    if answer is None:
        with scratch() as directory:
            store.download(MODEL_FILE, str(directory / MODEL_FILE))
            return manifest.digest(directory / MODEL_FILE)
    sha, size = hashlib.sha256(), 0
    with answer:
        while chunk := answer.read1(disk.CHUNK_BYTES, decode_content=True):
            sha.update(chunk)
            size += len(chunk)
            if size > MLMODEL_BYTES:
                raise RoleError(f"{uri} has an {MODEL_FILE} of more than {MLMODEL_BYTES} bytes; nothing was downloaded")
    return sha.hexdigest()


# The answers of which the body is a file, or the lack of one is no surprise.
_BODIES = (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)


class _Artifacts:
    """A `Store` that is one of MLflow's artifact repositories, or a directory in one."""

    def __init__(self, uri: str, repository: Any, root: str) -> None:
        from mlflow.environment_variables import MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD
        from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        self.uri = uri
        self.repository = repository
        self.root = root
        inner = getattr(repository, "repo", repository)
        # The user may have it that the tracking server only signs URLs of its store.
        proxied = isinstance(inner, HttpArtifactRepository) and not MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD.get()
        self.http = inner if proxied else None
        self.local = inner if isinstance(inner, LocalArtifactRepository) else None
        self.way: _Way | None = None

    def list(self, directory: str = "") -> tuple[list[RemoteFile], list[str]]:
        with explained(self.uri):
            found = self.repository.list_artifacts(self._whole(directory) or None)
        start = len(self.root) + 1 if self.root else 0
        files = [RemoteFile(one.path[start:], one.file_size) for one in found if not one.is_dir]
        return files, [one.path[start:] for one in found if one.is_dir]

    def open(self, path: str, offset: int) -> BaseHTTPResponse | None:
        if self.http is None:
            return None
        from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        # MLflow itself would cut the path at a # and decode a %.
        endpoint = f"/{urllib.parse.quote(self._whole(path))}"
        with explained(self.uri):
            if self.way and (answer := self.way.open(endpoint, headers)):
                return answer
            credentials = self.http._host_creds
            asked: requests.Response = http_request(credentials, endpoint, "GET", stream=True, extra_headers=headers)
            if asked.status_code not in _BODIES:
                asked._content = asked.raw.read(ERROR_BYTES, decode_content=True)  # what it has to say may have no end
                augmented_raise_for_status(asked)
            signed = credentials.auth or credentials.aws_sigv4 or credentials.use_databricks_sdk
            if not signed and not asked.history:
                self.way = _Way(asked, endpoint, credentials)
        return cast("BaseHTTPResponse", asked.raw)

    def download(self, path: str, local: str) -> None:
        with explained(self.uri):
            if not self.local:
                self.repository._download_file(self._whole(path), local)
                return
            # MLflow would wait for a pipe, copy a device without end, and not notice that a file changes meanwhile.
            try:
                manifest.copy(Path(self.local.download_artifacts(self._whole(path))).resolve(), Path(local))
            except NotRegularFile as error:
                raise RoleError(f"cannot read {self.uri}: {path} is no file, but a pipe, socket or device") from error
            except FileChanged as error:
                raise DamagedDownload(f"{path} of {self.uri} {error.strerror}") from error

    def _whole(self, path: str) -> str:
        return f"{self.root}/{path}".strip("/")


class _Way:
    """How MLflow asked for a file, to ask for others alike: over the same connections, at a fifth of the cost."""

    def __init__(self, asked: requests.Response, endpoint: str, credentials: Any) -> None:
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

        request, adapter = asked.request, asked.connection
        url = str(request.url)
        verify, certificate = credentials.verify, credentials.client_cert_path
        settings = requests.Session().merge_environment_settings(url, {}, True, verify, certificate)
        proxies = settings["proxies"]
        self.pool: Any = adapter.get_connection_with_tls_context(
            request, settings["verify"], proxies=proxies, cert=settings["cert"]
        )
        self.start = adapter.request_url(request, proxies).removesuffix(endpoint)
        self.headers = {name: value for name, value in request.headers.items() if name != "Range"}
        self.retries = adapter.max_retries
        self.timeout = MLFLOW_HTTP_REQUEST_TIMEOUT.get()

    def open(self, endpoint: str, headers: Mapping[str, str]) -> BaseHTTPResponse | None:
        """None for another answer than a file: then MLflow has to ask, with its own ways with redirects and logins."""
        answer: BaseHTTPResponse = self.pool.urlopen(
            *("GET", self.start + endpoint),
            headers={**self.headers, **headers},
            retries=self.retries,
            timeout=self.timeout,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        if answer.status in _BODIES:
            return answer
        answer.close()
        return None


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn whatever a store raises into `StoreUnreachable` or a `RoleError` that says what to do."""
    try:
        yield
    except (RoleError, ConfigError):
        raise
    except Exception as error:  # every store raises its own kind
        for one in _chain(error):
            if isinstance(one, OSError) and one.errno in _DISK:
                raise one from error
        raise explain(error, uri) from error


# What the disk raises that a file is written to, never a store.
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
