"""One worker process: its start by fork or as a fresh interpreter, its channel to the supervisor, and its end.

The channel is a socket pair. The worker sends a line: `READY`, or the reason of its failure. The supervisor sends a
byte once the worker may serve. A worker whose supervisor is gone sees the end of the channel, and ends.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from darwin_runtime.errors import RoleError

# The work of a process. It calls its argument once it is ready, which returns as soon as it may serve.
WorkerBody = Callable[[Callable[[], None]], None]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOP_SIGNALS, signal.SIGCHLD)
READY = "ready"

logger = logging.getLogger("darwin.workers")


# In the worker


def run_worker(channel: socket.socket, body: WorkerBody) -> int:
    """Run a worker's `body`; return the exit code.

    `channel` gets the message of an exception that `body` raises. When its other end is gone, this process ends.
    """
    channel.set_inheritable(False)
    may_serve = threading.Event()
    threading.Thread(target=_follow, args=(channel, may_serve), name="lifeline", daemon=True).start()

    def ready() -> None:
        _send_line(channel, READY)
        may_serve.wait()

    try:
        body(ready)
    except RoleError as error:
        _send_line(channel, str(error))
        return 1
    except BaseException as error:  # a model's code may raise anything
        logger.exception("unexpected %s: %s", type(error).__name__, error)
        _send_line(channel, f"unexpected {type(error).__name__}: {error}")
        return 1
    return 0


def _send_line(channel: socket.socket, text: str) -> None:
    # In one line, which is not too long to arrive at once.
    channel.sendall(" ".join(text.split())[:10_000].encode(errors="replace") + b"\n")


def _follow(channel: socket.socket, may_serve: threading.Event) -> None:
    """Set `may_serve` at a byte from the other end of `channel`; end this process, busy or not, when that is gone."""
    with contextlib.suppress(OSError):
        while channel.recv(1):
            may_serve.set()
    os._exit(1)


# In the supervisor


class Process(Protocol):
    """The part of `subprocess.Popen` that a supervisor uses."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


@dataclass
class ForkedProcess:
    """A fork of this process, as a `Process`."""

    pid: int

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@dataclass(eq=False)
class Worker:
    """A process, as its supervisor sees it.

    `kill_at` and `ready_at` are monotonic times. `failure` is the reason that the worker sent; `overdue` is the reason
    for which the supervisor killed it.
    """

    name: str
    process: Process
    channel: socket.socket
    kill_at: float = math.inf
    ready_at: float = math.inf
    failure: str = ""
    overdue: str = ""

    def __post_init__(self) -> None:
        self.channel.setblocking(False)

    def __str__(self) -> str:
        return f"{self.name} (pid {self.process.pid})"

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)  # nobody else's pid, for we have not waited for it yet

    def let_serve(self) -> None:
        with contextlib.suppress(OSError):  # it may have ended
            self.channel.send(b".")

    def receive(self) -> list[str]:
        """The lines that the worker has sent; none where there are no more, or no channel."""
        try:
            sent = self.channel.recv(1 << 16)
        except OSError:
            sent = b""
        return sent.decode(errors="replace").splitlines()


def fork(body: WorkerBody, name: str, others: Sequence[Worker]) -> Worker:
    """Start a copy of this process that runs `body`. It closes its copies of the channels of `others`."""
    ours, theirs = socket.socketpair()
    with theirs, _signals_held() as mask:
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            raise
        if not pid:
            ours.close()
            _run_fork(theirs, body, others, mask)
    return Worker(name, ForkedProcess(pid), ours)


def _run_fork(channel: socket.socket, body: WorkerBody, others: Sequence[Worker], mask: Iterable[int]) -> NoReturn:
    code = 1
    try:
        os.setsid()  # Ctrl+C is for the supervisor, which passes it on
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # Else another would not notice when the supervisor is gone.
        for other in others:
            other.channel.close()
        code = run_worker(channel, body)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)  # all else that is to be done at the end is the supervisor's


@contextlib.contextmanager
def _signals_held() -> Iterator[Iterable[int]]:
    """Signals wait; a copy made meanwhile lets them in with the yielded mask, once it has handlers of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn(command: Sequence[str], environ: Mapping[str, str], files: Sequence[int], name: str) -> Worker:
    """Start `command`, which inherits `files`. They are appended to it, with the channel for `run_worker` as last."""
    ours, theirs = socket.socketpair()
    with theirs:
        inherited = (*files, theirs.fileno())
        process = subprocess.Popen(  # noqa: S603 - the role's own command
            [*command, *map(str, inherited)], env=environ, pass_fds=inherited, start_new_session=True
        )
    return Worker(name, process, ours)


@contextlib.contextmanager
def signal_socket() -> Iterator[socket.socket]:
    """A socket that receives the number of each signal, for `supervise`. Enter it before anyone may stop us.

    The handlers stay: a signal that comes too late to matter must not change how the process ends.
    """
    arriving, noting = socket.socketpair()
    with arriving, noting:
        arriving.setblocking(False)
        noting.setblocking(False)
        signal.set_wakeup_fd(noting.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        try:
            yield arriving
        finally:
            signal.set_wakeup_fd(-1)


# What a fork cannot share


def name_thread(number: int) -> str:
    """The name that `list_handles` gives to the thread with this native id."""
    return f"thread {number}"


def list_handles() -> set[str]:
    """The threads, open files and connections of this process, as far as the system lists them."""
    handles = set()
    with contextlib.suppress(FileNotFoundError):  # not Linux
        handles = {name_thread(int(name)) for name in os.listdir("/proc/self/task")}
        for file in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was that of the list itself
                handles.add(f"{file.readlink()} as {file.name}")
    return handles


def list_new_handles(before: set[str]) -> list[str]:
    """The handles that are not among those from `before`. A thread that has ended is seen for a moment more."""
    end = time.monotonic() + 1
    while (new := list_handles() - before) and time.monotonic() < end:
        time.sleep(0.005)
    return sorted(new)


def describe_exit(code: int) -> str:
    """The end of a process with the exit code `code`, which is negative for a signal, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code == signal.SIGKILL:
        return f"was ended by {name}, probably for want of memory: raise the container's limit or lower WORKERS"
    return f"was ended by {name}"
