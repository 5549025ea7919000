"""`python -m bench`: measure this server beside its peers and its limits, and say which bars it meets.

Installs each peer in an environment of its own below build/bench, makes the models, runs the cases, prints a table, and
writes it to bench/RESULTS.md if everything was measured. The exit code is 1 if a bar isn't met.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import (
    cases,
    downloads,
    envs,
    liveness,
    machine,
    memory,
    overload,
    report,
    rollout,
    samples,
    startup,
    throughput,
)
from bench.outcome import Outcome, or_void
from bench.servers import OURS, SERVERS
from bench.throughput import LIMITS, Throughput

RESULTS = Path(__file__).with_name("RESULTS.md")

_CASES = (*cases.NAMES, *cases.TROUBLES, *downloads.NAMES)
_PEERS = tuple(dict.fromkeys(name for name in (*SERVERS, *LIMITS) if name != OURS))


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := [name for name in asked if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)} among {', '.join(known)}")
        return asked

    return parse


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure this server beside its peers and its limits."
    )
    parser.add_argument("--cases", type=_some_of(_CASES), help=f"only these of {','.join(_CASES)}")
    parser.add_argument("--peers", type=_some_of(_PEERS), help=f"only these of {','.join(_PEERS)}")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (5)")
    parser.add_argument("--seconds", type=int, default=5, help="how long each time (5)")
    parser.add_argument("--overload-seconds", type=int, default=60, help="how long an overload lasts (60)")
    parser.add_argument("--restarts", type=int, default=20, help="how often servers are restarted under load (20)")
    parser.add_argument(
        "--write", action="store_true", help=f"write to {RESULTS.name} even if not everything is measured"
    )
    return parser.parse_args()


def main() -> int:
    asked = _arguments()
    if problems := machine.problems():
        sys.exit("\n".join(problems))
    names, peers = asked.cases or list(_CASES), asked.peers or list(_PEERS)
    loads = [_with(case, peers) for case in cases.THROUGHPUT if case.name in names]
    of_cache = [name for name in names if name in downloads.NAMES]
    _prepare(names, peers, loads)
    # Ends the servers, too, as an interrupt does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    cached = downloads.run(of_cache, asked.rounds) if of_cache else []
    machine.stay_on_load_core()
    served = _run(names, peers, loads, asked.rounds, asked.seconds)
    troubled = _trouble(names, peers, asked.rounds, asked.overload_seconds, asked.restarts)
    everything = [*served, *troubled, *cached]
    sys.stdout.write(report.table(everything))
    if asked.write or not (asked.cases or asked.peers):
        if served:
            RESULTS.write_text(report.document(served, asked.rounds, asked.seconds, RESULTS.read_text()))
        if troubled:
            RESULTS.write_text(report.with_troubles(RESULTS.read_text(), troubled, asked.rounds))
        if cached:
            RESULTS.write_text(report.with_downloads(RESULTS.read_text(), cached, asked.rounds))
    return 0 if all(outcome.met for outcome in everything) else 1


def _with(case: Throughput, peers: list[str]) -> Throughput:
    return dataclasses.replace(case, others=[name for name in case.others if name in peers])


def _prepare(names: list[str], peers: list[str], loads: list[Throughput]) -> None:
    """Make the environments and the models."""
    needed = {SERVERS[name].env for name in (OURS, *peers) if name in SERVERS}
    needed |= {"mlflow"} if set(names) & set(downloads.NAMES) else set()
    for env in sorted(needed):
        envs.ensure(env)
    models = [case.model for case in loads]
    models += [startup.MODEL] if cases.START in names else []
    models += [memory.MODEL] if cases.MEMORY in names else []
    models += [liveness.SLOW_MODEL, liveness.FAST_MODEL] if cases.LIVENESS in names else []
    models += [overload.SLOW_MODEL, overload.FAST_MODEL] if cases.OVERLOAD in names else []
    models += [rollout.MODEL] if cases.SHUTDOWN in names else []
    samples.ensure(list(dict.fromkeys(models)))


def _run(names: list[str], peers: list[str], loads: list[Throughput], rounds: int, seconds: int) -> list[Outcome]:
    outcomes = throughput.run(loads, rounds, seconds)
    mlflow = [name for name in peers if name == "mlflow"]
    if cases.START in names:
        outcomes.append(or_void(startup.TITLE, lambda: startup.run(mlflow, rounds, cases.START_AT_MOST)))
    if cases.MEMORY in names:
        outcomes.append(or_void(memory.TITLE, lambda: memory.run(cases.MEMORY_WORKERS, seconds, cases.MEMORY_AT_MOST)))
    if cases.LIVENESS in names:
        outcomes += liveness.run(mlflow, rounds, seconds, cases.LIVENESS_AT_MOST_MS)
    return outcomes


def _trouble(names: list[str], peers: list[str], rounds: int, seconds: int, restarts: int) -> list[Outcome]:
    outcomes = overload.run(peers, rounds, seconds, cases.OVERLOAD_BARS) if cases.OVERLOAD in names else []
    return [*outcomes, *(rollout.run(peers, restarts) if cases.SHUTDOWN in names else [])]


if __name__ == "__main__":
    sys.exit(main())
