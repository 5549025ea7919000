"""The share of an exhaustive test that runs: one part in SHARE, which SEED chooses; `make soak` runs all with SHARE=1.

Both are environment variables. Without SEED there is a new one for each test run, whose first lines show it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SHARE = int(os.environ.get("SHARE", "5"))
# The processes of pytest-xdist inherit it.
SEED = int(os.environ.setdefault("SEED", str(random.SystemRandom().randrange(1_000_000))))


def part_of(all_of_them: Sequence[T]) -> Sequence[T]:
    """Every SHARE-th, and at least one; `SHARE` seeds in a row have them all."""
    return all_of_them[SEED % min(SHARE, len(all_of_them)) :: SHARE]
