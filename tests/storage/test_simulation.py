"""The simulation of `tests.simulation`, a bounded share of it; `make soak` runs it for longer."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environ
from tests.simulation import WITHOUT
from tests.support.prepared import uncovered

STEPS = 10_000


def simulate(seed: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process that has imported nothing that could stop its threads. One seed is enough for coverage."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seed", str(seed), "--steps", str(STEPS), *options],
        env=clean_environ() if seed == 0 else uncovered(clean_environ()),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


# By the words in which an invariant's end is logged.
BREAKS = {
    "pin-veto": "serves two versions",
    "pin-race": "serves two versions",
    "place": "has another's",
    "names": "is not (whole|known to use)|every entry is kept by",
}


@pytest.mark.parametrize("without", WITHOUT)
def test_it_notices_what_is_missing(without: str) -> None:
    for seed in range(50):
        done = simulate(seed, "--without", without)
        if done.returncode:
            assert re.search(BREAKS.get(without, "is not (whole|known to use)"), done.stderr), done.stderr
            return
    raise AssertionError(f"nothing is lost without {without}")


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no-locks"])
@pytest.mark.parametrize("seed", range(4))
def test_no_entry_that_a_pod_uses_is_ever_gone_or_partial(seed: int, locks: bool) -> None:
    done = simulate(seed, *(() if locks else ("--no-locks",)))
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["steps"] >= STEPS
    # Or it shows nothing.
    happens = (
        "downloads done",
        "cleanups done",
        "entries removed",
        "kills",
        "rotten",
        "fallbacks",
        "ghosts",
        "looks",
        "resolved",
        "pins dropped",
    )
    for what in happens:
        assert counts[what] > 0, what
