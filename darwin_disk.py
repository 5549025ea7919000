"""Writing, replacing and deleting on disk so that a crash, a full volume or another process in between does no harm."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# What an `OSError` of a full volume, or of a used-up quota, is numbered.
FULL = (errno.ENOSPC, errno.EDQUOT)

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


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
    with os.scandir(directory) as found:
        for entry in found:
            path = Path(entry.path)
            yield path
            if entry.is_dir(follow_symlinks=False):
                yield from below(path)


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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_files(paths: Sequence[Path]) -> None:
    """Flush files to disk, side by side, so that file systems can do it in few steps."""
    if paths:
        with ThreadPoolExecutor(min(8, len(paths))) as pool:
            list(pool.map(sync, paths))


def sync_tree(root: Path) -> None:
    """Flush every file and directory below `root`, and `root` itself, children before parents."""
    found = [path for path in below(root) if not path.is_symlink()]
    directories = [path for path in found if path.is_dir()]
    sync_files([path for path in found if path.is_file()])
    for directory in (*reversed(directories), root):
        sync(directory)


def remove_tree(path: Path) -> None:
    """Delete a directory, or the link or file that is there instead; links inside are not followed.

    Someone else may be deleting the same tree.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            # The same hook, under the name that this Python has for it.
            hook: Any = {"onexc" if sys.version_info >= (3, 12) else "onerror": _unless_gone}
            shutil.rmtree(path, **hook)


def _unless_gone(_function: object, _path: object, raised: Any) -> None:
    error = raised[1] if isinstance(raised, tuple) else raised
    if not isinstance(error, FileNotFoundError):
        raise error


def explain(error: OSError) -> str:
    """What to do about a file system's error, for a message that ends in it."""
    if error.errno in FULL:
        return f"{error}: the volume is full; enlarge it or its sizeLimit, or let cleanup.py free the cache"
    if error.errno == errno.EROFS:
        return f"{error}: the volume is mounted read-only; mount it writable"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{error}: user {os.getuid()} may not; set fsGroup, or the volume's owner"
    return str(error)
