"""Mounted files that change under a running process, as the kubelet replaces those of a Secret that is rotated."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from darwin_runtime.errors import UnusableFile

T = TypeVar("T")

# How often to look whether a file has changed, at most.
LOOK_SECONDS = 1.0

logger = logging.getLogger("darwin.serve")


def content(name: str, path: Path) -> bytes:
    """What is in the file that the setting `name` points to. Raises `UnusableFile`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableFile(f"{name}: cannot read {path}: {error.strerror or error}") from None


class ReloadingFile(Generic[T]):
    """What `load` makes of the files at `paths`, and again when these change; while that fails, what it made before.

    After each success but the first, `renewed` is called with it; a failure is logged once. Belongs to one thread.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], T], renewed: Callable[[T], None]) -> None:
        """Raises `UnusableFile`."""
        self._paths, self._load, self._renewed = paths, load, renewed
        # Taken before what they hold is read: a change in between is one that the next look finds.
        self._found = self._identities()
        self._value = load()
        self._told = ""
        self._look_at = time.monotonic() + LOOK_SECONDS

    @property
    def value(self) -> T:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look()
        return self._value

    def _look(self) -> None:
        found = self._identities()
        if found == self._found:
            self._told = ""
            return
        try:
            self._value = self._load()
        except UnusableFile as error:
            # Not remembered as found: it is tried again, for the other half of a change may be on its way.
            if str(error) != self._told:
                self._told = str(error)
                logger.error("%s. What was read before stays in use", error)
            return
        self._found, self._told = found, ""
        self._renewed(self._value)

    def _identities(self) -> list[tuple[int, ...]]:
        """Which files the paths lead to now, through all links."""
        found: list[tuple[int, ...]] = []
        for path in self._paths:
            try:
                status = path.stat()
                found.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size))
            except OSError:
                found.append(())
        return found
