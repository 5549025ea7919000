"""The artifacts of a model in its store: which files there are, and the bytes of one of them.

Everything goes through MLflow's own artifact repositories, so every store and every kind of authentication that MLflow
knows works here.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import tempfile
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
from darwin_runtime.storage.access import ARTIFACTS, check_uri
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

# The names that this runtime itself gives files beside a model's. A model that was logged from a directory where it had
# been served can hold some: they are no part of it.
PARTS = ".darwin-parts"
RESERVED = (".darwin-output.json", ".darwin-staging", PARTS)


# The answers of which the body is a file, or the lack of one is no surprise.
_BODIES = (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)

logger = logging.getLogger("darwin.transfer")


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
            found = list(walk(self.uri, self.store, self.listing))
        if ours := {name for file in found if (name := file.path.partition("/")[0]) in RESERVED}:
            names = ", ".join(sorted(ours))
            logger.info("%s holds %s of an earlier run, which is no part of the model and is left out", self.uri, names)
            found = [file for file in found if file.path.partition("/")[0] not in ours]
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
    waiting = [path[:-1] for path, _ in listing if path.endswith("/")]
    count = len(listing)
    while waiting:
        inside = waiting.pop()
        # A store may have names that no directory can have. Left out, the model would not be whole.
        if inside.rpartition("/")[2] in ("", ".", ".."):
            raise RoleError(f"{uri} lists a directory with the unsafe name {inside[:300]!r}; nothing was downloaded")
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
        self.server = repository if isinstance(repository, HttpArtifactRepository) else None
        if self.server and (why := check_uri(f"{repository.artifact_uri}/")):
            raise RoleError(f"cannot read {uri}: its source {mask_uri(repository.artifact_uri)} {why}")
        # The user may have it that the tracking server only signs URLs of its store.
        self.http = None if MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD.get() else self.server
        self.local = repository if isinstance(repository, LocalArtifactRepository) else None
        self.direct: _DirectRequests | None = None

    def list(self, directory: str = "") -> tuple[list[RemoteFile], list[str]]:
        inside = self._whole(directory)
        with explained(self.uri, directory):
            if self.server:
                found = [(f"{inside}/{name}".lstrip("/"), size, is_dir) for name, size, is_dir in self._listed(inside)]
            else:
                found = [
                    (one.path, one.file_size, one.is_dir) for one in self.repository.list_artifacts(inside or None)
                ]
        start = len(self.root) + 1 if self.root else 0
        files = [RemoteFile(path[start:], size) for path, size, is_dir in found if not is_dir]
        return files, [path[start:] for path, _, is_dir in found if is_dir]

    def _listed(self, inside: str) -> Iterator[tuple[str, int | None, bool]]:
        """(name, size, is_dir) of what MLflow's server has in a directory.

        MLflow's client takes a directory for a file where its only file has the same name, and rejects some names.
        """
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

        assert self.server
        server, _, root = self.server.artifact_uri.partition(ARTIFACTS)
        path = "/".join(filter(None, (root.strip("/"), inside)))
        answer = http_request(get_default_host_creds(server), ARTIFACTS, "GET", params={"path": path})
        augmented_raise_for_status(answer)
        listed = answer.json().get("files", [])
        # What MLflow's server decodes must be as safe as what it lists.
        manifest.check_names([urllib.parse.unquote(one["path"]) for one in listed])
        for one in listed:
            yield one["path"], int(one["file_size"]) if "file_size" in one else None, bool(one["is_dir"])

    def open(self, path: str, offset: int) -> BaseHTTPResponse | None:
        if self.http is None:
            return None
        from mlflow.utils.rest_utils import http_request

        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        # MLflow itself would cut the path at a # and decode a %.
        endpoint = f"/{urllib.parse.quote(self._whole(path))}"
        with explained(self.uri, path):
            if self.direct and (answer := self.direct.open(endpoint, headers)):
                if answer.status not in _BODIES:
                    _raise_for_status(self.direct.response(endpoint, answer))
                return answer
            credentials = self.http._host_creds
            asked: requests.Response = http_request(credentials, endpoint, "GET", stream=True, extra_headers=headers)
            if asked.status_code not in _BODIES:
                _raise_for_status(asked)
            signed = credentials.auth or credentials.aws_sigv4 or credentials.use_databricks_sdk
            if not signed and not asked.history:
                self.direct = _DirectRequests(asked, endpoint, credentials)
        return cast("BaseHTTPResponse", asked.raw)

    def download(self, path: str, local: str) -> None:
        from mlflow.store.artifact.artifact_repo import ArtifactRepository

        whole = self._whole(path)
        with explained(self.uri, path):
            if self.local:
                self._copy(path, Path(self.local.artifact_dir), local)
            elif type(self.repository)._download_file is ArtifactRepository._download_file:
                # It brings files only together with their directories.
                with tempfile.TemporaryDirectory(dir=Path(local).parent) as directory:
                    Path(self.repository.download_artifacts(whole, directory)).replace(local)
            else:
                self.repository._download_file(whole, local)

    def _copy(self, path: str, root: Path, local: str) -> None:
        # MLflow would reject some names, wait for a pipe, copy a device without end, and miss a change meanwhile.
        there = (root / self._whole(path)).resolve()
        if not there.is_relative_to(root.resolve()):
            raise RoleError(f"cannot read {path} of {self.uri}: it is a link to {there}, outside of the model's store")
        try:
            manifest.copy(there, Path(local))
        except NotRegularFile as error:
            raise RoleError(f"cannot read {self.uri}: {path} is no file, but a pipe, socket or device") from error
        except FileChanged as error:
            raise DamagedDownload(f"{path} of {self.uri} {error.strerror}") from error

    def _whole(self, path: str) -> str:
        return f"{self.root}/{path}".strip("/")


def _raise_for_status(answer: requests.Response) -> None:
    from mlflow.utils.rest_utils import augmented_raise_for_status

    answer._content = answer.raw.read(MAX_ERROR_BYTES, decode_content=True)  # what it has to say may have no end
    augmented_raise_for_status(answer)


class _DirectRequests:
    """How MLflow asked for a file, to ask for others alike: over the same connections, at a fifth of the cost."""

    def __init__(self, asked: requests.Response, endpoint: str, credentials: Any) -> None:
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

        self.request, self.adapter = request, adapter = asked.request, asked.connection
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
        """None for a redirect or a refusal: then MLflow has to ask, with its own ways with redirects and logins."""
        answer: BaseHTTPResponse = self.pool.urlopen(
            *("GET", self.start + endpoint),
            headers={**self.headers, **headers},
            retries=self.retries,
            timeout=self.timeout,
            redirect=False,
            # A proxy's connection carries requests for any host.
            assert_same_host=False,
            preload_content=False,
            decode_content=False,
        )
        if answer.status in _BODIES or answer.status in self.retries.status_forcelist:
            return answer
        answer.close()
        return None

    def response(self, endpoint: str, answer: BaseHTTPResponse) -> requests.Response:
        """An answer as MLflow's own request would have had it."""
        found: requests.Response = self.adapter.build_response(self.request, answer)
        found.url = self.start + endpoint
        return found


def chunks(uri: str, path: str, answer: BaseHTTPResponse) -> Iterator[bytes]:
    """The body of an answer, the file `path`, piece by piece.

    Raises as `resolve.resolve` does for errors of the network only.
    """
    encoded = is_encoded(answer)
    left = 0 if encoded else answer.length_remaining or 0
    connection = getattr(answer.connection, "sock", None)
    if type(connection) is not socket.socket:  # what arrives encrypted has another length
        connection = None
    least = 1
    # What the network does is explained; what who gets a chunk does with it, on a full disk for one, is not.
    with explained(uri, path):
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
