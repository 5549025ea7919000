"""Chat and agent models: bodies as they are, answers unwrapped, piece by piece on request."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import pytest
import requests

from darwin_runtime.errors import DeadlineExceeded, Overloaded
from darwin_runtime.http import streaming
from darwin_runtime.http.streaming import AHEAD, MAX_STREAMS, Streams
from tests.conftest import wait_until
from tests.support.models import model_path, scoring_app
from tests.support.servers import in_thread, serving

CHAT = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0.5}


def ask(url: str, body: Any, **options: Any) -> requests.Response:
    return requests.post(url + "/invocations", json=body, timeout=60, **options)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("chatting", CHAT),
        ("chatting", {"prompt": "a b", "stop": ["x"], "stream": False}),
        ("chatting", {"input": ["a", "b"], "null": None}),
        ("completion", CHAT),
    ],
)
def test_what_mlflows_server_answers(ours: Callable[[str], str], kind: str, body: Any) -> None:
    with in_thread(scoring_app(model_path(kind))) as mlflows:
        expected = ask(mlflows, body)
    answer = ask(ours(kind), body)
    assert (answer.status_code, expected.status_code) == (200, 200), (answer.text, expected.text)
    found, wanted = answer.json(), expected.json()
    assert found == wanted
    assert "predictions" not in found


def test_params_of_the_signature_are_params(ours: Callable[[str], str]) -> None:
    # The model fails on the rest, which shows what it was given.
    answer = ask(ours("params"), {"messages": [], "factor": "x"})
    assert answer.status_code == 400
    assert "params.factor" in answer.json()["message"]


def test_rows_win_where_both_are_there(ours: Callable[[str], str]) -> None:
    dtype = pd.Series(["a"]).dtype  # pandas 3 has one of its own for text
    body = {"instances": ["a"], "input": "b"}
    assert ask(ours("one_column"), body).json() == {"predictions": [f"text:{dtype}:['a']"]}


def test_a_body_that_does_not_fit_the_model_is_refused(ours: Callable[[str], str]) -> None:
    answer = ask(ours("completion"), {"messages": "hello"})
    assert (answer.status_code, answer.json().keys()) == (400, {"error_code", "message"})
    answer = ask(ours("iris"), CHAT)
    assert answer.status_code == 400


# Piece by piece


def events(answer: requests.Response) -> list[tuple[str, str]]:
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if fields:
            found.append((fields.get("event", ""), fields["data"]))
    return found


@pytest.mark.parametrize("padding", ["", "x" * 100_000])
def test_pieces(ours: Callable[[str], str], padding: str) -> None:
    answer = ask(ours("chatting"), {"prompt": "alles ist grün ✅", "stream": True, "padding": padding})
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *pieces, last = events(answer)
    assert [(name, json.loads(data)) for name, data in pieces] == [
        ("", {"word": word, "number": number}) for number, word in enumerate(["alles", "ist", "grün", "✅"])
    ]
    assert last == ("", "[DONE]")


def test_a_failure_half_way_is_told_as_an_event(ours: Callable[[str], str]) -> None:
    [first, (name, data)] = events(ask(ours("chatting"), {"prompt": "so raise", "stream": True}))
    assert json.loads(first[1]) == {"word": "so", "number": 0}
    assert name == "error"
    assert json.loads(data) == {
        "error_code": "INTERNAL_ERROR",
        "message": "Prediction failed: RuntimeError: out of words",
    }


def test_a_failure_at_the_beginning_has_a_status(ours: Callable[[str], str]) -> None:
    answer = ask(ours("chatting"), {"prompt": "raise", "stream": True})
    assert (answer.status_code, answer.json()["error_code"]) == (500, "INTERNAL_ERROR")
    answer = ask(ours("chatting"), {"messages": "no prompt", "stream": True})
    assert answer.status_code in (400, 500)
    [last] = events(ask(ours("chatting"), {"prompt": "", "stream": True}))
    assert last == ("", "[DONE]")


def test_a_piece_without_a_form_is_an_error(ours: Callable[[str], str]) -> None:
    url = ours("chatting")
    answer = ask(url, {"prompt": "object and more", "stream": True})
    assert (answer.status_code, answer.json()["error_code"]) == (500, "INTERNAL_ERROR")
    assert "object has no JSON form (at ['word'])" in answer.json()["message"]
    [first, (name, data)] = events(ask(url, {"prompt": "an object", "stream": True}))
    assert json.loads(first[1]) == {"word": "an", "number": 0}
    assert (name, "object has no JSON form" in data) == ("error", True)
    assert events(ask(url, {"prompt": "fine", "stream": True}))[-1] == ("", "[DONE]")


def test_too_many_streams_are_told_to_come_back(ours: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = ours("chatting")
    monkeypatch.setattr(streaming, "MAX_STREAMS", 0)
    answer = ask(url, {"prompt": "a", "stream": True})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_a_model_that_can_not_stream_says_so(ours: Callable[[str], str]) -> None:
    for kind, body in (("completion", CHAT), ("untyped", {"prompt": "a"})):
        answer = ask(ours(kind), {**body, "stream": True})
        assert answer.status_code == 400
        assert "leave out stream" in answer.json()["message"]


def test_the_model_stops_when_the_client_leaves(ours: Callable[[str], str], tmp_path: Path) -> None:
    address = urlsplit(ours("chatting"))
    body = json.dumps({"prompt": "go on", "stream": True, "left": str(tmp_path / "left")}).encode()
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=60) as client:
        client.sendall(head + body)
        received = b""
        while b"more" not in received:
            received += client.recv(1000)
        assert not (tmp_path / "left").exists()
    wait_until((tmp_path / "left").exists, "the model's end")


# By themselves


def test_a_slow_reader_holds_the_model_up() -> None:
    made: list[int] = []

    def start() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    async def test() -> None:
        pieces = Streams().pieces(start, 60)
        assert await anext(pieces) == 0
        await asyncio.to_thread(wait_until, lambda: len(made) > AHEAD, "pieces ahead")
        assert len(made) <= AHEAD + 2
        assert [piece async for piece in pieces] == [*range(1, 1000)]

    asyncio.run(test())


def test_there_are_so_many_at_once() -> None:
    gate = threading.Event()

    def start() -> Iterator[int]:
        yield 1
        gate.wait(60)
        yield 2

    async def test() -> None:
        streams = Streams()
        under_way = [streams.pieces(start, 60) for _ in range(MAX_STREAMS)]
        for pieces in under_way:
            assert await anext(pieces) == 1
        with pytest.raises(Overloaded):
            await anext(streams.pieces(start, 60))
        gate.set()
        for pieces in under_way:
            assert [piece async for piece in pieces] == [2]
        while True:
            try:
                assert await anext(streams.pieces(start, 60)) == 1
                break
            except Overloaded:  # their threads are about to end
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_piece_that_takes_too_long() -> None:
    gate = threading.Event()

    def start() -> Iterator[int]:
        yield 1
        gate.wait(60)

    async def test() -> None:
        pieces = Streams().pieces(start, 0.05)
        assert await anext(pieces) == 1
        with pytest.raises(DeadlineExceeded):
            await anext(pieces)

    try:
        asyncio.run(test())
    finally:
        gate.set()


def test_a_model_that_stays_silent_is_given_up() -> None:
    gate, hung = threading.Event(), []

    def start() -> Iterator[int]:
        yield 1
        gate.wait(60)

    async def test() -> None:
        streams = Streams(lambda: hung.append(1))
        pieces = streams.pieces(start, 0.05)
        assert await anext(pieces) == 1
        with pytest.raises(DeadlineExceeded):
            await anext(pieces)
        while not hung:
            await asyncio.sleep(0)

    try:
        asyncio.run(asyncio.wait_for(test(), 60))
    finally:
        gate.set()


def test_who_does_not_read_is_left(tmp_path: Path) -> None:
    left = tmp_path / "left"
    body = json.dumps({"prompt": "go on", "stream": True, "left": str(left)}).encode()
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving(model_path("chatting"), WORKERS=1, SEND_TIMEOUT_SECONDS=0.5) as served:
        address = urlsplit(served.url)
        with socket.create_connection((str(address.hostname), address.port or 0), timeout=60) as client:
            client.sendall(head + body)
            wait_until(left.exists, "the model's end")
