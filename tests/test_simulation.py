"""The simulation of `tests.simulation`, a bounded share of it; `make soak` runs it for longer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environ


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no-locks"])
@pytest.mark.parametrize("seed", range(4))
def test_no_entry_that_a_pod_uses_is_ever_gone_or_partial(seed: int, locks: bool) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.simulation", "--seed", str(seed), "--steps", "5000"),
            *(() if locks else ("--no-locks",)),
        ],
        env=clean_environ(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["steps"] >= 5000
    # Or it shows nothing.
    for what in ("downloads done", "cleanups done", "entries removed", "kills", "rotten"):
        assert counts[what] > 0, what
