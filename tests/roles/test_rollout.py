"""Restarts, rolling updates and dying workers under load, seen from behind a load balancer that retries nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import pytest
import trustme
import uvicorn
import uvloop
import yaml

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.http import server as server_module
from darwin_runtime.http.app import make_app
from darwin_runtime.http.service import Service
from darwin_runtime.model.load import load_model
from tests.conftest import ROOT, wait_until
from tests.image import chart
from tests.support.balancer import Backend, Balancer, Clients, Probe
from tests.support.connection import Answer, json_request
from tests.support.models import IRIS, iris_table, load_pyfunc, model_path
from tests.support.servers import Served, serving

pytestmark = pytest.mark.alone

RESTARTS = int(os.environ.get("RESTARTS", "4"))

CLIENTS = 16

# How long after a pod's deletion load balancers still send requests to it: less than DRAIN_SECONDS.
LAG_SECONDS = 1.0

# Probes of manifests come so much more often here.
SPEED = 20.0


def talk() -> list[tuple[bytes, Any]]:
    """Requests of several protocols, each with the model's own answer."""
    rows = iris_table()[0].sample(32, random_state=1)
    predictions = load_pyfunc(model_path("iris")).predict(rows).tolist()
    said = []
    for (_, row), prediction in zip(rows.iterrows(), predictions, strict=True):
        record = {str(name): float(value) for name, value in row.items()}
        said += [
            (json_request("/predict", {"features": record}), says(scores=[prediction])),
            (json_request("/invocations", {"dataframe_records": [record]}), says(predictions=[prediction])),
            (json_request("/v1/models/model:predict", {"instances": [record]}), says(predictions=[prediction])),
        ]
    # One that is not parsed on the event loop.
    large = {"dataframe_records": [IRIS] * 700}
    [expected] = load_pyfunc(model_path("iris")).predict(pd.DataFrame([IRIS])).tolist()
    said.append((json_request("/invocations", large), says(predictions=[expected] * 700)))
    return said


def says(**expected: Any) -> Any:
    def right(answer: Answer) -> bool:
        return answer.status == 200 and json.loads(answer.body) == expected

    return right


class Pods(contextlib.AsyncExitStack):
    """Servers behind `balancer`, started and ended off the event loop."""

    def __init__(self, probe: Probe, **env: Any) -> None:
        super().__init__()
        self.balancer = Balancer(probe)
        self._env = env
        self._all: list[Served] = []
        self.push_async_callback(self.balancer.close)

    async def start(self) -> tuple[Served, Backend]:
        """One more, in rotation."""
        pod = serving(model_path("iris"), wait=False, **self._env)
        served = await asyncio.to_thread(pod.__enter__)
        self.push_async_exit(_off_loop(pod.__exit__))
        self._all.append(served)
        backend = self.balancer.add(urlsplit(served.url).port or 0)
        await asyncio.wait_for(backend.ready.wait(), 60)
        return served, backend

    async def end(self, served: Served, backend: Backend) -> None:
        """As Kubernetes deletes a pod: SIGTERM, while load balancers hear of it when they do."""
        served.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(LAG_SECONDS)
        self.balancer.take_out(backend)

    async def __aexit__(self, *error: Any) -> bool | None:
        # All at once, without draining.
        for served in self._all:
            served.process.send_signal(signal.SIGINT)
        for served in self._all:
            await ended(served)
        return await super().__aexit__(*error)


async def ended(served: Served) -> int:
    """Its exit code, once it has one."""
    return await asyncio.to_thread(served.process.wait, 60)


def _off_loop(leave: Any) -> Any:
    async def exit_(*error: Any) -> None:
        await asyncio.to_thread(leave, *error)

    return exit_


@pytest.mark.parametrize("workers", [1, 2])
def test_restarts_under_load_fail_no_request(workers: int) -> None:
    """Who is told to end is in rotation until its probes fail."""

    async def scenario() -> None:
        async with Pods(Probe("/ready", 0.1), WORKERS=workers, DRAIN_SECONDS=2) as pods:

            async def leave(served: Served, backend: Backend) -> None:
                served.process.send_signal(signal.SIGTERM)
                assert await ended(served) == 0
                assert not backend.in_rotation
                pods.balancer.take_out(backend)

            pod = await pods.start()
            clients, leaving = Clients(pods.balancer.ask, talk(), CLIENTS), []
            for _ in range(RESTARTS):
                last, pod = pod, await pods.start()
                await clients.more(100)
                leaving.append(asyncio.create_task(leave(*last)))
            await asyncio.gather(*leaving)
            await clients.more(100)
            seen = await clients.stop()
            assert not seen.failed, seen

    asyncio.run(scenario())


def test_a_killed_worker_takes_only_what_it_was_at() -> None:
    """No more than a request for each connection that it had fails, and those on other connections don't."""

    async def scenario() -> None:
        async with Pods(Probe("/ready", 0.1), WORKERS=2) as pods:
            served, backend = await pods.start()
            clients = Clients(pods.balancer.ask, talk(), CLIENTS)
            await both(served)
            for _ in range(3):
                await clients.more(300)
                busiest = max(living(served), key=lambda pid: connections(pid, backend.port))
                os.kill(busiest, signal.SIGSTOP)  # so that it gets no other connections while they are counted
                theirs = connections(busiest, backend.port)
                before = clients.seen.failed.total()
                os.kill(busiest, signal.SIGKILL)
                await both(served, without=busiest)
                await clients.more(300)
                assert clients.seen.failed.total() - before <= theirs
                assert backend.in_rotation
            seen = await clients.stop()
            assert seen.failed.total() > 0
            assert all(re.match(r"(closed|.*reset by peer), after", why) for why in seen.failed), seen

    asyncio.run(scenario())


async def both(served: Served, without: int = 0) -> None:
    """Wait for two workers, apart from one that is about to be known to have ended."""
    await asyncio.to_thread(wait_until, lambda: len(living(served) - {without}) == 2, "both workers")


def living(served: Served) -> set[int]:
    """The process ids of the workers that are ready and have not ended, as far as the log tells."""
    ready = re.findall(r"\(pid (\d+)\) is ready", served.log)
    ended = re.findall(r"\(pid (\d+)\) was ended", served.log)
    return {int(pid) for pid in ready} - {int(pid) for pid in ended}


def connections(pid: int, port: int) -> int:
    """How many clients of this machine's `port` a process has accepted."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = {f"socket:[{line[9]}]" for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "01"}
    return sum(str(file.readlink()) in ours for file in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.parametrize("tls", [False, True])
def test_who_connects_as_the_port_closes_is_answered(serving_environment: None, tmp_path: Path, tls: bool) -> None:
    """Between two turns of the event loop, where only the system knows of them."""
    authority = trustme.CA()
    certificate, key, trust = tmp_path / "crt", tmp_path / "key", ssl.create_default_context()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    authority.configure_trust(trust)
    listener = server_module.bind("127.0.0.1", 0)
    service = Service(BatchLimits())
    service.use(load_model(model_path("iris")))
    files: dict[str, Any] = {"ssl_certfile": certificate, "ssl_keyfile": key} if tls else {}
    config = uvicorn.Config(make_app(service), http="httptools", lifespan="off", log_config=None, **files)
    server = server_module.Server(config, service, 0, lambda: None)

    def ask(client: socket.socket) -> bytes:
        with trust.wrap_socket(client, server_hostname="127.0.0.1") if tls else client as speaking:
            speaking.sendall(json_request("/predict", {"features": IRIS}))
            return speaking.recv(1000)

    async def scenario(pool: ThreadPoolExecutor) -> list[Future[bytes]]:
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup([listener])
        clients = [socket.create_connection(listener.getsockname(), timeout=60) for _ in range(3)]
        answers = [pool.submit(ask, client) for client in clients]
        await server.shutdown([listener])
        return answers

    with contextlib.closing(uvloop.new_event_loop()) as loop, ThreadPoolExecutor() as pool:
        answers = loop.run_until_complete(asyncio.wait_for(scenario(pool), 60))
        assert [answer.result()[:15] for answer in answers] == [b"HTTP/1.1 200 OK"] * 3


def ours(name: str) -> Mapping[str, Any]:
    documents = list(yaml.safe_load_all((ROOT / "deploy" / name).read_text()))
    [pod] = [document["spec"]["template"]["spec"] for document in documents if document["kind"] == "Deployment"]
    [container] = pod["containers"]
    return dict(container)


def darwins() -> Mapping[str, Any]:
    [container] = chart.deployment("image", "models:/iris/1", "emptydir", init=None)["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize(("manifest", "workers"), [("emptydir.yaml", 1), ("Darwin's chart", 2)])
def test_a_rolling_update_fails_no_request(manifest: str, workers: int) -> None:
    container = darwins() if manifest == "Darwin's chart" else ours(manifest)
    # What nothing else says, such as DRAIN_SECONDS, is as it comes.
    probe = Probe.of(container["readinessProbe"], SPEED)

    async def scenario() -> None:
        async with Pods(probe, WORKERS=workers, DRAIN_SECONDS="") as pods:
            old = [await pods.start() for _ in range(2)]
            # Some of the CPU is left to those that start.
            clients = Clients(pods.balancer.ask, talk(), CLIENTS, pause=0.01)
            for pod in old:
                new = await pods.start()
                await asyncio.gather(pods.end(*pod), clients.more(100))
            for served, _ in old:
                assert await ended(served) == 0
            before = new[1].asked
            await clients.more(100)
            assert new[1].asked > before
            seen = await clients.stop()
            assert not seen.failed, seen

    asyncio.run(scenario())
