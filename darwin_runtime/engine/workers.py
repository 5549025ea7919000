"""Several processes behind one socket: loaded once, forked, supervised, drained. Knows neither HTTP nor MLflow.

The parent loads and never uses what it loaded, so that its copies can: it runs no event loop, and the one thread it
ever has is gone before it forks. A fork does not copy threads, nor does it free locks, and two processes that use one
connection or file get each other's data. So where loading leaves threads or open files, or where the first copy can't
prove that it works, nothing is shared: workers are then fresh interpreters that each load by themselves.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, NoReturn, Protocol, TypeVar

from darwin_runtime import allocator
from darwin_runtime.errors import RoleError

T = TypeVar("T")

# What a worker does. It calls its argument once it is ready, which returns as soon as it may serve.
Body = Callable[[Callable[[], None]], None]

# How long a copy may take to prove itself. One that is only slow costs memory: see `_share_no_more`.
PROOF_SECONDS = 60.0

# A worker that was ready for so long and then dies was no failed start.
STEADY_SECONDS = 60.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 30.0

# So many deaths before any worker was ever ready end the role.
HOPELESS = 5

# For the waiting room to answer those whose connection it has accepted.
LEAVE_SECONDS = 10.0

STOPPING = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOPPING, signal.SIGCHLD)
READY = "ready"

logger = logging.getLogger("darwin.workers")


# A worker


def run_worker(channel: socket.socket, body: Body) -> int:
    """Run a worker's `body`; return the exit code.

    What `body` raises is told through `channel`. When the other end of that is gone, this process ends.
    """
    channel.set_inheritable(False)
    go = threading.Event()
    threading.Thread(target=_end_with, args=(channel, go), name="lifeline", daemon=True).start()

    def ready() -> None:
        _say(channel, READY)
        go.wait()

    try:
        body(ready)
    except RoleError as error:
        _say(channel, str(error))
        return 1
    except BaseException as error:  # a model's code may raise anything
        logger.exception("unexpected %s: %s", type(error).__name__, error)
        _say(channel, f"unexpected {type(error).__name__}: {error}")
        return 1
    return 0


def _say(channel: socket.socket, text: str) -> None:
    # In one line, which is not too long to arrive at once.
    channel.sendall(" ".join(text.split())[:10_000].encode(errors="replace") + b"\n")


def _end_with(channel: socket.socket, go: threading.Event) -> None:
    """Set `go` at a word from the other end of `channel`; end this process, whatever it is doing, when that is gone."""
    with contextlib.suppress(OSError):
        while channel.recv(1):
            go.set()
    os._exit(1)


# The supervisor


@dataclass(frozen=True)
class WorkerJob(Generic[T]):
    """What the processes do.

    `wait` serves `listener` while nothing is loaded, until SIGTERM; once it accepts no more, it calls its argument.
    `fetch`, then `load` are run once. `work` has what was loaded and proves it, calls its last argument, and serves
    until SIGTERM; its second is the worker's number, from 1 on. `command` is what to run in `environ` for a worker that
    loads what was fetched and does the same; its number, `files`, which it inherits, and the file descriptor of the
    channel for `run_worker` are appended to it. Workers that have not ended in `stop_seconds` when asked to are killed.
    """

    listener: socket.socket
    wait: Body
    fetch: Callable[[], None]
    load: Callable[[], T]
    work: Callable[[T, int, Callable[[], None]], None]
    command: Sequence[str]
    environ: Mapping[str, str]
    files: Sequence[int]
    stop_seconds: float


@contextlib.contextmanager
def signals() -> Iterator[socket.socket]:
    """A socket from which the number of each signal can be read, for `supervise`. To be had before anyone may stop us.

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


def supervise(count: int, job: WorkerJob[T], arriving: socket.socket) -> None:
    """Keep `count` workers at `job` until a signal comes; `arriving` is from `signals`. Closes the listener then.

    Raises what loading raised, and `RoleError` if no worker ever gets ready.
    """
    _Supervisor(count, job, arriving).run()


class _Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


@dataclass
class _Forked:
    """What `subprocess.Popen` is for a process that was not forked."""

    pid: int

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@dataclass(eq=False)
class _Worker:
    """A process, to be killed at the monotonic time `kill_at`. `told`: its own word on its failure; `overdue`: ours."""

    name: str
    process: _Process
    channel: socket.socket
    kill_at: float = math.inf
    ready_at: float = math.inf
    told: str = ""
    overdue: str = ""

    def __str__(self) -> str:
        return f"{self.name} (pid {self.process.pid})"

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)  # nobody else's pid, for we have not waited for it yet

    def let_in(self) -> None:
        with contextlib.suppress(OSError):  # it may have ended
            self.channel.send(b".")


@dataclass
class _Slot:
    """Where one worker at a time is; the next may start at the monotonic time `due`."""

    number: int
    worker: _Worker | None = None
    failures: int = 0  # since one was steady
    due: float = 0.0


class _Supervisor(Generic[T]):
    def __init__(self, count: int, job: WorkerJob[T], arriving: socket.socket) -> None:
        self._job = job
        self._posts = [_Slot(number) for number in range(1, count + 1)]
        self._waiting_room: _Worker | None = None
        self._start: Callable[[int], _Worker] | None = None  # how to, by its number, once it is known
        self._sharing = True
        self._dropped = False
        self._proven = False
        self._stopping = False
        self._arriving = arriving
        # Not epoll, of which the forks would share one with us.
        self._selector = selectors.PollSelector()
        self._selector.register(arriving, selectors.EVENT_READ, self._take_signals)

    def run(self) -> None:
        try:
            self._waiting_room = self._fork(self._job.wait, "the waiting room")
            self._load()
            while not (self._stopping and not self._living()):
                for key, _ in self._selector.select(self._patience()):
                    key.data()
                self._bury()
                self._kill_overdue()
                if self._dropped:  # nothing holds what was loaded any more
                    self._dropped = False
                    gc.collect()
                    allocator.give_back()
                self._fill_posts()
        finally:
            for worker in self._living():
                worker.send(signal.SIGKILL)
                worker.process.wait()
                self._forget(worker)
            self._selector.close()

    def _living(self) -> list[_Worker]:
        return [worker for worker in (self._waiting_room, *(post.worker for post in self._posts)) if worker]

    def _patience(self) -> float | None:
        """Seconds until something is due."""
        due = [worker.kill_at for worker in self._living()] + [post.due for post in self._open_posts()]
        first = min(due, default=math.inf)
        return None if first == math.inf else max(0.0, first - time.monotonic())

    def _take_signals(self) -> None:
        for number in self._arriving.recv(4096):
            if number in STOPPING:
                self._stop(number)

    def _stop(self, number: int) -> None:
        """Ask all to end, and when asked again, make them."""
        again, self._stopping = self._stopping, True
        # Who connects after the last worker closed its own is to be refused, not left waiting for nobody.
        self._job.listener.close()
        for worker in self._living():
            worker.send(signal.SIGKILL if again else number)
            worker.let_in()  # to see that there is nothing left to do
            worker.kill_at = time.monotonic() + self._job.stop_seconds

    # Loading

    def _load(self) -> None:
        """Load on a thread, so that signals are heard meanwhile."""
        done, loading = socket.socketpair()
        outcome: Future[T] = Future()
        before: set[str] = set()

        def load() -> None:
            with loading:
                try:
                    self._job.fetch()
                    before.update(_held())
                    before.discard(_thread(threading.get_native_id()))
                    outcome.set_result(self._job.load())
                except BaseException as error:  # raised again where it can be told
                    outcome.set_exception(error)

        def loaded() -> None:
            self._selector.unregister(done)
            done.close()
            self._share(outcome.result(), before)

        self._selector.register(done, selectors.EVENT_READ, loaded)
        threading.Thread(target=load, name="loading", daemon=True).start()

    def _share(self, resource: T, held_before: set[str]) -> None:
        self._start = partial(self._copy, resource)
        if held := _held_since(held_before):
            self._share_no_more(f"what was loaded holds what processes cannot share ({', '.join(held[:9])})")
            return
        # What the collector marks would no longer be shared.
        gc.freeze()

    def _share_no_more(self, why: str) -> None:
        logger.warning(
            "%s. So each worker loads for itself: that takes longer, and each needs the memory that all could share",
            why,
        )
        self._sharing = False
        self._start = self._spawn
        gc.unfreeze()
        gc.enable()
        self._dropped = True

    # Births

    def _open_posts(self) -> list[_Slot]:
        """Those to be filled. Before the first worker has proven itself, there is only that one."""
        if self._stopping or not self._start:
            return []
        return [post for post in (self._posts if self._proven else self._posts[:1]) if not post.worker]

    def _fill_posts(self) -> None:
        for post in self._open_posts():
            if self._start and post.due <= time.monotonic():
                try:
                    post.worker = self._start(post.number)
                except OSError as error:  # out of memory, or of processes
                    self._try_again(post, f"{_name(post.number)} cannot be started: {error}")

    def _copy(self, resource: T, number: int) -> _Worker:
        worker = self._fork(partial(self._job.work, resource, number), _name(number))
        worker.kill_at = time.monotonic() + PROOF_SECONDS
        return worker

    def _fork(self, body: Body, name: str) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs, _signals_held() as mask:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if not pid:
                ours.close()
                self._be_worker(theirs, body, mask)
        return self._introduce(_Worker(name, _Forked(pid), ours))

    def _be_worker(self, channel: socket.socket, body: Body, mask: Iterable[int]) -> NoReturn:
        code = 1
        try:
            os.setsid()  # Ctrl+C is for the supervisor, which passes it on
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # Else another would not notice when the supervisor is gone.
            for worker in self._living():
                worker.channel.close()
            code = run_worker(channel, body)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # all else that is to be done at the end is the supervisor's

    def _spawn(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            files = (*self._job.files, theirs.fileno())
            command = [*self._job.command, *map(str, (number, *files))]
            process = subprocess.Popen(  # noqa: S603 - the role's own command
                command, env=self._job.environ, pass_fds=files, start_new_session=True
            )
        return self._introduce(_Worker(_name(number), process, ours))

    def _introduce(self, worker: _Worker) -> _Worker:
        worker.channel.setblocking(False)
        self._selector.register(worker.channel, selectors.EVENT_READ, partial(self._hear, worker))
        return worker

    # Lives and deaths

    def _hear(self, worker: _Worker) -> None:
        try:
            said = worker.channel.recv(1 << 16)
        except OSError:
            said = b""
        if not said:
            self._forget(worker)
        for line in said.decode(errors="replace").splitlines():
            if line == READY:
                self._welcome(worker)
            else:
                worker.told = line

    def _welcome(self, worker: _Worker) -> None:
        worker.ready_at = time.monotonic()
        if worker is not self._waiting_room and not self._stopping:
            logger.info("%s is ready", worker)
            worker.kill_at = math.inf
            self._proven = True
        self._hand_over()

    def _hand_over(self) -> None:
        """Let in the workers that are ready, after the waiting room has closed: it would contradict them."""
        room = self._waiting_room
        if room and self._proven and room.kill_at == math.inf:
            room.send(signal.SIGTERM)
            room.kill_at = time.monotonic() + LEAVE_SECONDS
        if not room or room.ready_at < math.inf:
            for worker in self._living():
                if worker.ready_at < math.inf:
                    worker.let_in()

    def _kill_overdue(self) -> None:
        for worker in self._living():
            if worker.kill_at <= time.monotonic():
                leaving = self._stopping or worker is self._waiting_room
                worker.overdue = f"did not {'end' if leaving else 'get ready'} in time and was killed"
                worker.kill_at = math.inf
                worker.send(signal.SIGKILL)

    def _forget(self, worker: _Worker) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it may have been forgotten already
            self._selector.unregister(worker.channel)
        worker.channel.close()

    def _bury(self) -> None:
        """See who has ended, and what follows from that."""
        room = self._waiting_room
        if room and (code := room.process.poll()) is not None:
            self._waiting_room = None
            how = self._last_words(room, code)
            if not (self._proven or self._stopping):
                logger.error("%s %s: nothing answers until a worker is ready", room, how)
            self._hand_over()
        for post in self._posts:
            worker = post.worker
            if worker and (code := worker.process.poll()) is not None:
                post.worker = None
                self._replace(post, worker, self._last_words(worker, code))

    def _last_words(self, worker: _Worker, code: int) -> str:
        self._hear(worker)  # what has not been heard yet
        self._forget(worker)
        return f"failed: {worker.told}" if worker.told else worker.overdue or _meaning(code)

    def _replace(self, post: _Slot, worker: _Worker, how: str) -> None:
        if self._stopping:
            if worker.overdue:
                logger.warning("%s %s", worker, how)
        elif not self._proven and self._sharing:
            # It may be the copy that does not work, and not what was copied.
            self._share_no_more(f"{worker}, a copy of the process that loaded, {how}")
        elif not self._proven and worker.told:
            raise RoleError(worker.told)
        else:
            if time.monotonic() - worker.ready_at >= STEADY_SECONDS:
                post.failures = 0
            self._try_again(post, f"{worker} {how}")

    def _try_again(self, post: _Slot, why: str) -> None:
        post.failures += 1
        if not self._proven and post.failures >= HOPELESS:
            raise RoleError(f"{why}; so did {HOPELESS - 1} before it, and none was ever ready")
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (post.failures - 1), LONGEST_PAUSE_SECONDS)
        post.due = time.monotonic() + pause
        logger.error("%s; starting another in %g s", why, pause)


def _name(number: int) -> str:
    return f"worker {number}"


@contextlib.contextmanager
def _signals_held() -> Iterator[Iterable[int]]:
    """Signals wait; a copy made meanwhile lets them in with what is yielded, once it has handlers of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _thread(number: int) -> str:
    return f"thread {number}"


def _held() -> set[str]:
    """The threads, open files and connections of this process, as far as the system tells."""
    held = set()
    with contextlib.suppress(FileNotFoundError):  # not Linux
        held = {_thread(int(name)) for name in os.listdir("/proc/self/task")}
        for file in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was that of the list itself
                held.add(f"{file.readlink()} as {file.name}")
    return held


def _held_since(before: set[str]) -> list[str]:
    """What is held that was not held `before`. A thread that has ended is seen for a moment more."""
    end = time.monotonic() + 1
    while (held := _held() - before) and time.monotonic() < end:
        time.sleep(0.005)
    return sorted(held)


def _meaning(code: int) -> str:
    """What the exit code `code` of a process, negative for a signal, says of its end."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code == signal.SIGKILL:
        return f"was ended by {name}, probably for want of memory: raise the container's limit or lower WORKERS"
    return f"was ended by {name}"
