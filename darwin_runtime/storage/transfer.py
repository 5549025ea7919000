"""Bring a model's files to disk: side by side, a chunk at a time in memory, each taken up again where it broke off.

A file is put together in `parts/` and moved into the model's directory once it has arrived whole and is on disk. So a
directory that was left half-way holds whole files only, and a later run, in another pod perhaps, goes on from there.

A part is named `<file>.<validator>.<bytes>`: a hash of the file's path; one of what tells whether the store still has
the same file; how many bytes are on disk for good. What is beyond those may be holes, if the machine that wrote them
has crashed, so a later run does not count on it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from http import HTTPStatus
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from darwin_runtime import resources
from darwin_runtime.errors import ConfigError, DamagedDownload, RoleError, StoreUnreachable
from darwin_runtime.logs import format_bytes
from darwin_runtime.storage import digest as digest_module
from darwin_runtime.storage import disk, resolve
from darwin_runtime.storage.manifest import File, digest
from darwin_runtime.storage.resolve import RemoteFile, Retry, Source

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

T = TypeVar("T")

REGISTERED_MODEL_META = "registered_model_meta"

# So many files at a time, as CPUs allow: hashing is work, and a store far away is waited for. Each holds one chunk in
# memory.
FILES_PER_CPU = 1
LEAST_FILES, MOST_FILES = 3, 16
CHUNK_BYTES = 256 << 10

# Where a whole chunk comes in less than this, it is waited for: to wake for each packet takes a transfer 7% longer.
GATHER_SECONDS = 0.1

WRITE_BYTES = 16 << 20

# How often what has arrived is put on disk for good, in whole files and, as it costs more, in parts: a transfer that is
# killed loses no more than this.
COMMIT_SECONDS = 1.0
SYNC_SECONDS = 5.0
LOOK_SECONDS = 1.0

# So long, after a failure, the other files have to come to an end.
END_SECONDS = 5.0

# A store that sends less than this in that time has stalled, even if it sends something.
STALL_SECONDS = 60.0
STALL_BYTES = 60 << 10

TIMEOUT_SECONDS = 3600.0

_DIGESTS = ("Repr-Digest", "Digest")

_PART = re.compile(r"(?P<name>[0-9a-f]{32})\.(?P<validator>[0-9a-f]{16})\.(?P<synced>\d+)")

PROGRESS_SECONDS = 5.0
TERMINAL_PROGRESS_SECONDS = 0.5

logger = logging.getLogger("darwin.transfer")


class Deadline:
    """When all has to be over: `seconds` after this was made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self, what: str) -> None:
        """Raise `RoleError` once it has passed."""
        if self.left() < 0:
            raise RoleError(
                f"{what}: not done within DOWNLOAD_TIMEOUT_SECONDS={self.seconds:g}; what has arrived is kept for the "
                f"next attempt, which goes on from there"
            )

    def left(self) -> float:
        """Seconds; below zero once it has passed."""
        return self._end - time.monotonic()


class _Stopped(Exception):
    """Another file has failed."""


def run_with_timeout(seconds: float, action: Callable[[], T], what: str) -> T:
    """Run an `action` that knows no time limit, and leave it alone once it has taken so long.

    Raises what it raises, and `StoreUnreachable` when it has not ended in time.
    """
    ended: Future[T] = Future()
    if seconds > 0:
        start_threads(1, lambda: _settle(ended, action))
    if not wait([ended], max(0.0, seconds)).done:
        raise StoreUnreachable(f"{what}: no answer in time")
    return ended.result()


def _settle(future: Future[T], action: Callable[[], T]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:  # to be raised by who waits
        future.set_exception(error)


def fetch_model(uri: str, destination: Path) -> None:
    """Put the model at `uri` into the existing directory `destination`, `MLmodel` at its root, every file checked.

    Raises `ConfigError` for a URI of no known form, `RoleError` when it can't be had or put there.
    """
    if why := resolve.check_uri(uri):
        raise ConfigError([f"{uri!r} {why}"])
    parts = destination / f"{resolve.RESERVED}parts"
    try:
        source = resolve.retry_action(lambda: resolve.resolve(uri), Retry())
        files = Transfer(source, destination, parts, Retry(), Deadline(TIMEOUT_SECONDS)).run()
        told = digest_module.digest((file.path, file.sha256) for file in files)
        logger.info("%s has sha256 %s, which %s can ask for", uri, told, digest_module.NAME)
        disk.remove_tree(parts)
    except OSError as error:
        raise RoleError(f"cannot put {uri} on disk: {disk.explain(error)}") from error


class Transfer:
    """One model's way into the directory `model`, by way of `parts` on the same file system. Both are made."""

    def __init__(
        self, source: Source, model: Path, parts: Path, retry: Retry, deadline: Deadline, *, shared: bool = False
    ) -> None:
        """`shared`: another process may still be writing to the parts that are there."""
        self.source = source
        self.model = model
        self.parts = parts
        self.retry = retry
        self.deadline = deadline
        self.shared = shared
        self.total = 0
        self._done: dict[str, int] = {}
        self._left: dict[str, Path] = {}
        self._arriving: set[_Part] = set()
        self._stop = threading.Event()

    def run(self) -> list[File]:
        """Bring every file, and return them with size and sha256.

        Raises `RoleError` when there is no time, `DamagedDownload` or `StoreUnreachable` when a file's attempts are
        used up, `OSError` when the disk fails or is too small.
        """
        for directory in (self.model, self.parts):
            directory.mkdir(parents=True, exist_ok=True)
        self._left = self._parts()
        what = f"cannot list {self.source.uri} before DOWNLOAD_TIMEOUT_SECONDS are over"
        files = run_with_timeout(
            self.deadline.left(), lambda: resolve.retry_action(self.source.files, self.retry), what
        )
        self.total = sum(file.size or 0 for file in files)
        here = self._here(files)
        self._check_space(files, here)
        with _Progress(self, len(files), here):
            found = self._all(files)
        if "name" in self.source.identity:
            found = [file for file in found if file.path != REGISTERED_MODEL_META]
            found.append(self._registered_model_meta())
        return found

    def _parts(self) -> dict[str, Path]:
        """What an earlier run left that can be gone on with, by the part's name. Else, as what a store's own library
        left of a download of several pieces at once, it is removed."""
        found = {}
        for path in [self.parts / name for name in os.listdir(self.parts)]:
            told = _PART.fullmatch(path.name)
            if told and path.is_file() and not path.is_symlink():
                found[told["name"]] = path
            else:
                disk.remove_tree(path)
        return found

    def arrived(self) -> int:
        """How many bytes are on disk."""
        size = sum(self._done.values())
        # Meanwhile parts are given their names, and all may have been published.
        with contextlib.suppress(OSError):
            for name in os.listdir(self.parts):
                with contextlib.suppress(OSError):
                    size += (self.parts / name).stat().st_size
        return size

    def _here(self, files: list[RemoteFile]) -> int:
        """How many bytes an earlier run brought. What is in its way, or isn't the model's, is removed."""
        wanted = {file.path: file.size for file in files}
        size = self.arrived()
        for path in [path for path in disk.below(self.model) if path.is_symlink() or not path.is_dir()]:
            name = path.relative_to(self.model).as_posix()
            there = path.lstat().st_size
            if name not in wanted or path.is_symlink() or wanted[name] not in (None, there):
                path.unlink()
            else:
                size += there
        return size

    def _check_space(self, files: list[RemoteFile], here: int) -> None:
        free = shutil.disk_usage(self.model).free
        if self.total - here > free:
            sizes = f"{format_bytes(self.total)} in {len(files)} files, of which {format_bytes(here)} are here"
            why = f"{self.source.uri} has {sizes}, but only {format_bytes(free)} are free"
            raise OSError(errno.ENOSPC, why, str(self.model))

    def _all(self, files: list[RemoteFile]) -> list[File]:
        found: dict[str, File] = {}
        arrived: dict[str, _Part] = {}
        committed = synced = time.monotonic()
        ended: SimpleQueue[Future[tuple[File, _Part | None]]] = SimpleQueue()
        # The largest first, or the last one to begin would keep all waiting.
        todo = sorted(files, key=lambda file: file.size or 0)
        at_once = min(MOST_FILES, max(LEAST_FILES, FILES_PER_CPU * resources.cpu_limit()), len(files))
        threads = start_threads(at_once, lambda: self._work(todo, ended))
        try:
            while len(found) < len(files):
                # Not for each file: of thousands, to wake for one costs a part of what bringing it does.
                if working := [thread for thread in threads if thread.is_alive()]:
                    working[0].join(LOOK_SECONDS)
                with contextlib.suppress(Empty):
                    while True:
                        file, part = ended.get_nowait().result()
                        found[file.path] = file
                        if part:
                            arrived[file.path] = part
                self.deadline.check(f"download of {self.source.uri}")
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self._commit(arrived)
                    committed = time.monotonic()
                if time.monotonic() - synced > SYNC_SECONDS:
                    for one in self._arriving.copy():
                        one.sync()
                    synced = time.monotonic()
        except BaseException:
            self._stop.set()
            # Inside a store's own library, there is no stopping them.
            until = time.monotonic() + END_SECONDS
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
            self._commit(arrived)
            raise
        self._commit(arrived)
        return [found[file.path] for file in files]

    def _work(self, todo: list[RemoteFile], ended: SimpleQueue[Future[tuple[File, _Part | None]]]) -> None:
        """Bring files, from the end of the list, as long as there are any."""
        while not self._stop.is_set():
            try:
                file = todo.pop()
            except IndexError:
                return
            done: Future[tuple[File, _Part | None]] = Future()
            _settle(done, partial(self._one, file))
            ended.put(done)
            if done.exception():
                self._stop.set()

    def _commit(self, arrived: dict[str, _Part]) -> None:
        """Have whole parts on disk, and give them their names. Together: each by itself costs many times as much."""
        paths = {name: part.path for name, part in arrived.items()}
        disk.side_by_side(_finish, list(paths.values()))
        for name, path in paths.items():
            local = self.model / name
            # Only in the model: what another pod has taken over is not begun anew.
            for parent in reversed(local.relative_to(self.model).parents[:-1]):
                (self.model / parent).mkdir(exist_ok=True)
                if (self.model / parent).is_symlink():
                    raise NotADirectoryError(errno.ENOTDIR, "a link among directories", str(self.model / parent))
            self._done[name] = arrived[name].size
            path.rename(local)
        arrived.clear()

    def _one(self, file: RemoteFile) -> tuple[File, _Part | None]:
        """A file, and its part unless it is in its place already."""
        local = self.model / file.path
        if local.is_file():
            size = self._done[file.path] = local.stat().st_size
            return File(file.path, size, digest(local)), None
        part = _Part(self.parts, file.path)
        if left := self._left.get(part.name):
            # Never all of it: the store is asked at least once whether the file is the same still.
            part.take_over(left, sys.maxsize if file.size is None else file.size - 1, self._check, copied=self.shared)
        self._arriving.add(part)
        try:
            resolve.retry_action(lambda: self._bring(file, part), self.retry, self._wait)
        except BaseException:
            part.sync()
            raise
        finally:
            self._arriving.discard(part)
        return File(file.path, part.size, part.sha256.hexdigest()), part

    def _bring(self, file: RemoteFile, part: _Part) -> None:
        """One attempt at a file."""
        self._check()
        if not part.validator:
            part.restart("")
        if part.size and part.size == file.size and part.checksums_match():
            return
        answer = self.source.store.open(file.path, part.size)
        if answer is None:
            self._download(file, part)
            return
        if not part.can_resume(answer):
            answer.close()
            part.restart("")
            answer = self.source.store.open(file.path, 0)
            assert answer is not None
            part.can_resume(answer)
        with answer:
            # What says of itself that it is another length is not taken at all: a page to sign in at, for one.
            if (told := _length(answer)) not in (None, file.size) and file.size is not None:
                part.restart("")
                raise DamagedDownload(
                    f"{self._named(file)} was sent with {told} bytes instead of the {file.size} listed"
                )
            self._stream(file, part, answer)

    def _stream(self, file: RemoteFile, part: _Part, answer: BaseHTTPResponse) -> None:
        since, before = time.monotonic(), part.size
        with part.open() as target:
            for chunk in self._chunks(answer):
                self._check()
                part.add(target, chunk)
                if file.size is not None and part.size > file.size:
                    break
                if (seconds := time.monotonic() - since) > STALL_SECONDS:
                    if part.size - before < STALL_BYTES:
                        got = format_bytes(part.size - before)
                        raise StoreUnreachable(f"{self._named(file)} has stalled: {got} in the last {seconds:.0f} s")
                    since, before = time.monotonic(), part.size
        if file.size is not None and part.size != file.size:
            arrived = part.size
            if arrived > file.size:
                part.restart("")
            raise DamagedDownload(f"{self._named(file)} arrived with {arrived} bytes instead of the {file.size} listed")
        if not part.checksums_match():
            part.restart("")
            raise DamagedDownload(f"{self._named(file)} arrived with other bytes than its store's checksum tells")

    def _chunks(self, answer: BaseHTTPResponse) -> Iterator[bytes]:
        encoded = _is_encoded(answer)
        left = 0 if encoded else answer.length_remaining or 0
        connection = getattr(answer.connection, "sock", None)
        if type(connection) is not socket.socket:  # what arrives encrypted has another length
            connection = None
        least = 1
        # What the network does is explained; what who gets a chunk does with it, on a full disk for one, is not.
        with resolve.explained(self.source.uri):
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

    def _download(self, file: RemoteFile, part: _Part) -> None:
        part.path.unlink(missing_ok=True)  # whatever it is, it is not written through
        part.there = True
        try:
            self.source.store.download(file.path, str(part.path))
            size = part.path.lstat().st_size
        except FileNotFoundError as error:
            raise DamagedDownload(f"{self._named(file)} did not arrive ({error})") from error
        if file.size is not None and size != file.size:
            raise DamagedDownload(f"{self._named(file)} arrived with {size} bytes instead of the {file.size} listed")
        part.read()

    def _named(self, file: RemoteFile) -> str:
        return f"{file.path} of {self.source.uri}"

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped
        self.deadline.check(f"download of {self.source.uri}")

    def _wait(self, seconds: float) -> None:
        self._stop.wait(seconds)
        self._check()

    def _registered_model_meta(self) -> File:
        """MLflow leaves this file in a registered model it downloads, and so says the model's name and version."""
        import yaml

        identity = self.source.identity
        path = self.model / REGISTERED_MODEL_META
        content = {"model_name": identity["name"], "model_version": identity["version"]}
        disk.write_atomically(path, yaml.safe_dump(content))
        return File(REGISTERED_MODEL_META, path.stat().st_size, digest(path))


class _Part:
    """A file on its way, with the sha256 of what is there, and what tells whether the store still has the same file.

    Without a validator, what an earlier run left is of no use.
    """

    def __init__(self, directory: Path, path: str) -> None:
        """`path` is the file's, in its model."""
        self.directory = directory
        self.name = hashlib.sha256(path.encode()).hexdigest()[:32]
        self.there = False
        self._naming = threading.Lock()
        self.restart("")

    def restart(self, validator: str) -> None:
        """Begin anew, with a file that `validator` tells."""
        with self._naming:
            if self.there:
                self.path.unlink(missing_ok=True)
            self.size = 0
            self.synced = 0
            self.sha256 = hashlib.sha256()
            self.validator = validator
            self.there = False
        self._begun = 0
        self._told: list[tuple[hashlib._Hash, bytes]] = []

    @property
    def path(self) -> Path:
        return self.directory / f"{self.name}.{self.validator}.{self.synced}"

    def take_over(self, left: Path, most: int, check: Callable[[], None], *, copied: bool) -> None:
        """Go on with the part `left` of an earlier run, but with no more than `most` bytes of it.

        To be `copied` is a part that who began it may still write to. Raises what `check`, called now and then, raises.
        """
        told = _PART.fullmatch(left.name)
        assert told
        most = min(most, int(told["synced"]))
        new = disk.temporary(left)
        try:
            with (
                disk.open_regular(left) if copied else left.open("r+b") as old,
                new.open("xb") if copied else contextlib.nullcontext() as target,
            ):
                while chunk := old.read(min(CHUNK_BYTES, most - self.size)):
                    check()
                    self.sha256.update(chunk)
                    self.size += len(chunk)
                    if target:
                        target.write(chunk)
                if not target:
                    old.truncate(self.size)
            self.validator, self.synced = told["validator"], 0 if copied else self.size
            (new if copied else left).rename(self.path)
            self.there = True
        except OSError:
            # No room for a copy, for one.
            self.restart("")
            new.unlink(missing_ok=True)
        if copied or not self.there:
            left.unlink(missing_ok=True)

    def can_resume(self, answer: BaseHTTPResponse) -> bool:
        """Whether `answer` can be added to what is there; when it is a whole file, that begins anew."""
        validator = _validator(answer)
        if answer.status == HTTPStatus.PARTIAL_CONTENT:
            start = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", answer.headers.get("Content-Range", ""))
            if not start or int(start[1]) != self.size or validator != self.validator:
                return False
        elif answer.status == HTTPStatus.OK:
            self.restart(validator)
        else:
            return False
        self._told = list(_checksums(answer, self.sha256))
        return True

    def open(self) -> BinaryIO:
        """To be added to."""
        with self._naming:
            self.there = True
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            return os.fdopen(os.open(self.path, flags, 0o644), "ab", buffering=0)

    def add(self, target: BinaryIO, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[target.write(view) :]
        self.size += len(chunk)
        self.sha256.update(chunk)
        for hasher, _ in self._told:
            if hasher is not self.sha256:
                hasher.update(chunk)
        if self.size - self._begun >= WRITE_BYTES:
            # Have the disk begin, or it would all be left for the end. (What is being written is not forgotten.)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(target.fileno(), self._begun, self.size - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = self.size

    def sync(self) -> None:
        """Have what has arrived on disk for good, beside the thread that adds to it."""
        with self._naming:
            size, path, begun = self.size, self.path, self.sha256
        if not self.validator or size == self.synced:
            return
        with contextlib.suppress(FileNotFoundError):  # it is begun anew
            disk.sync(path)
            with self._naming:
                if self.there and self.sha256 is begun:
                    self.synced = size
                    path.rename(self.path)

    def read(self) -> None:
        """Take the file as it is on disk."""
        self.size, self.sha256, self.there = 0, hashlib.sha256(), True
        for chunk in disk.chunks(self.path):
            self.sha256.update(chunk)
            self.size += len(chunk)

    def checksums_match(self) -> bool:
        return all(hasher.digest() == told for hasher, told in self._told)


def _finish(path: Path) -> None:
    with disk.open_regular(path) as file:
        os.fchmod(file.fileno(), 0o644)  # a local store's own modes may keep other users' containers out
        os.fsync(file.fileno())


def _validator(answer: BaseHTTPResponse) -> str:
    """What tells a store's file from another of the same name (RFC 9110, 8.8.3), to be put in a name; else nothing.

    A checksum belongs to it: a rest that comes without what was told of the whole could not be checked. One of the body
    alone does not tell of the rest.
    """
    tag = answer.headers.get("ETag", "")
    if not tag.startswith('"') or _is_encoded(answer) or "Content-MD5" in answer.headers:
        return ""
    told = [tag, *(answer.headers.get(name, "") for name in _DIGESTS)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _length(answer: BaseHTTPResponse) -> int | None:
    """The length that an answer gives a whole file, if it gives one."""
    length = answer.headers.get("Content-Length", "")
    return int(length) if answer.status == HTTPStatus.OK and length.isdecimal() and not _is_encoded(answer) else None


def _is_encoded(answer: BaseHTTPResponse) -> bool:
    return answer.headers.get("Content-Encoding", "identity") != "identity"


def _checksums(answer: BaseHTTPResponse, sha256: hashlib._Hash) -> Iterator[tuple[hashlib._Hash, bytes]]:
    """What an answer says of its file: (hash to compare, digest).

    Of the whole file are Repr-Digest (RFC 9530) and its forerunner Digest (RFC 3230); of the body is Content-MD5 (RFC
    1864).
    """
    told = [re.search(r"\bsha-256=:?([\w+/]{43}=)", answer.headers.get(name, ""), re.I) for name in _DIGESTS]
    yield from ((sha256, base64.b64decode(found[1])) for found in told if found)
    if answer.status == HTTPStatus.OK and (md5 := answer.headers.get("Content-MD5")):
        with contextlib.suppress(ValueError):
            yield hashlib.md5(usedforsecurity=False), base64.b64decode(md5)


def start_threads(count: int, work: Callable[[], None]) -> list[threading.Thread]:
    """Threads that keep no process from ending."""
    threads = [threading.Thread(target=work, name=f"transfer-{number}", daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


class _Progress:
    """Says how far a transfer has come: a log line every few seconds, or one rewriting line on a terminal."""

    def __init__(self, transfer: Transfer, count: int, here: int) -> None:
        self.transfer = transfer
        self.count = count
        self.here = here
        self.started = time.monotonic()
        self.stop = threading.Event()
        self.terminal = sys.stderr.isatty()
        self.thread = threading.Thread(target=self._report, name="progress", daemon=True)

    def __enter__(self) -> None:
        already = f", {format_bytes(self.here)} of it already here" if self.here else ""
        logger.info("downloading %d files, %s%s", self.count, format_bytes(self.transfer.total), already)
        self.thread.start()

    def __exit__(self, failed: object, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
        if not failed:
            seconds = max(time.monotonic() - self.started, 1e-9)
            brought = self.transfer.arrived() - self.here
            logger.info("downloaded %s in %.1f s, %.1f MB/s", format_bytes(brought), seconds, brought / seconds / 1e6)

    def _report(self) -> None:
        while not self.stop.wait(TERMINAL_PROGRESS_SECONDS if self.terminal else PROGRESS_SECONDS):
            line = progress(self.transfer.arrived(), self.transfer.total, self.here, time.monotonic() - self.started)
            if self.terminal:
                sys.stderr.write(f"\r\033[K{line}")
                sys.stderr.flush()
            else:
                logger.info("%s", line)


def progress(arrived: int, total: int, here: int, seconds: float) -> str:
    """How far a transfer is, that began with `here` of `total` bytes `seconds` ago."""
    percent = 100 * arrived / total if total else 0.0
    rate = max(0, arrived - here) / seconds
    left = f"{max(0, total - arrived) / rate:.0f} s" if rate else "unknown"
    return f"{percent:.0f}% of {format_bytes(total)}, {rate / 1e6:.1f} MB/s, ETA {left}"
