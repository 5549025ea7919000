"""How long liveness probes wait while the server is busy, each over a connection of its own as kubelet's are."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable

from bench import load, processes
from bench.outcome import Outcome, Row, void_text
from bench.processes import Failed
from bench.samples import Sample
from bench.servers import OURS, SERVERS

SLOW_MODEL, FAST_MODEL = "slow", "logistic"

# How long the one prediction takes, and how often it is probed meanwhile.
PREDICTION_SECONDS = 5.0
PAUSE_SECONDS = 0.01

CONNECTIONS = 64

_ROUTES = {OURS: "/livez", "mlflow": "/ping"}


def run(others: list[str], rounds: int, seconds: int, most_ms: float) -> list[Outcome]:
    """`most_ms`: the 99th percentile that ours may have, over all rounds."""
    names = [OURS, *(name for name in others if name in _ROUTES)]
    measures: dict[str, Callable[[str], list[float]]] = {
        "a probe while a prediction computes in Python for 5 s": lambda name: _during_prediction(name, busy=True),
        "a probe while a prediction sleeps for 5 s": lambda name: _during_prediction(name, busy=False),
        f"a probe under {CONNECTIONS} connections of load": lambda name: _during_load(name, seconds),
    }
    outcomes = []
    for title, measure in measures.items():
        waits: dict[str, list[float]] = {name: [] for name in names}
        voids: dict[str, str] = {}
        for number in range(rounds):
            for name in names if number % 2 == 0 else reversed(names):
                sys.stderr.write(f"round {number + 1} of {rounds}: {title}, {SERVERS[name].title}\n")
                try:
                    waits[name] += measure(name)
                except Failed as error:
                    voids[name] = str(error)
        outcomes.append(Outcome(title, [_row(name, waits[name], voids.get(name), most_ms) for name in names]))
    return outcomes


def _row(name: str, waits: list[float], void: str | None, most_ms: float) -> Row:
    who = f"{SERVERS[name].title}, `{_ROUTES[name]}`"
    if void is not None:
        return Row(who, void_text(void), met=False if name == OURS else None)
    p99 = statistics.quantiles(waits, n=100)[98]
    figure, median = f"p99 {p99:.1f} ms", f"{statistics.median(waits):.2f} ms"
    if name != OURS:
        return Row(who, figure, median)
    return Row(who, figure, median, None, f"≤ {most_ms:g} ms", p99 <= most_ms)


def _during_prediction(name: str, *, busy: bool) -> list[float]:
    server = SERVERS[name]
    form = server.formats["json"]
    body = json.dumps({"dataframe_split": {"columns": ["seconds", "busy"], "data": [[PREDICTION_SECONDS, busy]]}})
    headers = {"Content-Type": form.content_type}
    with server.serving(SLOW_MODEL) as port:
        return _probe_during(name, port, lambda: _ask(port, form.path, body.encode(), headers))


def _ask(port: int, path: str, body: bytes, headers: dict[str, str]) -> None:
    status, answer = processes.request(port, "POST", path, body, headers)
    if status != 200:
        raise Failed(f"wrong answer: {status} {answer[:200]!r}")


def _during_load(name: str, seconds: int) -> list[float]:
    server = SERVERS[name]
    with server.serving(FAST_MODEL) as port:
        talk = load.rehearse(name, port, server.formats["json"], Sample.of(FAST_MODEL), 1)
        load.press(port, talk, CONNECTIONS, 1)
        return _probe_during(name, port, lambda: load.press(port, talk, CONNECTIONS, seconds))


def _probe_during(name: str, port: int, work: Callable[[], object]) -> list[float]:
    """The milliseconds that each probe took, sent one after the other until `work` is done."""
    failures: list[Exception] = []

    def do() -> None:
        try:
            work()
        except Exception as error:  # told below, where somebody listens
            failures.append(error)

    worker = threading.Thread(target=do)
    worker.start()
    time.sleep(0.2)  # until the work has reached the server
    waits = []
    while worker.is_alive():
        began = time.monotonic()
        if not processes.answers(port, _ROUTES[name]):
            raise Failed(f"{_ROUTES[name]} was not answered with 200")
        waits.append((time.monotonic() - began) * 1000)
        time.sleep(PAUSE_SECONDS)
    worker.join()
    for error in failures:
        raise error
    # The last probes may have met a server that was done.
    return waits[:-1]
