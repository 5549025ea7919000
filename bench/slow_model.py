"""A model whose prediction takes as long as its input says: MLflow runs this file when it loads `slow`."""

from __future__ import annotations

import time
from typing import Any

import mlflow
import pandas as pd


class Slow(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow ships no types
    """For each row, spend `seconds`: counting in Python, which holds the interpreter's lock, or sleeping.

    Answer with them.
    """

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> list[float]:
        return [self._spend(float(seconds), bool(busy)) for seconds, busy in model_input.to_numpy()]

    def _spend(self, seconds: float, busy: bool) -> float:
        if not busy:
            time.sleep(seconds)
            return seconds
        # Of this thread's own CPU time: work does not become less while others have the core, or the lock.
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass
        return seconds


mlflow.models.set_model(Slow())
