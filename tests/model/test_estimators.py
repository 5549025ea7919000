"""Every scikit-learn classifier and regressor, saved with MLflow's defaults, answers over HTTP what pyfunc answers."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import requests
import sklearn.utils
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.http.app import make_app
from darwin_runtime.http.service import Service
from darwin_runtime.model.compare import same
from darwin_runtime.model.load import load_model
from tests.support.models import load_pyfunc, save_estimator
from tests.support.servers import in_thread

ESTIMATORS = {kind: dict(sklearn.utils.all_estimators(type_filter=kind)) for kind in ("classifier", "regressor")}

# What those with required arguments are given.
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "ClassifierChain": lambda: {"estimator": LogisticRegression()},
    "FixedThresholdClassifier": lambda: {"estimator": LogisticRegression()},
    "MultiOutputClassifier": lambda: {"estimator": DecisionTreeClassifier(random_state=0)},
    "MultiOutputRegressor": lambda: {"estimator": Ridge()},
    "OneVsOneClassifier": lambda: {"estimator": LogisticRegression()},
    "OneVsRestClassifier": lambda: {"estimator": LogisticRegression()},
    "OutputCodeClassifier": lambda: {"estimator": LogisticRegression(), "random_state": 0},
    "RegressorChain": lambda: {"estimator": Ridge()},
    "SelfTrainingClassifier": lambda: {"estimator": LogisticRegression()},
    "StackingClassifier": lambda: {"estimators": [("a", LogisticRegression()), ("b", DecisionTreeClassifier())]},
    "StackingRegressor": lambda: {"estimators": [("a", LinearRegression()), ("b", DecisionTreeRegressor())]},
    "TunedThresholdClassifierCV": lambda: {"estimator": LogisticRegression()},
    "VotingClassifier": lambda: {"estimators": [("a", LogisticRegression()), ("b", DecisionTreeClassifier())]},
    "VotingRegressor": lambda: {"estimators": [("a", LinearRegression()), ("b", DecisionTreeRegressor())]},
}

# What they learn, where it isn't one number or one of three classes.
TARGETS = {
    **dict.fromkeys(("ClassifierChain", "MultiOutputClassifier"), "labels"),
    **dict.fromkeys(("FixedThresholdClassifier", "TunedThresholdClassifierCV"), "binary"),
    **dict.fromkeys(
        (
            *("CCA", "MultiOutputRegressor", "MultiTaskElasticNet", "MultiTaskElasticNetCV", "MultiTaskLasso"),
            *("MultiTaskLassoCV", "PLSCanonical", "RegressorChain"),
        ),
        "numbers",
    ),
}

# Those that learn from fewer columns than there are.
COLUMNS = {"IsotonicRegression": 1}

# Those that can't be trained on a small table at all, and why.
UNTRAINABLE: dict[str, str] = {}

ROWS = 48


def table(columns: int) -> pd.DataFrame:
    """Positive numbers, as some estimators need."""
    numbers: Any = np.random.default_rng(7).uniform(0.5, 4.0, size=(ROWS, columns)).round(3)
    made: pd.DataFrame = pd.DataFrame(numbers, columns=[f"x{i}" for i in range(columns)])
    return made


def target(kind: str, features: pd.DataFrame) -> Any:
    total = features.sum(axis=1).to_numpy()
    classes = np.digitize(total, np.quantile(total, [1 / 3, 2 / 3]))
    return {
        "classifier": classes,
        "binary": (classes > 0).astype(int),
        "labels": np.stack([classes > 0, classes > 1], axis=1).astype(int),
        "regressor": total,
        "numbers": np.stack([total, features["x0"].to_numpy()], axis=1),
    }[kind]


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[Service, str]]:
    service = Service(BatchLimits(timeout=120))
    with in_thread(make_app(service)) as url:
        yield service, url


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, named in ESTIMATORS.items() for name in named if name not in UNTRAINABLE]
)
def test_estimator(service: tuple[Service, str], tmp_path: Path, kind: str, name: str) -> None:
    features = table(COLUMNS.get(name, 4))
    model = ESTIMATORS[kind][name](**ARGUMENTS.get(name, dict)())
    if "random_state" in inspect.signature(type(model)).parameters:
        model.set_params(random_state=0)
    model.fit(features, target(TARGETS.get(name, kind), features))
    path = save_estimator(model, tmp_path / "model", features)

    loaded = load_model(path)
    rows = loaded.input_schema.split(None, features.to_numpy().tolist())
    quick = loaded.with_quickest_predictor(
        loaded.input_schema.split(None, features.head(3).to_numpy().tolist()), budget=30
    )
    assert same(quick.predict(rows), loaded.predict(rows))
    service[0].use(loaded)
    expected = json.loads(json.dumps(np.asarray(load_pyfunc(path).predict(features)).tolist()))
    body = {"dataframe_split": features.to_dict("split")}
    answer = requests.post(service[1] + "/invocations", json=body, timeout=120)
    assert answer.json() == {"predictions": expected}
    answer = requests.post(service[1] + "/predict", json={"features": features.to_dict("records")}, timeout=120)
    assert answer.json() == {"scores": expected}


def test_the_lists_are_not_stale() -> None:
    known = {name: estimator for named in ESTIMATORS.values() for name, estimator in named.items()}
    assert len(known) > 80
    for name in (*ARGUMENTS, *TARGETS, *COLUMNS, *UNTRAINABLE):
        assert name in known, f"scikit-learn has no {name} any more"


@pytest.mark.parametrize("name", dict.fromkeys([*ARGUMENTS, *TARGETS, *COLUMNS, *UNTRAINABLE]))
def test_the_exceptions_are_needed(name: str) -> None:
    """Without what the lists say of it, the estimator can't be built or trained."""
    kind = next(kind for kind, named in ESTIMATORS.items() if name in named)
    features = table(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError, IndexError)):  # noqa: PT012 - either step may be the one to fail
            model = ESTIMATORS[kind][name]()
            model.fit(features, target(kind, features)).predict(features)
