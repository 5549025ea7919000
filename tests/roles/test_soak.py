"""`make soak-serve` does this for half an hour; here it takes 20 seconds."""

from __future__ import annotations

import pytest

from tests import soak

pytestmark = pytest.mark.alone


def test_nothing_grows_and_every_answer_is_right() -> None:
    verdict = soak.soak(20)
    assert not verdict.problems, verdict.table()
