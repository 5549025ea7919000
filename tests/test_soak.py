"""A minute of what `make soak-serve` does for half an hour."""

from __future__ import annotations

from tests import soak


def test_nothing_grows_and_every_answer_is_right() -> None:
    verdict = soak.soak(60)
    assert not verdict.problems, verdict.table()
