"""Resolve a model URI, list the model's files, transfer them, verify them.

Everything goes through MLflow's own clients and artifact stores, so every URI and every kind of authentication that
MLflow knows works here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import re
import shutil
import ssl
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import darwin_mlflow
from darwin_cache import File, digest
from darwin_env import ConfigError, Reader
from darwin_log import RoleError, human, mask_uri

T = TypeVar("T")

MODEL_FILE = "MLmodel"
REGISTERED_MODEL_META = "registered_model_meta"

MAX_BACKOFF_SECONDS = 60.0

# Files are transferred side by side; each holds one chunk of 1 MiB in memory.
PARALLEL_FILES = 4

PROGRESS_SECONDS = 5.0
TERMINAL_PROGRESS_SECONDS = 0.5

MODEL_URI_EXAMPLE = "models:/my-model/3"

logger = logging.getLogger("darwin.fetch")


class Unreachable(RoleError):
    """MLflow or the artifact store did not answer: connection, timeout, 429 or 5xx. Worth retrying."""


class Damaged(RoleError):
    """What arrived is not what the listing promised. Worth retrying, never worth using."""


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


@dataclass(frozen=True)
class Source:
    """A model found: what its URI resolved to, its files, and `download(path, local)` that brings one of them.

    `identity` names the model's bytes, not the alias or stage that led to them.
    """

    uri: str
    identity: Mapping[str, str]
    files: Sequence[RemoteFile]
    download: Callable[[str, str], None] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(file.size or 0 for file in self.files)

    def listing(self) -> list[tuple[str, int | None]]:
        return [(file.path, file.size) for file in self.files]


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


def fetch_model(uri: str, destination: Path) -> None:
    """Put the model at `uri` into the existing directory `destination`, `MLmodel` at its root, every file checked.

    Raises `ConfigError` for a URI of no known form, `RoleError` when it can't be had.
    """
    if why := check_uri(uri):
        raise ConfigError([f"{uri!r} {why}"])
    source = persist(lambda: resolve(uri), Retry())
    Transfer(source, destination).run(Retry())


def persist(action: Callable[[], T], retry: Retry) -> T:
    """Run `action`, and again after each failure worth retrying; raises the last one's error."""
    delays = retry.delays()
    while True:
        try:
            return action()
        except (Unreachable, Damaged) as error:
            delay = next(delays, None)
            if delay is None:
                raise
            logger.warning("%s; trying again in %.1f s", error, delay)
            time.sleep(delay)


def resolve(uri: str) -> Source:
    """Find the model at `uri` and list its files, recursively.

    Raises `Unreachable` for failures worth retrying, else `RoleError`: it does not exist, access was refused, there
    is no model there.
    """
    with _explained(uri):
        repository, root, identity = _locate(uri)
        files = list(_walk(repository, root, root))
    _check_names(uri, [file.path for file in files])

    def download(path: str, local: str) -> None:
        with _explained(uri):
            repository._download_file(f"{root}/{path}" if root else path, local)

    if "name" not in identity:
        # No registry vouches for what is there, and a listing doesn't change when a file does: MLmodel tells models
        # apart, as it holds the id and the time of logging.
        identity = {**identity, "mlmodel": _digest_remote(download)}
    return Source(uri, identity, files, download)


def _check_names(uri: str, names: Sequence[str]) -> None:
    if MODEL_FILE not in names:
        nested = next((name for name in names if name.endswith(f"/{MODEL_FILE}")), None)
        if not names:
            raise RoleError(f"no MLflow model at {uri}: nothing is there")
        hint = f"; there is one at {nested}, ask for {uri.rstrip('/')}/{PurePosixPath(nested).parent}" if nested else ""
        raise RoleError(f"no MLflow model at {uri}: no {MODEL_FILE} among its {len(names)} files{hint}")
    for name in names:
        # A listing is somebody else's word; it must not choose where files go.
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
            raise RoleError(f"{uri} lists a file with the unsafe name {name!r}; nothing was downloaded")
    if len(set(names)) != len(names):
        raise RoleError(f"{uri} lists a file twice; nothing was downloaded")


def _locate(uri: str) -> tuple[Any, str, dict[str, str]]:
    """The artifact repository of a model, the model's path in it, and the identity it resolved to."""
    darwin_mlflow.prepare()
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


def _walk(repository: Any, directory: str, root: str) -> Iterator[RemoteFile]:
    for info in repository.list_artifacts(directory or None):
        if info.is_dir:
            yield from _walk(repository, info.path, root)
        else:
            yield RemoteFile(info.path[len(root) + 1 :] if root else info.path, info.file_size)


def _digest_remote(download: Callable[[str, str], None]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        local = Path(directory, MODEL_FILE)
        download(MODEL_FILE, str(local))
        return hashlib.sha256(local.read_bytes()).hexdigest()


class Transfer:
    """One model's way to `destination`. What has arrived whole is kept between attempts."""

    def __init__(self, source: Source, destination: Path) -> None:
        self.source = source
        self.destination = destination
        self.done: dict[str, File] = {}

    def run(self, retry: Retry) -> list[File]:
        """Bring every file, and return them with size and sha256.

        Raises `RoleError` when there is no room, `Damaged` or `Unreachable` when the attempts are used up.
        """
        self._check_space()
        with _Progress(self.source, self.destination):
            files = persist(self._attempt, retry)
        if "name" in self.source.identity:
            files = [file for file in files if file.path != REGISTERED_MODEL_META]
            files.append(self._registered_model_meta())
        return files

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.destination).free
        if self.source.bytes > free:
            raise RoleError(
                f"{self.source.uri} needs {human(self.source.bytes)} in {len(self.source.files)} files, but only "
                f"{human(free)} are free at {self.destination}; nothing was downloaded. Enlarge the volume or its "
                f"sizeLimit, or let cleanup.py free the cache"
            )

    def _attempt(self) -> list[File]:
        pending = [file for file in self.source.files if file.path not in self.done]
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            futures = [pool.submit(self._one, file) for file in pending]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [self.done[file.path] for file in self.source.files]

    def _one(self, file: RemoteFile) -> None:
        local = self.destination / file.path
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.source.download(file.path, str(local))
            arrived = local.stat().st_size
        except FileNotFoundError as error:
            raise Damaged(f"{file.path} of {self.source.uri} did not arrive ({error})") from error
        if file.size is not None and arrived != file.size:
            raise Damaged(
                f"{file.path} of {self.source.uri} arrived with {arrived} bytes instead of the {file.size} listed"
            )
        local.chmod(0o644)  # a local store's own modes may keep other users' containers out
        self.done[file.path] = File(file.path, arrived, digest(local))

    def _registered_model_meta(self) -> File:
        """MLflow leaves this file in a registered model it downloads, and so says the model's name and version."""
        import yaml

        identity = self.source.identity
        path = self.destination / REGISTERED_MODEL_META
        content = {"model_name": identity["name"], "model_version": identity["version"]}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return File(REGISTERED_MODEL_META, path.stat().st_size, digest(path))


class _Progress:
    """Says how far a transfer has come: a log line every few seconds, or one rewriting line on a terminal."""

    def __init__(self, source: Source, destination: Path) -> None:
        self.total = source.bytes
        self.count = len(source.files)
        self.destination = destination
        self.started = time.monotonic()
        self.stop = threading.Event()
        self.terminal = sys.stderr.isatty()
        self.thread = threading.Thread(target=self._report, name="progress", daemon=True)

    def __enter__(self) -> None:
        logger.info("downloading %d files, %s", self.count, human(self.total))
        self.thread.start()

    def __exit__(self, failed: object, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
        if not failed:
            seconds = max(time.monotonic() - self.started, 1e-9)
            logger.info("downloaded %s in %.1f s, %.1f MB/s", human(self.total), seconds, self.total / seconds / 1e6)

    def _report(self) -> None:
        while not self.stop.wait(TERMINAL_PROGRESS_SECONDS if self.terminal else PROGRESS_SECONDS):
            line = self.line(self._arrived(), time.monotonic() - self.started)
            if self.terminal:
                sys.stderr.write(f"\r\033[K{line}")
                sys.stderr.flush()
            else:
                logger.info("%s", line)

    def line(self, arrived: int, seconds: float) -> str:
        percent = 100 * arrived / self.total if self.total else 0.0
        rate = arrived / seconds
        left = f"{max(0.0, self.total - arrived) / rate:.0f} s" if rate else "unknown"
        return f"{percent:.0f}% of {human(self.total)}, {rate / 1e6:.1f} MB/s, ETA {left}"

    def _arrived(self) -> int:
        size = 0
        for directory, _, names in os.walk(self.destination):
            for name in names:
                with contextlib.suppress(OSError):
                    size += Path(directory, name).stat().st_size
        return size


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn whatever a store raises into `Unreachable` or a `RoleError` that says what to do."""
    try:
        yield
    except (RoleError, ConfigError):
        raise
    except Exception as error:  # every store raises its own kind
        raise explain(error, uri) from error


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
    """The error to raise for `error`, met while reading `uri`: `Unreachable` only where there was no usable answer."""
    chain = list(_chain(error))
    cause = chain[-1]
    reason = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, ModuleNotFoundError):
        return RoleError(
            f"cannot read {uri}: its store needs the Python package {cause.name!r}, which is not installed"
        )
    if any(isinstance(one, ssl.SSLCertVerificationError) for one in chain):
        hint = "the server's certificate is not trusted: check the URI, or set REQUESTS_CA_BUNDLE to its CA"
        return RoleError(f"cannot read {uri}: {hint} ({reason})")
    status = next((found for one in chain if (found := _status(one)) is not None), None)
    if isinstance(cause, FileNotFoundError):
        status = 404
    lost = any(_TRANSPORT & {base.__name__ for base in type(one).__mro__} for one in chain)
    if status in (408, 429) or (status or 0) >= 500 or (status is None and lost):
        where = f"the tracking server {os.environ.get('MLFLOW_TRACKING_URI')}" if needs_tracking(uri) else "its store"
        return Unreachable(f"cannot read {uri}: no usable answer from {where} ({reason})")
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
        status = int(error.get_http_status_code())
        return None if status == 500 else status
    return None
