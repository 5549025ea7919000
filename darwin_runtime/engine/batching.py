"""Admission and work-conserving batching in front of one inference thread.

Whenever the thread is free it is given all that waits and may be put together; a request that comes alone waits for no
other. This module knows rows and how to put them together, neither MLflow nor HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar

import pandas as pd

from darwin_runtime.errors import ClientDisconnected, DeadlineExceeded, Overloaded
from darwin_runtime.schema.rows import Rows, concat

T = TypeVar("T")

# What waits may not fill the memory, however few rows it is.
MAX_QUEUE_BYTES = 64 * 1024 * 1024
# What one waiting request occupies besides its body.
REQUEST_BYTES = 4096

# While the event loop's turns bring companions, a batch waits for more, so long at most. A request that has arrived is
# read in one turn and admitted in the next; those who just had their answer need one more to ask again.
GATHER_SECONDS = 0.005
TURNS, TURNS_IF_EXPECTED = 2, 4
# Until most of those are back, a batch waits for this share of what it costs to run one.
MOST = 3 / 4
LINGER_SHARE = 1 / 4

# Who would wait for more than this share of the time a request may take is told to come back later: what is accepted is
# to be answered in time, though it be reckoned wrong by half.
WAIT_SHARE = 1 / 2
FADING = 7 / 8

# A client that has waited longer than this may have given up.
SUSPECT_SECONDS = 0.25

logger = logging.getLogger("darwin.batching")


@dataclass(frozen=True)
class BatchLimits:
    """`batch_rows` go to the model at once, `queue_rows` may wait; `timeout` is in seconds, waiting included."""

    batch_rows: int = 256
    queue_rows: int = 100_000
    timeout: float = 60


class InferenceThread:
    """One thread that runs what it is given, in order. It never keeps the process from ending."""

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        # Its count is that of the jobs. Who writes to it has let go of the interpreter's lock when the thread wakes;
        # out of a queue, the thread would wake only to wait for that, which is two more changes of the thread.
        self._signal = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        threading.Thread(target=self._work, name="inference", daemon=True).start()

    def run(self, job: Callable[[], None]) -> None:
        """Have `job` run, which raises nothing."""
        self._jobs.append(job)
        os.eventfd_write(self._signal, 1)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # whatever it is, the one waiting must hear of it
                future.set_exception(error)

        self.run(run)
        return future

    def _work(self) -> None:
        while True:
            os.eventfd_read(self._signal)
            try:
                self._jobs.popleft()()
            except BaseException:  # nobody else would answer any more
                logger.exception("a job on the inference thread failed")


class PredictionRequest(NamedTuple):
    """What to predict, and how to put the answer. `method` is the model's, if not its usual one.

    With `stream`, the answer is wanted piece by piece, which a `Batcher` has none of.
    """

    rows: Rows
    params: Mapping[str, Any]
    write: Callable[[Any], Any]
    method: str = ""
    stream: bool = False


class Answered(NamedTuple):
    """What a request's `write` made of the model's answer to `rows` rows.

    Seconds in the queue, of computing (that of the whole batch), and of writing.
    """

    reply: Any
    rows: int
    queued: float
    computed: float
    written: float


Outcome = Answered | BaseException


@dataclass(eq=False, slots=True)
class PendingRequest:
    """A request on its way through the model. `since` is the event loop's time at which it was admitted.

    One that is yet to be parsed has no `kind` that it could share with others, and counts as a full batch.
    """

    parse: Callable[[], PredictionRequest]
    kind: Hashable | None
    count: int
    size: int
    gone: Callable[[], Awaitable[bool]]
    answer: asyncio.Future[Answered]
    since: float
    arrived: float


class Watcher(Protocol):
    """Whom a `Batcher` tells what it does."""

    def batch(self, rows: int) -> None:
        """So many rows were answered together."""

    def queued(self, rows: int) -> None:
        """So many rows wait now."""


class Nobody:
    """Watches nothing."""

    def batch(self, rows: int) -> None: ...

    def queued(self, rows: int) -> None: ...


class Batcher:
    """Has `predict` answer requests on `thread`, several at once where `batching` and their rows allow it.

    All its methods belong to the event loop's thread. `on_hang` is called when the thread has been busy with one batch
    for twice the time that a request may take.
    """

    def __init__(
        self,
        predict: Callable[[Rows, Mapping[str, Any], str], Any],
        thread: InferenceThread,
        limits: BatchLimits,
        *,
        batching: bool,
        on_hang: Callable[[], None],
        watcher: Watcher = Nobody(),  # noqa: B008 - it has no state
    ) -> None:
        self._watcher = watcher
        self._predict = predict
        self._thread = thread
        self._limits = limits
        self._batching = batching
        self._on_hang = on_hang
        # What waits, by what may go together; the kinds take turns.
        self._queues: dict[Hashable, deque[PendingRequest]] = {}
        self._jobs = self._rows = self._bytes = 0
        # Admitted and, as far as is known, unanswered; the oldest first.
        self._open: deque[PendingRequest] = deque()
        self._alarm: asyncio.TimerHandle | None = None
        self._running: list[PendingRequest] = []
        # When that began; and the one that is looked after again, for it was late.
        self._started = self._watched = 0.0
        self._looking = False
        # Since when a batch is being gathered, and for how many turns of the loop nobody has come.
        self._looked = 0.0
        self._quiet = 0
        # How many rows were being served when the latest batch was delivered, and when that was; what a batch costs at
        # least, and what a row costs beyond that: seconds and rows of the latest batches, older ones counting less.
        self._around = 0
        # Whether that was a single request, and nobody had come in the meantime: then nobody is expected now.
        self._lone = True
        self._delivered = 0.0
        self._batch_seconds = math.inf
        self._seconds_beyond = self._rows_done = 0.0

    @property
    def stuck(self) -> float:
        """For how many seconds one batch has been running, where that is longer than a request may take; else 0."""
        running = asyncio.get_running_loop().time() - self._started if self._running else 0.0
        return running if running > self._limits.timeout else 0.0

    @property
    def _wait(self) -> float:
        """The seconds that what waits will take, going by what batches have cost lately; 0 before there was any."""
        if self._batch_seconds == math.inf:
            return 0.0
        batches = min(self._jobs, len(self._queues) + self._rows / self._limits.batch_rows)
        return batches * self._batch_seconds + self._rows * self._seconds_beyond / self._rows_done

    def check(self, count: int, size: int) -> None:
        """Raise `Overloaded` if a request of so many rows and bytes that came now would not be let in."""
        if not self._rows:
            return
        full = self._rows + count > self._limits.queue_rows or self._bytes + size + REQUEST_BYTES > MAX_QUEUE_BYTES
        if full or self._wait > WAIT_SHARE * self._limits.timeout:
            raise Overloaded(max(1, math.ceil(self._wait)))

    async def predict(self, request: PredictionRequest, size: int, gone: Callable[[], Awaitable[bool]]) -> Answered:
        """The answer to `request`, of `size` bytes; `gone` tells whether the client still waits.

        Raises what predict and write raise, `Overloaded`, `DeadlineExceeded` and `ClientDisconnected`.
        """
        # That rows are independent is proven for the usual method alone.
        kind = request.rows.batch_key if self._batching and not request.method else None
        if kind is not None and request.params:
            kind = (kind, repr(sorted(request.params.items())))
        return await self._answered(lambda: request, kind, request.rows.count, size, gone)

    async def parse_and_predict(
        self, parse: Callable[[], PredictionRequest], size: int, gone: Callable[[], Awaitable[bool]]
    ) -> Answered:
        """The same for a request that takes long to parse: that, too, then waits its turn and is off the event loop.

        Raises what parse raises, too.
        """
        return await self._answered(parse, None, self._limits.batch_rows, size, gone)

    async def _answered(
        self,
        parse: Callable[[], PredictionRequest],
        kind: Hashable | None,
        count: int,
        size: int,
        gone: Callable[[], Awaitable[bool]],
    ) -> Answered:
        self.check(count, size)
        loop = asyncio.get_running_loop()
        size += REQUEST_BYTES
        job = PendingRequest(parse, kind, count, size, gone, loop.create_future(), loop.time(), perf_counter())
        self._queues.setdefault(job if kind is None else kind, deque()).append(job)
        self._jobs += 1
        self._rows += count
        self._bytes += size
        self._watcher.queued(self._rows)
        self._quiet = 0
        self._open.append(job)
        if self._alarm is None:
            self._alarm = loop.call_later(self._limits.timeout, self._expire)
        if not self._looking and not self._running:
            if self._lone or not self._batching:
                self._run(self._take())
            else:
                self._look_again(loop)
        return await job.answer

    def _look(self) -> None:
        """Start a batch, unless companions are arriving, which cost less now than alone."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._quiet += 1
        if self._batching and self._rows < self._limits.batch_rows:
            expected = self._rows < MOST * self._around
            turns = TURNS_IF_EXPECTED if expected else TURNS
            if self._quiet < turns and now - self._looked < GATHER_SECONDS:
                loop.call_soon(self._look)
                return
            linger = min(self._batch_seconds * LINGER_SHARE, GATHER_SECONDS)
            if expected and now - self._delivered < linger:
                loop.call_later(linger / 4, self._look)
                return
        self._looking = False
        batch = self._take()
        if batch and loop.time() - batch[0].since > SUSPECT_SECONDS:
            self._looking = True
            task = loop.create_task(self._run_wanted(batch))
            task.add_done_callback(lambda done: done.result())
        else:
            self._run(batch)

    def _take(self) -> list[PendingRequest]:
        """The next batch, off the queue."""
        batch: list[PendingRequest] = []
        count = 0
        while self._queues and not batch:
            key = next(iter(self._queues))
            waiting = self._queues.pop(key)
            while waiting and (not batch or count + waiting[0].count <= self._limits.batch_rows):
                job = waiting.popleft()
                self._jobs -= 1
                self._rows -= job.count
                self._bytes -= job.size
                if not job.answer.done():
                    batch.append(job)
                    count += job.count
            if waiting:
                self._queues[key] = waiting
        self._watcher.queued(self._rows)
        return batch

    async def _run_wanted(self, batch: list[PendingRequest]) -> None:
        """Run `batch` without the jobs whose client has gone."""
        wanted = []
        for job in batch:
            gone = False
            with contextlib.suppress(Exception):
                gone = await job.gone()
            if job.answer.done():
                continue
            if gone:
                job.answer.set_exception(ClientDisconnected())
            else:
                wanted.append(job)
        self._looking = False
        self._run(wanted)

    def _run(self, batch: list[PendingRequest]) -> None:
        loop = asyncio.get_running_loop()
        self._running = batch
        if not batch:
            self._look_again(loop)
            return
        self._started = loop.time()
        self._thread.run(lambda: self._answer(batch, loop))

    def _look_again(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._queues and not self._looking:
            self._looking = True
            self._looked = loop.time()
            loop.call_soon(self._look)

    def _answer(self, batch: list[PendingRequest], loop: asyncio.AbstractEventLoop) -> None:
        """On the inference thread: have the model answer, and tell the event loop."""
        began = perf_counter()
        answers = self._together(batch, began) if len(batch) > 1 else [_outcome(partial(self._alone, batch[0], began))]
        with contextlib.suppress(RuntimeError):  # the loop has ended without waiting for us
            loop.call_soon_threadsafe(self._deliver, batch, answers, perf_counter() - began)

    def _alone(self, job: PendingRequest, began: float) -> Answered:
        request = job.parse()
        asked = perf_counter()
        output = self._predict(request.rows, request.params, request.method)
        answered = perf_counter()
        reply = request.write(output)
        return Answered(reply, request.rows.count, began - job.arrived, answered - asked, perf_counter() - answered)

    def _together(self, batch: list[PendingRequest], began: float) -> list[Outcome] | None:
        """The answer to each of `batch`, which go to the model at once; None if each has to be asked alone."""
        requests = [job.parse() for job in batch]
        counts = [request.rows.count for request in requests]
        try:
            output = self._predict(concat([request.rows for request in requests]), requests[0].params, "")
            parts = split(output, counts)
        except BaseException:
            return None  # alone, each gets the error that is its own
        if parts is None:
            logger.warning("the model does not answer with a row for each of several: rows are not batched any more")
            self._batching = False
            return None
        before = perf_counter()
        computed = before - began
        answers: list[Outcome] = []
        for job, request, part in zip(batch, requests, parts, strict=True):
            reply = _outcome(partial(request.write, part))
            after = perf_counter()
            timed = Answered(reply, request.rows.count, began - job.arrived, computed, after - before)
            answers.append(reply if isinstance(reply, BaseException) else timed)
            before = after
        return answers

    def _deliver(self, batch: list[PendingRequest], answers: Sequence[Outcome] | None, seconds: float) -> None:
        if answers is None:
            self._put_back(batch)
            answers = ()
        else:
            self._watcher.batch(sum(answer.rows for answer in answers if isinstance(answer, Answered)))
        for job, answer in zip(batch, answers, strict=False):
            if job.answer.done():  # too late, or nobody waits
                continue
            if isinstance(answer, BaseException):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)
        while self._open and self._open[0].answer.done():
            self._open.popleft()
        self._lone = len(batch) + self._jobs <= 1
        self._learn(seconds, sum(job.count for job in batch))
        self._running = []
        self._look_again(asyncio.get_running_loop())

    def _put_back(self, batch: list[PendingRequest]) -> None:
        """Have each of `batch` go next, alone."""
        self._queues = {**{job: deque([job]) for job in batch}, **self._queues}
        self._jobs += len(batch)
        self._rows += sum(job.count for job in batch)
        self._bytes += sum(job.size for job in batch)

    def _learn(self, seconds: float, rows: int) -> None:
        self._around, self._delivered = rows + self._rows, asyncio.get_running_loop().time()
        self._batch_seconds = min(seconds, self._batch_seconds * 1.05 + 1e-6)
        self._seconds_beyond = self._seconds_beyond * FADING + seconds - self._batch_seconds
        self._rows_done = self._rows_done * FADING + rows

    def _expire(self) -> None:
        """Answer those who have waited too long."""
        loop = asyncio.get_running_loop()
        self._alarm = None
        now = loop.time()
        while self._open and (self._open[0].answer.done() or now - self._open[0].since >= self._limits.timeout):
            job = self._open.popleft()
            if not job.answer.done():
                job.answer.set_exception(DeadlineExceeded(f"no answer within {self._limits.timeout:g} seconds"))
        if self._open:
            self._alarm = loop.call_at(self._open[0].since + self._limits.timeout, self._expire)
        if self._running and self._watched != self._started:
            self._watched = self._started
            loop.call_at(self._started + 2 * self._limits.timeout, self._check, self._started)

    def _check(self, started: float) -> None:
        if self._running and self._started == started:
            self._on_hang()


def _outcome(get: Callable[[], T]) -> T | BaseException:
    try:
        return get()
    except BaseException as error:  # whatever it is, the one waiting must hear of it
        return error


def split(output: Any, counts: Sequence[int]) -> list[Any] | None:
    """`output` cut into parts of `counts` rows; None unless it is rows, as many as that."""
    if not hasattr(output, "__len__") or isinstance(output, (str, bytes, Mapping)) or len(output) != sum(counts):
        return None
    rows = output.iloc if isinstance(output, (pd.DataFrame, pd.Series)) else output
    ends = 0
    parts = []
    for count in counts:
        parts.append(rows[ends : ends + count])
        ends += count
    return parts
