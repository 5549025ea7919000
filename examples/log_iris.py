"""Log a small classifier of scikit-learn's iris data to MLflow and make it the champion. Used by `make run`."""

from __future__ import annotations

import sys
from pathlib import Path

import mlflow
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression


def main(artifacts: Path) -> None:
    features, species = load_iris(return_X_y=True, as_frame=True)
    model = LogisticRegression(max_iter=1000).fit(features, species)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("iris")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("iris", artifacts.as_uri())
    with mlflow.start_run(experiment_id=experiment_id):
        logged = mlflow.sklearn.log_model(
            model,
            name="model",
            input_example=features.head(2),
            registered_model_name="iris",
            pip_requirements=["scikit-learn", "skops"],
        )
    client.set_registered_model_alias("iris", "champion", logged.registered_model_version)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
