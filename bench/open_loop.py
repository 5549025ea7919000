"""A load generator: requests to the slow model that are sent when they are due, whatever became of those before them.

`python -m bench.open_loop`, a process of its own, reads a `InputSchema` in JSON and writes a `Seen` in JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import sys
from collections import Counter, deque
from dataclasses import dataclass, field

import uvloop

from bench.servers import SERVERS
from tests.support.connection import Answer, Broken, Connection, request

# A request that is sent so long after it was due was sent late.
LATE_SECONDS = 0.01

# What an answer that was sent in time may take to get here.
ON_THE_WAY_SECONDS = 0.1

# A client that waits for longer than `timeout` by so much gives up.
PATIENCE_SECONDS = 5.0

# Each address has ports for some 28,000 connections.
SOURCES = [f"127.0.0.{number}" for number in range(2, 10)]

REFUSALS = (429, 503)


@dataclass(frozen=True)
class Plan:
    """Ask `server` at `port` for `seconds`, for rows that take the model `cost` seconds each.

    `rate` requests a second are sent over as many connections as that takes; if it is 0, over `connections`, each with
    one request at a time. An answer may take `timeout` seconds.
    """

    server: str
    port: int
    seconds: float
    cost: float
    timeout: float
    rate: float = 0
    connections: int = 0


@dataclass
class Seen:
    """How many requests were sent, what became of them, and the medians of milliseconds of those that are timed.

    `unanswered` waited in vain, `cut` were sent too shortly before the end to say. `others` says what is broken.
    """

    sent: int = 0
    sent_late: int = 0
    most_connections: int = 0
    good: int = 0
    good_ms: float = 0
    refused: int = 0
    refused_ms: float = 0
    refused_p99_ms: float = 0
    retry_after: int = 0
    late: int = 0
    timed_out: int = 0
    wrong: int = 0
    broken: int = 0
    unanswered: int = 0
    cut: int = 0
    others: dict[str, int] = field(default_factory=dict)


class Generator:
    """Sends requests, and sees what becomes of them. All its methods belong to the event loop's thread."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._form = SERVERS[plan.server].formats["json"]
        self._loop = asyncio.get_running_loop()
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._opened = 0
        # Sent at, connection once there is one; the oldest first.
        self._waiting: deque[_Request] = deque()
        self._times: dict[str, list[float]] = {"good": [], "refused": []}
        self._others: Counter[str] = Counter()
        self.seen = Seen()

    async def run(self) -> Seen:
        if self._plan.rate:
            await self._by_the_clock()
        else:
            end = self._loop.time() + self._plan.seconds
            await asyncio.gather(*(self._in_turn(end) for _ in range(self._plan.connections)))
        self.seen.cut = sum(not request.done for request in self._waiting)
        for connection in list(self._open):
            connection.close()
        if good := self._times["good"]:
            self.seen.good_ms = statistics.median(good)
        if len(refused := self._times["refused"]) > 1:
            self.seen.refused_ms = statistics.median(refused)
            self.seen.refused_p99_ms = statistics.quantiles(refused, n=100)[98]
        self.seen.others = dict(self._others.most_common(5))
        return self.seen

    async def _by_the_clock(self) -> None:
        start = self._loop.time()
        tasks: set[asyncio.Task[None]] = set()
        for number in range(int(self._plan.rate * self._plan.seconds)):
            due = start + number / self._plan.rate
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            self.seen.sent_late += self._loop.time() - due > LATE_SECONDS
            task = self._loop.create_task(self._send())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            self._give_up()
        await asyncio.sleep(max(0.0, start + self._plan.seconds - self._loop.time()))
        for task in list(tasks):
            task.cancel()

    async def _in_turn(self, end: float) -> None:
        while self._loop.time() < end:
            await self._send()

    async def _send(self) -> None:
        """Send a request that nobody else sends, so that nobody else's answer is taken for right."""
        row = [self._plan.cost + self.seen.sent * 1e-9, True]
        self.seen.sent += 1
        body = self._form.write(["seconds", "busy"], [row])
        data = request("POST", self._form.path, body, {"Content-Type": self._form.content_type})
        sent = _Request(self._loop.time())
        self._waiting.append(sent)
        try:
            sent.connection = self._idle.pop() if self._idle else await self._connect()
            answer = await sent.connection.ask(data)
        except Broken as error:
            if not sent.done:
                self.seen.broken += 1
                self._others[str(error)] += 1
        else:
            self._take(answer, self._loop.time() - sent.at, row[0])
        sent.done = True

    async def _connect(self) -> Connection:
        self._opened += 1
        made = await Connection.open(
            self._plan.port, self._idle.append, self._forget, source=SOURCES[self._opened % len(SOURCES)]
        )
        self._open.add(made)
        self.seen.most_connections = max(self.seen.most_connections, len(self._open))
        return made

    def _forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def _take(self, answer: Answer, seconds: float, value: float) -> None:
        if answer.status == 200:
            if not self._is_right(answer.body, value):
                self.seen.wrong += 1
            elif seconds > self._plan.timeout + ON_THE_WAY_SECONDS:
                self.seen.late += 1
            else:
                self.seen.good += 1
                self._times["good"].append(seconds * 1000)
        elif answer.status in REFUSALS:
            self.seen.refused += 1
            self.seen.retry_after += b"retry-after" in answer.headers
            self._times["refused"].append(seconds * 1000)
        elif answer.status == 504:
            self.seen.timed_out += 1
        else:
            self.seen.broken += 1
            self._others[f"{answer.status} {answer.body[:100]!r}"] += 1

    def _is_right(self, body: bytes, value: float) -> bool:
        try:
            return self._form.read(body) == [value]
        except (ValueError, LookupError, TypeError):
            return False

    def _give_up(self) -> None:
        """Do what clients do who have waited for too long."""
        longest = self._plan.timeout + PATIENCE_SECONDS
        while self._waiting and (self._waiting[0].done or self._loop.time() - self._waiting[0].at > longest):
            sent = self._waiting.popleft()
            if not sent.done:
                sent.done = True
                self.seen.unanswered += 1
                if sent.connection:
                    sent.connection.close()


@dataclass(eq=False, slots=True)
class _Request:
    at: float
    connection: Connection | None = None
    done: bool = False


async def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    json.dump(dataclasses.asdict(await Generator(plan).run()), sys.stdout)


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(main())
