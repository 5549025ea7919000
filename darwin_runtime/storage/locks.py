"""The lock on the download of an entry, and the staging directory that its holder fills and publishes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from darwin_runtime.errors import RoleError
from darwin_runtime.logs import format_bytes
from darwin_runtime.role import at_sigterm
from darwin_runtime.storage import disk
from darwin_runtime.storage.cache import (
    LAST_USED,
    LOCKS,
    MANIFEST,
    MAX_NOTE_BYTES,
    STAGING,
    TAKEN,
    Cache,
    differences,
    key_of,
    model_of,
    parse_note,
    parts_of,
    stamp,
)
from darwin_runtime.storage.manifest import Manifest, summary

# A downloader shows this often that it is alive, and counts as dead after so much silence.
HEARTBEAT_SECONDS = 5.0
SILENCE_SECONDS = 30.0


@dataclass(frozen=True)
class LockState:
    """Who holds a lock: how far its download is, in bytes, and how long it has been silent, in seconds."""

    owner: str
    arrived: int
    total: int
    silence: float
    released: bool

    @property
    def alive(self) -> bool:
        return not self.released and self.silence < SILENCE_SECONDS

    @property
    def progress(self) -> str:
        return f"{100 * self.arrived / self.total:.0f}% of {format_bytes(self.total)}" if self.total else "begun"


class Lock:
    """The exclusive right to download one key, as long as all play by the rules; no more than bandwidth depends on it.

    `inherited` tells that the holder before died, or gave up: what it has staged is there to be taken over.
    """

    def __init__(self, path: Path, descriptor: int, owner: str, *, inherited: bool) -> None:
        self.path = path
        self.owner = owner
        self.inherited = inherited
        self.staging: Path | None = None
        self._descriptor = descriptor
        self.beat(0, 0)

    def beat(self, arrived: int, total: int) -> None:
        """Show that the holder is alive, and so what it has staged, and how far it is, in bytes."""
        self._write(arrived, total, released=False)
        if self.staging:
            with contextlib.suppress(OSError):
                os.utime(self.staging)

    @contextlib.contextmanager
    def beating(self, progress: Callable[[], tuple[int, int]]) -> Iterator[None]:
        """Show until the end of the block that the holder is alive; `progress` returns arrived and total bytes."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                self.beat(*progress())

        thread = threading.Thread(target=run, name="heartbeat", daemon=True)
        thread.start()
        try:
            # Others need not wait until this one counts as dead.
            with at_sigterm(lambda: self._write(0, 0, released=True, sync=False)):
                yield
        finally:
            stop.set()
            thread.join()

    def is_lost(self) -> bool:
        """Whether another has taken the lock, and then what was staged, from this one, which it took for dead."""
        try:
            return self.path.stat().st_ino != os.fstat(self._descriptor).st_ino
        except FileNotFoundError:
            return True

    def release(self, *, done: bool) -> None:
        """Give the lock up; unless all is `done`, what was staged is left to the next holder."""
        try:
            if done:
                with contextlib.suppress(FileNotFoundError):
                    if not self.is_lost():
                        self.path.unlink()
            else:
                self._write(0, 0, released=True)
        finally:
            os.close(self._descriptor)

    def _write(self, arrived: int, total: int, *, released: bool, sync: bool = True) -> None:
        state = {"owner": self.owner, "released": released, "arrived": arrived, "total": total}
        content = json.dumps(state).encode()
        # Taken over, or on a full volume, it is still the downloader's right to go on.
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, content, 0)
            os.ftruncate(self._descriptor, len(content))
            if sync:
                os.fsync(self._descriptor)


def try_lock(cache: Cache, key: str, owner: str) -> Lock | LockState:
    """The lock on the download of `key`, or who holds it: another owner that is alive."""
    path, inherited = cache.root / LOCKS / key, False
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, disk.FILE_MODE)
            return Lock(path, descriptor, owner, inherited=_clear_stolen(path) or inherited)
        except FileExistsError:
            holder = _holder(cache, path)
            if holder and holder.alive and holder.owner != owner:
                return holder
            if holder:
                inherited = _steal(cache, path, owner) or inherited


def _holder(cache: Cache, path: Path) -> LockState | None:
    try:
        with disk.open_regular(path) as file:
            beaten = os.fstat(file.fileno()).st_mtime
            text = file.read(MAX_NOTE_BYTES)
    except FileNotFoundError:
        return None
    state = parse_note(text)  # nothing while it is being written
    arrived, total = (_size(state.get(name)) for name in ("arrived", "total"))
    released = bool(state.get("released"))
    owner = "".join(letter for letter in str(state.get("owner", ""))[:500] if letter.isprintable())
    return LockState(owner, arrived, total, cache.now() - beaten, released)


def _steal(cache: Cache, path: Path, owner: str) -> bool:
    """Take a dead holder's lock away. Of several who try, one succeeds."""
    taken = disk.temporary(path)
    try:
        path.rename(taken)
    except FileNotFoundError:
        return False
    holder = _holder(cache, taken)
    if holder and holder.alive and holder.owner != owner:
        with contextlib.suppress(FileNotFoundError):
            taken.rename(path)  # it is not the one that was dead
        return False
    taken.unlink(missing_ok=True)
    return True


def _clear_stolen(path: Path) -> bool:
    """Whether someone died, or still is, taking a dead holder's lock away: what that one staged is there, too."""
    stolen = list(path.parent.glob(f".{path.name}.*.tmp"))
    for lock in stolen:
        lock.unlink(missing_ok=True)
    return bool(stolen)


def stage(cache: Cache, key: str, lock: Lock | None = None) -> Path:
    """A directory to put a model together in: what the holder before left of it, or an empty one.

    It is renamed, so that a former owner that is not dead after all finds nothing to write to by its name.
    """
    staging = cache.root / STAGING / f"{key}.{secrets.token_hex(8)}"
    found = False
    for left in cache.inside(STAGING) if lock else ():
        if key_of(left) == key and lock and (lock.inherited or _is_silent(cache, left)):
            if found or _holds_links(left):
                cache.delete_tree(left)
                continue
            with contextlib.suppress(FileNotFoundError):
                left.rename(staging)
                found = True
    # Not tempfile.mkdtemp: its 0700 would stay on the entry and keep other users' pods out. And what has been taken
    # over again by now is not begun anew.
    for directory in (*(() if found else (staging,)), model_of(staging), parts_of(staging)):
        directory.mkdir(exist_ok=True)
    if lock:
        lock.staging = staging
    return staging


def _is_silent(cache: Cache, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return cache.now() - disk.last_change(path) > SILENCE_SECONDS
    return False


def publish(
    cache: Cache, staging: Path, key: str, manifest: Manifest, verify: str = "size", *, exactly: bool = False
) -> bool:
    """Give what is staged its final name; False when another writer was first and ours was dropped.

    The files, whose sizes the manifest states, are on disk before the name is. An entry that is damaged, as far as
    `verify` looks, is replaced, and so is one of other files, if they have to be `exactly` these. Raises
    `RoleError` when what is staged is not what the manifest states.
    """
    with disk.discard_when_full(staging, partial(cache.delete_tree, staging)):
        _finish(staging, manifest)
        return _rename(cache, staging, key, manifest, verify, exactly=exactly)


def _finish(staging: Path, manifest: Manifest) -> None:
    stamp(staging / LAST_USED, os.O_NOFOLLOW)
    disk.remove_tree(parts_of(staging))
    if damage := differences(manifest, staging, "size"):
        raise RoleError(f"not published, {summary(damage)}")
    disk.sync_tree(staging)
    disk.write_atomically(staging / MANIFEST, manifest.dump())


def _rename(cache: Cache, staging: Path, key: str, manifest: Manifest, verify: str, *, exactly: bool) -> bool:
    def wrong() -> bool:
        return bool(cache.damage(key, verify)) or (exactly and set(cache.manifest(key).files) != set(manifest.files))

    while True:
        try:
            staging.rename(cache.root / key)
        except OSError as error:
            if staging.exists():
                if error.errno not in TAKEN:
                    raise
                if cache.has(key) and not wrong():
                    cache.delete_tree(staging)
                    return False
                _set_aside(cache, key, wrong)
                continue
            # On a network file system the reply to a rename that happened can be lost. Or what was staged has been
            # taken over.
            if not cache.has(key) or wrong():
                raise
        break
    disk.sync(cache.root)
    return True


def _set_aside(cache: Cache, key: str, wrong: Callable[[], bool]) -> None:
    removal = cache.announce(key)
    try:
        # Looked at once more: another pod may have replaced it, and others may use it, before the announcement.
        if wrong():
            cache.commit(removal)
    finally:
        cache.cancel(removal)


def _size(told: object) -> int:
    return min(max(told, 0), sys.maxsize) if isinstance(told, int) else 0


def _holds_links(root: Path) -> bool:
    """Whether there are links in what was staged, where a download would follow them."""
    return any(path.is_symlink() for path in disk.below(root))
