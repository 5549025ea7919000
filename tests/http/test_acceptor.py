"""Who accepts a connection, of several processes that listen on one port."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from darwin_runtime.http.acceptor import PRECEDENCE_SECONDS, Acceptor
from darwin_runtime.http.metrics import SharedMetrics, WorkerMetrics
from tests.conftest import wait_until
from tests.engine.test_workers import pids
from tests.support.connection import Connection, request
from tests.support.models import model_path
from tests.support.servers import serving

pytestmark = pytest.mark.alone


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def sockets(pid: int) -> int:
    count = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(file.readlink()).startswith("socket:")
    return count


def test_clients_that_stay_are_shared_out() -> None:
    with serving(model_path("iris"), WORKERS=2) as served:
        wait_until(lambda: len(pids(served)) == 2, "both workers")
        before = {pid: sockets(pid) for pid in pids(served)}

        async def connect() -> list[int]:
            port = int(served.url.rpartition(":")[2])
            connections = await asyncio.gather(*(Connection.open(port) for _ in range(32)))
            try:
                for connection in connections:
                    assert (await connection.ask(request("GET", "/livez"))).status == 200
                wait_until(lambda: "darwin_connections 33.0" in served.get("/metrics").text, "all of them, and its own")
                return [sockets(pid) - count for pid, count in before.items()]
            finally:
                for connection in connections:
                    connection.close()

        shares = asyncio.run(connect())
        # Were the other process kept from running for long, one would rightly go on alone.
        assert sum(shares) >= 32
        assert min(shares) >= 8


def ahead(counts: list[int]) -> bool:
    """Whether the first worker has more than another; one with less than none has not started."""
    shared = SharedMetrics(1 + len(counts))
    WorkerMetrics(shared, 0)  # the waiting room, which is gone when there are workers
    workers = []
    for number, count in enumerate(counts, 1):
        if count >= 0:
            workers.append(WorkerMetrics(shared, number))
            workers[-1].connected(count)
    return workers[0].has_more_connections()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([3, 3], False), ([4, 3], True), ([3, 4], False), ([4, 9, 3], True), ([4], False), ([4, -1], False)],
)
def test_who_has_more_than_another(counts: list[int], expected: bool) -> None:
    assert ahead(counts) == expected


def test_who_died_took_its_connections_along() -> None:
    shared = SharedMetrics(3)
    WorkerMetrics(shared, 1).connected(9)
    other = WorkerMetrics(shared, 2)
    other.connected(7)
    assert not other.has_more_connections()
    WorkerMetrics(shared, 1)
    assert other.has_more_connections()


def served_by(listener: socket.socket, ahead: Callable[[], bool], wanted: int) -> list[socket.socket]:
    """The first connections that an acceptor takes, so many; each is over at once."""
    taken: list[socket.socket] = []

    async def run() -> None:
        done = asyncio.Event()

        async def join(client: socket.socket) -> None:
            with client:
                taken.append(client)
            if len(taken) == wanted:
                done.set()
            raise ConnectionResetError

        acceptor = Acceptor(listener, join, ahead)
        try:
            await asyncio.wait_for(done.wait(), 30)
        finally:
            acceptor.close()

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    return taken


def test_what_nobody_else_takes_is_taken(listener: socket.socket) -> None:
    """The other process may be busy for long."""
    clients = [socket.create_connection(listener.getsockname()) for _ in range(20)]
    served_by(listener, lambda: True, len(clients))
    for client in clients:
        assert client.recv(1) == b""
        client.close()


class Poor(socket.socket):
    """Has no more files, so many times."""

    failures = 3

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_it_goes_on_when_there_are_files_again(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darwin_runtime.http.acceptor.RETRY_SECONDS", 0.01)
    with socket.create_connection(listener.getsockname()) as client, Poor(fileno=os.dup(listener.fileno())) as poor:
        served_by(poor, lambda: False, 1)
        assert not poor.failures
        assert client.recv(1) == b""


def test_a_closed_one_takes_nobody(listener: socket.socket) -> None:
    async def run() -> None:
        async def join(_: socket.socket) -> None:
            raise AssertionError("taken")

        with socket.create_connection(listener.getsockname()):
            asked = asyncio.Event()

            def ahead() -> bool:
                asked.set()
                return True

            acceptor = Acceptor(listener, join, ahead)
            await asked.wait()
            acceptor.close()
            await asyncio.sleep(2 * PRECEDENCE_SECONDS)
            listener.accept()[0].close()

    asyncio.run(run())
