"""Requests per second, server beside server: the same rows, the same core, the order turned around every round."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench import ROOT, envs, load, machine, processes
from bench.load import Measured
from bench.outcome import Outcome, Row, at_least, at_most, void_text
from bench.processes import Failed
from bench.samples import MODELS, Sample
from bench.servers import ECHO, OURS, SERVERS

BARE, BARE_BATCHES = "bare", "bare-batches"

# The model alone, so many rows at a time.
_BARE_SIZES = {BARE: 1, BARE_BATCHES: 32}

LIMITS = (ECHO, *_BARE_SIZES)

_TITLES = {
    **{name: server.title for name, server in SERVERS.items()},
    BARE: "the model alone, row by row",
    BARE_BATCHES: "the model alone, 32 rows at once",
}


@dataclass(frozen=True)
class Throughput:
    """`rates` are bars: whom we have to be so many times as fast as, in rows per second.

    With one connection, that is by median latency. `latency`, if set, is another bar: our median latency may be so many
    times those of the echo and the bare model, added.
    """

    name: str
    title: str
    model: str
    connections: int
    others: Sequence[str]
    rates: Mapping[str, float]
    latency: float | None = None
    rows: int = 1
    content: str = "json"

    @property
    def measured(self) -> tuple[str, ...]:
        return (OURS, *self.others)


@dataclass
class _Result:
    """What one server did in one case, round by round; or why that is void."""

    runs: list[Measured] = field(default_factory=list)
    void: str = ""

    @property
    def rate(self) -> float | None:
        return None if self.void or not self.runs else statistics.median(run.rate for run in self.runs)

    @property
    def latency(self) -> float | None:
        return None if self.void or not self.runs else statistics.median(run.latency for run in self.runs)


_Results = Mapping[tuple[str, str], _Result]


def run(cases: Sequence[Throughput], rounds: int, seconds: int) -> list[Outcome]:
    """Measure all `cases`, for `seconds` each time."""
    results: defaultdict[tuple[str, str], _Result] = defaultdict(_Result)
    for number in range(rounds):
        for model in dict.fromkeys(case.model for case in cases):
            of_model = [case for case in cases if case.model == model]
            everybody = list(dict.fromkeys(who for case in of_model for who in case.measured))
            for who in everybody if number % 2 == 0 else reversed(everybody):
                sys.stderr.write(f"round {number + 1} of {rounds}: {model}, {_TITLES[who]}\n")
                theirs = [case for case in of_model if who in case.measured and not results[case.name, who].void]
                _run_one(who, model, theirs, seconds, results)
    return [_judge(case, results) for case in cases]


def _run_one(who: str, model: str, cases: Sequence[Throughput], seconds: int, results: _Results) -> None:
    if who in _BARE_SIZES and cases:
        measured = _bare(model, _BARE_SIZES[who], seconds)
        for case in cases:
            results[case.name, who].runs.append(measured)
    elif cases:
        try:
            with SERVERS[who].serving(model) as port:
                for case in cases:
                    _run_case(who, port, case, seconds, results[case.name, who])
        except Failed as error:
            sys.stderr.write(f"void: {error}\n")
            for case in cases:
                results[case.name, who].void = str(error)


def _run_case(who: str, port: int, case: Throughput, seconds: int, result: _Result) -> None:
    form = SERVERS[who].formats[case.content]
    try:
        talk = load.rehearse(who, port, form, Sample.of(case.model), case.rows)
        load.press(port, talk, case.connections, max(1, seconds // 3))  # to warm up
        result.runs.append(load.press(port, talk, case.connections, seconds))
    except Failed as error:
        sys.stderr.write(f"void: {error}\n")
        result.void = str(error)


def _bare(model: str, size: int, seconds: int) -> Measured:
    python = envs.python(envs.OURS)
    arguments = [str(MODELS / model), str(MODELS / f"{model}.json"), str(size), str(seconds)]
    command = processes.on_core(machine.SERVER_CORE, [python, "-m", "bench.bare", *arguments])
    env = processes.environ(python, {})
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout))


def _judge(case: Throughput, results: _Results) -> Outcome:
    ours = results[case.name, OURS]
    rows = [_row(case, OURS, ours, ours)]
    rows += [_row(case, who, results[case.name, who], ours) for who in case.others]
    if case.latency is not None and {ECHO, BARE} <= {*case.others}:
        rows.append(_latency_row(case.latency, ours, results[case.name, ECHO], results[case.name, BARE]))
    return Outcome(case.title, rows)


def _row(case: Throughput, who: str, theirs: _Result, ours: _Result) -> Row:
    title = _TITLES[who]
    if theirs.rate is None or theirs.latency is None:
        failing = who == OURS or who in case.rates
        return Row(title, void_text(theirs.void), met=False if failing else None)
    unit = "rows" if who in _BARE_SIZES else "requests"
    figure, latency = f"{theirs.rate:,.{0 if theirs.rate >= 100 else 1}f} {unit}/s", f"{theirs.latency:,.2f} ms"
    if who == OURS:
        return Row(title, figure, latency)
    # The machine's speed drifts: only what was measured in one round is compared. And with one connection, the load
    # generator's own time between two requests, which is nobody's merit, counts in the rate but not in the latency.
    rounds = list(zip(ours.runs, theirs.runs, strict=False)) if not ours.void else []
    ratios = [them.latency / us.latency if case.connections == 1 else us.rate / them.rate for us, them in rounds]
    ratio = statistics.median(ratios) if ratios else None
    bar, met = at_least(ratio, case.rates[who]) if who in case.rates else ("", None)
    return Row(title, figure, latency, ratio, bar, met)


def _latency_row(most: float, ours: _Result, echo: _Result, bare: _Result) -> Row:
    who = "median latency: echo + the model alone"
    if echo.latency is None or bare.latency is None:
        return Row(who, "void", met=False)
    rounds = zip(ours.runs, echo.runs, bare.runs, strict=False)
    ratios = [us.latency / (stack.latency + model.latency) for us, stack, model in rounds]
    ratio = statistics.median(ratios) if ratios and not ours.void else None
    bar, met = at_most(ratio, most)
    return Row(who, "", f"{echo.latency + bare.latency:,.2f} ms", ratio, bar, met)
