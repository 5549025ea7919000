"""Writing, replacing and deleting on disk so that a crash, a full volume or another process in between does no harm."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"


def temporary(path: Path) -> Path:
    """A name beside `path` for what is to replace it; one that a crash left behind is told by its ending."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")


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
    sync_files([Path(directory, name) for directory, _, files in os.walk(root) for name in files])
    for directory, _, _ in os.walk(root, topdown=False):
        sync(Path(directory))


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
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}: the volume is full; enlarge it or its sizeLimit, or let cleanup.py free the cache"
    if error.errno == errno.EROFS:
        return f"{error}: the volume is mounted read-only; mount it writable"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{error}: user {os.getuid()} may not; set fsGroup, or the volume's owner"
    return str(error)
