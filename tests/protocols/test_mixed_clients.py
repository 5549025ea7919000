"""Many clients at once, all different: each gets what it would have got alone."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import pytest
from sklearn.tree import DecisionTreeRegressor

from tests.support.models import model_path, save_estimator
from tests.support.servers import serving
from tests.support.share import SEED, SHARE

CLIENTS = 64
REQUESTS = 100_000


def _scaled(rng: random.Random) -> Any:
    rows: list[Any] = [{"a": rng.randint(-999, 999), "b": rng.random()} for _ in range(rng.choice([1, 1, 1, 2, 5]))]
    body: dict[str, Any] = {"dataframe_records": rows}
    if rng.random() < 0.5:
        body["params"] = {"factor": rng.choice([1.0, 2.5]), "mode": rng.choice(["fast", "slow"])}
    if rng.random() < 0.1:
        rng.choice([rows[0], body]).pop("a", None)
        rows[-1]["b"] = "text"
    return body


def _table(rng: random.Random) -> Any:
    rows: list[list[Any]] = [[rng.random() for _ in range(3)] for _ in range(rng.choice([1, 1, 1, 2, 40]))]
    if rng.random() < 0.1:
        rng.choice(rows)[1] = rng.choice(["text", True, [1]])
    return {"dataframe_split": {"columns": ["x", "y", "z"], "data": rows}}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that tells a thousand rows apart."""
    rng = random.Random(1)
    table = pd.DataFrame([[rng.random() for _ in range(3)] for _ in range(1000)], columns=["x", "y", "z"])
    model = DecisionTreeRegressor(random_state=0).fit(table, [rng.random() for _ in range(1000)])
    return save_estimator(model, tmp_path_factory.mktemp("tree") / "model", table)


@pytest.mark.parametrize(
    ("kind", "make", "batching"), [("params", _scaled, "on"), ("tree", _table, "auto")], ids=["params", "tree"]
)
def test_nobody_gets_another_answer(kind: str, make: Callable[[random.Random], Any], batching: str, tree: Path) -> None:
    path = tree if kind == "tree" else model_path(kind)
    rng, count = random.Random(SEED), REQUESTS // 2 // SHARE
    bodies = [json.dumps(make(rng)).encode() for _ in range(400)]
    with serving(path, WORKERS=1, BATCHING="off", FAST_PATH="off") as alone:
        expected = []
        for body in bodies:
            answer = alone.post("/invocations", data=body, headers={"Content-Type": "application/json"})
            expected.append((answer.status_code, answer.content))
    assert {status for status, _ in expected} == {200, 400}
    assert len({content for status, content in expected if status == 200}) > 250
    with serving(path, WORKERS=1, BATCHING=batching) as served:
        found = asyncio.run(_ask(served.url, bodies, expected, count))
    assert found == Counter(right=found["right"], left=found["left"])
    assert found["left"] > count / 200
    assert found.total() == count


async def _ask(url: str, bodies: list[bytes], expected: list[tuple[int, bytes]], count: int) -> Counter[str]:
    """What `CLIENTS` clients saw: answers that were right, wrong ones, and requests that they did not wait for."""
    address = urlsplit(url)
    found: Counter[str] = Counter()
    left = iter(range(count))

    async def client(seed: int) -> None:
        rng = random.Random(seed)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for _ in left:
            which = rng.randrange(len(bodies))
            body = bodies[which]
            head = "POST /invocations HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if rng.random() < 0.02:
                await asyncio.sleep(rng.random() / 100)
                writer.close()
                reader, writer = await asyncio.open_connection(address.hostname, address.port)
                found["left"] += 1
                continue
            status, content = await _answer(reader)
            found["right" if (status, content) == expected[which] else f"wrong: {which}"] += 1
        writer.close()

    await asyncio.wait_for(asyncio.gather(*(client(seed) for seed in range(CLIENTS))), 600)
    return found


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head.split(" ", 2)[1]), await reader.readexactly(length)
