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

from darwin_runtime.errors import FileChanged, NoLinks, NotRegularFile, RoleError, VolumeFull
from darwin_runtime.logs import format_bytes

# What an `OSError` of a full volume, or of a used-up quota, is numbered.
FULL = (errno.ENOSPC, errno.EDQUOT)

# The replies of file systems to an operation that they lack: symbolic links, modes, times, flushes of directories.
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EPERM)

# Files that the group may write, if the umask lets it.
FILE_MODE = 0o664

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
        with about(new), new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_link(path: Path, target: Path | str) -> None:
    """Make a symbolic link. Raises `NoLinks` on a file system without them."""
    try:
        path.symlink_to(target)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            raise NoLinks(error.errno, f"no symbolic links there, {error.strerror}", str(path)) from error
        raise OSError(error.errno, error.strerror, str(path)) from error  # without the target, which is no path here


def replace_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, whatever it led to. Raises `OSError` where it is a directory."""
    new = temporary(path)
    make_link(new, target)
    try:
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush one file or directory to disk; file systems that can't sync a directory are taken as they are."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # not to wait for a pipe's other end
    try:
        with about(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
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


def share_with_group(directory: Path) -> None:
    """Clear the group's bits of the umask if the group may write to `directory`, or to the nearest one above it.

    The kubelet makes a volume writable for its fsGroup once, and the umask of most containers undoes that.
    """
    nearest = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
    if nearest.stat().st_mode & stat.S_IWGRP:
        os.umask(os.umask(0o077) & ~stat.S_IRWXG)


def touch(descriptor: int) -> None:
    """Set the mtime of an open file without content to now, by the file server's clock."""
    try:
        os.utime(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        os.pwrite(descriptor, b"\n", 0)  # the server gives a written file its time, too


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Name `path` in an error of the block that has no name, or one relative to an open directory."""
    try:
        yield
    except OSError as error:
        if error.errno and not (isinstance(error.filename, str) and "/" in error.filename):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def discard_when_full(
    volume: Path, discard: Callable[[], object], needed: Callable[[], int] = lambda: 0
) -> Iterator[None]:
    """Call `discard` where the block fails on a full `volume`: others need the room.

    Raises `VolumeFull` then; `needed` returns the bytes that were still to come.
    """
    try:
        with about(volume):
            yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        full = VolumeFull(error, _why_full(error, needed()))
        discard()
        raise full from error


def explain(error: OSError) -> str:
    """The reason of a file system's error, its remedy, and in brackets the words of the kernel."""
    if isinstance(error, VolumeFull):
        remedy: str | None = error.remedy
    elif error.errno in FULL:
        remedy = _why_full(error)
    elif error.errno == errno.EROFS:
        remedy = _why_read_only(error)
    elif error.errno in (errno.EACCES, errno.EPERM):
        remedy = _why_refused(error)
    else:
        remedy = _REMEDIES.get(error.errno or 0)
    return f"{remedy} ({error})" if remedy else str(error)


_REMEDIES = {
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "a file is where a directory belongs; remove it, or set another path"
    ),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENOTCONN),
        "the volume's disk or server fails; look at the events of the pod and of its node",
    ),
}


def _mount(path: Path) -> Path:
    """The mount point of the file system that has, or would have, `path`."""
    place = Path(os.path.realpath(path))
    return next(one for one in (place, *place.parents) if os.path.ismount(one))


def _why_full(error: OSError, needed: int = 0) -> str:
    if error.errno == errno.EDQUOT:
        return "the quota of its user, group or directory is used up; raise it, or let cleanup.py free the cache"
    state = ""
    if isinstance(error.filename, str):
        mount = _mount(Path(error.filename))
        found = os.statvfs(mount)
        if found.f_files and not found.f_favail and found.f_bavail:
            return (
                f"no inodes are left at {mount}: all {found.f_files} are in use, one for each file and directory; "
                f"take a model of fewer files or a file system with more inodes, or let cleanup.py free the cache"
            )
        free, size = (format_bytes(blocks * found.f_frsize) for blocks in (found.f_bavail, found.f_blocks))
        more = f", {format_bytes(needed)} more needed" if needed > 0 else ""
        state = f" ({free} of {size} free at {mount}{more})"
    return f"the volume is full{state}; enlarge it or its sizeLimit, or let cleanup.py free the cache"


def _why_read_only(error: OSError) -> str:
    if isinstance(error.filename, str) and _mount(Path(error.filename)) == Path("/"):
        return "the root file system is read-only; mount a volume there, such as an emptyDir"
    return "the volume is mounted read-only; mount it writable"


def _why_refused(error: OSError) -> str:
    user, groups = os.getuid(), sorted({os.getegid(), *os.getgroups()})
    who = f"user {user} of group {', '.join(map(str, groups))} may not"
    paths = [Path(path).absolute() for path in (error.filename, error.filename2) if isinstance(path, str)]
    if not paths:
        return f"{who}; set runAsUser to the volume's owner, or fsGroup"
    place, refused = _refusing(paths)
    found = place.stat()
    owner = f"{place} belongs to user {found.st_uid}, group {found.st_gid}, mode {stat.filemode(found.st_mode)}"
    if error.errno == errno.EACCES and not user and _overrides_modes():
        why = "the server maps root to another user (root_squash), or a policy refuses it; set runAsUser to one who may"
    elif not refused:
        why = "its mode would allow it, so the volume or a security policy refuses this operation to all"
    elif found.st_uid == user:
        why = "its own mode keeps its owner out; change the mode"
    elif found.st_gid in groups:
        why = (
            f"its group may not write, since user {found.st_uid} made it with a umask such as 022; run all pods that "
            f"share the volume as one user (runAsUser), or change the mode once (chmod -R g+w)"
        )
    else:
        why = f"set fsGroup in the pod's securityContext, or runAsUser to {found.st_uid}"
    return f"{who}: {owner}; {why}"


def _refusing(paths: Sequence[Path]) -> tuple[Path, bool]:
    """The place that keeps this process from `paths`, and whether its mode does so."""
    there = [next(place for place in (path, *path.parents) if os.access(place, os.F_OK)) for path in paths]
    there += [path.parent for path in paths if path in there]
    for place in there:
        if not os.access(place, os.R_OK | os.W_OK | (os.X_OK if place.is_dir() else 0)):
            return place, True
    return there[0], False


def _overrides_modes() -> bool:
    """Whether the kernel lets this process write whatever the mode is (CAP_DAC_OVERRIDE)."""
    with contextlib.suppress(OSError):
        told = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
        return bool(told and int(told[1], 16) & 2)
    return False


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
