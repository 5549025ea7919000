"""The processes of one test run share a directory, and servers that keep their files in it, each started once.

pytest-xdist runs the tests in several processes. The first that needs a server starts it, the last that needs it ends
it: each holds a lock for as long as it does, and a lock of the dead is gone.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "DARWIN_TEST_RUN"


def directory() -> Path:
    """The directory. The first process that asks makes it, and removes it at its end; its children inherit its name."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = tempfile.mkdtemp(prefix="darwin-tests-")
        atexit.register(_remove, os.getpid(), os.environ[VARIABLE])
    return Path(os.environ[VARIABLE])


def _remove(owner: int, path: str) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The path `name` in the directory, after `make` made it, in whichever process that was."""
    path = directory() / name
    path.parent.mkdir(exist_ok=True)
    with _locked(path.with_name(f"{path.name}.making")):
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            make(part)
            part.rename(path)
    return path


@contextmanager
def server(name: str, start: Callable[[Path], tuple[str, int]]) -> Iterator[str]:
    """The URI of the server `name`; `start` makes it live in a directory, and returns its URI and process group."""
    home = directory() / name
    home.mkdir(exist_ok=True)
    running = home / "running"
    with (home / "users").open("w") as users:
        with _locked(home / "changing"):
            fcntl.flock(users, fcntl.LOCK_SH)
            if not running.exists():
                running.write_text("{} {}".format(*start(home)))
            uri, group = running.read_text().split()
        try:
            yield uri
        finally:
            with _locked(home / "changing"), suppress(BlockingIOError):  # somebody else needs it
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.killpg(int(group), signal.SIGTERM)
                running.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
