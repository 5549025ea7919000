"""Real models, logged to the tests' MLflow server."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import Tracking

NAME = "iris"


@dataclass(frozen=True)
class Logged:
    run: str
    model_id: str
    version: str


@contextmanager
def client_of(tracking: Tracking) -> Iterator[Any]:
    """An MLflow client, and MLflow's fluent functions, logged in to the tests' server."""
    before = {name: os.environ.get(name) for name in tracking.environ}
    os.environ.update(tracking.environ, MLFLOW_DISABLE_TELEMETRY="true")
    import mlflow

    mlflow.set_tracking_uri(tracking.uri)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield mlflow.MlflowClient()
    finally:
        mlflow.set_tracking_uri(None)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)  # MLflow itself removes some
            else:
                os.environ[name] = value


def log_model(tracking: Tracking, factor: float, name: str = NAME) -> Logged:
    """Log and register a model that is told apart by its coefficient."""
    with client_of(tracking):
        import mlflow
        import numpy as np
        from sklearn.linear_model import LinearRegression

        model = LinearRegression().fit(np.array([[0.0], [1.0]]), np.array([0.0, factor]))
        with mlflow.start_run() as run:
            info = mlflow.sklearn.log_model(
                model,
                name="model",
                registered_model_name=name,
                input_example=np.array([[1.0]]),
                pip_requirements=["scikit-learn", "skops"],
            )
    return Logged(run.info.run_id, info.model_id, str(info.registered_model_version))


def log_files(tracking: Tracking, name: str, files: Mapping[str, bytes]) -> str:
    """Register version 1 of a model that consists of these files, which need not make sense; returns its URI."""
    with client_of(tracking) as client, tempfile.TemporaryDirectory() as directory:
        import mlflow

        for path, content in files.items():
            local = Path(directory, path)
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(content)
        with mlflow.start_run() as run:
            mlflow.log_artifacts(directory, "model")
        client.create_registered_model(name)
        version = client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
    return f"models:/{name}/{version.version}"
