"""What a restart costs requests, behind a load balancer that follows a readiness route and sends nothing twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from bench import load, processes
from bench.outcome import Outcome, Row, void_text
from bench.processes import Failed
from bench.samples import Sample
from bench.servers import OURS, SERVERS, Started
from tests.support.balancer import Backend, Balancer, Clients, Probe, Seen
from tests.support.connection import Answer, request

MODEL = "logistic"

NAMES = (OURS, "mlflow", "mlserver")

# Every fifth of a second, and five failures in a row to be out of rotation: some second, as long as it takes clusters.
PROBE_SECONDS, PROBE_FAILURES = 0.2, 5

CLIENTS = 16
# Between an answer and the next request of a client.
PAUSE_SECONDS = 0.05

# Before a server that was told to end is ended.
GRACE_SECONDS = 30.0

WORKERS = 2
KILLS = 3


def run(others: list[str], restarts: int) -> list[Outcome]:
    rows = [_row(name, restarts) for name in NAMES if name in (OURS, *others)]
    return [
        Outcome(f"{restarts} restarts under load, one server replacing another", rows),
        Outcome(f"SIGKILL of one of {WORKERS} workers, {KILLS} times, {CLIENTS} clients", [_killed_row()]),
    ]


def _row(name: str, restarts: int) -> Row:
    title = f"{SERVERS[name].title}, `{SERVERS[name].ready}`"
    try:
        seen = asyncio.run(_restart(name, restarts))
    except Failed as error:
        return Row(title, void_text(str(error)), met=False if name == OURS else None)
    sys.stderr.write(f"{title}: {seen}\n")
    return Row(title, _figure(seen), "", None, *(("none", not seen.failed) if name == OURS else ("", None)))


def _figure(seen: Seen) -> str:
    failed = seen.failed.total()
    return f"{failed:,} of {seen.right + failed:,} requests failed"


class _Servers(contextlib.AsyncExitStack):
    """Servers of one kind behind a balancer."""

    def __init__(self, name: str, **env: str) -> None:
        super().__init__()
        self._name, self._env = name, env
        self.balancer = Balancer(Probe(SERVERS[name].ready, PROBE_SECONDS, failures=PROBE_FAILURES))

    async def start(self) -> tuple[Started, Backend]:
        """One more, in rotation. Raises `Failed`."""
        server = SERVERS[self._name].starting(MODEL, **self._env)
        started = await asyncio.to_thread(server.__enter__)
        self.callback(server.__exit__, None, None, None)
        backend = self.balancer.add(started.port)
        try:
            await asyncio.wait_for(backend.ready.wait(), processes.DEADLINE_SECONDS)
        except asyncio.TimeoutError as error:
            raise Failed(f"it was not ready after {processes.DEADLINE_SECONDS} s") from error
        return started, backend

    async def clients(self, port: int, pause: float = PAUSE_SECONDS) -> Clients:
        """Busy from now on."""
        form = SERVERS[self._name].formats["json"]
        found = await asyncio.to_thread(load.rehearse, self._name, port, form, Sample.of(MODEL), 1)

        def right(expected: list[Any]) -> Callable[[Answer], bool]:
            return lambda answer: answer.status == 200 and form.read(answer.body) == expected

        talk = [
            (request("POST", form.path, body, {"Content-Type": form.content_type}), right(form.read(answer)))
            for body, answer in zip(found.bodies, found.answers, strict=True)
        ]
        return Clients(self.balancer.ask, talk, CLIENTS, pause)


async def _restart(name: str, restarts: int) -> Seen:
    """What clients saw while one server replaced another, so often. Raises `Failed`."""
    async with _Servers(name) as servers:
        started, backend = await servers.start()
        clients = await servers.clients(started.port)
        for number in range(restarts):
            sys.stderr.write(f"restart {number + 1} of {restarts}: {SERVERS[name].title}\n")
            last, its_backend = started, backend
            started, backend = await servers.start()
            await clients.more(CLIENTS)
            os.kill(last.leader, signal.SIGTERM)
            await _end(last.leader)
            while its_backend.in_rotation:
                await asyncio.sleep(PROBE_SECONDS)
            servers.balancer.take_out(its_backend)
        await clients.more(CLIENTS)
        seen = await clients.stop()
        await servers.balancer.close()
        return seen


async def _end(leader: int) -> None:
    """Wait until a process and all that it started have ended, as long as Kubernetes does."""
    deadline = time.monotonic() + GRACE_SECONDS
    while processes.family(leader) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)


def _killed_row() -> Row:
    title = SERVERS[OURS].title
    most = KILLS * CLIENTS
    try:
        seen = asyncio.run(_kill())
    except Failed as error:
        return Row(title, void_text(str(error)), met=False)
    sys.stderr.write(f"{title}: {seen}\n")
    figure = f"{_figure(seen)}, {most} could have been under way"
    return Row(title, figure, "", None, f"≤ {most}", seen.failed.total() <= most)


async def _kill() -> Seen:
    """What clients saw while workers were killed. Raises `Failed`."""
    async with _Servers(OURS, WORKERS=str(WORKERS)) as servers:
        started, _ = await servers.start()
        clients = await servers.clients(started.port, pause=0)
        for _ in range(KILLS):
            while len(workers := processes.family(started.leader).keys() - {started.leader}) < WORKERS:
                await asyncio.sleep(0.1)
            await clients.more(10 * CLIENTS)
            os.kill(min(workers), signal.SIGKILL)
            while min(workers) in processes.family(started.leader):
                await asyncio.sleep(0.1)
        await clients.more(10 * CLIENTS)
        seen = await clients.stop()
        await servers.balancer.close()
        return seen
