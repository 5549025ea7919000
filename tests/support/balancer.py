"""A load balancer that sends each request on once, whatever comes of it, and the clients before it.

It keeps connections open and follows a probe as the kubelet does. Who owns a backend can also take it out of rotation,
as Kubernetes does with the endpoints of a pod that it deletes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.connection import Answer, Broken, Connection, request

# For an answer, before it counts as none.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Probe:
    """As in a pod's manifest: seconds, and how many probes in a row it takes to be in rotation or out of it."""

    path: str
    period: float
    timeout: float = 1
    failures: int = 3
    successes: int = 1
    delay: float = 0

    @classmethod
    def of(cls, manifest: Mapping[str, Any], speed: float = 1) -> Probe:
        """A probe of a manifest, with what it does not say as Kubernetes has it; `speed` shortens delay and period."""
        return cls(
            manifest["httpGet"]["path"],
            manifest.get("periodSeconds", 10) / speed,
            manifest.get("timeoutSeconds", 1),
            manifest.get("failureThreshold", 3),
            manifest.get("successThreshold", 1),
            manifest.get("initialDelaySeconds", 0) / speed,
        )


@dataclass(eq=False)
class Backend:
    """`ready` as far as the probes know; `out` for good."""

    port: int
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    out: bool = False
    idle: list[Connection] = field(default_factory=list)
    asked: int = 0

    @property
    def in_rotation(self) -> bool:
        return self.ready.is_set() and not self.out


class Balancer:
    """All its methods belong to the event loop's thread."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._backends: list[Backend] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = itertools.count()

    def add(self, port: int) -> Backend:
        """Send requests to `port`, too, whenever its probes say that it is ready."""
        backend = Backend(port)
        self._backends.append(backend)
        self._tasks.add(asyncio.create_task(self._follow(backend)))
        return backend

    def take_out(self, backend: Backend) -> None:
        """Send it nothing more, and forget the connections that are not in use."""
        backend.out = True
        self._backends.remove(backend)
        for connection in list(backend.idle):
            connection.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for backend in list(self._backends):
            self.take_out(backend)

    async def ask(self, data: bytes) -> Answer:
        """The answer of whose turn it is. Raises `Broken`."""
        there = [backend for backend in self._backends if backend.in_rotation]
        if not there:
            raise Broken("nobody is ready")
        backend = there[next(self._turn) % len(there)]
        backend.asked += 1
        if backend.idle:
            connection = backend.idle.pop()
        else:
            connection = await Connection.open(
                backend.port, lambda free: self._keep(backend, free), lambda lost: _forget(backend, lost)
            )
        try:
            return await asyncio.wait_for(connection.ask(data), PATIENCE_SECONDS)
        except (asyncio.TimeoutError, TimeoutError):
            raise Broken(f"no answer within {PATIENCE_SECONDS:g} s") from None

    def _keep(self, backend: Backend, connection: Connection) -> None:
        if backend.out:
            connection.close()
        else:
            backend.idle.append(connection)

    async def _follow(self, backend: Backend) -> None:
        """Probe it, each time over a connection of its own as the kubelet does."""
        row = 0
        await asyncio.sleep(self._probe.delay)
        while not backend.out:
            well = await probe(backend.port, self._probe)
            # How many in a row say something else than what is taken to be so.
            row = row + 1 if well != backend.ready.is_set() else 0
            if row >= (self._probe.successes if well else self._probe.failures):
                row = 0
                (backend.ready.set if well else backend.ready.clear)()
            await asyncio.sleep(self._probe.period)


def _forget(backend: Backend, connection: Connection) -> None:
    if connection in backend.idle:
        backend.idle.remove(connection)


async def probe(port: int, how: Probe) -> bool:
    """Whether `port` answers as a probe wants to be answered."""
    connection = None
    try:
        connection = await asyncio.wait_for(Connection.open(port), how.timeout)
        answer = await asyncio.wait_for(
            connection.ask(request("GET", how.path, headers={"Connection": "close"})), how.timeout
        )
    except (Broken, asyncio.TimeoutError, TimeoutError):
        return False
    finally:
        if connection:
            connection.close()
    return 200 <= answer.status < 400


@dataclass
class Seen:
    """What clients saw: how many right answers, and of the others what came instead."""

    right: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.failed.total()} of {self.right + self.failed.total()} requests failed: {dict(self.failed)}"


class Clients:
    """So many at once, each asking the next of `talk` as soon as it has its answer and has slept for `pause` seconds.

    `talk` are requests, each with what tells whether an answer to it is right. `seen` is up to date at any time.
    """

    def __init__(
        self,
        ask: Callable[[bytes], Any],
        talk: Sequence[tuple[bytes, Callable[[Answer], bool]]],
        count: int,
        pause: float = 0,
    ) -> None:
        self.seen = Seen()
        self._ask, self._pause = ask, pause
        self._talk = itertools.cycle(talk)
        self._done = False
        self._tasks = [asyncio.create_task(self._work()) for _ in range(count)]

    async def _work(self) -> None:
        while not self._done:
            data, is_right = next(self._talk)
            try:
                answer = await self._ask(data)
            except Broken as broken:
                self.seen.failed[str(broken)] += 1
                # Else a dead backend would be asked a thousand times a second.
                await asyncio.sleep(0.01)
            else:
                if is_right(answer):
                    self.seen.right += 1
                else:
                    self.seen.failed[f"{answer.status} {answer.body[:200]!r}"] += 1
            await asyncio.sleep(self._pause)

    async def more(self, count: int) -> None:
        """Wait for `count` more right answers."""
        goal = self.seen.right + count
        while self.seen.right < goal:
            assert not any(task.done() for task in self._tasks), [task for task in self._tasks if task.done()]
            await asyncio.sleep(0.01)

    async def stop(self) -> Seen:
        """Let each have its last answer."""
        self._done = True
        await asyncio.gather(*self._tasks)
        return self.seen
