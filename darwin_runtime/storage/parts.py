"""Parts: files on their way, each taken up again where it broke off.

A part is named `<file>.<validator>.<bytes>`: a hash of the file's path; one of what tells whether the store still has
the same file; how many bytes are on disk for good. What is beyond those may be holes, if the machine that wrote them
has crashed, so a later run does not count on it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from darwin_runtime.errors import DamagedDownload, StoreUnreachable
from darwin_runtime.logs import format_bytes
from darwin_runtime.storage import disk
from darwin_runtime.storage.artifacts import CHUNK_BYTES, RemoteFile, Source, chunks, is_encoded, length_of

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

WRITE_BYTES = 16 << 20

# A store that sends less than this in that time has stalled, even if it sends something.
STALL_SECONDS = 60.0
STALL_BYTES = 60 << 10

_DIGESTS = ("Repr-Digest", "Digest")

_PART = re.compile(r"(?P<name>[0-9a-f]{32})\.(?P<validator>[0-9a-f]{16})\.(?P<synced>\d+)")


class Part:
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

    def take_over(self, left: Path, max_bytes: int, check: Callable[[], None], *, copied: bool) -> None:
        """Go on with the part `left` of an earlier run, but with no more than `max_bytes` bytes of it.

        To be `copied` is a part that who began it may still write to. Raises what `check`, called now and then, raises.
        """
        told = _PART.fullmatch(left.name)
        assert told
        max_bytes = min(max_bytes, int(told["synced"]))
        new = disk.temporary(left)
        try:
            with (
                disk.open_regular(left) if copied else left.open("r+b") as old,
                new.open("xb") if copied else contextlib.nullcontext() as target,
            ):
                while chunk := old.read(min(CHUNK_BYTES, max_bytes - self.size)):
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
            return os.fdopen(os.open(self.path, flags, disk.FILE_MODE), "ab", buffering=0)

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
            with contextlib.suppress(AttributeError, OSError):  # no more than advice
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


def left_in(directory: Path) -> dict[str, Path]:
    """The parts that an earlier run left and a later one can resume, by `Part.name`.

    Anything else is removed, such as the pieces that a store's own library downloads side by side.
    """
    found = {}
    for path in [directory / name for name in os.listdir(directory)]:
        told = _PART.fullmatch(path.name)
        if told and path.is_file() and not path.is_symlink():
            found[told["name"]] = path
        else:
            disk.remove_tree(path)
    return found


def bring(part: Part, file: RemoteFile, source: Source, check: Callable[[], None]) -> None:
    """Make one attempt at a file. Raises what `check`, called now and then, raises."""
    check()
    if not part.validator:
        part.restart("")
    if part.size and part.size == file.size and part.checksums_match():
        return
    answer = source.store.open(file.path, part.size)
    if answer is None:
        _download(part, file, source)
        return
    if not part.can_resume(answer):
        answer.close()
        part.restart("")
        answer = source.store.open(file.path, 0)
        assert answer is not None
        part.can_resume(answer)
    named = f"{file.path} of {source.uri}"
    with answer:
        # What says of itself that it is another length is not taken at all: a page to sign in at, for one.
        if (told := length_of(answer)) not in (None, file.size) and file.size is not None:
            part.restart("")
            raise DamagedDownload(f"{named} was sent with {told} bytes instead of the {file.size} listed")
        _stream(part, file, source, answer, check)


def _stream(part: Part, file: RemoteFile, source: Source, answer: BaseHTTPResponse, check: Callable[[], None]) -> None:
    named = f"{file.path} of {source.uri}"
    since, before = time.monotonic(), part.size
    with part.open() as target:
        for chunk in chunks(source.uri, file.path, answer):
            check()
            part.add(target, chunk)
            if file.size is not None and part.size > file.size:
                break
            if (seconds := time.monotonic() - since) > STALL_SECONDS:
                if part.size - before < STALL_BYTES:
                    got = format_bytes(part.size - before)
                    raise StoreUnreachable(f"{named} has stalled: {got} in the last {seconds:.0f} s")
                since, before = time.monotonic(), part.size
    if file.size is not None and part.size != file.size:
        arrived = part.size
        if arrived > file.size:
            part.restart("")
        raise DamagedDownload(f"{named} arrived with {arrived} bytes instead of the {file.size} listed")
    if not part.checksums_match():
        part.restart("")
        raise DamagedDownload(f"{named} arrived with other bytes than its store's checksum tells")


def _download(part: Part, file: RemoteFile, source: Source) -> None:
    named = f"{file.path} of {source.uri}"
    part.path.unlink(missing_ok=True)  # whatever it is, it is not written through
    part.there = True
    try:
        source.store.download(file.path, str(part.path))
        size = part.path.lstat().st_size
    except FileNotFoundError as error:
        raise DamagedDownload(f"{named} did not arrive ({error})") from error
    if file.size is not None and size != file.size:
        raise DamagedDownload(f"{named} arrived with {size} bytes instead of the {file.size} listed")
    part.read()


def _validator(answer: BaseHTTPResponse) -> str:
    """What tells a store's file from another of the same name (RFC 9110, 8.8.3), to be put in a name; else nothing.

    A checksum belongs to it: a rest that comes without what was told of the whole could not be checked. One of the body
    alone does not tell of the rest.
    """
    tag = answer.headers.get("ETag", "")
    if not tag.startswith('"') or is_encoded(answer) or "Content-MD5" in answer.headers:
        return ""
    told = [tag, *(answer.headers.get(name, "") for name in _DIGESTS)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


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
