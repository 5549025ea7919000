"""Other methods than predict: by setting, by request, in batches, and never other than the estimator's own answer."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import mlflow.lightgbm
import numpy as np
import pandas as pd
import pytest
from lightgbm import LGBMClassifier
from mlflow.models import infer_signature
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.engine.batching import Batcher
from darwin_runtime.engine.inference_thread import InferenceThread
from darwin_runtime.errors import RoleError
from darwin_runtime.model.load import load_model
from darwin_runtime.model.model import Model
from darwin_runtime.model.self_test import example_rows, make_ready
from darwin_runtime.protocols.base import Request
from darwin_runtime.schema.rows import Rows
from tests.conftest import run_role
from tests.support.models import IRIS, REQUIREMENTS, iris_table, model_path, save, save_estimator
from tests.support.servers import serving

pytestmark = pytest.mark.usefixtures("serving_environment")

TABLE, TARGET = iris_table()
IRIS_ROWS = [IRIS, {**IRIS, "petal length (cm)": 1.0}]


def iris_rows(model: Model, count: int = 5) -> Rows:
    return model.input_schema.split(None, TABLE.head(count).to_numpy().tolist())


CLASSIFIER = make_pipeline(StandardScaler(), RandomForestClassifier(10, random_state=0)).fit(TABLE, TARGET)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("method", ["predict", "predict_proba", "predict_log_proba"])
def test_the_estimator_s_own_answer(tmp_path: Path, method: str, fast: bool) -> None:
    directory = save_estimator(CLASSIFIER, tmp_path / "model", TABLE)
    with np.errstate(divide="ignore"):
        model = load_model(directory, method=method).with_quickest_predictor(fast=fast)
        assert model.predictor.batchable
        assert bool(model.predictor.predict_array) == fast
        expected = getattr(CLASSIFIER, method)(TABLE.head(5))
        np.testing.assert_array_equal(model.predict(iris_rows(model)), expected)
        other = "predict_proba" if method == "predict" else "predict"
        np.testing.assert_array_equal(
            model.predict(iris_rows(model), method=other), getattr(CLASSIFIER, other)(TABLE.head(5))
        )
    assert ("on arrays" in model.predictor.description) == fast


@pytest.mark.parametrize(
    ("estimator", "methods"),
    [
        (CLASSIFIER, ["predict", "predict_proba", "predict_log_proba"]),
        (LinearSVC().fit(TABLE, TARGET), ["predict", "decision_function"]),
        (IsolationForest(n_estimators=10).fit(TABLE), ["predict", "decision_function", "score_samples"]),
    ],
)
def test_what_a_model_offers(tmp_path: Path, estimator: Any, methods: list[str]) -> None:
    contract = load_model(save_estimator(estimator, tmp_path / "model", TABLE)).contract("m")
    assert list(contract.methods) == methods
    assert contract.classes == (None if isinstance(estimator, IsolationForest) else [0, 1, 2])


BOOSTED = LGBMClassifier(n_estimators=2, verbose=-1).fit(TABLE, TARGET)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("flavor", "estimator", "taken"),
    # The pipeline has **params, for a last step that takes none.
    [(mlflow.sklearn, CLASSIFIER, {}), (mlflow.lightgbm, BOOSTED, {"raw_score": True})],
    ids=["sklearn", "lightgbm"],
)
def test_a_method_gets_the_params_that_it_takes(
    tmp_path: Path, flavor: Any, estimator: Any, taken: dict[str, Any], fast: bool
) -> None:
    # MLflow gives the defaults to each request. `X` is the data's own name.
    options: Any = {"signature": infer_signature(TABLE, params={"tag": "a", "X": 1, "raw_score": True})}
    if flavor is mlflow.sklearn:
        options["serialization_format"] = "cloudpickle"
    path = save(lambda at: flavor.save_model(estimator, at, **options, **REQUIREMENTS), tmp_path / "model")
    model = load_model(path).with_quickest_predictor(fast=fast)
    expected = estimator.predict_proba(TABLE.head(5), **taken)
    for params in ({}, {"tag": "b"}):
        np.testing.assert_array_equal(model.predict(iris_rows(model), params, "predict_proba"), expected)
    np.testing.assert_array_equal(model.predict(iris_rows(model), {"tag": "b"}), estimator.predict(TABLE.head(5)))


def test_boosters_and_the_models_of_others_offer_nothing_else() -> None:
    assert load_model(model_path("untyped")).contract("m").methods == ("predict",)
    assert load_model(model_path("params")).contract("m").methods == ("predict",)


def test_a_model_logged_with_another_method(tmp_path: Path) -> None:
    directory = save(
        lambda at: mlflow.sklearn.save_model(
            CLASSIFIER,
            at,
            pyfunc_predict_fn="predict_proba",
            serialization_format="cloudpickle",
            input_example=TABLE.head(2),
            **REQUIREMENTS,
        ),
        tmp_path / "model",
    )
    model = load_model(directory)
    assert model.contract("m").method == "predict_proba"
    np.testing.assert_array_equal(model.predict(iris_rows(model)), CLASSIFIER.predict_proba(TABLE.head(5)))
    np.testing.assert_array_equal(model.predict(iris_rows(model), method="predict"), CLASSIFIER.predict(TABLE.head(5)))


def test_a_method_that_the_model_has_not(tmp_path: Path) -> None:
    with pytest.raises(RoleError, match="has no predict_proba: PREDICT_METHOD may be predict, decision_function"):
        load_model(save_estimator(LinearSVC().fit(TABLE, TARGET), tmp_path / "model", TABLE), method="predict_proba")
    done = run_role("darwin_serve.py", MODEL_LOCAL_PATH=model_path("untyped"), PREDICT_METHOD="transform", PORT=0)
    assert (done.code, "PREDICT_METHOD may be predict" in done.last) == (1, True)


def test_only_the_proven_method_is_batched() -> None:

    model = make_ready(load_model(model_path("iris")), "iris", fast_path=True)
    rows = example_rows(model)
    assert rows is not None
    calls: list[tuple[int, str]] = []

    def predict(given: Rows, params: Any, method: str) -> Any:
        calls.append((given.count, method))
        return model.predict(given, params, method)

    async def here() -> bool:
        return False

    async def test() -> None:
        batcher = Batcher(predict, InferenceThread(), BatchLimits(), batching=True, on_hang=lambda: None)
        methods = ["predict_proba", "", "predict_proba", "", ""]
        asked = [
            batcher.predict(Request(rows, {}, model.contract(""), method), lambda output, _: output, 1, here)
            for method in methods
        ]
        for method, answered in zip(methods, await asyncio.gather(*asked), strict=True):
            assert answered.reply.ndim == (2 if method else 1)
            assert answered.rows == rows.count

    asyncio.run(asyncio.wait_for(test(), 60))
    assert sorted(calls) == [(rows.count, "predict_proba"), (rows.count, "predict_proba"), (3 * rows.count, "")]


def test_several_outputs(tmp_path: Path) -> None:
    both = RandomForestClassifier(5, random_state=0).fit(TABLE, np.c_[TARGET, TARGET > 0])
    directory = save_estimator(both, tmp_path / "model", TABLE)
    with serving(directory, WORKERS=1) as served:
        body = {"features": [*IRIS_ROWS], "params": {"predict_method": "predict_proba"}}
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: served.post("/predict", body).json(), range(32)))
    expected = [part.tolist() for part in both.predict_proba(pd.DataFrame(IRIS_ROWS))]
    assert all(answer["scores"] == expected for answer in answers)


def test_the_original_s_form() -> None:
    with serving(model_path("iris"), WORKERS=1, PREDICT_METHOD="predict_proba") as served:
        answer = served.post("/predict", {"features": [IRIS, {**IRIS, "petal length (cm)": 1.0}]}).json()
        assert answer.keys() == {"scores", "predicted_class", "probabilities"}
        assert answer["scores"] == answer["probabilities"]
        assert [row.index(max(row)) for row in answer["probabilities"]] == answer["predicted_class"] == [1, 0]
        body = {"dataframe_records": [IRIS], "params": {"predict_method": "predict"}}
        assert served.post("/invocations", body).json() == {"predictions": [1]}
        [output] = served.post(
            "/v2/models/model/infer",
            {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP64", "data": [6.1, 2.8, 4.7, 1.2]}]},
        ).json()["outputs"]
        assert (output["name"], output["shape"]) == ("predict_proba", [1, 3])
        assert "predict_proba" in json.dumps(served.get("/openapi.json").json())
        # What the model was logged with describes another method's answer.
        assert served.get("/v2/models/model").json()["outputs"] == served.get("/schema").json()["outputs"] == []
        refused = served.post("/predict", {"features": IRIS, "params": {"predict_method": "fit"}})
        assert refused.status_code == 422
        assert "one of predict, predict_proba" in refused.json()["detail"]["errors"][0]["message"]
    assert "predicts on arrays with LogisticRegression and predict_proba" in served.log
