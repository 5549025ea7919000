"""The quickest way to have a loaded model predict that is proven to answer what `pyfunc.predict` answers.

There are three, the quickest first:

1. **On arrays**: the flavor's own estimator is given `Rows.matrix()`, and some of its steps are reduced to their
   arithmetic. Whenever that raises, the next way answers instead, so errors are always the next way's.
   Taken if the model is made of nothing but known libraries' code, and answers its input example and made-up rows bit
   for bit as the next way does, without a warning that the next way doesn't give.
2. **Through pyfunc without its check of the schema**, which is most of what pyfunc costs. Taken if that check returns
   the tables or tensors of our plan exactly as it got them. The model isn't run for this, so any flavor may have it.
3. **Plain pyfunc.**

Code that came with the model is never run on made-up rows: it may have side effects, and a few rows don't tell what it
does with others. A proof runs the model, so it belongs into the process that serves: the thread pools that libraries
start don't survive a fork.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from darwin_runtime.model.native import FLAVORS, NativeCopies, NotEquivalent, on_matrix, one_job
from darwin_runtime.model.sample_rows import SampleRows, forms
from darwin_runtime.schema.model_spec import InputSchema
from darwin_runtime.schema.rows import Rows

Params = Mapping[str, Any] | None

# Seconds for what a proof must try, and the share of them for what it may try besides.
BUDGET = 1.0
FURTHER = 0.05


class NotFaster(NotEquivalent):
    """The proof takes more time than it may."""


@dataclass(frozen=True)
class Predictor:
    """How a model predicts: `predict_array` if there is one and it doesn't raise, else `predict_dataframe`.

    Where it is `batchable`, rows predicted together get what each would get alone, but for the last bits of floats;
    `EquivalenceCheck.batchable` says how many.
    """

    predict_dataframe: Callable[[Rows, Params], Any]
    predict_array: Callable[[Rows], Any] | None = None
    batchable: bool = False
    description: str = "predicts through pyfunc"


def plain(pyfunc: Any) -> Predictor:
    return Predictor(lambda rows, params: pyfunc.predict(rows.for_model(), params=dict(params) if params else None))


# What scikit-learn's estimators and those that share its API may answer besides `predict`.
METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples", "transform")


def raw(pyfunc: Any) -> Any:
    """The flavor's own model, if it is of a known flavor."""
    return pyfunc.get_raw_model() if pyfunc.loader_module in FLAVORS else None


def methods(pyfunc: Any) -> list[str]:
    """Which of `METHODS` the model offers."""
    model = raw(pyfunc)
    # A booster has `predict` alone, which takes what MLflow makes of a table.
    return [name for name in METHODS if callable(getattr(model, name, None))] if hasattr(model, "get_params") else []


def asked(pyfunc: Any, method: str) -> Any:
    """`pyfunc` as if it had been logged with `method` for its `pyfunc_predict_fn`."""
    if method == pyfunc.metadata.flavors["python_function"].get("predict_fn", "predict"):
        return pyfunc
    call = getattr(raw(pyfunc), method)
    other = copy.copy(pyfunc)
    other._predict_fn = lambda data, params=None: call(data, **(params or {}))
    return other


def prove(
    pyfunc: Any,
    plan: InputSchema,
    example: Rows | None = None,
    *,
    method: str = "predict",
    fast: bool = True,
    budget: float = BUDGET,
) -> Predictor:
    """The quickest path for the model, found in some 50 ms and in about twice `budget` seconds at most.

    If not `fast`, it is plain, but maybe batchable. Raises nothing: what can't be proven is not used, and the path's
    description says why.
    """
    proof = EquivalenceCheck(pyfunc, plan, example, budget, method)
    path, why = plain(pyfunc), [] if fast else ["FAST_PATH=off"]
    with _undisturbed():
        for step in (proof.unenforced, proof.on_arrays) if fast else ():
            try:
                path = step(path)
            except Exception as error:
                why.append(_reason(error))
        if path.predict_array:
            why = []
        try:
            path = proof.batchable(path)
            why.append("rows may be batched")
        except Exception as error:
            reason = _reason(error)
            why.append("rows are not batched" if reason in why else f"rows are not batched: {reason}")
    return replace(path, description="; ".join([path.description, *dict.fromkeys(why)]))


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, NotEquivalent) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the global random states as they are."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


# Proofs


@dataclass(frozen=True)
class Outcome:
    """What came of one call: an `answer`, or the `error` that was raised, and warnings."""

    answer: Any
    error: Exception | None
    warned: frozenset[tuple[type[Warning], str]]


def _outcome(call: Callable[[Rows], Any], rows: Rows) -> Outcome:
    answer, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = call(copy.deepcopy(rows))  # some models write into their input
        except Exception as raised:
            error = raised
    return Outcome(answer, error, frozenset((warning.category, str(warning.message)) for warning in caught))


class Clock:
    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.begin = time.perf_counter()

    def spent(self, share: float = 1.0) -> bool:
        return time.perf_counter() - self.begin > share * self.budget

    def check(self) -> None:
        if self.spent():
            raise NotFaster(f"the proof takes more than {self.budget:g} s")


class EquivalenceCheck:
    """The steps of `prove`. Each returns a better path, or raises, mostly `NotEquivalent`."""

    def __init__(self, pyfunc: Any, plan: InputSchema, example: Rows | None, budget: float, method: str) -> None:
        self.method = method
        self.pyfunc = pyfunc
        self.plan = plan
        self.example = example
        self.budget = budget

    def unenforced(self, path: Predictor) -> Predictor:
        """Do as `PyFuncModel.predict` does, prediction context and all, but give the model its input as it is."""
        from mlflow.pyfunc import _enforce_params_schema, _enforce_schema

        metadata, predict = self.pyfunc.metadata, self.pyfunc._predict_fn
        if metadata._is_signature_from_type_hint() or metadata._is_type_hint_from_example():
            raise NotEquivalent("the model has type hints, which MLflow enforces")
        schema, params_schema = metadata.get_input_schema(), metadata.get_params_schema()
        if schema is not None and not self.plan.inputs:
            raise NotEquivalent("its signature has no inputs")
        for rows in forms(self.plan, self.example):
            if not same(_enforce_schema(rows.for_model(), schema, self.pyfunc.loader_module), rows.for_model()):
                raise NotEquivalent("MLflow's check of the schema changes what the model gets")
        parameter = inspect.signature(predict).parameters.get("params")
        takes_params = parameter is not None and parameter.kind != inspect.Parameter.VAR_KEYWORD
        if params_schema and not takes_params:
            raise NotEquivalent("the signature has params and the model takes none, of which MLflow warns")

        def without_enforcement(data: Any, params: Params = None) -> Any:
            params = _enforce_params_schema(params, params_schema)
            return predict(data, params=params) if takes_params else predict(data)

        quicker = copy.copy(self.pyfunc)
        quicker._predict = without_enforcement

        def tables(rows: Rows, params: Params) -> Any:
            return quicker.predict(_by_column(rows).for_model(), params=dict(params) if params else None)

        return replace(
            path, predict_dataframe=tables, description="predicts through pyfunc without a second check of the schema"
        )

    def on_arrays(self, path: Predictor) -> Predictor:
        """Call the estimator itself, with kernels if they hold, else without."""
        probes = self._probes
        numbers = {field.number for field in probes.fields}
        if None in numbers:
            raise NotEquivalent("not all columns are numbers")
        for kernels in (True, False):
            twins = NativeCopies(kernels)
            try:
                arrays = on_matrix(self.pyfunc, self.method, probes.plan, numbers, twins)
                with one_job(twins.forests):
                    self._compare(arrays, lambda rows: path.predict_dataframe(rows, None), probes)
                break
            except Exception as error:
                if not kernels or isinstance(error, NotFaster):
                    raise
        name = type(self.pyfunc.get_raw_model()).__name__
        asked = "" if self.method == "predict" else f" and {self.method}"
        return replace(path, predict_array=arrays, description=f"predicts on arrays with {name}{asked}")

    def _compare(self, arrays: Callable[[Rows], Any], tables: Callable[[Rows], Any], probes: SampleRows) -> None:
        """Raise `NotEquivalent` unless whatever `predict_array` answers is what `predict_dataframe` answers."""
        typical, odd = probes.typical, probes.odd
        answered, clock = 0, Clock(self.budget)
        pyfunc: Callable[[Rows], Any] = lambda rows: self.pyfunc.predict(rows.for_model())  # noqa: E731
        needed = [
            (typical[:17], pyfunc),
            *((batch, tables) for batch in (typical[:1], typical, typical)),
            *(([row], tables) for row in (*odd[7:10], odd[-1])),  # the largest, the smallest, all kinds, nulls
        ]
        further = [
            *(([row], tables) for row in odd[:7] + odd[10:-1] + typical[1:5]),
            *(([*typical[at : at + 2], row], tables) for at, row in enumerate(odd)),
        ]
        for index, (batch, reference) in enumerate(needed + further):
            if index >= len(needed) and clock.spent(FURTHER):
                break
            clock.check()
            rows = probes.rows(batch)
            expected, found = _outcome(reference, rows), _outcome(arrays, rows)
            if found.error:  # then the tables answer
                if not expected.error and batch[0] is typical[0]:
                    raise NotEquivalent(f"on arrays it raises {_reason(found.error)}")
                continue
            if expected.error:
                raise NotEquivalent(f"on arrays it doesn't raise {_reason(expected.error)}")
            if more := found.warned - expected.warned:
                raise NotEquivalent(f"on arrays it warns: {' '.join(str(next(iter(more))[1]).split())}")
            if not same(found.answer, expected.answer):
                raise NotEquivalent(f"on arrays it answers otherwise, for {len(batch)} rows")
            answered += len(batch)
        if not answered:
            raise NotEquivalent("no row is known that it answers")

    def batchable(self, path: Predictor) -> Predictor:
        """Rows predicted together are answered as alone, in an array, table or list with a row for each.

        A float may differ by the last bits: by 1e-9 (64 bits) or 1e-4 (32 bits) of the largest magnitude in its
        column of the answers. Relative to that, and not to the float itself, because a sum's error is relative to its
        summands. Labels, integers and texts are the same, and so are types.
        """
        probes = self._probes
        if self.pyfunc.loader_module == "mlflow.xgboost" and self.pyfunc.metadata.get_params_schema():
            raise NotEquivalent("a param may hold a value for each row")

        def call(rows: Rows) -> Any:
            if path.predict_array:
                with contextlib.suppress(Exception):
                    return path.predict_array(rows)
            return path.predict_dataframe(rows, None)

        alone: list[tuple[list[Any], Any]] = []
        clock = Clock(self.budget)
        for row in probes.typical[:3] + probes.missing + probes.typical[3:13]:
            if len(alone) > 3 and clock.spent(FURTHER):
                break
            clock.check()
            outcome = _outcome(call, probes.rows([row]))
            if not outcome.error:
                alone.append((row, outcome.answer))
        if len(alone) < 3:
            raise NotEquivalent("it answers too few made-up rows")
        for part in (alone, alone[:2], alone[-3:], alone[::-1] * 4):
            clock.check()
            outcome = _outcome(call, probes.rows([row for row, _ in part]))
            if outcome.error:
                raise NotEquivalent(f"rows that it answers one by one make it raise {_reason(outcome.error)}")
            if not _splits_into(outcome.answer, [answer for _, answer in part]):
                raise NotEquivalent("what a row is answered depends on the rows beside it")
        return replace(path, batchable=True)

    @functools.cached_property
    def _probes(self) -> SampleRows:
        if self.pyfunc.loader_module not in FLAVORS:
            raise NotEquivalent(f"{self.pyfunc.loader_module} may run any code")
        NativeCopies(kernels=False).of(self.pyfunc.get_raw_model())
        return SampleRows.of(self.plan, self.example)


def _by_column(rows: Rows) -> Rows:
    """pyfunc gives models tables whose columns lie together; matrix products differ in the last bits otherwise."""
    return rows if rows.names is None else replace(rows, value=np.array(rows.value, order="F"))


# Comparing


def same(one: Any, other: Any) -> bool:
    """Of one type, and bit for bit the same. NaN is NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, pd.DataFrame):
        if not one.columns.identical(other.columns) or not one.index.identical(other.index):
            return False
        dtypes = {*one.dtypes, *other.dtypes}
        if len(dtypes) == 1:
            return same(one.to_numpy(), other.to_numpy())
        return all(same(one.iloc[:, i], other.iloc[:, i]) for i in range(one.shape[1]))
    if isinstance(one, pd.Series):
        axes = one.name == other.name and one.dtype == other.dtype and one.index.identical(other.index)
        return bool(axes) and same(one.to_numpy(), other.to_numpy())
    if isinstance(one, np.ndarray):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        if one.dtype == object:
            return same(one.ravel().tolist(), other.ravel().tolist())
        if one.dtype.kind == "f":
            nan = np.isnan(one)
            one, other = np.where(nan, 0, one), np.where(nan & np.isnan(other), 0, other)
        return bool(one.tobytes() == other.tobytes())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one is other or one == other or (one != one and other != other))


def _splits_into(output: Any, parts: Sequence[Any]) -> bool:
    """Is `output` made of `parts`, of one row each, one after the other?"""
    if not isinstance(output, (np.ndarray, pd.DataFrame, pd.Series, list)) or len(output) != len(parts):
        return False
    if any(type(part) is not type(output) for part in parts):
        return False
    whole, pieces = _columns(output), list(map(_columns, parts))
    if any(piece.keys() != whole.keys() for piece in pieces):
        return False
    return all(_stacked(whole[name], [piece[name] for piece in pieces]) for name in whole)


def _columns(output: Any) -> dict[Any, Any]:
    if isinstance(output, pd.DataFrame):
        return {name: output[name].to_numpy() for name in output.columns}
    return {"": output.to_numpy() if isinstance(output, pd.Series) else output}


def _stacked(whole: Any, parts: Sequence[Any]) -> bool:
    if isinstance(whole, list):
        return same(whole, [item for part in parts for item in part])
    if any(part.dtype != whole.dtype or part.shape != (1, *whole.shape[1:]) for part in parts):
        return False
    joined = np.concatenate(parts)
    if whole.dtype.kind != "f":
        return same(whole, joined)
    largest = np.max(np.abs(whole), axis=0, initial=0, where=np.isfinite(whole))
    tolerance = 1e-9 if whole.dtype == np.float64 else 1e-4
    return bool(np.isclose(joined, whole, rtol=0, atol=tolerance * largest, equal_nan=True).all())
