"""The models as files: has them made, and reads the rows that they are asked about. bench/models.py makes them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench import BUILD, ROOT, envs

MODELS = BUILD / "models"

_MAKERS = [ROOT / "bench" / name for name in ("models.py", "slow_model.py", "peers/slow_estimator.py")]


@dataclass(frozen=True)
class Sample:
    """A model's rows, and what it predicts for each."""

    columns: list[str]
    rows: list[list[float]]
    predictions: list[Any]

    @classmethod
    def of(cls, model: str) -> Sample:
        return cls(**json.loads((MODELS / f"{model}.json").read_text()))

    def chunks(self, size: int) -> Iterator[tuple[list[list[float]], list[Any]]]:
        """`size` rows at a time, with their predictions."""
        for start in range(0, len(self.rows) - size + 1, size):
            yield self.rows[start : start + size], self.predictions[start : start + size]


def ensure(models: Sequence[str]) -> None:
    """Make those of `models` that are missing, or were made by other code or with other libraries."""
    made_from = hashlib.sha256(b"".join(path.read_bytes() for path in _MAKERS) + envs.digest(envs.OURS).encode())
    for model in models:
        stamp = MODELS / f"{model}.made-from"
        if stamp.is_file() and stamp.read_text() == made_from.hexdigest():
            continue
        sys.stderr.write(f"making the model {model}\n")
        MODELS.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(MODELS / model, ignore_errors=True)  # MLflow overwrites nothing
        subprocess.run([envs.python(envs.OURS), "-m", "bench.models", MODELS, model], cwd=ROOT, check=True)
        stamp.write_text(made_from.hexdigest())
