"""A model on BentoML, with adaptive batching: `MODEL=... bentoml serve bentoml_server:Classifier`."""

from __future__ import annotations

import os

import bentoml
import mlflow.pyfunc
import numpy as np


@bentoml.service(
    workers=1,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Classifier:
    def __init__(self) -> None:
        # Without MLflow's checks of a DataFrame: the fastest that its users can have.
        self.model = mlflow.pyfunc.load_model(os.environ["MODEL"]).get_raw_model()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)  # type: ignore[untyped-decorator]  # it is not here
    def predict(self, rows: list[list[float]]) -> list[int]:
        return [int(each) for each in self.model.predict(np.asarray(rows))]
