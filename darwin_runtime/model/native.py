"""A flavor's own estimator, given an array instead of a table, with some of its steps reduced to their arithmetic.

Nothing here is right by itself: `fast_path` proves, for each model, that it answers what MLflow answers.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import pandas as pd

from darwin_runtime.schema.model_spec import InputSchema
from darwin_runtime.schema.rows import Array, Rows
from darwin_runtime.schema.tabular import TabularSchema

Method = Callable[..., Any]

FLAVORS = ("mlflow.sklearn", "mlflow.lightgbm", "mlflow.xgboost", "mlflow.catboost")

# Libraries that take an array for the table of the same numbers. scikit-learn's losses are of a module `_loss`.
KNOWN = frozenset({"sklearn", "_loss", "lightgbm", "xgboost", "catboost", "numpy", "scipy", "pandas", "joblib"})

# From here on, integers may be no floats.
EXACT = 2**53


class NotEquivalent(Exception):
    """Why a way, or predicting rows of several requests together, is not for this model."""


def on_matrix(
    pyfunc: Any, method: str, plan: InputSchema, numbers: AbstractSet[Any], twins: NativeCopies
) -> Callable[[Rows], Any]:
    """What the flavor's wrapper in MLflow does with `method`, with a matrix laid out in memory as its table would be.

    `numbers` are the dtypes of the columns. What is returned raises for rows that are no matrix of the same numbers.
    """
    predict = _predict_of(pyfunc, method, plan, twins)
    order: Any = "F" if isinstance(plan, TabularSchema) else "C"
    rounds = np.dtype(np.int64) in numbers and len(numbers) > 1

    def arrays(rows: Rows) -> Any:
        matrix = rows.matrix()
        if matrix is None or (rounds and (np.abs(matrix) >= EXACT).any()):
            raise NotEquivalent("these rows are no matrix")
        return predict(np.array(matrix, order=order))

    return arrays


def _predict_of(pyfunc: Any, method: str, plan: InputSchema, twins: NativeCopies) -> Method:
    model, flavor = pyfunc.get_raw_model(), pyfunc.loader_module
    if flavor == "mlflow.xgboost":
        if not hasattr(model, "inplace_predict"):
            return functools.partial(getattr(model, method), validate_features=False)

        def in_place(matrix: Array) -> Any:
            _check(_single(matrix), nan=True)  # as a DMatrix does, which is all that Booster.predict() takes
            return model.inplace_predict(matrix, validate_features=False)

        return in_place
    if flavor == "mlflow.lightgbm" and not hasattr(model, "booster_"):
        return lambda matrix: model.predict(_floats(matrix))
    trained_on = getattr(model, "feature_names_in_", None) if flavor == "mlflow.sklearn" else None
    if (
        trained_on is not None
        and isinstance(plan, TabularSchema)
        and list(trained_on) != [c.name for c in plan.columns]
    ):
        raise NotEquivalent("the signature's columns are not those, in order, that the model was trained on")
    predict: Method = getattr(twins.of(model), method)
    return predict


class NativeCopies:
    """Copies of fitted estimators that don't ask for the names of columns, and use `KERNELS` if they may.

    They share what was learnt. `forests` are the originals, not in their copies, whose trees may run in threads.
    """

    def __init__(self, kernels: bool) -> None:
        self.kernels = kernels
        self.forests: list[Any] = []
        self._made: dict[int, Any] = {}

    def of(self, part: Any) -> Any:
        """Raises `NotEquivalent` if `part`, or anything in it, is not of a known library."""
        kind = type(part)
        if part is None or kind in (bool, int, float, str, bytes):
            return part
        if id(part) not in self._made:
            self._made[id(part)] = part  # what leads back to itself
            self._made[id(part)] = self._copy(part, kind)
        return self._made[id(part)]

    def _copy(self, part: Any, kind: type) -> Any:
        if kind in (list, tuple):
            return kind(map(self.of, part))
        if isinstance(part, dict):
            items = {self.of(key): self.of(value) for key, value in part.items()}
            return items if kind is dict else part
        if isinstance(part, (set, frozenset)) or (isinstance(part, np.ndarray) and part.dtype == object):
            for item in part.ravel() if isinstance(part, np.ndarray) else part:
                self.of(item)
            return part
        if kind is functools.partial:
            return functools.partial(self.of(part.func), *map(self.of, part.args), **self.of(part.keywords))
        if kind is types.MethodType:
            return types.MethodType(part.__func__, self.of(part.__self__))
        code = part if isinstance(part, (type, types.FunctionType, types.BuiltinFunctionType)) else kind
        root = str(code.__module__).partition(".")[0]
        if root not in KNOWN and root not in sys.stdlib_module_names:
            raise NotEquivalent(f"{code.__module__}.{code.__qualname__} is the model's own code")
        # LightGBM's wrappers are copied, too, but not its Booster, which owns memory.
        copied = root == "sklearn" or (root == "lightgbm" and hasattr(part, "get_params"))
        new: Any = kind.__new__  # another one than object's has what is written in Cython
        return self._estimator(part, kind) if copied and code is kind and new is object.__new__ else part

    def _estimator(self, part: Any, kind: type) -> Any:
        made: Any = object.__new__(kind)
        self._made[id(part)] = made
        for name, value in getattr(part, "__dict__", {}).items():
            if name != "feature_names_in_":
                made.__dict__[name] = self.of(value)
        if indices := getattr(part, "_transformer_to_input_indices", None):
            # A ColumnTransformer's columns have names. Where it takes a single one as a vector, arrays won't do.
            made.transformers_ = [
                (name, step, columns if np.isscalar(columns) else indices[name])
                for name, step, columns in made.transformers_
            ]
        if self.kernels:
            for method in ("decision_function", "predict_proba", "transform", "predict"):
                owner = next((base for base in kind.__mro__ if method in vars(base)), kind)
                kernel = KERNELS.get(f"{owner.__module__}.{owner.__qualname__}.{method}")
                with contextlib.suppress(AttributeError):  # a template, which has learnt nothing
                    if kernel and (quick := kernel(made)):
                        made.__dict__[method] = quick
                if kernel in (_forest_probabilities, _forest_mean):
                    self.forests.append(part)
        return made


@contextlib.contextmanager
def one_job(forests: Sequence[Any]) -> Iterator[None]:
    """Have `forests` add up their trees in order. With several threads, the order, and the last bit, are chance."""
    jobs = [forest.n_jobs for forest in forests]
    try:
        for forest in forests:
            forest.n_jobs = None
        yield
    finally:
        for forest, n in zip(forests, jobs, strict=True):
            forest.n_jobs = n


def _check(matrix: Array, *, nan: bool = False) -> None:
    if np.isinf(matrix).any() if nan else not np.isfinite(matrix).all():
        raise ValueError("not finite")


def _single(matrix: Array) -> Array:
    with np.errstate(over="ignore"):
        return matrix.astype(np.float32)


def _floats(matrix: Array) -> Array:
    """As LightGBM makes of a table; of an array of integers it would make one of 32 bits."""
    return matrix.astype(np.result_type(matrix.dtype, np.float32), copy=False)


def _scores(model: Any) -> Method:
    weights, intercept = model.coef_.T, model.intercept_

    def decision_function(matrix: Array) -> Any:
        _check(matrix)
        scores = matrix @ weights + intercept
        return scores.reshape(-1) if scores.ndim > 1 and scores.shape[1] == 1 else scores

    return decision_function


def _labels(model: Any) -> Method:
    decide, classes = model.decision_function, model.classes_

    def predict(matrix: Array) -> Any:
        scores = decide(matrix)
        return classes.take((scores > 0).astype(np.intp) if scores.ndim == 1 else scores.argmax(axis=1), axis=0)

    return predict


def _sum(model: Any) -> Method:
    weights, intercept = model.coef_.T, model.intercept_

    def predict(matrix: Array) -> Any:
        _check(matrix)
        return matrix @ weights + intercept

    return predict


def _scaled(scaler: Any) -> Method:
    def transform(matrix: Array) -> Any:
        matrix = np.array(matrix, dtype=matrix.dtype if matrix.dtype.kind == "f" else np.float64)
        _check(matrix, nan=True)
        if scaler.with_mean:
            matrix -= scaler.mean_.astype(matrix.dtype, copy=False)
        if scaler.with_std:
            matrix /= scaler.scale_.astype(matrix.dtype, copy=False)
        return matrix

    return transform


def _forest(forest: Any, classes: int) -> Method | None:
    """The mean of what the trees hold, without joblib, which costs some fifty times what the trees do."""
    if forest.n_outputs_ > 1:
        return None
    trees = [tree.tree_ for tree in forest.estimators_]
    takes_nan = forest.estimators_[0]._support_missing_values(np.empty((0, 0)))

    def mean(matrix: Array) -> Any:
        if matrix.shape[1] != forest.n_features_in_:
            raise ValueError("trees would read beyond the row's end")
        matrix = _single(matrix)
        _check(matrix, nan=takes_nan)
        total = np.zeros((len(matrix), classes))
        for tree in trees:
            total += tree.predict(matrix)
        total /= len(trees)
        return total

    return mean


def _forest_probabilities(forest: Any) -> Method | None:
    return _forest(forest, forest.n_classes_)


def _forest_mean(forest: Any) -> Method | None:
    mean = _forest(forest, 1)

    def predict(matrix: Array) -> Any:
        assert mean
        return mean(matrix)[:, 0]

    return mean and predict


def _chained(method: str) -> Callable[[Any], Method | None]:
    def kernel(pipeline: Any) -> Method | None:
        *steps, last = (step for _, step in pipeline.steps)
        final = getattr(last, method, None)
        transforms = [step.transform for step in steps if step not in (None, "passthrough")]

        def call(matrix: Any) -> Any:
            for transform in transforms:
                matrix = transform(matrix)
            assert final
            return final(matrix)

        return final and call

    return kernel


class _Asked(Exception):
    """Carries the options with which LightGBM's wrapper for scikit-learn asks its booster."""

    def predict(self, _: Any, **options: Any) -> Any:
        self.options = options
        raise self


def _boosted(model: Any) -> Method:
    booster, asked = model.booster_, _Asked()
    model._Booster = asked
    try:
        model.predict(pd.DataFrame(np.zeros((1, booster.num_feature()))))
    except _Asked:
        pass
    finally:
        model._Booster = booster
    return lambda matrix: booster.predict(_floats(matrix), **asked.options)


def _boosted_labels(model: Any) -> Method:
    scores, classes, binary = _boosted(model), model.classes_, model.n_classes_ <= 2

    def predict(matrix: Array) -> Any:
        found = scores(matrix)
        if binary:
            found = np.vstack((1.0 - found, found)).T
        return classes.take(found.argmax(axis=1))

    return predict


# What replaces a method, by its place in the library: the same arithmetic without the checks of types, shapes and
# names, which cost ten to fifty times as much. A kernel is given the twin and raises where the method would.
KERNELS: dict[str, Callable[[Any], Method | None]] = {
    "sklearn.linear_model._base.LinearClassifierMixin.decision_function": _scores,
    "sklearn.linear_model._base.LinearClassifierMixin.predict": _labels,
    "sklearn.linear_model._base.LinearModel.predict": _sum,
    "sklearn.preprocessing._data.StandardScaler.transform": _scaled,
    "sklearn.ensemble._forest.ForestClassifier.predict_proba": _forest_probabilities,
    "sklearn.ensemble._forest.ForestRegressor.predict": _forest_mean,
    "sklearn.pipeline.Pipeline.predict": _chained("predict"),
    "sklearn.pipeline.Pipeline.predict_proba": _chained("predict_proba"),
    "lightgbm.sklearn.LGBMModel.predict": _boosted,
    "lightgbm.sklearn.LGBMClassifier.predict": _boosted_labels,
}
