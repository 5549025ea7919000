"""A server under mixed traffic for a long time: is every answer right, and does nothing grow? `python -m tests.soak`.

Clients of every protocol, good and bad, patient and not, ask two servers with two workers each, one of them with a
model that streams. Meanwhile memory, open files and threads of each process are sampled. After a warm-up, the median of
the last third of the samples is compared with that of the first.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gzip
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.conftest import wait_until
from tests.support import tensors
from tests.support.connection import Answer, Broken, Connection, json_request, request
from tests.support.models import iris_table, load_pyfunc, model_path
from tests.support.servers import Served, serving

# Visits a second: some fifth of a CPU for the servers.
RATE = 100.0
WORKERS = 2
_WORKER = re.compile(r"worker (\d+) \(pid (\d+)\) is ready")

# The share of the samples in which caches fill and pools get their size.
WARM_UP = 0.2

# Connections that are kept open between requests. Beyond, they are closed.
KEPT = 16

LARGE_ROWS = 4000

# What each process may have more of in the end. Memory: what the allocator keeps differs by some megabytes with what
# happened to be computed side by side, while a leak of 200 bytes a request makes twice as much in half an hour. Files:
# the connections that clients keep open may all be with the one worker at first, and with the other in the end.
# Threads: asyncio's pool for what would block, which grows when all of it is in use at once, to six on two CPUs.
BOUNDS = {"PSS, MiB": 8.0, "RSS, MiB": 12.0, "files": float(KEPT), "threads": 6.0}

_CHAT = "two words and more"


class Wrong(Exception):
    """An answer was not what it has to be."""


@dataclass
class Client:
    """Asks one server, over connections that are kept open or of its own."""

    port: int
    idle: list[Connection] = field(default_factory=list)

    async def open(self) -> Connection:
        return await Connection.open(self.port)

    async def ask(self, data: bytes) -> Answer:
        if self.idle and random.random() < 0.8:
            connection = self.idle.pop()
        else:
            connection = await Connection.open(self.port, self._keep, self._forget)
        return await asyncio.wait_for(connection.ask(data), 60)

    async def close(self) -> None:
        for connection in list(self.idle):
            connection.close()
        while self.idle:
            await asyncio.sleep(0)

    def _keep(self, connection: Connection) -> None:
        if len(self.idle) < KEPT:
            self.idle.append(connection)
        else:
            connection.close()

    def _forget(self, connection: Connection) -> None:
        with contextlib.suppress(ValueError):
            self.idle.remove(connection)


Visit = Callable[[], Awaitable[None]]


def check(said: bool, answer: Answer) -> None:
    if not said:
        raise Wrong(f"{answer.status} {answer.body[:300]!r}")


class Traffic:
    """What visitors do. `chat` talks to the model that streams."""

    def __init__(self, tables: Client, chat: Client) -> None:
        self._tables, self._chat = tables, chat
        self.clients = (tables, chat)
        table = iris_table()[0]
        self._columns = [str(name) for name in table.columns]
        self._rows = table.to_numpy().tolist()
        self._labels = load_pyfunc(model_path("iris")).predict(table).tolist()

    def visits(self) -> dict[str, tuple[float, Visit]]:
        """What each kind of visitor does, and how often: a weight."""
        return {
            "Darwin": (10, lambda: self._rows_of("/predict", "features", "scores")),
            "MLflow": (10, lambda: self._rows_of("/invocations", "dataframe_records", "predictions")),
            "KServe V1": (10, lambda: self._rows_of("/v1/models/model:predict", "instances", "predictions")),
            "KServe V2": (10, lambda: self._v2(binary=False)),
            "KServe V2, binary": (10, lambda: self._v2(binary=True)),
            "CSV": (10, self._csv),
            "gzip": (10, self._gzip),
            "large": (1, self._large),
            "bad": (10, self._bad),
            "no HTTP": (2, self._no_http),
            "slow": (4, self._slow),
            "leaves": (6, self._leave),
            "leaves half-way": (6, self._leave_half_way),
            "stream": (5, self._stream),
            "stream, leaves": (2, self._leave_stream),
            "scrape": (3, self._scrape),
        }

    def _some(self, most: int = 5) -> tuple[list[list[float]], list[int]]:
        picked = [random.randrange(len(self._rows)) for _ in range(random.randint(1, most))]
        return [self._rows[number] for number in picked], [self._labels[number] for number in picked]

    def _records(self, rows: Sequence[Sequence[float]]) -> list[dict[str, float]]:
        return [dict(zip(self._columns, row, strict=True)) for row in rows]

    async def _rows_of(self, path: str, key: str, name: str) -> None:
        rows, labels = self._some()
        answer = await self._tables.ask(json_request(path, {key: self._records(rows)}))
        check(answer.status == 200 and json.loads(answer.body) == {name: labels}, answer)

    async def _v2(self, *, binary: bool) -> None:
        rows, labels = self._some()
        tensor = {"name": "input", "shape": [len(rows), 4], "datatype": "FP64", "data": rows}
        body: dict[str, Any] = {"inputs": [tensor]}
        if binary:
            body["parameters"] = {"binary_data_output": True}
            data, headers = tensors.binary(body)
            answer = await self._tables.ask(request("POST", "/v2/models/model/infer", data, headers))
        else:
            answer = await self._tables.ask(json_request("/v2/models/model/infer", body))
        check(answer.status == 200, answer)
        length = answer.headers.get(b"inference-header-content-length")
        found = tensors.values(answer.body, length.decode() if length else None)
        check(list(found.values()) == [labels], answer)

    def _table(self, rows: Sequence[Sequence[float]]) -> bytes:
        return json.dumps({"dataframe_split": {"columns": self._columns, "data": rows}}).encode()

    async def _csv(self) -> None:
        rows, labels = self._some()
        lines = [",".join(self._columns), *(",".join(map(str, row)) for row in rows)]
        data = request("POST", "/invocations", "\n".join(lines).encode(), {"Content-Type": "text/csv"})
        answer = await self._tables.ask(data)
        check(answer.status == 200 and json.loads(answer.body) == {"predictions": labels}, answer)

    async def _gzip(self) -> None:
        rows, labels = self._some(50)
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        data = request("POST", "/invocations", gzip.compress(self._table(rows)), headers)
        answer = await self._tables.ask(data)
        check(answer.status == 200 and json.loads(answer.body) == {"predictions": labels}, answer)

    async def _large(self) -> None:
        times = LARGE_ROWS // len(self._rows)
        data = request("POST", "/invocations", self._table(self._rows * times), {"Content-Type": "application/json"})
        answer = await self._tables.ask(data)
        check(answer.status == 200 and json.loads(answer.body) == {"predictions": self._labels * times}, answer)

    async def _bad(self) -> None:
        noise = base64.b64encode(random.randbytes(12)).decode()
        data, status = random.choice(
            [
                (json_request("/predict", {"features": {noise: 1.0}}), 422),
                (json_request("/predict", {"features": dict.fromkeys(self._columns, noise)}), 422),
                (request("POST", "/predict", f'{{"features": [{noise}'.encode()), 422),
                (request("POST", "/invocations", noise.encode(), {"Content-Type": "text/csv"}), 400),
                (request("POST", "/invocations", b"{}", {"Content-Type": f"text/{noise[:5]}x"}), 415),
                (request("POST", "/invocations", noise.encode(), {"Content-Encoding": "gzip"}), 400),
                (json_request(f"/v1/models/{noise.replace('/', '-')}:predict", {"instances": []}), 404),
                (request("GET", "/predict"), 405),
                (request("GET", f"/{noise}"), 404),
            ]
        )
        answer = await self._tables.ask(data)
        check(answer.status == status and b"Traceback" not in answer.body and bool(answer.body), answer)

    async def _no_http(self) -> None:
        answer = await self._tables.ask(random.choice([b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n"]))
        check(answer.status == 400, answer)

    async def _slow(self) -> None:
        rows, labels = self._some()
        data = request("POST", "/invocations", self._table(rows), {"Content-Type": "application/json"})
        connection = await self._tables.open()
        size = len(data) // 5 + 1
        answer = connection.ask(data[:size])
        for at in range(size, len(data), size):
            await asyncio.sleep(random.random() / 4)
            connection.transport.write(data[at : at + size])
        said = await answer
        connection.close()
        check(said.status == 200 and json.loads(said.body) == {"predictions": labels}, said)

    async def _leave(self) -> None:
        await self._send_and_leave(self._tables, json_request("/predict", {"features": self._records(self._some()[0])}))

    async def _leave_half_way(self) -> None:
        data = request("POST", "/invocations", self._table(self._rows), {"Content-Type": "application/json"})
        await self._send_and_leave(self._tables, data[: random.randrange(len(data))])

    async def _send_and_leave(self, client: Client, data: bytes) -> None:
        connection = await client.open()
        answer = connection.ask(data)
        await asyncio.sleep(random.random() / 50)
        connection.close()
        with contextlib.suppress(Broken):
            await answer

    async def _stream(self) -> None:
        answer = await self._chat.ask(json_request("/invocations", {"prompt": _CHAT, "stream": True}))
        events = [line for line in answer.body.decode().splitlines() if line.startswith("data: ")]
        words = [{"word": word, "number": number} for number, word in enumerate(_CHAT.split())]
        check([json.loads(event[6:]) for event in events[:-1]] == words and events[-1] == "data: [DONE]", answer)

    async def _leave_stream(self) -> None:
        # One without an end.
        await self._send_and_leave(
            self._chat, json_request("/invocations", {"prompt": _CHAT, "stream": True, "left": "/dev/null"})
        )

    async def _scrape(self) -> None:
        for path, word in (
            ("/metrics", b"darwin_"),
            ("/docs", b"<html"),
            ("/openapi.json", b"openapi"),
            ("/schema", b"petal"),
            ("/ready", b"ready"),
        ):
            answer = await self._tables.ask(request("GET", path))
            check(answer.status == 200 and word in answer.body, answer)


# Processes


Samples = dict[tuple[str, str], list[float]]


def processes(served: Served, name: str) -> dict[str, int]:
    """The process ids of a server's supervisor and workers."""
    workers = {f"{name}, worker {number}": int(pid) for number, pid in sorted(_WORKER.findall(served.log))}
    return {f"{name}, supervisor": served.process.pid, **workers}


def measure(pid: int) -> dict[str, float]:
    """Raises `OSError` for a process that has ended."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {key: int(size) / 1024 for key, size in re.findall(r"^(Pss|Rss):\s+(\d+) kB$", rollup, re.MULTILINE)}
    return {
        "PSS, MiB": sizes["Pss"],
        "RSS, MiB": sizes["Rss"],
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@dataclass
class Verdict:
    """What visitors saw, and what became of each process: the medians of its first and its last third."""

    visits: Counter[str]
    failures: Counter[str]
    grown: dict[tuple[str, str], tuple[float, float]]
    cpu: float
    seconds: float

    @property
    def problems(self) -> list[str]:
        said = [f"{count} times: {failure}" for failure, count in self.failures.most_common(20)]
        said += [f"no visit: {kind}" for kind, count in self.visits.items() if not count]
        for (process, what), (first, last) in self.grown.items():
            if last - first > BOUNDS[what]:
                said.append(f"{process}: {what} went from {first:.1f} to {last:.1f}")
        return said

    def table(self) -> str:
        lines = [f"{'process':28} {'':10} {'first third':>12} {'last third':>12} {'more':>8} {'at most':>8}"]
        for (process, what), (first, last) in self.grown.items():
            lines.append(f"{process:28} {what:10} {first:12.1f} {last:12.1f} {last - first:+8.1f} {BOUNDS[what]:8.1f}")
        total = sum(self.visits.values())
        lines.append(f"{total} visits in {self.seconds:.0f} s, {dict(self.visits)}")
        lines.append(f"{self.cpu / self.seconds:.0%} of a CPU for the servers")
        return "\n".join(lines + self.problems)


def soak(seconds: float, rate: float = RATE, **env: Any) -> Verdict:
    """Have visitors come at `rate` a second for `seconds`."""
    with started("iris", env) as tables, started("chatting", env) as chat:
        watched = {**processes(tables, "tables"), **processes(chat, "chat")}
        traffic = Traffic(*(Client(urlsplit(served.url).port or 0) for served in (tables, chat)))
        return asyncio.run(_visit(traffic, watched, seconds, rate))


@contextlib.contextmanager
def started(kind: str, env: dict[str, Any]) -> Iterator[Served]:
    """A server with all its workers."""
    with serving(model_path(kind), **{"WORKERS": WORKERS, "BATCHING": "on", **env}) as served:
        wait_until(lambda: len(_WORKER.findall(served.log)) == WORKERS, "all workers")
        yield served


async def _visit(traffic: Traffic, watched: dict[str, int], seconds: float, rate: float) -> Verdict:
    failures: Counter[str] = Counter()
    samples: Samples = {(name, what): [] for name in watched for what in BOUNDS}
    kinds = traffic.visits()
    visits = Counter(dict.fromkeys(kinds, 0))
    weights = [weight for weight, _ in kinds.values()]
    tasks: set[asyncio.Task[None]] = set()

    async def visit(kind: str) -> None:
        try:
            await kinds[kind][1]()
            visits[kind] += 1
        except Exception as error:  # one bad answer is told in the end, beside the others
            failures[f"{kind}: {error!r}"] += 1

    async def watch() -> None:
        pause = max(0.25, seconds / 400)
        while True:
            for name, pid in watched.items():
                for what, value in measure(pid).items():
                    samples[name, what].append(value)
            await asyncio.sleep(pause)

    began, used = time.monotonic(), sum(map(cpu_seconds, watched.values()))
    watching = asyncio.create_task(watch())
    while (now := time.monotonic() - began) < seconds and not watching.done():
        task = asyncio.create_task(visit(random.choices([*kinds], weights)[0]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(max(0.0, random.expovariate(rate)))
    await asyncio.gather(*tasks)
    cpu = 0.0
    if watching.done():
        failures[f"a process has ended: {watching.exception()!r}"] += 1
    else:
        cpu = sum(map(cpu_seconds, watched.values())) - used
    watching.cancel()
    for client in traffic.clients:
        await client.close()
    grown = {}
    for key, values in samples.items():
        steady = values[int(len(values) * WARM_UP) :]
        third = max(1, len(steady) // 3)
        grown[key] = statistics.median(steady[:third]), statistics.median(steady[-third:])
    return Verdict(visits, failures, grown, cpu, now)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Mixed traffic for a long time.")
    parser.add_argument("--minutes", type=float, default=30, help="how long (30)")
    parser.add_argument("--rate", type=float, default=RATE, help=f"visits a second ({RATE:g})")
    asked = parser.parse_args()
    verdict = soak(60 * asked.minutes, asked.rate)
    sys.stdout.write(verdict.table() + "\n")
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
