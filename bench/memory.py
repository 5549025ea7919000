"""What more workers cost in memory: the proportional set size of all processes, after requests to each."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bench import load, processes
from bench.outcome import Outcome, Row, at_most
from bench.processes import Failed
from bench.samples import Sample
from bench.servers import OURS, SERVERS

TITLE = "memory, a forest of 260 MB"

MODEL = "bigforest"

# So many that every worker gets some.
CONNECTIONS = 64

_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)


def run(workers: int, seconds: int, most: float) -> Outcome:
    """`most`: how many times the memory of one worker that many may take."""
    one, several = (_used(count, seconds) for count in (1, workers))
    ratio = several / one
    bar, met = at_most(ratio, most)
    rows = [
        Row(f"`WORKERS={workers}`", f"{several:,.0f} MiB"),
        Row("`WORKERS=1`", f"{one:,.0f} MiB", "", ratio, bar, met),
    ]
    return Outcome(TITLE, rows)


def _used(workers: int, seconds: int) -> float:
    """MiB in use by a server with so many workers. Raises `Failed`, also if they are not there."""
    sys.stderr.write(f"memory: {workers} workers\n")
    server, sample = SERVERS[OURS], Sample.of(MODEL)
    with server.starting(MODEL, WORKERS=str(workers)) as started:
        started.wait()
        talk = load.rehearse(OURS, started.port, server.formats["json"], sample, 1)
        load.press(started.port, talk, CONNECTIONS, seconds)
        members = processes.family(started.leader)
        if len(members) < workers:
            raise Failed(f"{workers} workers, but only {len(members)} processes")
        return sum(map(_pss, members)) / 2**10


def _pss(process: int) -> int:
    """In KiB; a page that several processes share counts in equal parts for each."""
    [size] = _PSS.findall(Path(f"/proc/{process}/smaps_rollup").read_text())
    return int(size)
