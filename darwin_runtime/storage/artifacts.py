"""The artifacts of a model in its store: which files there are, and the bytes of one of them.

Everything goes through MLflow's own artifact repositories, so every store and every kind of authentication that MLflow
knows works here.
"""

from __future__ import annotations

import hashlib
import socket
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import requests

from darwin_runtime.errors import DamagedDownload, FileChanged, NotRegularFile, RoleError
from darwin_runtime.redact import mask_uri
from darwin_runtime.storage import disk, manifest
from darwin_runtime.storage.manifest import MODEL_FILE, File, Manifest
from darwin_runtime.storage.store_errors import explained

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

# No model has a larger `MLmodel`, more files and directories, or deeper ones.
MAX_MLMODEL_BYTES = 16 << 20
MAX_LISTED = 100_000
MAX_DEPTH = 64

# The part of an error's body that is read.
MAX_ERROR_BYTES = 1 << 16

CHUNK_BYTES = 256 << 10

# Where a whole chunk comes in less than this, it is waited for: to wake for each packet takes a transfer 7% longer.
GATHER_SECONDS = 0.1

# How the names begin that this runtime itself gives files beside a model's. A model that was logged from a directory
# where it had been served can hold some: they are no part of it.
RESERVED = ".darwin-"


# The answers of which the body is a file, or the lack of one is no surprise.
_BODIES = (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)


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

    @property
    def label(self) -> str:
        """The URI, and the version and run that it resolved to, for a log line."""
        resolved = "".join(f", {name} {value}" for name, value in self.identity.items() if name in ("version", "run"))
        return f"{self.uri}{resolved}"

    def files(self) -> list[RemoteFile]:
        """All files, at any depth; one request to the store for each directory. Raises as `resolve.resolve` does."""
        with explained(self.uri):
            found = [file for file in walk(self.uri, self.store, self.listing) if not file.path.startswith(RESERVED)]
        _check_listing(self.uri, found)
        return found

    def manifest(self, files: Sequence[File]) -> Manifest:
        """The manifest of this source's `files`, once they are here."""
        return Manifest(mask_uri(self.uri), self.identity, files)


def _check_listing(uri: str, files: Sequence[RemoteFile]) -> None:
    """Raise `RoleError` for what can't be true of files, or would choose where they go: it is somebody else's word."""
    try:
        manifest.check_names([file.path for file in files])
    except ValueError as error:
        raise RoleError(f"{uri} lists {error}; nothing was downloaded") from error
    for file in files:
        if file.size is not None and file.size < 0:
            raise RoleError(f"{uri} lists {file.path!r} with {file.size} bytes; nothing was downloaded")


def walk(uri: str, store: Store, listing: Sequence[tuple[str, int | None]]) -> Iterator[RemoteFile]:
    """All files, at any depth. Raises `RoleError` for a listing that goes round in circles, or has no end."""
    yield from (RemoteFile(path, size) for path, size in listing if not path.endswith("/"))
    waiting = [path.rstrip("/") for path, _ in listing if path.endswith("/")]
    count = len(listing)
    while waiting:
        inside = waiting.pop()
        files, directories = store.list(inside)
        for path in [*(file.path for file in files), *directories]:
            if path.rpartition("/")[0] != inside or path.count("/") > MAX_DEPTH:
                where = f"{path[:300]!r} in the directory {inside[:300]!r}"
                raise RoleError(f"{uri} lists {where}, which is not in it or too deep; nothing was downloaded")
        count += len(files) + len(directories)
        if count > MAX_LISTED:
            raise RoleError(f"{uri} lists more than {MAX_LISTED} files and directories; nothing was downloaded")
        yield from files
        waiting += directories


def digest_of_model_file(uri: str, store: Store) -> str:
    answer = store.open(MODEL_FILE, 0)
    if answer is None:
        with disk.scratch() as directory:
            store.download(MODEL_FILE, str(directory / MODEL_FILE))
            return manifest.digest(directory / MODEL_FILE)
    sha, size = hashlib.sha256(), 0
    with answer:
        while chunk := answer.read1(disk.CHUNK_BYTES, decode_content=True):
            sha.update(chunk)
            size += len(chunk)
            if size > MAX_MLMODEL_BYTES:
                raise RoleError(
                    f"{uri} has an {MODEL_FILE} of more than {MAX_MLMODEL_BYTES} bytes; nothing was downloaded"
                )
    return sha.hexdigest()


class ArtifactStore:
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
        self.direct: _DirectRequests | None = None

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
            if self.direct and (answer := self.direct.open(endpoint, headers)):
                return answer
            credentials = self.http._host_creds
            asked: requests.Response = http_request(credentials, endpoint, "GET", stream=True, extra_headers=headers)
            if asked.status_code not in _BODIES:
                asked._content = asked.raw.read(
                    MAX_ERROR_BYTES, decode_content=True
                )  # what it has to say may have no end
                augmented_raise_for_status(asked)
            signed = credentials.auth or credentials.aws_sigv4 or credentials.use_databricks_sdk
            if not signed and not asked.history:
                self.direct = _DirectRequests(asked, endpoint, credentials)
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


class _DirectRequests:
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


def chunks(uri: str, answer: BaseHTTPResponse) -> Iterator[bytes]:
    """The body of an answer, piece by piece. Raises as `resolve.resolve` does for errors of the network only."""
    encoded = is_encoded(answer)
    left = 0 if encoded else answer.length_remaining or 0
    connection = getattr(answer.connection, "sock", None)
    if type(connection) is not socket.socket:  # what arrives encrypted has another length
        connection = None
    least = 1
    # What the network does is explained; what who gets a chunk does with it, on a full disk for one, is not.
    with explained(uri):
        began = time.monotonic()
        while chunk := answer.read1(CHUNK_BYTES, decode_content=encoded):
            left -= len(chunk)
            quick = (time.monotonic() - began) * CHUNK_BYTES < GATHER_SECONDS * len(chunk)
            # Never for the end: that would not come, or the connection's next answer would not.
            wanted = CHUNK_BYTES if quick and left > CHUNK_BYTES else 1
            if connection and wanted != least:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
                least = wanted
            yield chunk
            began = time.monotonic()


def length_of(answer: BaseHTTPResponse) -> int | None:
    """The length that an answer gives a whole file, if it gives one."""
    length = answer.headers.get("Content-Length", "")
    return int(length) if answer.status == HTTPStatus.OK and length.isdecimal() and not is_encoded(answer) else None


def is_encoded(answer: BaseHTTPResponse) -> bool:
    return answer.headers.get("Content-Encoding", "identity") != "identity"
