"""What a server does with ten times what it can do: how much of it is answered, what becomes of the rest, and after."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench import ROOT, load, machine, processes
from bench.open_loop import Plan, Seen
from bench.outcome import Outcome, Row, void_text
from bench.processes import Failed
from bench.samples import Sample
from bench.servers import OURS, SERVERS, Started

SLOW_MODEL, FAST_MODEL = "slow", "logistic"

# What a row costs the slow model, in seconds of its core.
COST_SECONDS = 0.01
# How long a request may take: the variable that says so, where there is one.
TIMEOUT_SECONDS = 5
_TIMEOUTS = {OURS: "REQUEST_TIMEOUT_SECONDS", "mlflow": "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"}

SLOW, FAST = (OURS, "mlflow", "mlserver"), (OURS, "mlflow", "mlserver-batching")

TIMES = 10
CONNECTIONS = 32

# With so many at once the slow model is asked for its peak.
_PEAK_CONNECTIONS = (2, 8)

# A lone request is as quick again as before when it takes no more than so many times as long.
AS_BEFORE = 2

_RECOVERY_SECONDS = 120
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Bars:
    """Ours has to answer that share of its peak, to refuse in so many milliseconds, to grow by so many MiB at most, and
    to be itself again in so many seconds.
    """

    share: float
    refusal_ms: float
    growth_mib: float
    recovery_seconds: float


@dataclasses.dataclass(frozen=True)
class _Ordeal:
    """Rates are good answers a second, memory is in MiB."""

    peak: float
    rate: float
    offered: float
    seen: Seen
    before: float
    most: float
    after: float
    recovery: float


def run(others: list[str], rounds: int, seconds: int, bars: Bars) -> list[Outcome]:
    """`seconds` of ten times the slow model's peak, once; `rounds` of ten times the connections with the fast one."""
    slow = [name for name in SLOW if name in (OURS, *others)]
    fast = [name for name in FAST if name in (OURS, *others)]
    cost = f"{COST_SECONDS * 1000:g} ms of CPU a row"
    title = f"{TIMES} × the peak for {seconds} s, {cost}, {TIMEOUT_SECONDS} s to answer"
    rows = [row for name in slow for row in _rows(name, seconds, bars)]
    outcomes = [Outcome(title, rows)]
    title = f"{TIMES * CONNECTIONS} connections instead of {CONNECTIONS}, logistic regression, 1 row"
    return [*outcomes, Outcome(title, [_crowd(name, rounds, bars) for name in fast])]


def _rows(name: str, seconds: int, bars: Bars) -> Iterator[Row]:
    title = SERVERS[name].title
    try:
        did = _endure(name, seconds)
    except Failed as error:
        yield Row(title, void_text(str(error)), met=False if name == OURS else None)
        return
    seen, share = did.seen, did.rate / did.peak

    def row(what: str, figure: str, latency: str, bar: str, met: bool) -> Row:
        return Row(f"{title}, {what}", figure, latency, None, *((bar, met) if name == OURS else ("", None)))

    # Not the server's doing, but so many came in bursts.
    late = f", {seen.sent_late / seen.sent:.0%} of them sent late" if seen.sent_late > seen.sent / 100 else ""
    yield row(
        "good answers",
        f"{did.rate:.1f}/s, {share:.0%} of its peak of {did.peak:.1f}/s; {did.offered:,.0f}/s asked for{late}",
        f"{seen.good_ms:,.0f} ms",
        f"≥ {bars.share:.0%}",
        share >= bars.share,
    )
    yield row(
        "refused",
        f"{seen.refused:,}, {seen.retry_after:,} of them told when to come back" if seen.refused else "none",
        f"{seen.refused_ms:,.1f} ms" if seen.refused else "",
        f"all told, < {bars.refusal_ms:g} ms",
        bool(seen.refused) and seen.retry_after == seen.refused and seen.refused_ms < bars.refusal_ms,
    )
    bad = (seen.late, seen.wrong, seen.broken, seen.unanswered)
    yield row("late, wrong, broken, never answered", ", ".join(f"{count:,}" for count in bad), "", "none", not any(bad))
    yield Row(f"{title}, told that it took too long", f"{seen.timed_out:,}")
    yield row(
        "memory before, at most, after",
        f"{did.before:,.0f}, {did.most:,.0f}, {did.after:,.0f} MiB",
        "",
        f"≤ {bars.growth_mib:g} MiB more",
        did.most - did.before <= bars.growth_mib,
    )
    yield row(
        "until a lone request is as quick again",
        f"{did.recovery:.2f} s" if did.recovery < _RECOVERY_SECONDS else f"not in {_RECOVERY_SECONDS} s",
        "",
        f"≤ {bars.recovery_seconds:g} s",
        did.recovery <= bars.recovery_seconds,
    )


def _endure(name: str, seconds: int) -> _Ordeal:
    """Raises `Failed`."""
    limit = {_TIMEOUTS[name]: str(TIMEOUT_SECONDS)} if name in _TIMEOUTS else {}
    with SERVERS[name].starting(SLOW_MODEL, **limit) as started:
        started.wait()
        plan = Plan(name, started.port, max(1, min(5, seconds / 4)), COST_SECONDS, TIMEOUT_SECONDS)
        peak = 0.0
        for connections in _PEAK_CONNECTIONS:
            found = _generate(dataclasses.replace(plan, connections=connections))
            if found.good != found.sent or not found.good:
                raise Failed(f"at {connections} connections: {found}")
            peak = max(peak, found.good / plan.seconds)
        alone = statistics.median(_lone_seconds(name, started.port) for _ in range(9))
        before, rate = _resident(started), TIMES * peak
        with _watching(started) as most:
            seen = _generate(dataclasses.replace(plan, rate=rate, seconds=seconds))
        recovery = _recovery(name, started.port, AS_BEFORE * alone)
        sys.stderr.write(f"{SERVERS[name].title}, overload: {seen}\n")
        return _Ordeal(peak, seen.good / seconds, rate, seen, before, max(most), _resident(started), recovery)


def _generate(plan: Plan) -> Seen:
    sys.stderr.write(f"{SERVERS[plan.server].title}, overload: {plan}\n")
    command = processes.on_core(machine.LOAD_CORE, [sys.executable, "-m", "bench.open_loop"])
    asked = json.dumps(dataclasses.asdict(plan))
    done = subprocess.run(command, input=asked, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"the load generator: {done.stderr}")
    return Seen(**json.loads(done.stdout))


def _lone_seconds(name: str, port: int) -> float:
    """How long one request takes by itself, on a connection of its own."""
    form = SERVERS[name].formats["json"]
    body = form.write(["seconds", "busy"], [[COST_SECONDS, True]])
    began = time.monotonic()
    status, answer = processes.request(port, "POST", form.path, body, {"Content-Type": form.content_type})
    if status != 200 or form.read(answer) != [COST_SECONDS]:
        raise Failed(f"wrong answer: {status} {answer[:200]!r}")
    return time.monotonic() - began


def _recovery(name: str, port: int, enough: float) -> float:
    """Seconds from now until a lone request is answered in `enough`."""
    began = time.monotonic()
    while time.monotonic() - began < _RECOVERY_SECONDS:
        with contextlib.suppress(Failed, OSError):
            if _lone_seconds(name, port) <= enough:
                return time.monotonic() - began
    return _RECOVERY_SECONDS


@contextlib.contextmanager
def _watching(started: Started) -> Iterator[list[float]]:
    """The memory of a server at every moment, until the end."""
    seen, done = [_resident(started)], threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            seen.append(_resident(started))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def _resident(started: Started) -> float:
    """MiB that all processes of a server have in memory."""
    pages = 0
    for process in processes.family(started.leader):
        with contextlib.suppress(OSError):  # it has ended
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * _PAGE / 2**20


def _crowd(name: str, rounds: int, bars: Bars) -> Row:
    """How the fast model does with ten times the connections."""
    title = SERVERS[name].title
    rates: Mapping[int, list[load.Measured]] = {CONNECTIONS: [], TIMES * CONNECTIONS: []}
    try:
        with SERVERS[name].serving(FAST_MODEL) as port:
            talk = load.rehearse(name, port, SERVERS[name].formats["json"], Sample.of(FAST_MODEL), 1)
            load.press(port, talk, CONNECTIONS, 1)
            for _ in range(rounds):
                for connections, measured in rates.items():
                    measured.append(load.press(port, talk, connections, 5))
    except Failed as error:
        return Row(title, void_text(str(error)), met=False if name == OURS else None)
    few, many = (statistics.median(run.rate for run in runs) for runs in rates.values())
    share = statistics.median(after.rate / before.rate for before, after in zip(*rates.values(), strict=True))
    latency = statistics.median(run.latency for run in rates[TIMES * CONNECTIONS])
    figure = f"{many:,.0f} requests/s, {share:.0%} of {few:,.0f}"
    bar, met = (f"≥ {bars.share:.0%}", share >= bars.share) if name == OURS else ("", None)
    return Row(title, figure, f"{latency:,.1f} ms", None, bar, met)
