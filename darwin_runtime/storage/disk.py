"""Writing, replacing and deleting on disk so that a crash, a full volume or another process in between does no harm."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from darwin_runtime.errors import FileChanged, NotRegularFile, RoleError

# What an `OSError` of a full volume, or of a used-up quota, is numbered.
FULL = (errno.ENOSPC, errno.EDQUOT)

CHUNK_BYTES = 1 << 20

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def identity(found: os.stat_result) -> tuple[int, ...]:
    """What does not stay as it is when a file, or what a directory lists, changes: ctime can't be set back."""
    return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def open_regular(path: Path) -> BinaryIO:
    """Open a file to be read; nothing is waited for, as at the other end of a pipe, and no link is followed.

    Raises `NotRegularFile`, and `OSError` as `open` does.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.ENODEV):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise NotRegularFile(errno.EINVAL, "not a regular file", str(path))


def read_small(path: Path, most: int) -> bytes:
    """A file's content. Raises as `open_regular` does, and `ValueError` for more than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return content


def chunks(path: Path) -> Iterator[bytes]:
    """What is in a file, piece by piece; also what grows meanwhile comes to an end.

    Raises as `open_regular` does, and `FileChanged`.
    """
    with open_regular(path) as file:
        before, size = identity(os.fstat(file.fileno())), 0
        while chunk := file.read(CHUNK_BYTES):
            size += len(chunk)
            if size > before[3]:
                break
            yield chunk
        if size != before[3] or identity(os.fstat(file.fileno())) != before:
            raise FileChanged(errno.EAGAIN, "changed while it was read", str(path))


def temporary(path: Path) -> Path:
    """A name beside `path` for what is to replace it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def is_temporary(name: str) -> bool:
    """Whether it is a name made by `temporary`, which a crash can leave behind."""
    return _TEMPORARY.fullmatch(name) is not None


def below(directory: Path) -> Iterator[Path]:
    """Everything below a directory, parents before children; links are not followed.

    Raises `OSError` where a directory can't be listed: what can't be seen is not what isn't there.
    """
    waiting = [str(directory)]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for entry in found:
                yield Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)


def last_change(path: Path) -> float:
    """When something last happened to `path` or in it. Not mtime: a copy of a local store's file keeps its source's."""
    newest = path.lstat().st_ctime
    if path.is_dir() and not path.is_symlink():
        # What can't be looked into is as old as it shows itself: a download that is alive touches its directory.
        with contextlib.suppress(OSError):
            for node in below(path):
                newest = max(newest, node.lstat().st_ctime)
    return newest


def write_atomically(path: Path, text: str) -> None:
    """Write `path` so that a reader, or a crash, sees the old content or the new, never a part."""
    new = temporary(path)
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, whatever it led to. Raises `OSError` where it is a directory."""
    new = temporary(path)
    new.symlink_to(target)
    try:
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush one file or directory to disk; file systems that can't sync a directory are taken as they are."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # not to wait for a pipe's other end
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def side_by_side(action: Callable[[Path], None], paths: Sequence[Path]) -> None:
    """Do something to files that ends on disk, to some at a time, so that file systems can do it in few steps."""

    def each(some: Sequence[Path]) -> None:
        for path in some:
            action(path)

    if paths:
        count = min(8, len(paths))
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(each, [paths[number::count] for number in range(count)]))


def sync_tree(root: Path) -> None:
    """Flush every file and directory below `root`, and `root` itself, children before parents."""
    found = [path for path in below(root) if not path.is_symlink()]
    directories = [path for path in found if path.is_dir()]
    side_by_side(sync, [path for path in found if path.is_file()])
    for directory in (*reversed(directories), root):
        sync(directory)


def remove_tree(path: Path) -> None:
    """Delete a directory, or the link or file that is there instead; links inside are not followed.

    Someone else may be deleting the same tree. Raises `OSError`, also for one that is too deep.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            # The same hook, under the name that this Python has for it.
            hook: Any = {"onexc" if sys.version_info >= (3, 12) else "onerror": _unless_gone}
            try:
                shutil.rmtree(path, **hook)
            except RecursionError:
                raise OSError(errno.ENAMETOOLONG, "too many directories inside each other", str(path)) from None


def _unless_gone(_function: object, _path: object, raised: Any) -> None:
    error = raised[1] if isinstance(raised, tuple) else raised
    if not isinstance(error, FileNotFoundError):
        raise error


@contextlib.contextmanager
def discard_when_full(discard: Callable[[], object]) -> Iterator[None]:
    """Call `discard` where the block fails on a full volume: others need the room."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            discard()
        raise


def explain(error: OSError) -> str:
    """What to do about a file system's error, for a message that ends in it."""
    if error.errno in FULL:
        return f"{error}: the volume is full; enlarge it or its sizeLimit, or let cleanup.py free the cache"
    if error.errno == errno.EROFS:
        return f"{error}: the volume is mounted read-only; mount it writable"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{error}: user {os.getuid()} may not; set fsGroup, or the volume's owner"
    return str(error)


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
