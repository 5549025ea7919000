"""A flavor's own estimator without its checks: it gets an array instead of a table, and kernels replace some methods.

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

from darwin_runtime.model.kernels.arrays import ArrayMethod, require_finite, to_float32, to_floats
from darwin_runtime.model.kernels.table import FORESTS, KERNELS
from darwin_runtime.schema.model_spec import InputSchema
from darwin_runtime.schema.rows import Array, Rows
from darwin_runtime.schema.tabular import TabularSchema

NATIVE_FLAVORS = ("mlflow.sklearn", "mlflow.lightgbm", "mlflow.xgboost", "mlflow.catboost")

# Libraries that take an array for the table of the same numbers. scikit-learn's losses are of a module `_loss`.
KNOWN_LIBRARIES = frozenset(
    {"sklearn", "_loss", "lightgbm", "xgboost", "catboost", "numpy", "scipy", "pandas", "joblib"}
)

# From here on, floats do not hold every integer.
MIN_INEXACT = 2**53


class NotEquivalent(Exception):
    """The reason why a predictor, or predicting rows of several requests together, is not for this model."""


def array_predictor(
    pyfunc: Any, method: str, plan: InputSchema, numbers: AbstractSet[Any], copies: NativeCopies
) -> Callable[[Rows], Any]:
    """A `predict_array`: the work of the flavor's wrapper in MLflow with `method`, on a matrix for a table.

    The matrix is laid out in memory as the table would be. `numbers` are the dtypes of the columns. The function raises
    for rows that are no matrix of the same numbers.
    """
    predict = _matrix_method(pyfunc, method, plan, copies)
    order: Any = "F" if isinstance(plan, TabularSchema) else "C"
    rounds = np.dtype(np.int64) in numbers and len(numbers) > 1

    def predict_array(rows: Rows) -> Any:
        matrix = rows.matrix()
        if matrix is None or (rounds and (np.abs(matrix) >= MIN_INEXACT).any()):
            raise NotEquivalent("these rows are no matrix")
        return predict(np.array(matrix, order=order))

    return predict_array


def _matrix_method(pyfunc: Any, method: str, plan: InputSchema, copies: NativeCopies) -> ArrayMethod:
    model, flavor = pyfunc.get_raw_model(), pyfunc.loader_module
    if flavor == "mlflow.xgboost":
        if not hasattr(model, "inplace_predict"):
            return functools.partial(getattr(model, method), validate_features=False)

        def in_place(matrix: Array) -> Any:
            require_finite(to_float32(matrix), nan=True)  # as a DMatrix does, which is all that Booster.predict() takes
            return model.inplace_predict(matrix, validate_features=False)

        return in_place
    if flavor == "mlflow.lightgbm" and not hasattr(model, "booster_"):
        return lambda matrix: model.predict(to_floats(matrix))
    trained_on = getattr(model, "feature_names_in_", None) if flavor == "mlflow.sklearn" else None
    if (
        trained_on is not None
        and isinstance(plan, TabularSchema)
        and list(trained_on) != [c.name for c in plan.columns]
    ):
        raise NotEquivalent("the signature's columns are not those, in order, that the model was trained on")
    predict: ArrayMethod = getattr(copies.of(model), method)
    return predict


class NativeCopies:
    """Copies of fitted estimators that don't ask for the names of columns, and use `KERNELS` if they may.

    They share the fitted arrays. `forests` are originals, not copies, whose trees may run in threads.
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
        if root not in KNOWN_LIBRARIES and root not in sys.stdlib_module_names:
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
                if kernel in FORESTS:
                    self.forests.append(part)
        return made


@contextlib.contextmanager
def single_threaded(forests: Sequence[Any]) -> Iterator[None]:
    """Have `forests` add up their trees in order. With several threads, the order, and the last bit, are chance."""
    jobs = [forest.n_jobs for forest in forests]
    try:
        for forest in forests:
            forest.n_jobs = None
        yield
    finally:
        for forest, n in zip(forests, jobs, strict=True):
            forest.n_jobs = n
