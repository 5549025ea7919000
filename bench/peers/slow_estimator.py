"""The model of bench/slow_model.py as an estimator on arrays, for MLServer."""

from __future__ import annotations

import time
from typing import Any


class Slow:
    """For each row, spend the seconds in it: counting in Python, or sleeping. Answer with them."""

    def predict(self, rows: Any) -> Any:
        for seconds, busy in rows:
            until = time.thread_time() + seconds
            if not busy:
                time.sleep(seconds)
            while busy and time.thread_time() < until:
                pass
        return rows[:, 0]
