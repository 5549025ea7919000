"""Models of LightGBM and XGBoost that were trained on pandas categories answer as their estimators do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightgbm
import mlflow
import mlflow.lightgbm
import mlflow.sklearn
import mlflow.xgboost
import numpy as np
import pandas as pd
import pytest
import requests
import xgboost
from mlflow.models import infer_signature

from darwin_runtime.errors import InputRejected
from darwin_runtime.model.load import load_model
from darwin_runtime.model.model import Model
from darwin_runtime.model.self_test import make_ready
from tests.support.models import REQUIREMENTS, load_pyfunc, save
from tests.support.servers import serving

pytestmark = pytest.mark.usefixtures("serving_environment")

RNG = np.random.default_rng(0)
TABLE = pd.DataFrame(
    {
        "x": RNG.normal(size=200),
        "color": pd.Categorical(RNG.choice(["red", "green", "blue"], 200)),
        "size": pd.Categorical(RNG.choice([10, 20, 30], 200)),
    }
)
TARGET = (TABLE["x"] > 0).astype(int) + (TABLE["color"] == "red")
CATEGORIES = {"color": "category", "size": "category"}
ROWS: list[dict[str, Any]] = [
    *({"x": 0.5, "color": color, "size": size} for color in ("red", "green", "blue") for size in (10, 20, 30)),
    *({"x": x, "color": None, "size": 20} for x in (None, -1.5)),
]

CLASSIFIER = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(TABLE, TARGET)
ESTIMATORS: dict[str, tuple[Any, Any]] = {
    "LGBMClassifier": (mlflow.lightgbm, CLASSIFIER),
    "LGBMRegressor": (mlflow.lightgbm, lightgbm.LGBMRegressor(n_estimators=5, verbose=-1).fit(TABLE, TARGET)),
    "lightgbm.Booster": (
        mlflow.lightgbm,
        lightgbm.train({"objective": "regression", "verbose": -1}, lightgbm.Dataset(TABLE, TARGET), 5),
    ),
    "LGBMClassifier, as scikit-learn": (mlflow.sklearn, CLASSIFIER),
    "XGBClassifier": (
        mlflow.xgboost,
        xgboost.XGBClassifier(n_estimators=5, enable_categorical=True).fit(TABLE, TARGET),
    ),
    "XGBRegressor": (mlflow.xgboost, xgboost.XGBRegressor(n_estimators=5, enable_categorical=True).fit(TABLE, TARGET)),
    "xgboost.Booster": (
        mlflow.xgboost,
        xgboost.train({}, xgboost.DMatrix(TABLE, TARGET, enable_categorical=True), 5),
    ),
}


def saved(kind: str, path: Path, **options: Any) -> Path:
    flavor, estimator = ESTIMATORS[kind]
    if flavor is mlflow.sklearn:
        options["serialization_format"] = "cloudpickle"
    options |= REQUIREMENTS
    # MLflow warns of integers in a table.
    return save(lambda at: flavor.save_model(estimator, at, signature=infer_signature(TABLE), **options), path)


def own_answer(estimator: Any, rows: list[dict[str, Any]], method: str = "predict") -> Any:
    table = pd.DataFrame(rows).astype({"x": "float64"})
    for name in CATEGORIES:
        table[name] = pd.Categorical(table[name], categories=TABLE[name].cat.categories)
    data = xgboost.DMatrix(table, enable_categorical=True) if isinstance(estimator, xgboost.Booster) else table
    return np.asarray(getattr(estimator, method)(data))


def ask(model: Model, rows: list[dict[str, Any]], method: str = "") -> Any:
    return np.asarray(model.predict(model.input_schema.records(rows), None, method))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_as_the_estimator_itself_answers(tmp_path: Path, kind: str, example: bool, fast: bool) -> None:
    directory = saved(kind, tmp_path / "model", **({"input_example": TABLE.head(2)} if example else {}))
    with pytest.raises(ValueError, match="categor"):
        load_pyfunc(directory).predict(TABLE.head(2).astype({"color": str, "size": "int64"}))
    model = make_ready(load_model(directory), "m", fast_path=fast)
    assert "on arrays" not in model.predictor.description
    estimator = ESTIMATORS[kind][1]
    for rows in (ROWS, *([row] for row in ROWS)):
        np.testing.assert_array_equal(ask(model, rows), own_answer(estimator, rows))
        for method in set(model.predictors) - {"predict"}:
            np.testing.assert_array_equal(ask(model, rows, method), own_answer(estimator, rows, method))


def test_a_value_that_was_no_category(tmp_path: Path) -> None:
    unknown = {"x": 0.5, "color": "red", "size": 99}
    model = load_model(saved("XGBClassifier", tmp_path / "xgboost"))
    with pytest.raises(InputRejected, match="column 'size': the model knows no category 99"):
        ask(model, [unknown])
    np.testing.assert_array_equal(ask(model, ROWS), own_answer(ESTIMATORS["XGBClassifier"][1], ROWS))
    # LightGBM takes it for a missing value.
    model = load_model(saved("LGBMClassifier", tmp_path / "lightgbm"))
    expected = own_answer(CLASSIFIER, [{**unknown, "size": None}], "predict_proba")
    np.testing.assert_array_equal(ask(model, [unknown], "predict_proba"), expected)


def test_integers_that_lightgbm_only_takes_for_categories_stay_integers(tmp_path: Path) -> None:
    table = TABLE.assign(number=RNG.integers(0, 5, 200), ordered=pd.Categorical(["a", "b"] * 100, ordered=True))
    fitted = lightgbm.LGBMRegressor(n_estimators=5, verbose=-1)
    fitted.fit(table, TARGET, categorical_feature=["color", "size", "ordered"])

    def build(at: Path) -> None:
        mlflow.lightgbm.save_model(fitted, at, signature=infer_signature(table), **REQUIREMENTS)

    model = load_model(save(build, tmp_path / "model"))
    rows = json.loads(table.head(20).to_json(orient="records"))
    np.testing.assert_array_equal(ask(model, rows), fitted.predict(table.head(20)))


@pytest.mark.parametrize("kind", ["LGBMClassifier", "XGBClassifier"])
def test_over_http(tmp_path: Path, kind: str) -> None:
    directory = saved(kind, tmp_path / "model", input_example=TABLE.head(2))
    expected = own_answer(ESTIMATORS[kind][1], ROWS).tolist()
    with serving(directory, WORKERS=1) as served:
        assert served.post("/predict", {"features": ROWS}).json()["scores"] == expected
        sample = requests.get(served.url + "/schema", timeout=60).json()["sample_request"]
        assert served.post("/predict", sample).status_code == 200
