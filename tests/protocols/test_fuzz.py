"""A share of the coverage-guided fuzzing that `make fuzz` does at length."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, absent, clean_environ
from tests.fuzz import FOUND
from tests.support.hostile import TARGETS
from tests.support.prepared import uncovered

# There are wheels for some Pythons on x86-64 Linux only.
EXPECTED_HERE = sys.platform == "linux" and (3, 11) <= sys.version_info < (3, 14)


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("atheris") is None:
        if EXPECTED_HERE:
            absent("atheris is not installed")
        pytest.skip("there is no atheris for this Python")
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    environ = uncovered(clean_environ())
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_nothing_but_what_is_expected_comes_out() -> None:
    done = fuzz("all", "--runs", "60000", "--seconds", "60")
    assert done.returncode == 0, done.stdout
    table = re.findall(r"^([\w-]+) +(\d+) +(\d+) +\d+ ", done.stdout, re.MULTILINE)
    assert [target for target, _, _ in table] == [*TARGETS]
    # Our own code is seen, or nothing would guide it.
    assert all(int(inputs) >= 100 and int(edges) > 5 for _, inputs, edges in table), done.stdout


def test_what_is_not_expected_is_found_and_kept(tmp_path: Path) -> None:
    done = fuzz("self-test", "--runs", "100000")
    assert done.returncode != 0
    assert "Uncaught Python exception" in done.stdout + done.stderr
    [kept] = (ROOT / FOUND).glob("self-test-crash-*")
    again = fuzz("self-test", "--input", str(kept))
    kept.unlink()
    assert "AssertionError: found" in again.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_read(target: str) -> None:
    run, seeds = TARGETS[target]
    made = list(seeds())
    assert made
    for data in made:
        run(data)
