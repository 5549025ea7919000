"""Roles in processes that can be killed before any chosen step on disk, at any time, or let live.

Every file that is created, renamed or removed is announced by Python itself (its audit events), so each is a place to
be killed at, and none is forgotten. The roles run in forks of a process that has imported everything
(`tests/support/prepared.py`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support import prepared

KILLED = -signal.SIGKILL

# These change the disk; `open` does so where it is for writing.
_CHANGES = {
    *("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.utime", "os.chmod"),
    "os.truncate",
}


@dataclass(frozen=True)
class Run:
    """One run of a role.

    `within` are the directories whose changes count. It is killed before change number `at`, or `after` seconds.
    `patch` names a function of this module that changes the role's process first.
    """

    role: str
    environ: Mapping[str, str]
    within: tuple[str, ...] = ()
    at: int | None = None
    after: float | None = None
    arguments: tuple[str, ...] = ()
    patch: str = ""


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (or minus the signal), what it logged, the changes that it made or was about to."""

    code: int
    err: str
    changes: list[str] = field(default_factory=list)


def run(*runs: Run) -> list[Ended]:
    """Run them at once, each to its end."""
    return [_end(*one) for one in [_start(one) for one in runs]]


def _start(one: Run) -> tuple[Run, prepared.Process, int, int]:
    log, changes = os.memfd_create("log"), os.memfd_create("changes")
    environ = dict(one.environ)
    if one.at is None and one.after is None and "COVERAGE_PROCESS_CONFIG" in os.environ:
        # A process that is killed measures no coverage: it could leave half a file of it.
        environ["COVERAGE_PROCESS_CONFIG"] = os.environ["COVERAGE_PROCESS_CONFIG"]
    what = json.dumps(asdict(one)), f"/proc/{os.getpid()}/fd/{changes}"
    return one, prepared.start("-c", _CODE, *what, env=environ, stdout=log, stderr=log), log, changes


def _end(one: Run, process: prepared.Process, log: int, changes: int) -> Ended:
    if one.after is not None:
        time.sleep(one.after)
        process.kill()
    ended = Ended(process.wait(timeout=120), _read(log), _read(changes).splitlines())
    os.close(log)
    os.close(changes)
    return ended


def _read(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()


# In the other process

_CODE = "from tests.support import killing; killing.main()"


def main() -> None:
    """Run the role of the `Run` that `argv` has as JSON, writing its changes to a file."""
    import cleanup
    import download

    one = Run(**json.loads(sys.argv[1]))
    noted = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
    if one.patch:
        globals()[one.patch]()
    sys.addaudithook(_hook(tuple(one.within), one.at, noted))
    code = {"download": download, "cleanup": cleanup}[one.role].main(os.environ, *map(Path, one.arguments))
    sys.stderr.flush()
    os._exit(code)


def no_locks() -> None:
    """Every downloader gets the lock at once."""
    from darwin_runtime.storage import locks
    from darwin_runtime.storage.cache import Cache

    def try_lock(cache: Cache, key: str, owner: str) -> locks.Lock:
        path = cache.root / ".locks" / f"{key}.{os.getpid()}"
        return locks.Lock(path, os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), owner, inherited=False)

    locks.try_lock = try_lock


def quick_heartbeat() -> None:
    """The dead are noticed soon, and leave what had arrived."""
    from darwin_runtime.storage import locks, single_flight, transfer

    transfer.COMMIT_SECONDS, transfer.SYNC_SECONDS, transfer.LOOK_SECONDS = 0.2, 0.2, 0.05
    locks.HEARTBEAT_SECONDS, locks.SILENCE_SECONDS, single_flight.POLL_SECONDS = 0.2, 1.0, 0.05


def _hook(within: tuple[str, ...], at: int | None, noted: int) -> Any:
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _CHANGES or (event == "open" and not _writes(args)):
            return
        if not (paths := paths_within(event, args, within)):
            return
        os.write(noted, f"{event} {' '.join(paths)}\n".encode())
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # whichever thread this is, the process ends now
        count += 1

    return hook


def paths_within(event: str, args: tuple[Any, ...], within: tuple[str, ...]) -> list[str]:
    """The paths that an audit event is about, if one of them is in these directories; otherwise none."""
    names = args[: 1 if event == "open" else 2]  # then comes a mode
    paths = [os.fsdecode(path) for path in names if isinstance(path, str | bytes | os.PathLike)]
    # A path relative to an open directory is within a tree that is being deleted.
    return paths if any(not path.startswith("/") or path.startswith(within) for path in paths) else []


def _writes(args: tuple[Any, ...]) -> bool:
    return isinstance(args[0], str | bytes) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
