"""Roles in processes that can be killed before any chosen step on disk, at any time, or let live.

Every file that is created, renamed or removed is announced by Python itself (its audit events), so each is a place to
be killed at, and none is forgotten. The roles run in forks of one process that has imported everything: a start takes
milliseconds.

    python -m tests.killing     reads a list of runs (JSON) from each line of stdin, and answers with a list of ends
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.conftest import ROOT, clean_environ

KILLED = -signal.SIGKILL

# What changes the disk. `open` does where it is for writing.
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


class Roles:
    """A process to run roles from."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, *runs: Run) -> list[Ended]:
        """Run them at once, each to its end."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([asdict(run) for run in runs]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that runs roles has ended"
        return [Ended(**ended) for ended in json.loads(line)]


@contextmanager
def roles() -> Iterator[Roles]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.killing"],
        env=clean_environ(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Roles(process)
        assert process.stdin
        process.stdin.close()
        assert process.wait(timeout=30) == 0


# In the other process


def no_locks() -> None:
    """Every downloader gets the lock at once."""
    import darwin_cache

    def try_lock(cache: darwin_cache.Cache, key: str, owner: str) -> darwin_cache.Lock:
        path = cache.root / ".locks" / f"{key}.{os.getpid()}"
        return darwin_cache.Lock(path, os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), owner, inherited=False)

    darwin_cache.Cache.try_lock = try_lock  # type: ignore[assignment,method-assign]


def quick_heartbeat() -> None:
    """The dead are noticed soon, and leave what had arrived."""
    import darwin_cache
    import darwin_transfer
    import download

    darwin_transfer.COMMIT_SECONDS, darwin_transfer.SYNC_SECONDS, darwin_transfer.LOOK_SECONDS = 0.2, 0.2, 0.05
    darwin_cache.HEARTBEAT_SECONDS, darwin_cache.SILENCE_SECONDS, download.POLL_SECONDS = 0.2, 1.0, 0.05


def _serve() -> None:
    import cleanup
    import darwin_mlflow
    import download

    modules = {"download": download, "cleanup": cleanup}
    darwin_mlflow.prepare()
    from mlflow import MlflowClient  # noqa: F401 - what the roles import when they need it
    from mlflow.store.artifact import http_artifact_repo, mlflow_artifacts_repo, models_artifact_repo  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        began = [(run, *_start(modules[run["role"]], run)) for run in asked]
        print(json.dumps([_end(*one) for one in began]), flush=True)  # noqa: T201 - to who asked


def _start(module: ModuleType, run: Mapping[str, Any]) -> tuple[int, int, int]:
    log, noted = os.memfd_create("log"), os.memfd_create("changes")
    child = os.fork()
    if child:
        return child, log, noted
    code = 70
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(run["environ"])
        if run["patch"]:
            globals()[run["patch"]]()
        sys.addaudithook(_hook(tuple(run["within"]), run["at"], noted))
        code = module.main(os.environ, *map(Path, run["arguments"]))
        sys.stderr.flush()
    finally:
        os._exit(code)


def _end(run: Mapping[str, Any], child: int, log: int, noted: int) -> dict[str, Any]:
    if run["after"] is not None:
        time.sleep(run["after"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found = {"code": os.waitstatus_to_exitcode(status), "err": _read(log), "changes": _read(noted).splitlines()}
    os.close(log)
    os.close(noted)
    return found


def _read(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()


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


if __name__ == "__main__":
    _serve()
