"""A limit, not a peer: a model in a loop, on arrays, without a server. Runs in the environment `ours`.

`python -m bench.bare MODEL SAMPLE SIZE SECONDS` predicts SIZE rows at a time and prints, as JSON, rows per second and
the median time of one prediction in milliseconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np


def main(model: str, sample: str, size: int, seconds: float) -> None:
    # Of an array there is nothing to say: that a model fitted on named columns gets one is the point.
    warnings.simplefilter("ignore")
    raw = mlflow.pyfunc.load_model(model).get_raw_model()
    rows = np.array(json.loads(Path(sample).read_text())["rows"])
    arrays = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    _loop(raw, arrays, seconds / 4)
    times = _loop(raw, arrays, seconds)
    rate = size * len(times) / sum(times)
    sys.stdout.write(json.dumps({"rate": rate, "latency": statistics.median(times) * 1000}) + "\n")


def _loop(model: Any, arrays: list[Any], seconds: float) -> list[float]:
    """The time in seconds that each prediction took."""
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for array in arrays:
            before = time.perf_counter()
            model.predict(array)
            times.append(time.perf_counter() - before)
    return times


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
