"""Time to ready: from the start of the process to the first 200 of its readiness route."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from bench import envs, machine, processes
from bench.outcome import Outcome, Row, at_most
from bench.processes import Failed
from bench.samples import MODELS
from bench.servers import OURS, SERVERS

TITLE = "time to ready"

MODEL = "logistic"

# What a server cannot do without. It says when it has loaded, and ends.
_LOAD = "import mlflow.pyfunc; mlflow.pyfunc.load_model({!r}); print(flush=True)"
_BARE = "`mlflow.pyfunc.load_model` in a bare interpreter"


def run(others: list[str], rounds: int, most: float) -> Outcome:
    """`most`: how many times as long as a bare interpreter, from start to end, ours may take. Raises `Failed`."""
    servers: dict[str, list[float]] = {name: [] for name in (OURS, *others)}
    loads: list[tuple[float, float]] = []
    for number in range(rounds + 1):  # the first is not counted: it reads files that later ones find in memory
        sys.stderr.write(f"round {number} of {rounds}: time to ready\n")
        for name in servers if number % 2 else reversed(servers):
            servers[name].append(_start(name))
        loads.append(_load())
    took = {name: statistics.median(times[1:]) for name, times in servers.items()}
    loaded, ended = (statistics.median(times) for times in zip(*loads[1:], strict=True))
    ratio = took[OURS] / ended
    bar, met = at_most(ratio, most)
    rows = [Row(SERVERS[OURS].title, f"{took[OURS]:.2f} s")]
    rows += [Row(SERVERS[name].title, f"{took[name]:.2f} s", ratio=took[OURS] / took[name]) for name in others]
    rows.append(Row(_BARE, f"{ended:.2f} s", "", ratio, bar, met))
    rows.append(Row("the same, until it has loaded", f"{loaded:.2f} s", ratio=took[OURS] / loaded))
    return Outcome(TITLE, rows)


def _start(name: str) -> float:
    began = time.monotonic()
    with SERVERS[name].serving(MODEL):
        return time.monotonic() - began


def _load() -> tuple[float, float]:
    """Seconds until it has loaded, and until it has ended."""
    python = envs.python(envs.OURS)
    command = processes.on_core(machine.SERVER_CORE, [python, "-c", _LOAD.format(str(MODELS / MODEL))])
    began = time.monotonic()
    with subprocess.Popen(command, env=processes.environ(python, {}), stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read(1)
        loaded = time.monotonic() - began
        process.wait()
        ended = time.monotonic() - began
    if process.returncode:
        raise Failed("a bare interpreter cannot load the model")
    return loaded, ended
