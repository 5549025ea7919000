"""The supervisor of several processes behind one socket: load once, fork, replace, drain. Without HTTP or MLflow.

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
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from darwin_runtime.engine import processes
from darwin_runtime.engine.processes import READY, STOP_SIGNALS, Worker, WorkerBody
from darwin_runtime.errors import RoleError
from darwin_runtime.resources import return_free_memory

T = TypeVar("T")

# The time in which a copy has to prove itself. One that is only slow costs memory: see `_stop_sharing`.
PROOF_SECONDS = 60.0

# A worker that was ready for so long and then dies was no failed start.
STEADY_SECONDS = 60.0
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.1, 30.0

# So many deaths before any worker was ever ready end the role.
MAX_FAILED_STARTS = 5

# For the placeholder server to answer those whose connection it has accepted.
PLACEHOLDER_STOP_SECONDS = 10.0

logger = logging.getLogger("darwin.workers")


@dataclass(frozen=True)
class WorkerJob(Generic[T]):
    """The work of the processes.

    `placeholder` serves `listener` while nothing is loaded, until SIGTERM; once it accepts no more, it calls its
    argument. `fetch`, then `load` are run once. `work` has what was loaded and proves it, calls its last argument, and
    serves until SIGTERM; its second is the worker's number, from 1 on. `command` is what to run in `environ` for a
    worker that loads what was fetched and does the same; its number, `files`, which it inherits, and the file
    descriptor of the channel for `run_worker` are appended to it. Workers that have not ended in `stop_seconds` when
    asked to are killed.
    """

    listener: socket.socket
    placeholder: WorkerBody
    fetch: Callable[[], None]
    load: Callable[[], T]
    work: Callable[[T, int, Callable[[], None]], None]
    command: Sequence[str]
    environ: Mapping[str, str]
    files: Sequence[int]
    stop_seconds: float


def supervise(count: int, job: WorkerJob[T], arriving: socket.socket) -> None:
    """Keep `count` workers at `job` until a signal comes; `arriving` is a `signal_socket`. Closes the listener then.

    Raises what loading raised, and `RoleError` if no worker ever gets ready.
    """
    _Supervisor(count, job, arriving).run()


@dataclass
class Slot:
    """The place of one worker at a time; the next may start at the monotonic time `due`."""

    number: int
    worker: Worker | None = None
    failures: int = 0  # since one was steady
    due: float = 0.0

    @property
    def name(self) -> str:
        return f"worker {self.number}"


class _Supervisor(Generic[T]):
    def __init__(self, count: int, job: WorkerJob[T], arriving: socket.socket) -> None:
        self._job = job
        self._slots = [Slot(number) for number in range(1, count + 1)]
        self._placeholder: Worker | None = None
        self._start: Callable[[Slot], Worker] | None = None  # once it is known how
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
            # Operators search the log for this name.
            self._placeholder = self._fork(self._job.placeholder, "the placeholder server")
            self._load()
            while not (self._stopping and not self._running()):
                for key, _ in self._selector.select(self._select_timeout()):
                    key.data()
                self._reap()
                self._kill_overdue()
                if self._dropped:  # nothing holds what was loaded any more
                    self._dropped = False
                    gc.collect()
                    return_free_memory()
                self._fill_slots()
        finally:
            for worker in self._running():
                worker.send_signal(signal.SIGKILL)
                worker.process.wait()
                self._close_channel(worker)
            self._selector.close()

    def _running(self) -> list[Worker]:
        return [worker for worker in (self._placeholder, *(slot.worker for slot in self._slots)) if worker]

    def _select_timeout(self) -> float | None:
        """Seconds until something is due."""
        due = [worker.kill_at for worker in self._running()] + [slot.due for slot in self._free_slots()]
        first = min(due, default=math.inf)
        return None if first == math.inf else max(0.0, first - time.monotonic())

    def _take_signals(self) -> None:
        for number in self._arriving.recv(4096):
            if number in STOP_SIGNALS:
                self._stop(number)

    def _stop(self, number: int) -> None:
        """Ask all to end, and when asked again, make them."""
        again, self._stopping = self._stopping, True
        # Who connects after the last worker closed its own is to be refused, not left waiting for nobody.
        self._job.listener.close()
        for worker in self._running():
            worker.send_signal(signal.SIGKILL if again else number)
            worker.let_serve()  # to see that there is nothing left to do
            worker.kill_at = time.monotonic() + self._job.stop_seconds

    # Loading

    def _load(self) -> None:
        """Load on a thread, so that signals are handled meanwhile."""
        done, loading = socket.socketpair()
        outcome: Future[T] = Future()
        before: set[str] = set()

        def load() -> None:
            with loading:
                try:
                    self._job.fetch()
                    before.update(processes.list_handles())
                    before.discard(processes.name_thread(threading.get_native_id()))
                    outcome.set_result(self._job.load())
                except BaseException as error:  # raised again on the main thread
                    outcome.set_exception(error)

        def loaded() -> None:
            self._selector.unregister(done)
            done.close()
            self._share(outcome.result(), before)

        self._selector.register(done, selectors.EVENT_READ, loaded)
        threading.Thread(target=load, name="loading", daemon=True).start()

    def _share(self, resource: T, handles_before: set[str]) -> None:
        self._start = partial(self._fork_worker, resource)
        if new := processes.list_new_handles(handles_before):
            self._stop_sharing(f"what was loaded holds what processes cannot share ({', '.join(new[:9])})")
            return
        # What the collector marks would no longer be shared.
        gc.freeze()

    def _stop_sharing(self, why: str) -> None:
        logger.warning(
            "%s. So each worker loads for itself: that takes longer, and each needs the memory that all could share",
            why,
        )
        self._sharing = False
        self._start = self._spawn_worker
        gc.unfreeze()
        gc.enable()
        self._dropped = True

    # Starts

    def _free_slots(self) -> list[Slot]:
        """Those to be filled. Before the first worker has proven itself, there is only that one."""
        if self._stopping or not self._start:
            return []
        return [slot for slot in (self._slots if self._proven else self._slots[:1]) if not slot.worker]

    def _fill_slots(self) -> None:
        for slot in self._free_slots():
            if self._start and slot.due <= time.monotonic():
                try:
                    slot.worker = self._start(slot)
                except OSError as error:  # out of memory, or of processes
                    self._schedule_restart(slot, f"{slot.name} cannot be started: {error}")

    def _fork_worker(self, resource: T, slot: Slot) -> Worker:
        worker = self._fork(partial(self._job.work, resource, slot.number), slot.name)
        worker.kill_at = time.monotonic() + PROOF_SECONDS
        return worker

    def _fork(self, body: WorkerBody, name: str) -> Worker:
        return self._listen_to(processes.fork(body, name, self._running()))

    def _spawn_worker(self, slot: Slot) -> Worker:
        job = self._job
        command = [*job.command, str(slot.number)]
        return self._listen_to(processes.spawn(command, job.environ, job.files, slot.name))

    def _listen_to(self, worker: Worker) -> Worker:
        self._selector.register(worker.channel, selectors.EVENT_READ, partial(self._receive, worker))
        return worker

    # Lives and deaths

    def _receive(self, worker: Worker) -> None:
        lines = worker.receive()
        if not lines:
            self._close_channel(worker)
        for line in lines:
            if line == READY:
                self._note_ready(worker)
            else:
                worker.failure = line

    def _note_ready(self, worker: Worker) -> None:
        worker.ready_at = time.monotonic()
        if worker is not self._placeholder and not self._stopping:
            logger.info("%s is ready", worker)
            worker.kill_at = math.inf
            self._proven = True
        self._hand_over()

    def _hand_over(self) -> None:
        """Let the ready workers serve, after the placeholder server has closed: it would contradict them."""
        placeholder = self._placeholder
        if placeholder and self._proven and placeholder.kill_at == math.inf:
            placeholder.send_signal(signal.SIGTERM)
            placeholder.kill_at = time.monotonic() + PLACEHOLDER_STOP_SECONDS
        if not placeholder or placeholder.ready_at < math.inf:
            for worker in self._running():
                if worker.ready_at < math.inf:
                    worker.let_serve()

    def _kill_overdue(self) -> None:
        for worker in self._running():
            if worker.kill_at <= time.monotonic():
                leaving = self._stopping or worker is self._placeholder
                worker.overdue = f"did not {'end' if leaving else 'get ready'} in time and was killed"
                worker.kill_at = math.inf
                worker.send_signal(signal.SIGKILL)

    def _close_channel(self, worker: Worker) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it may have been closed already
            self._selector.unregister(worker.channel)
        worker.channel.close()

    def _reap(self) -> None:
        """See who has ended, and what follows from that."""
        placeholder = self._placeholder
        if placeholder and (code := placeholder.process.poll()) is not None:
            self._placeholder = None
            how = self._describe_end(placeholder, code)
            if not (self._proven or self._stopping):
                logger.error("%s %s: nothing answers until a worker is ready", placeholder, how)
            self._hand_over()
        for slot in self._slots:
            worker = slot.worker
            if worker and (code := worker.process.poll()) is not None:
                slot.worker = None
                self._replace(slot, worker, self._describe_end(worker, code))

    def _describe_end(self, worker: Worker, code: int) -> str:
        self._receive(worker)  # the lines that have not been read yet
        self._close_channel(worker)
        return f"failed: {worker.failure}" if worker.failure else worker.overdue or processes.describe_exit(code)

    def _replace(self, slot: Slot, worker: Worker, how: str) -> None:
        if self._stopping:
            if worker.overdue:
                logger.warning("%s %s", worker, how)
        elif not self._proven and self._sharing:
            # It may be the copy that does not work, and not what was copied.
            self._stop_sharing(f"{worker}, a copy of the process that loaded, {how}")
        elif not self._proven and worker.failure:
            raise RoleError(worker.failure)
        else:
            if time.monotonic() - worker.ready_at >= STEADY_SECONDS:
                slot.failures = 0
            self._schedule_restart(slot, f"{worker} {how}")

    def _schedule_restart(self, slot: Slot, why: str) -> None:
        slot.failures += 1
        if not self._proven and slot.failures >= MAX_FAILED_STARTS:
            raise RoleError(f"{why}; so did {MAX_FAILED_STARTS - 1} before it, and none was ever ready")
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (slot.failures - 1), MAX_PAUSE_SECONDS)
        slot.due = time.monotonic() + pause
        logger.error("%s; starting another in %g s", why, pause)
