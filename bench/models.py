"""The models that are served, and the rows they are asked about. Runs in the environment `ours`.

`python -m bench.models DIRECTORY NAME...` saves each model as MLflow's users do, to DIRECTORY/NAME, and beside it

- NAME.json: columns, rows, and the prediction for each row, which answers are compared with;
- NAME.joblib: the scikit-learn models and the slow one once more, for servers that read no MLflow models.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import mlflow.lightgbm
import mlflow.pyfunc
import mlflow.sklearn
import mlflow.xgboost
import numpy as np
import pandas as pd
from lightgbm import LGBMClassifier
from mlflow.models import infer_signature
from sklearn.datasets import load_iris, make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from xgboost import XGBClassifier

# By the name under which it is also found by the server that loads it.
sys.path.append(str(Path(__file__).with_name("peers")))

SEED = 1

# How many different rows the servers are asked about, one at a time.
ROWS = 64

# skops, in which MLflow saves scikit-learn's models, loads what scikit-learn itself writes in Cython only if told to.
_TREE = "sklearn.tree._tree.Tree"

# Each flavor, with the requirements that MLflow would otherwise take a while to find out.
SKLEARN = (mlflow.sklearn, {"pip_requirements": ["scikit-learn", "skops"], "skops_trusted_types": [_TREE]})
LIGHTGBM = (mlflow.lightgbm, {"pip_requirements": ["lightgbm", "scikit-learn", "skops"]})
XGBOOST = (mlflow.xgboost, {"pip_requirements": ["xgboost-cpu", "scikit-learn"]})


def _data(columns: int, rows: int) -> tuple[pd.DataFrame, Any]:
    """Two classes that a few of the columns tell apart."""
    features, labels = make_classification(rows, columns, n_informative=min(columns, 8) // 2 * 2, random_state=SEED)
    return pd.DataFrame(features, columns=[f"feature_{i}" for i in range(columns)]), labels


def logistic() -> tuple[Any, pd.DataFrame]:
    """scikit-learn's usual first example."""
    features, species = load_iris(return_X_y=True, as_frame=True)
    return LogisticRegression(max_iter=1000).fit(features, species), features.sample(ROWS, random_state=SEED)


def forest() -> tuple[Any, pd.DataFrame]:
    """100 trees on 20 columns."""
    features, labels = _data(20, 2000)
    return RandomForestClassifier(100, random_state=SEED).fit(features, labels), features.head(ROWS)


def wide() -> tuple[Any, pd.DataFrame]:
    """600 columns."""
    features, labels = _data(600, 2000)
    return LogisticRegression(max_iter=1000).fit(features, labels), features.head(ROWS)


def batch() -> tuple[Any, pd.DataFrame]:
    """10 columns, asked about 10,000 rows at once."""
    features, labels = _data(10, 10_000)
    return LogisticRegression(max_iter=1000).fit(features, labels), features


def lightgbm() -> tuple[Any, pd.DataFrame]:
    """100 boosted trees on 20 columns."""
    features, labels = _data(20, 2000)
    return LGBMClassifier(n_estimators=100, random_state=SEED, verbose=-1).fit(features, labels), features.head(ROWS)


def xgboost() -> tuple[Any, pd.DataFrame]:
    """100 boosted trees on 20 columns."""
    features, labels = _data(20, 2000)
    return XGBClassifier(n_estimators=100, random_state=SEED).fit(features, labels), features.head(ROWS)


def bigforest() -> tuple[Any, pd.DataFrame]:
    """A forest of 260 MB once loaded: labels at random make its trees as large as they get."""
    rng = np.random.default_rng(SEED)
    features = pd.DataFrame(rng.normal(size=(50_000, 20)), columns=[f"feature_{i}" for i in range(20)])
    model = RandomForestClassifier(133, max_features=1, random_state=SEED, n_jobs=-1)
    model.fit(features, rng.integers(2, size=len(features)))
    # It was fitted on all cores, and is to predict on one thread like every model here.
    return model.set_params(n_jobs=None), features.head(ROWS)


MODELS: dict[str, tuple[Callable[[], tuple[Any, pd.DataFrame]], tuple[Any, dict[str, Any]]]] = {
    "logistic": (logistic, SKLEARN),
    "forest": (forest, SKLEARN),
    "wide": (wide, SKLEARN),
    "batch": (batch, SKLEARN),
    "lightgbm": (lightgbm, LIGHTGBM),
    "xgboost": (xgboost, XGBOOST),
    "bigforest": (bigforest, SKLEARN),
}


def _save(directory: Path, name: str) -> None:
    make, (flavor, options) = MODELS[name]
    model, rows = make()
    predictions = model.predict(rows)
    flavor.save_model(
        model,
        directory / name,
        signature=infer_signature(rows, predictions),
        input_example=rows.head(2),
        **options,
    )
    if flavor is mlflow.sklearn:
        joblib.dump(model, directory / f"{name}.joblib")
    _write_sample(directory, name, rows, predictions.tolist())


def _save_slow(directory: Path) -> None:
    rows = pd.DataFrame({"seconds": [0.0], "busy": [True]})
    mlflow.pyfunc.save_model(
        directory / "slow",
        python_model=Path(__file__).with_name("slow_model.py"),
        signature=infer_signature(rows, [0.0]),
        input_example=rows,
        pip_requirements=["pandas"],
    )
    # By the name under which the server that loads it finds it.
    sys.path.append(str(Path(__file__).with_name("peers")))
    joblib.dump(importlib.import_module("slow_estimator").Slow(), directory / "slow.joblib")
    _write_sample(directory, "slow", rows, [0.0])


def _write_sample(directory: Path, name: str, rows: pd.DataFrame, predictions: list[float]) -> None:
    sample = {"columns": list(rows.columns), "rows": rows.values.tolist(), "predictions": predictions}
    (directory / f"{name}.json").write_text(json.dumps(sample))


def main(directory: Path, names: list[str]) -> None:
    for name in names:
        _save_slow(directory) if name == "slow" else _save(directory, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
