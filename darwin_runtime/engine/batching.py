"""Work-conserving batching in front of one inference thread.

Whenever the thread is free it is given all that waits and may be put together; a request that comes alone waits for no
other. This module knows rows and how to put them together, neither MLflow nor HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Protocol, TypeVar

import pandas as pd

from darwin_runtime.engine.admission import Answered, BatchLimits, PendingRequest, RequestQueue
from darwin_runtime.engine.inference_thread import InferenceThread
from darwin_runtime.errors import ClientDisconnected, DeadlineExceeded
from darwin_runtime.protocols.base import Request
from darwin_runtime.schema.rows import Rows, concat

T = TypeVar("T")

# While the event loop's turns bring companions, a batch waits for more, so long at most. A request that has arrived is
# read in one turn and admitted in the next; those who just had their answer need one more to ask again.
GATHER_SECONDS = 0.005
TURNS, TURNS_IF_EXPECTED = 2, 4
# Until so large a share of those are back, a batch waits for this share of what it costs to run one.
EXPECTED_SHARE = 3 / 4
LINGER_SHARE = 1 / 4

# A client that has waited longer than this may have given up.
SUSPECT_SECONDS = 0.25

logger = logging.getLogger("darwin.batching")

Outcome = Answered | BaseException


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
        self._queue = RequestQueue(limits)
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
        # How many rows were being served when the latest batch was delivered, and when that was.
        self._around = 0
        # Whether that was a single request, and nobody had come in the meantime: then nobody is expected now.
        self._lone = True
        self._delivered = 0.0

    @property
    def stuck(self) -> float:
        """For how many seconds one batch has been running, where that is longer than a request may take; else 0."""
        running = asyncio.get_running_loop().time() - self._started if self._running else 0.0
        return running if running > self._limits.timeout else 0.0

    def check(self, count: int, size: int) -> None:
        """Raise `Overloaded` if a request of so many rows and bytes that came now would not be let in."""
        self._queue.check(count, size)

    async def predict(
        self,
        request: Request | Callable[[], Request],
        write: Callable[[Any, Request], Any],
        size: int,
        gone: Callable[[], Awaitable[bool]],
    ) -> Answered:
        """The answer to `request`, of `size` bytes, as `write` puts it; `gone` asks whether the client has left.

        A request that takes long to read is given as a function, which the inference thread calls when its turn comes:
        it waits unread, as a full batch. Raises what read, predict and write raise, `Overloaded`, `DeadlineExceeded`
        and `ClientDisconnected`.
        """
        kind, count = None, self._limits.batch_rows
        if isinstance(request, Request):
            count = max(1, request.rows.count)
            # That rows are independent is proven for the usual method alone.
            kind = request.rows.batch_key if self._batching and not (request.method or request.methods) else None
            if kind is not None and request.params:
                kind = (kind, repr(sorted(request.params.items())))
        loop = asyncio.get_running_loop()
        pending = PendingRequest(
            request, write, kind, count, size, gone, loop.create_future(), loop.time(), perf_counter()
        )
        self._queue.add(pending)
        self._watcher.queued(self._queue.rows)
        self._quiet = 0
        self._open.append(pending)
        if self._alarm is None:
            self._alarm = loop.call_later(self._limits.timeout, self._expire)
        if not self._looking and not self._running:
            if self._lone or not self._batching:
                self._run(self._take())
            else:
                self._look_again(loop)
        return await pending.answer

    def _look(self) -> None:
        """Start a batch, unless companions are arriving, which cost less now than alone."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._quiet += 1
        if self._batching and self._queue.rows < self._limits.batch_rows:
            expected = self._queue.rows < EXPECTED_SHARE * self._around
            turns = TURNS_IF_EXPECTED if expected else TURNS
            if self._quiet < turns and now - self._looked < GATHER_SECONDS:
                loop.call_soon(self._look)
                return
            linger = min(self._queue.batch_seconds * LINGER_SHARE, GATHER_SECONDS)
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
        batch = self._queue.take()
        self._watcher.queued(self._queue.rows)
        return batch

    async def _run_wanted(self, batch: list[PendingRequest]) -> None:
        """Run `batch` without the requests whose client has gone."""
        wanted = []
        for pending in batch:
            gone = False
            with contextlib.suppress(Exception):
                gone = await pending.gone()
            if pending.answer.done():
                continue
            if gone:
                pending.answer.set_exception(ClientDisconnected())
            else:
                wanted.append(pending)
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
        if self._queue.jobs and not self._looking:
            self._looking = True
            self._looked = loop.time()
            loop.call_soon(self._look)

    def _answer(self, batch: list[PendingRequest], loop: asyncio.AbstractEventLoop) -> None:
        """On the inference thread: have the model answer, and tell the event loop."""
        began = perf_counter()
        answers = self._together(batch, began) if len(batch) > 1 else [_outcome(partial(self._alone, batch[0], began))]
        with contextlib.suppress(RuntimeError):  # the loop has ended without waiting for us
            loop.call_soon_threadsafe(self._deliver, batch, answers, perf_counter() - began)

    def _alone(self, pending: PendingRequest, began: float) -> Answered:
        request = pending.request if isinstance(pending.request, Request) else pending.request()
        asked = perf_counter()
        rows, params = request.rows, request.params
        if request.methods:
            output: Any = {method: self._predict(rows, params, method) for method in request.methods}
        else:
            output = self._predict(rows, params, request.method)
        answered = perf_counter()
        reply = pending.write(output, request)
        return Answered(reply, request.rows.count, began - pending.arrived, answered - asked, perf_counter() - answered)

    def _together(self, batch: list[PendingRequest], began: float) -> list[Outcome] | None:
        """The answer to each of `batch`, which go to the model at once; None if each has to be asked alone."""
        requests = [pending.request for pending in batch if isinstance(pending.request, Request)]
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
        for pending, request, part in zip(batch, requests, parts, strict=True):
            reply = _outcome(partial(pending.write, part, request))
            after = perf_counter()
            timed = Answered(reply, request.rows.count, began - pending.arrived, computed, after - before)
            answers.append(reply if isinstance(reply, BaseException) else timed)
            before = after
        return answers

    def _deliver(self, batch: list[PendingRequest], answers: Sequence[Outcome] | None, seconds: float) -> None:
        if answers is None:
            self._queue.put_back(batch)
            answers = ()
        else:
            self._watcher.batch(sum(answer.rows for answer in answers if isinstance(answer, Answered)))
        for pending, answer in zip(batch, answers, strict=False):
            if pending.answer.done():  # too late, or nobody waits
                continue
            if isinstance(answer, BaseException):
                pending.answer.set_exception(answer)
            else:
                pending.answer.set_result(answer)
        while self._open and self._open[0].answer.done():
            self._open.popleft()
        self._lone = len(batch) + self._queue.jobs <= 1
        self._learn(seconds, sum(pending.count for pending in batch))
        self._running = []
        self._look_again(asyncio.get_running_loop())

    def _learn(self, seconds: float, rows: int) -> None:
        self._around, self._delivered = rows + self._queue.rows, asyncio.get_running_loop().time()
        self._queue.learn(seconds, rows)

    def _expire(self) -> None:
        """Answer those who have waited too long."""
        loop = asyncio.get_running_loop()
        self._alarm = None
        now = loop.time()
        while self._open and (self._open[0].answer.done() or now - self._open[0].since >= self._limits.timeout):
            pending = self._open.popleft()
            if not pending.answer.done():
                pending.answer.set_exception(DeadlineExceeded(f"no answer within {self._limits.timeout:g} seconds"))
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
