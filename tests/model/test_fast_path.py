"""Which path is proven for which model, and that whatever it answers is what pyfunc answers, bit for bit."""

from __future__ import annotations

import atexit
import functools
import importlib
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import catboost
import lightgbm
import numpy as np
import pandas as pd
import pytest
import xgboost
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    ExtraTreesRegressor,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
    VotingClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import ElasticNet, LinearRegression, LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler, scale
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from darwin_runtime import mlflow_import
from darwin_runtime.errors import InputError, InputRejected, PredictionFailed
from darwin_runtime.model.compare import same, splits_into
from darwin_runtime.model.load import SERVING, load_model
from darwin_runtime.model.model import Model
from darwin_runtime.model.native import NotEquivalent
from darwin_runtime.protocols import mlflow_scoring
from tests.support.models import REQUIREMENTS, model_path, save

with warnings.catch_warnings():
    # MLflow warns of its own type hints.
    warnings.simplefilter("ignore")
    from mlflow.models import ModelSignature, infer_signature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

NAMES = ["a", "b", "c", "d"]
RNG = np.random.default_rng(3)
TABLE = pd.DataFrame(RNG.normal(size=(120, 4)).round(4) * [1, 10, 100, 1000], columns=NAMES)
HOLES = TABLE.mask(RNG.random(TABLE.shape) < 0.1)
NUMBER = TABLE["a"] * 3 + TABLE["b"] + np.sin(TABLE["c"])
CLASS = np.digitize(NUMBER, [-5, 5])
WORD = np.array(["low", "middle", "high"])[CLASS]
TWO = np.stack([NUMBER, TABLE["c"]], axis=1)
YES = (NUMBER > 0).astype(int)


class Shifted(BaseEstimator, ClassifierMixin):  # type: ignore[misc]
    """Answers otherwise for arrays than for tables."""

    def fit(self, features: Any, target: Any) -> Shifted:
        self.classes_ = np.unique(target)
        return self

    def predict(self, features: Any) -> Any:
        return np.full(len(features), float(isinstance(features, pd.DataFrame)))


def by_name(table: Any) -> Any:
    return table[["b", "a"]]


_directory = Path(tempfile.mkdtemp(prefix="darwin-test-fast-"))
atexit.register(shutil.rmtree, _directory, ignore_errors=True)


def loaded(model: Any, features: Any = TABLE, flavor: str = "sklearn", **options: Any) -> Model:
    """`model` as MLflow saves and we load it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that integers can't be null
        options.setdefault("signature", infer_signature(features))
    if flavor == "sklearn":
        options.setdefault("serialization_format", "cloudpickle")
    if "input_example" not in options:
        options["input_example"] = features[:5]
    save_model = importlib.import_module(f"mlflow.{flavor}").save_model
    path = Path(tempfile.mkdtemp(dir=_directory)) / "model"
    return load_model(save(lambda at: save_model(model, at, **options, **REQUIREMENTS), path))


def proven(model: Model, *, fast: bool = True) -> Model:
    example = None
    if model.example is not None:
        example = mlflow_scoring.read(model.example, {}, model.contract("")).rows
    return model.with_quickest_predictor(example, fast=fast, budget=60)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # load() sets these for good; another test may want MLflow's defaults.
    for name, value in (mlflow_import.DEFAULTS | SERVING).items():
        monkeypatch.setenv(name, value)


def values(features: Any, rows: slice) -> list[list[Any]]:
    cells = features.to_numpy().tolist() if isinstance(features, pd.DataFrame) else features.tolist()
    return [[None if cell != cell else cell for cell in row] for row in cells[rows]]


def assert_answers_as_pyfunc(model: Model, quick: Model, features: Any, *, answered: bool = True) -> None:
    """Bit for bit, one by one and together, with nulls, and errors in the same words."""
    cells = values(features, slice(40, 75))
    holes = [[None, *row[1:]] for row in cells[:2]]
    odd = [[value] * len(cells[0]) for value in (0, 1, -1)]
    for batch in (cells[:1], cells[1:3], cells[3:20], cells, holes[:1], [*cells[:3], *holes], odd, odd[:1]):
        try:
            rows = model.input_schema.split(None, batch)
        except InputError:  # no null where the signature has integers
            continue
        outcomes = []
        for each in (model, quick):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    outcomes.append(each.predict(rows))
                except (PredictionFailed, InputRejected) as error:
                    outcomes.append((type(error), str(error)))
        assert same(*outcomes), (batch, outcomes)
    if answered:
        assert quick.predictor.predict_array
        quick.predictor.predict_array(model.input_schema.split(None, cells))


ON_ARRAYS: dict[str, Callable[[], Model]] = {
    "logistic": lambda: loaded(LogisticRegression(max_iter=1000).fit(TABLE, WORD)),
    "binary": lambda: loaded(LogisticRegression(max_iter=1000).fit(TABLE, YES)),
    "logistic_probabilities": lambda: loaded(
        LogisticRegression(max_iter=1000).fit(TABLE, WORD), pyfunc_predict_fn="predict_proba"
    ),
    "linear": lambda: loaded(LinearRegression().fit(TABLE, NUMBER)),
    "two_numbers": lambda: loaded(Ridge().fit(TABLE, TWO)),
    "elastic": lambda: loaded(ElasticNet().fit(TABLE, NUMBER)),
    "svc": lambda: loaded(LinearSVC().fit(TABLE / 1000, WORD)),
    "sgd": lambda: loaded(SGDClassifier(random_state=0).fit(TABLE, YES)),
    "scaled": lambda: loaded(make_pipeline(StandardScaler(), LogisticRegression()).fit(TABLE, WORD)),
    "scaled_probabilities": lambda: loaded(
        make_pipeline(StandardScaler(), "passthrough", LogisticRegression()).fit(TABLE, WORD),
        pyfunc_predict_fn="predict_proba",
    ),
    "imputed": lambda: loaded(make_pipeline(SimpleImputer(), StandardScaler(), Ridge()).fit(HOLES, NUMBER), HOLES),
    "pandas_output": lambda: loaded(
        make_pipeline(StandardScaler(), Ridge()).set_output(transform="pandas").fit(TABLE, NUMBER)
    ),
    "tree": lambda: loaded(DecisionTreeClassifier(random_state=0).fit(TABLE, WORD)),
    "forest": lambda: loaded(RandomForestClassifier(20, random_state=0).fit(TABLE, WORD)),
    "forest_probabilities": lambda: loaded(
        RandomForestClassifier(20, random_state=0).fit(TABLE, WORD), pyfunc_predict_fn="predict_proba"
    ),
    "forest_with_nan": lambda: loaded(RandomForestRegressor(20, random_state=0).fit(HOLES, NUMBER), HOLES),
    "forest_two_numbers": lambda: loaded(RandomForestRegressor(5, random_state=0).fit(TABLE, TWO)),
    "extra_trees": lambda: loaded(ExtraTreesRegressor(20, random_state=0).fit(TABLE, NUMBER)),
    "scaled_forest": lambda: loaded(
        make_pipeline(StandardScaler(), RandomForestClassifier(20, random_state=0)).fit(TABLE, WORD)
    ),
    "voting": lambda: loaded(
        VotingClassifier(
            [("a", LogisticRegression(max_iter=1000)), ("b", RandomForestClassifier(9, random_state=0))], voting="soft"
        ).fit(TABLE, WORD)
    ),
    "calibrated": lambda: loaded(CalibratedClassifierCV(RandomForestClassifier(9, random_state=0)).fit(TABLE, YES)),
    "search": lambda: loaded(GridSearchCV(Ridge(), {"alpha": [0.1, 1.0]}).fit(TABLE, NUMBER)),
    "log_target": lambda: loaded(
        TransformedTargetRegressor(Ridge(), func=np.arcsinh, inverse_func=np.sinh).fit(TABLE / 1000, NUMBER / 1000)
    ),
    "multi_output": lambda: loaded(MultiOutputRegressor(Ridge()).fit(TABLE, TWO)),
    "gradient_boosting": lambda: loaded(GradientBoostingRegressor(n_estimators=20).fit(TABLE, NUMBER)),
    "hist_gradient_boosting": lambda: loaded(HistGradientBoostingClassifier(max_iter=10).fit(HOLES, WORD), HOLES),
    "neighbors": lambda: loaded(KNeighborsClassifier().fit(TABLE, WORD)),
    "columns_by_name": lambda: loaded(
        make_pipeline(ColumnTransformer([("scale", StandardScaler(), ["c", "a"])]), Ridge()).fit(TABLE, NUMBER)
    ),
    "lightgbm": lambda: loaded(lightgbm.LGBMClassifier(n_estimators=9, verbose=-1).fit(HOLES, WORD), HOLES, "lightgbm"),
    "lightgbm_binary": lambda: loaded(
        lightgbm.LGBMClassifier(n_estimators=9, verbose=-1).fit(TABLE, YES), flavor="lightgbm"
    ),
    "lightgbm_regressor": lambda: loaded(
        lightgbm.LGBMRegressor(n_estimators=9, verbose=-1).fit(TABLE, NUMBER), flavor="lightgbm"
    ),
    "lightgbm_booster": lambda: loaded(
        lightgbm.LGBMRegressor(n_estimators=9, verbose=-1).fit(TABLE, NUMBER).booster_, flavor="lightgbm"
    ),
    "xgboost": lambda: loaded(xgboost.XGBClassifier(n_estimators=9).fit(HOLES, CLASS), HOLES, "xgboost"),
    "xgboost_booster": lambda: loaded(
        xgboost.XGBRegressor(n_estimators=9).fit(TABLE, NUMBER).get_booster(), flavor="xgboost"
    ),
    "scaled_xgboost": lambda: loaded(
        make_pipeline(StandardScaler(), xgboost.XGBRegressor(n_estimators=9)).fit(TABLE, NUMBER)
    ),
    "catboost": lambda: loaded(
        catboost.CatBoostClassifier(iterations=9, verbose=0, allow_writing_files=False).fit(HOLES, WORD),
        HOLES,
        "catboost",
    ),
    "catboost_regressor": lambda: loaded(
        catboost.CatBoostRegressor(iterations=9, verbose=0, allow_writing_files=False).fit(TABLE, NUMBER),
        flavor="catboost",
    ),
}


@pytest.mark.parametrize("name", ON_ARRAYS)
@pytest.mark.filterwarnings("ignore:.*no associated writer:ResourceWarning")
def test_on_arrays_and_batched(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ON_ARRAYS[name]()
    quick = proven(model)
    assert quick.predictor.predict_array, quick.predictor.description
    assert quick.batchable, quick.predictor.description
    assert quick.predictor.description.startswith("predicts on arrays with ")
    assert quick.predictor.description.endswith("; rows may be batched")
    assert_answers_as_pyfunc(model, quick, TABLE)


def not_on_arrays(model: Model, why: str) -> Model:
    quick = proven(model)
    assert quick.predictor.predict_array is None
    assert why in quick.predictor.description
    return quick


def without_check(model: Model) -> bool:
    return "without a second check of the schema" in model.predictor.description


def test_text_stays_in_tables_but_is_batched() -> None:
    table = TABLE.assign(town=np.where(TABLE["a"] > 0, "Bern", "Genf"), on=TABLE["b"] > 0)
    encoder = OneHotEncoder(handle_unknown="ignore")
    columns = ColumnTransformer([("town", encoder, ["town"])], remainder=StandardScaler())
    model = loaded(make_pipeline(columns, LogisticRegression()).fit(table, WORD), table)
    quick = not_on_arrays(model, "not all columns are numbers")
    assert without_check(quick)
    assert quick.batchable
    assert_answers_as_pyfunc(model, quick, table, answered=False)


def test_a_column_taken_as_a_vector_by_name_stays_in_tables() -> None:
    columns = ColumnTransformer([("a", FunctionTransformer(pd.DataFrame), "a")], remainder="passthrough")
    model = loaded(make_pipeline(columns, Ridge()).fit(TABLE, NUMBER))
    quick = not_on_arrays(model, "on arrays it raises")
    assert quick.batchable
    assert_answers_as_pyfunc(model, quick, TABLE, answered=False)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Shifted().fit(TABLE, YES),
        lambda: make_pipeline(FunctionTransformer(by_name), Ridge()).fit(TABLE, NUMBER),
        lambda: make_pipeline(FunctionTransformer(lambda table: table - table.mean(axis=0)), Ridge()).fit(
            TABLE, NUMBER
        ),
        lambda: make_pipeline(FunctionTransformer(functools.partial(by_name)), Ridge()).fit(TABLE, NUMBER),
    ],
)
def test_code_that_came_with_the_model_is_not_run_on_made_up_rows(build: Callable[[], Any]) -> None:
    model = loaded(build())
    quick = not_on_arrays(model, "is the model's own code")
    assert not quick.batchable
    assert without_check(quick)
    assert_answers_as_pyfunc(model, quick, TABLE, answered=False)


def test_rows_that_depend_on_others_are_not_batched() -> None:
    """Made of known code only, so that the rows themselves must show it."""
    model = loaded(make_pipeline(FunctionTransformer(scale), Ridge()).fit(TABLE, NUMBER))
    quick = proven(model)
    assert quick.predictor.predict_array
    assert not quick.batchable
    assert "depends on the rows beside it" in quick.predictor.description
    assert_answers_as_pyfunc(model, quick, TABLE)


def test_chance_is_not_proven() -> None:
    state = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    model = loaded(DummyClassifier(strategy="stratified").fit(TABLE, WORD))
    quick = not_on_arrays(model, "answers otherwise")
    assert not quick.batchable
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state  # type: ignore[index]


def test_threads_of_a_forest_are_left_to_it() -> None:
    forest = RandomForestClassifier(20, random_state=0, n_jobs=2).fit(TABLE, WORD)
    model = loaded(forest)
    quick = proven(model)
    assert quick.predictor.predict_array
    assert model.pyfunc.get_raw_model().n_jobs == 2
    rows = model.input_schema.split(None, values(TABLE, slice(0, 20)))
    assert quick.predict(rows).tolist() == model.predict(rows).tolist()


def test_numbers_of_several_types() -> None:
    table = TABLE.assign(n=np.arange(120) * 10**6, few=np.arange(120, dtype=np.int32), f=TABLE["a"].astype(np.float32))
    forest = RandomForestRegressor(9, random_state=0)
    for model in (
        loaded(forest.fit(table, NUMBER), table),
        loaded(lightgbm.LGBMRegressor(n_estimators=9, verbose=-1).fit(table, NUMBER), table, "lightgbm"),
        loaded(make_pipeline(StandardScaler(), Ridge()).fit(table[["n"]], NUMBER), table[["n"]]),
    ):
        quick = proven(model)
        assert quick.predictor.predict_array
        assert quick.batchable
        names = [column.key for column in model.input_schema.columns]  # type: ignore[union-attr]
        cells = [dict(zip(names, row, strict=True)) for row in values(table[names].astype(object), slice(0, 9))]
        rows = model.input_schema.records(cells)
        assert same(quick.predict(rows), model.predict(rows))
        quick.predictor.predict_array(rows)
    rows = model.input_schema.records([{"n": 2**62 + 1}])
    assert same(quick.predict(rows), model.predict(rows))


def test_integers_that_are_no_floats_go_through_tables() -> None:
    table = pd.DataFrame({"n": np.arange(20) * 2**40, "x": np.linspace(0, 1, 20)})
    model = loaded(DecisionTreeClassifier(random_state=0).fit(table, np.arange(20) % 3), table)
    quick = proven(model)
    assert quick.predictor.predict_array
    quick.predictor.predict_array(model.input_schema.records([{"n": 5, "x": 0.5}]))
    large = model.input_schema.records([{"n": 2**54 + 1, "x": 0.5}])
    with pytest.raises(NotEquivalent):
        quick.predictor.predict_array(large)
    assert same(quick.predict(large), model.predict(large))


def test_a_tensor_that_is_a_table() -> None:
    features = TABLE.to_numpy()
    model = loaded(make_pipeline(StandardScaler(), LogisticRegression()).fit(features, WORD), features)
    quick = proven(model)
    assert quick.predictor.predict_array
    assert quick.batchable
    assert_answers_as_pyfunc(model, quick, features)


def test_optional_columns_may_be_absent() -> None:
    signature = ModelSignature(Schema([ColSpec("double", name, required=name == "a") for name in NAMES]))
    model = loaded(HistGradientBoostingClassifier(max_iter=5).fit(HOLES, WORD), HOLES, signature=signature)
    quick = proven(model)
    assert quick.predictor.predict_array
    full, absent = (model.input_schema.records([row]) for row in (dict.fromkeys(NAMES, 0.5), {"a": 0.5}))
    assert same(quick.predict(full), model.predict(full))
    with pytest.raises(InputRejected, match="feature names") as expected:
        model.predict(absent)
    with pytest.raises(InputRejected) as found:
        quick.predict(absent)
    assert str(found.value) == str(expected.value)


def test_columns_in_another_order_than_in_training() -> None:
    model = loaded(
        make_pipeline(ColumnTransformer([("scale", StandardScaler(), ["c", "a"])]), Ridge()).fit(TABLE, NUMBER),
        TABLE[NAMES[::-1]],
    )
    quick = not_on_arrays(model, "not those, in order")
    assert_answers_as_pyfunc(model, quick, TABLE, answered=False)


def test_without_an_example() -> None:
    for model in (
        loaded(LogisticRegression(max_iter=1000).fit(TABLE, WORD), input_example=None),
        loaded(
            lightgbm.LGBMClassifier(n_estimators=9, verbose=-1).fit(TABLE, WORD), TABLE, "lightgbm", input_example=None
        ),
    ):
        quick = proven(model)
        assert quick.predictor.predict_array
        assert quick.batchable
        assert_answers_as_pyfunc(model, quick, TABLE)


def test_without_a_signature_nothing_is_known_of_the_rows() -> None:
    quick = not_on_arrays(load_model(model_path("no_signature")), "it has no signature")
    assert not quick.batchable
    rows = quick.input_schema.features([[5.1, 3.5, 1.4, 0.2]])
    assert quick.predict(rows).tolist() == [0]


def test_params_are_enforced_and_have_their_defaults() -> None:
    params = ParamSchema([ParamSpec("output_margin", "boolean", False)])
    signature = ModelSignature(infer_signature(TABLE).inputs, params=params)
    model = loaded(xgboost.XGBRegressor(n_estimators=5).fit(TABLE, YES), TABLE, "xgboost", signature=signature)
    quick = proven(model)
    assert quick.predictor.predict_array
    assert not quick.batchable
    rows = model.input_schema.split(None, values(TABLE, slice(0, 5)))
    for given in ({}, {"output_margin": True}):
        assert same(quick.predict(rows, given), model.predict(rows, given))
    with pytest.raises(InputRejected, match="Invalid parameters") as caught:
        quick.predict(rows, {"output_margin": "no"})
    assert caught.value.by_schema


def test_defaults_of_params_count() -> None:
    params = ParamSchema([ParamSpec("output_margin", "boolean", True)])
    signature = ModelSignature(infer_signature(TABLE).inputs, params=params)
    model = loaded(xgboost.XGBClassifier(n_estimators=5).fit(TABLE, YES), TABLE, "xgboost", signature=signature)
    quick = not_on_arrays(model, "answers otherwise")
    assert_answers_as_pyfunc(model, quick, TABLE, answered=False)


@pytest.mark.parametrize("name", ["typed", "optional", "params", "tensors", "any_length", "untyped", "one_column"])
def test_any_flavor_may_do_without_the_check_of_the_schema(name: str) -> None:
    quick = proven(load_model(model_path(name)))
    assert without_check(quick)
    assert quick.predictor.predict_array is None
    assert not quick.batchable
    assert "may run any code" in quick.predictor.description


@pytest.mark.parametrize(
    ("name", "why"), [("nested", "is of array of double"), ("words", "tensors of text"), ("hinted", "type hints")]
)
def test_where_mlflow_has_a_say_its_check_stays(name: str, why: str) -> None:
    quick = not_on_arrays(proven(load_model(model_path(name))), why)
    assert not without_check(quick)


def test_params_of_python_models() -> None:
    model = load_model(model_path("params"))
    quick = proven(model)
    rows = model.input_schema.records([{"a": 1, "b": 2}])
    for given in ({}, {"factor": 3, "weights": [1], "since": "2025-01-01"}):
        assert quick.predict(rows, model.params.parse(given)) == model.predict(rows, model.params.parse(given))
    with pytest.raises(InputRejected):
        quick.predict(rows, {"count": "many"})


def test_switched_off_rows_may_still_be_batched() -> None:
    model = ON_ARRAYS["forest"]()
    quick = proven(model, fast=False)
    assert quick.predictor.predict_array is None
    assert quick.predictor.description == "predicts through pyfunc; FAST_PATH=off; rows may be batched"


def test_a_slow_model_is_not_proven() -> None:
    quick = ON_ARRAYS["forest"]().with_quickest_predictor(budget=0)
    assert quick.predictor.predict_array is None
    assert not quick.batchable
    assert "the proof takes more than 0 s" in quick.predictor.description


def test_what_is_the_same() -> None:
    table = pd.DataFrame({"a": [1.0, np.nan], "b": ["x", None]})
    alike: list[Any] = [1, "a", None, np.array([np.nan, -0.0]), [1, {"a": np.array(["x"], object)}], table, table["b"]]
    for value in alike:
        assert same(value, value)
    for one, other in [
        (1, 1.0),
        (np.array([0.0]), np.array([-0.0])),
        (np.array([0.0]), np.array([np.nan])),
        (np.array([1]), np.array([[1]])),
        (np.array([1.0]), np.array([1.0], np.float32)),
        (np.array([1.0]), np.array([np.nextafter(1, 2)])),
        ([1, 2], [1]),
        ({"a": 1}, {"b": 1}),
        (table, table[["b", "a"]]),
        (table, table.set_axis(["x", "y"])),
        (table, table.assign(a=[1.0, 2.0])),
        (table["a"], table["a"].astype(np.float32)),
    ]:
        assert not same(one, other)


def test_what_is_made_of_an_answer_for_each_row() -> None:
    table = pd.DataFrame({"a": [1.0, 2.0, np.nan], "b": ["x", "y", "z"]})
    for whole in (table, table["a"], table["a"].to_numpy(), table["b"].to_numpy(), [1, 2.5, "x"], np.eye(3)):
        parts = [whole.iloc[i : i + 1] if hasattr(whole, "iloc") else whole[i : i + 1] for i in range(3)]
        assert splits_into(whole, parts)
        assert not splits_into(whole, parts[:2])
        assert not splits_into(whole, parts[::-1])
    large = np.array([[1e9, 1.0], [1.0, 1e-9]])
    for near, close in [([1.5, 1.5e-9], True), ([1.0, 3e-9], False), ([3.0, 1e-9], False)]:
        assert splits_into(large, [large[:1], np.array([near])]) is close
    for whole, part in [
        (np.array(["x", "long"]), np.array(["x"])),
        (np.array([1.0]), np.array([1])),
        (np.array([[1.0]]), np.array([1.0])),
        ([1], np.array([1])),
        (table[:1], table[["a"]][:1]),
        ({"a": 1}, {"a": 1}),
    ]:
        assert not splits_into(whole, [part] * len(whole))


def test_times_and_bytes_beside_numbers() -> None:
    table = TABLE.assign(when=pd.Timestamp("2024-02-29T12:00:00"), blob=[b"\x00\xff"] * len(TABLE))
    model = loaded(
        make_pipeline(ColumnTransformer([("numbers", "passthrough", NAMES)]), LinearRegression()).fit(table, NUMBER),
        table,
    )
    quick = not_on_arrays(model, "not all columns are numbers")
    assert without_check(quick)
    assert quick.batchable
    row = dict.fromkeys(NAMES, 0.5) | {"when": "2024-01-01", "blob": "AP8="}
    rows = model.input_schema.records([row, row])
    assert same(quick.predict(rows), model.predict(rows))


@pytest.mark.parametrize("estimator", [LogisticRegression(max_iter=1000), RandomForestClassifier(5)])
def test_a_model_of_other_columns_than_its_signature_only_fails(estimator: Any) -> None:
    model = loaded(estimator.fit(TABLE.to_numpy(), WORD), TABLE[["a", "b"]], input_example=None)
    quick = not_on_arrays(model, "no row is known that it answers")
    assert "it answers too few made-up rows" in quick.predictor.description
    assert not quick.batchable
