"""The queue in front of the model: which requests may wait there, for how long they would, and which go next.

All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from darwin_runtime.errors import Overloaded
from darwin_runtime.protocols.base import Request

# Waiting requests may not fill the memory, however few rows they have.
MAX_QUEUE_BYTES = 64 * 1024 * 1024
# A waiting request occupies this much besides its body.
REQUEST_BYTES = 4096

# Requests that would wait longer than this share of their timeout are rejected. Estimates can be off by a factor of
# two.
WAIT_SHARE = 1 / 2
FADING = 7 / 8


@dataclass(frozen=True)
class BatchLimits:
    """`batch_rows` go to the model at once, `queue_rows` may wait; `timeout` is in seconds, waiting included."""

    batch_rows: int = 256
    queue_rows: int = 100_000
    timeout: float = 60


class Answered(NamedTuple):
    """The reply made of the model's answer to `rows` rows.

    Seconds in the queue, of computing (that of the whole batch), and of writing.
    """

    reply: Any
    rows: int
    queued: float
    computed: float
    written: float


@dataclass(eq=False, slots=True)
class PendingRequest:
    """A request on its way through the model. `since` is the event loop's time at which it was admitted.

    A `request` that takes long to read is a function that reads it. `write` makes the model's answer a reply. Requests
    of one `kind` may go together; those with None go alone.
    """

    request: Request | Callable[[], Request]
    write: Callable[[Any, Request], Any]
    kind: Hashable | None
    count: int
    size: int
    gone: Callable[[], Awaitable[bool]]
    answer: asyncio.Future[Answered]
    since: float
    arrived: float


class RequestQueue:
    """Requests that wait, by what may go together; the kinds take turns. `jobs` and `rows` are how many wait."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._kinds: dict[Hashable, deque[PendingRequest]] = {}
        self.jobs = self.rows = self._bytes = 0
        # What a batch costs at least, and what a row costs beyond that: seconds and rows of the latest batches, older
        # ones counting less.
        self.batch_seconds = math.inf
        self._seconds_beyond = self._rows_done = 0.0

    @property
    def wait(self) -> float:
        """The seconds that what waits will take, going by what batches have cost lately; 0 before there was any."""
        if self.batch_seconds == math.inf:
            return 0.0
        batches = min(self.jobs, len(self._kinds) + self.rows / self._limits.batch_rows)
        return batches * self.batch_seconds + self.rows * self._seconds_beyond / self._rows_done

    def check(self, count: int, size: int) -> None:
        """Raise `Overloaded` if a request of so many rows and bytes that came now would not be let in."""
        if not self.rows:
            return
        full = self.rows + count > self._limits.queue_rows or self._bytes + size + REQUEST_BYTES > MAX_QUEUE_BYTES
        if full or self.wait > WAIT_SHARE * self._limits.timeout:
            raise Overloaded(max(1, math.ceil(self.wait)))

    def add(self, pending: PendingRequest) -> None:
        """Let it in. Raises `Overloaded`."""
        self.check(pending.count, pending.size)
        self._kinds.setdefault(pending if pending.kind is None else pending.kind, deque()).append(pending)
        self.jobs += 1
        self.rows += pending.count
        self._bytes += pending.size + REQUEST_BYTES

    def take(self) -> list[PendingRequest]:
        """The next batch, off the queue."""
        batch: list[PendingRequest] = []
        count = 0
        while self._kinds and not batch:
            kind = next(iter(self._kinds))
            waiting = self._kinds.pop(kind)
            while waiting and (not batch or count + waiting[0].count <= self._limits.batch_rows):
                pending = waiting.popleft()
                self.jobs -= 1
                self.rows -= pending.count
                self._bytes -= pending.size + REQUEST_BYTES
                if not pending.answer.done():
                    batch.append(pending)
                    count += pending.count
            if waiting:
                self._kinds[kind] = waiting
        return batch

    def put_back(self, batch: list[PendingRequest]) -> None:
        """Have each of `batch` go next, alone."""
        self._kinds = {**{pending: deque([pending]) for pending in batch}, **self._kinds}
        self.jobs += len(batch)
        self.rows += sum(pending.count for pending in batch)
        self._bytes += sum(pending.size + REQUEST_BYTES for pending in batch)

    def learn(self, seconds: float, rows: int) -> None:
        """Go by a batch of so many rows that took so many seconds, too."""
        self.batch_seconds = min(seconds, self.batch_seconds * 1.05 + 1e-6)
        self._seconds_beyond = self._seconds_beyond * FADING + seconds - self.batch_seconds
        self._rows_done = self._rows_done * FADING + rows
