"""Admission and batching: who goes together, who is turned away, and that nobody gets another's answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest

from darwin_runtime.engine.admission import MAX_QUEUE_BYTES, Answered, BatchLimits
from darwin_runtime.engine.batching import SUSPECT_SECONDS, Batcher, split
from darwin_runtime.engine.inference_thread import InferenceThread
from darwin_runtime.errors import ClientDisconnected, DeadlineExceeded, InputError, Overloaded
from darwin_runtime.protocols.base import Request
from darwin_runtime.schema.model_spec import ModelSpec, compile_schema
from darwin_runtime.schema.params import ParamSchema
from darwin_runtime.schema.rows import Rows

PLAN = compile_schema([{"type": "double", "name": "a"}])
CONTRACT = ModelSpec(PLAN, ParamSchema(None))


def request(*values: float, **params: Any) -> Request:
    return Request(PLAN.records([{"a": value} for value in values]), params, CONTRACT)


class Doubler:
    """Answers each row with its double, noting each call; the call whose number is in `gates` waits for its gate."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[float], dict[str, Any]]] = []
        self.gates: dict[int, threading.Event] = {}
        self.entered = threading.Semaphore(0)

    def __call__(self, given: Rows, params: Mapping[str, Any], method: str) -> Any:
        values = given.for_model()["a"].tolist()
        self.calls.append((values, dict(params)))
        self.entered.release()
        if gate := self.gates.get(len(self.calls)):
            assert gate.wait(60)
        if -1.0 in values:
            raise ValueError("no negative numbers")
        return np.array(values) * 2

    def hold(self, call: int) -> threading.Event:
        self.gates[call] = threading.Event()
        return self.gates[call]


async def still_there() -> bool:
    return False


async def left() -> bool:
    return True


def write(output: Any, _: Request) -> bytes:
    return repr(np.asarray(output).tolist()).encode()


async def reply(answered: Coroutine[Any, Any, Answered]) -> Any:
    return (await answered).reply


class Bench:
    """A batcher in front of a `Doubler`."""

    def __init__(self, limits: BatchLimits | None = None, *, batching: bool = True) -> None:
        self.model = Doubler()
        self.hung = 0
        self.batcher = Batcher(
            self.model, InferenceThread(), limits or BatchLimits(), batching=batching, on_hang=self.hang
        )

    def hang(self) -> None:
        self.hung += 1

    def ask(self, *values: float, gone: Callable[..., Any] = still_there, size: int = 10, **params: Any) -> Any:
        return asyncio.ensure_future(reply(self.batcher.predict(request(*values, **params), write, size, gone)))

    async def occupied(self) -> tuple[Any, threading.Event]:
        """The model is busy with a first request until the event is set."""
        gate = self.model.hold(1)
        first = self.ask(0)
        await asyncio.to_thread(self.model.entered.acquire)
        return first, gate


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_what_waits_goes_together() -> None:
    async def test() -> None:
        bench = Bench()
        first, gate = await bench.occupied()
        others = [bench.ask(1), bench.ask(2, 3), bench.ask(4)]
        await asyncio.sleep(0)
        gate.set()
        assert list(await asyncio.gather(first, *others)) == [b"[0.0]", b"[2.0]", b"[4.0, 6.0]", b"[8.0]"]
        assert [call for call, _ in bench.model.calls] == [[0], [1, 2, 3, 4]]

    run(test)


def test_what_comes_in_one_turn_of_the_loop_goes_together() -> None:
    async def test() -> None:
        bench = Bench()
        for _ in range(2):
            answers = await asyncio.gather(*(bench.ask(i) for i in range(5)))
            assert answers == [f"[{2.0 * i}]".encode() for i in range(5)]
        # Nobody was to be expected with the very first.
        assert [call for call, _ in bench.model.calls] == [[0], [1, 2, 3, 4], [0, 1, 2, 3, 4]]

    run(test)


def test_one_after_another_goes_to_the_model_without_another_turn_of_the_loop() -> None:
    async def test() -> None:
        bench = Bench()
        for call in range(3):
            asked = bench.batcher.predict(request(call), write, 10, still_there)
            asked.send(None)
            assert bench.model.entered.acquire(timeout=60)  # which keeps the loop from turning
            asked.close()
            # Until that has been delivered.
            assert await bench.ask(5) == b"[10.0]"
            assert bench.model.entered.acquire(timeout=60)

    run(test)


def test_a_batch_has_no_more_rows_than_it_may() -> None:
    async def test() -> None:
        bench = Bench(BatchLimits(batch_rows=4))
        first, gate = await bench.occupied()
        others = [bench.ask(1, 2, 3), bench.ask(4), bench.ask(5), bench.ask(6, 7, 8, 9, 10), bench.ask(11)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *others)
        assert [len(call) for call, _ in bench.model.calls] == [1, 4, 1, 5, 1]

    run(test)


@pytest.mark.parametrize("batching", [True, False])
def test_params_are_never_mixed(batching: bool) -> None:
    async def test() -> None:
        bench = Bench(batching=batching)
        first, gate = await bench.occupied()
        others = [bench.ask(i, p=p) for i, p in enumerate([1, 1.0, True, 1, "1", 1.0])] + [bench.ask(6)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *others)
        together = [[0.0, 3.0], [1.0, 5.0], [2.0], [4.0], [6.0]] if batching else [[float(i)] for i in range(7)]
        assert [call for call, _ in bench.model.calls[1:]] == together
        assert repr(bench.model.calls[1:3][0][1]) == "{'p': 1}"

    run(test)


def test_a_bad_request_in_a_batch_fails_alone() -> None:
    async def test() -> None:
        bench = Bench()
        answers = await asyncio.gather(*(bench.ask(i) for i in (1, -1, 2)), return_exceptions=True)
        assert [answers[0], answers[2]] == [b"[2.0]", b"[4.0]"]
        assert isinstance(answers[1], ValueError)
        assert await bench.ask(3) == b"[6.0]"

    run(test)


def test_after_a_batch_failed_each_is_answered_as_soon_as_it_can_be() -> None:
    async def test() -> None:
        bench = Bench()
        first, gate = await bench.occupied()
        last = bench.model.hold(5)  # after the first, the batch, and two of its requests
        good, bad, held = (bench.ask(value) for value in (1, -1, 2))
        await asyncio.sleep(0)
        gate.set()
        assert await first == b"[0.0]"
        assert await good == b"[2.0]"
        with pytest.raises(ValueError, match="no negative numbers"):
            await bad
        assert not held.done()
        last.set()
        assert await held == b"[4.0]"
        assert [call for call, _ in bench.model.calls] == [[0], [1, -1, 2], [1], [-1], [2]]

    run(test)


def test_an_answer_that_can_not_be_written_fails_alone() -> None:
    def picky(output: Any, asked: Request) -> bytes:
        assert output[0] != 2.0
        return write(output, asked)

    async def test() -> None:
        bench = Bench()
        asked = [reply(bench.batcher.predict(request(i), picky, 1, still_there)) for i in (0, 0, 1, 2)]
        _, *answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [answers[0], answers[2]] == [b"[0.0]", b"[4.0]"]
        assert isinstance(answers[1], AssertionError)
        assert [call for call, _ in bench.model.calls] == [[0], [0, 1, 2]]

    run(test)


def test_a_model_that_does_not_answer_row_by_row_is_asked_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        thread, limits = InferenceThread(), BatchLimits()
        batcher = Batcher(lambda given, *_: [given.count], thread, limits, batching=True, on_hang=lambda: None)
        asked = [reply(batcher.predict(request(*range(n)), write, 1, still_there)) for n in (1, 2, 3)]
        assert await asyncio.gather(*asked) == [b"[1]", b"[2]", b"[3]"]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        # Once that is known, it isn't tried again.
        again = [reply(batcher.predict(request(*range(n)), write, 1, still_there)) for n in (1, 2)]
        assert list(await asyncio.gather(*again)) == [b"[1]", b"[2]"]
        assert len(caplog.records) == 1

    run(test)


def test_what_is_too_much_is_turned_away_and_the_rest_answered() -> None:
    async def test() -> None:
        bench = Bench(BatchLimits(queue_rows=3))
        first, gate = await bench.occupied()
        others = [bench.ask(1, 2), bench.ask(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="try again in 1 s") as refused:
            await bench.ask(4)
        assert refused.value.retry_after == 1
        gate.set()
        await asyncio.gather(first, *others)
        assert await bench.ask(*range(10)), "more than may wait, but nothing else does"
        assert await bench.ask(5) == b"[10.0]"

    run(test)


@pytest.mark.parametrize("batching", [True, False])
def test_who_would_wait_too_long_is_told_so_at_once(batching: bool) -> None:
    async def test() -> None:
        bench = Bench(BatchLimits(timeout=8, batch_rows=2), batching=batching)
        first, gate = await bench.occupied()
        bench.batcher._learn(1.0, 1)  # as if a batch had just taken a second
        accepted: list[Any] = []
        while True:
            newest = bench.ask(len(accepted))
            await asyncio.sleep(0)
            if newest.done():
                break
            accepted.append(newest)
        with pytest.raises(Overloaded) as refused:
            await newest
        gate.set()
        await asyncio.gather(first, *accepted)
        # A second for a batch, four are half of the time; batched, two rows are one.
        assert len(accepted) == pytest.approx(4 * (2 if batching else 1), abs=3)
        assert 4 <= refused.value.retry_after <= 6
        # What it was reckoned by is forgotten once batches have been quick again.
        for number in range(200):
            assert await bench.ask(number) == f"[{number * 2.0}]".encode()
        assert bench.batcher._queue.wait == 0

    run(test)


def test_one_large_request_is_one_batch() -> None:
    async def test() -> None:
        bench = Bench(BatchLimits(timeout=8, batch_rows=2))
        first, gate = await bench.occupied()
        bench.batcher._learn(1.0, 1)
        large = bench.ask(*range(1000))
        await asyncio.sleep(0)
        small = bench.ask(1)
        await asyncio.sleep(0)
        assert not small.done()
        gate.set()
        await asyncio.gather(first, large)
        assert await small == b"[2.0]"

    run(test)


def test_large_bodies_count_by_their_size() -> None:
    async def test() -> None:
        bench = Bench()
        first, gate = await bench.occupied()
        other = bench.ask(1, size=MAX_QUEUE_BYTES)
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await bench.ask(2)
        gate.set()
        await asyncio.gather(first, other)

    run(test)


def test_what_takes_long_to_read_waits_its_turn_unread() -> None:
    async def test() -> None:
        bench = Bench(BatchLimits(queue_rows=300))
        first, gate = await bench.occupied()
        have_read: list[float] = []

        def ask(value: float) -> Any:
            def read() -> Request:
                have_read.append(value)
                if value < 0:
                    raise InputError([])
                return request(value, value)

            return asyncio.ensure_future(reply(bench.batcher.predict(read, write, 10, still_there)))

        large, bad = ask(1), ask(-1)
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await bad
        small = bench.ask(2)
        await asyncio.sleep(0)
        assert have_read == []
        gate.set()
        assert list(await asyncio.gather(first, large, small)) == [b"[0.0]", b"[2.0, 2.0]", b"[4.0]"]
        assert [call for call, _ in bench.model.calls] == [[0], [1, 1], [2]]
        with pytest.raises(InputError):
            await ask(-1)
        assert await bench.ask(3) == b"[6.0]"

    run(test)


def test_who_waits_too_long_is_told_and_not_run() -> None:
    async def test() -> None:
        bench = Bench(BatchLimits(timeout=0.1))
        first, gate = await bench.occupied()
        second = bench.ask(1)
        for late in (first, second):
            with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.1 seconds"):
                await late
        assert bench.batcher.stuck >= 0.1
        gate.set()
        assert await bench.ask(2) == b"[4.0]"
        assert [call for call, _ in bench.model.calls] == [[0], [2]]
        assert bench.batcher.stuck == 0

    run(test)


def test_who_has_left_is_not_run() -> None:
    async def test() -> None:
        bench = Bench()
        first, gate = await bench.occupied()
        gone, there = bench.ask(1, gone=left), bench.ask(2)
        # Only who has waited for a while is asked.
        await asyncio.sleep(2 * SUSPECT_SECONDS)
        gate.set()
        assert list(await asyncio.gather(first, there)) == [b"[0.0]", b"[4.0]"]
        with pytest.raises(ClientDisconnected):
            await gone
        assert [call for call, _ in bench.model.calls] == [[0], [2]]

    run(test)


def test_a_cancelled_request_is_not_run() -> None:
    async def test() -> None:
        bench = Bench()
        first, gate = await bench.occupied()
        cancelled = bench.ask(1)
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        gate.set()
        await first
        assert await bench.ask(2) == b"[4.0]"
        assert [call for call, _ in bench.model.calls] == [[0], [2]]

    run(test)


def test_a_model_that_hangs_is_told_of() -> None:
    async def test() -> None:
        bench = Bench(BatchLimits(timeout=0.05))
        first, gate = await bench.occupied()
        with pytest.raises(DeadlineExceeded):
            await first
        while not bench.hung:
            await asyncio.sleep(0.01)
        assert bench.batcher.stuck >= 0.1
        gate.set()

    run(test)


def test_the_kinds_take_turns() -> None:
    async def test() -> None:
        bench = Bench(BatchLimits(batch_rows=2))
        first, gate = await bench.occupied()
        others = [bench.ask(i, p=i % 2) for i in range(1, 9)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *others)
        assert [call for call, _ in bench.model.calls[1:]] == [[1, 3], [2, 4], [5, 7], [6, 8]]

    run(test)


@pytest.mark.parametrize(
    ("output", "parts"),
    [
        (np.array([[1], [2], [3]]), [[[1]], [[2], [3]]]),
        ([1, 2, 3], [[1], [2, 3]]),
        (pd.Series([1, 2, 3], index=[7, 8, 9]), [[1], [2, 3]]),
        (pd.DataFrame({"a": [1, 2, 3]}), [[[1]], [[2], [3]]]),
    ],
)
def test_split(output: Any, parts: list[Any]) -> None:
    found = split(output, [1, 2])
    assert found is not None
    assert [np.asarray(part).tolist() for part in found] == parts
    assert all(type(part) is type(output) for part in found)


@pytest.mark.parametrize("output", [np.array([1, 2]), "abc", {"a": 1, "b": 2, "c": 3}, np.float64(3), None, 3])
def test_split_of_what_has_not_a_row_for_each(output: Any) -> None:
    assert split(output, [1, 2]) is None


def test_an_output_that_can_not_be_split_is_asked_for_one_by_one() -> None:
    def predict(given: Rows, *_: Any) -> Any:
        return np.array(given.count)  # which has no length

    async def test() -> None:
        batcher = Batcher(predict, InferenceThread(), BatchLimits(), batching=True, on_hang=lambda: None)
        for _ in range(2):
            asked = [reply(batcher.predict(request(i), write, 1, still_there)) for i in (1, 2)]
            assert list(await asyncio.gather(*asked)) == [b"1", b"1"]

    run(test)
