"""A transfer: all files of a model brought to disk side by side, a chunk of each at a time in memory.

A file is put together in `parts/` and moved into the model's directory once it has arrived whole and is on disk. So a
directory that was left half-way holds whole files only, and a later run, in another pod perhaps, goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from darwin_runtime import resources
from darwin_runtime.logs import format_bytes
from darwin_runtime.storage import attempts, disk, parts
from darwin_runtime.storage.artifacts import RemoteFile, Source
from darwin_runtime.storage.attempts import Deadline, RetryPolicy
from darwin_runtime.storage.manifest import File, digest
from darwin_runtime.storage.parts import Part
from darwin_runtime.storage.progress import Progress

REGISTERED_MODEL_META = "registered_model_meta"

# So many files at a time, as CPUs allow: hashing is work, and a store far away is waited for. Each holds one chunk in
# memory.
FILES_PER_CPU = 1
MIN_FILES, MAX_FILES = 3, 16

# How often what has arrived is put on disk for good, in whole files and, as it costs more, in parts: a transfer that is
# killed loses no more than this.
COMMIT_SECONDS = 1.0
SYNC_SECONDS = 5.0
LOOK_SECONDS = 1.0

# So long, after a failure, the other files have to come to an end.
END_SECONDS = 5.0

logger = logging.getLogger("darwin.transfer")


class _Stopped(Exception):
    """Another file has failed."""


class Transfer:
    """One model's way into the directory `model`, by way of `parts` on the same file system. Both are made."""

    def __init__(
        self, source: Source, model: Path, parts: Path, retry: RetryPolicy, deadline: Deadline, *, shared: bool = False
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
        self._arriving: set[Part] = set()
        self._stop = threading.Event()

    def run(self) -> list[File]:
        """Bring every file, and return them with size and sha256.

        Raises `RoleError` when there is no time, `DamagedDownload` or `StoreUnreachable` when a file's attempts are
        used up, `OSError` when the disk fails or is too small.
        """
        for directory in (self.model, self.parts):
            directory.mkdir(parents=True, exist_ok=True)
        self._left = parts.left_in(self.parts)
        what = f"list {self.source.uri}"
        files = attempts.run_with_timeout(
            self.deadline.left(), lambda: attempts.retry(self.source.files, self.retry), what
        )
        self.total = sum(file.size or 0 for file in files)
        here = self._here(files)
        self._check_space(files, here)
        with Progress(self.arrived, self.total, len(files), here):
            found = self._all(files)
        if "name" in self.source.identity:
            found = [file for file in found if file.path != REGISTERED_MODEL_META]
            found.append(self._registered_model_meta())
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
        arrived: dict[str, Part] = {}
        committed = synced = time.monotonic()
        ended: SimpleQueue[Future[tuple[File, Part | None]]] = SimpleQueue()
        # The largest first, or the last one to begin would keep all waiting.
        todo = sorted(files, key=lambda file: file.size or 0)
        at_once = min(MAX_FILES, max(MIN_FILES, FILES_PER_CPU * resources.cpu_limit()), len(files))
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
                self._check_time()
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

    def _work(self, todo: list[RemoteFile], ended: SimpleQueue[Future[tuple[File, Part | None]]]) -> None:
        """Bring files, from the end of the list, as long as there are any."""
        while not self._stop.is_set():
            try:
                file = todo.pop()
            except IndexError:
                return
            done: Future[tuple[File, Part | None]] = Future()
            attempts.settle(done, partial(self._one, file))
            ended.put(done)
            if done.exception():
                self._stop.set()

    def _commit(self, arrived: dict[str, Part]) -> None:
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

    def _one(self, file: RemoteFile) -> tuple[File, Part | None]:
        """A file, and its part unless it is in its place already."""
        local = self.model / file.path
        if local.is_file():
            size = self._done[file.path] = local.stat().st_size
            return File(file.path, size, digest(local)), None
        part = Part(self.parts, file.path)
        if left := self._left.get(part.name):
            # Never all of it: the store is asked at least once whether the file is the same still.
            part.take_over(left, sys.maxsize if file.size is None else file.size - 1, self._check, copied=self.shared)
        self._arriving.add(part)
        try:
            attempts.retry(lambda: parts.bring(part, file, self.source, self._check), self.retry, self._wait)
        except BaseException:
            part.sync()
            raise
        finally:
            self._arriving.discard(part)
        return File(file.path, part.size, part.sha256.hexdigest()), part

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped
        self._check_time()

    def _check_time(self) -> None:
        if self.deadline.left() >= 0:
            return
        # A store without a validator, as every store that its own library reads, sends a file from its start.
        if all(part.validator for part in self._arriving.copy()):
            self.deadline.check(f"download of {self.source.uri}")
        else:
            kept = "files that have arrived whole are kept for the next attempt, the others begin anew"
            self.deadline.check(f"download of {self.source.uri}", kept)

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


def _finish(path: Path) -> None:
    with disk.open_regular(path) as file:
        # A local store's own modes may keep other users' containers out. Some volumes let no mode be set.
        with contextlib.suppress(OSError):
            os.fchmod(file.fileno(), 0o644)
        with disk.about(path):
            os.fsync(file.fileno())


def start_threads(count: int, work: Callable[[], None]) -> list[threading.Thread]:
    """Threads that keep no process from ending."""
    threads = [threading.Thread(target=work, name=f"transfer-{number}", daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads
