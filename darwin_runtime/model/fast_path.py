"""The quickest predictor of a loaded model that is proven to answer what `pyfunc.predict` answers.

There are three predictors, the quickest first:

1. **On arrays**: the flavor's own estimator is given `Rows.matrix()`, and some of its steps are reduced to their
   arithmetic. Whenever that raises, the next predictor answers instead, so errors are always those of the next one.
   Taken if the model is made of nothing but known libraries' code, and answers its input example and sample rows bit
   for bit as the next predictor does, without a warning that the next one doesn't give.
2. **Through pyfunc without its check of the schema**, which is most of what pyfunc costs. Taken if that check returns
   the tables or tensors of our plan exactly as it got them. The model isn't run for this, so any flavor may have it.
3. **Plain pyfunc.**

Code that came with the model is never run on sample rows: it may have side effects, and a few rows don't show what it
does with others. A check runs the model, so it belongs into the process that serves: the thread pools that libraries
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from darwin_runtime.model.categories import CategoryPredict
from darwin_runtime.model.compare import same, splits_into
from darwin_runtime.model.native import NATIVE_FLAVORS, NativeCopies, NotEquivalent, array_predictor, single_threaded
from darwin_runtime.model.sample_rows import SampleRows, forms
from darwin_runtime.schema.model_spec import InputSchema
from darwin_runtime.schema.rows import Rows

Params = Mapping[str, Any] | None

# Seconds for the rows that a check must try, and the share of them for the rows that it may try besides.
BUDGET = 1.0
FURTHER = 0.05


class NotFaster(NotEquivalent):
    """The check takes more time than it may."""


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


def pyfunc_predictor(pyfunc: Any) -> Predictor:
    return Predictor(lambda rows, params: pyfunc.predict(rows.for_model(), params=dict(params) if params else None))


# What scikit-learn's estimators and those that share its API may answer besides `predict`.
METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples", "transform")


def raw_model(pyfunc: Any) -> Any:
    """The flavor's own model, if it is of a known flavor."""
    return pyfunc.get_raw_model() if pyfunc.loader_module in NATIVE_FLAVORS else None


def offered_methods(pyfunc: Any) -> list[str]:
    """Which of `METHODS` the model offers."""
    model = raw_model(pyfunc)
    # A booster has `predict` alone, which takes what MLflow makes of a table.
    return [name for name in METHODS if callable(getattr(model, name, None))] if hasattr(model, "get_params") else []


def with_method(pyfunc: Any, method: str) -> Any:
    """`pyfunc` as if it had been logged with `method` for its `pyfunc_predict_fn`."""
    if method == pyfunc.metadata.flavors["python_function"].get("predict_fn", "predict"):
        return pyfunc
    call = getattr(raw_model(pyfunc), method)
    taken = _named_params(call)

    def predict(data: Any, params: Params = None) -> Any:
        return call(data, **{name: value for name, value in (params or {}).items() if name in taken})

    other = copy.copy(pyfunc)
    usual = pyfunc._predict_fn
    other._predict_fn = replace(usual, predict=predict) if isinstance(usual, CategoryPredict) else predict
    return other


def _named_params(method: Callable[..., Any]) -> list[str]:
    """The names of the arguments after the data. Others would raise, and the signature's are given to every method."""
    try:
        _, *more = inspect.signature(method).parameters.values()
    except ValueError:  # not written in Python, or without arguments
        return []
    return [each.name for each in more if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def find_quickest(
    pyfunc: Any,
    plan: InputSchema,
    example: Rows | None = None,
    *,
    method: str = "predict",
    fast: bool = True,
    budget: float = BUDGET,
) -> Predictor:
    """The quickest predictor for the model, found in some 50 ms and in about twice `budget` seconds at most.

    If not `fast`, it is plain pyfunc, but maybe batchable. Raises nothing: a predictor that can't be proven is not
    used, and the description gives the reason.
    """
    check = EquivalenceCheck(pyfunc, plan, example, budget, method)
    predictor, why = pyfunc_predictor(pyfunc), [] if fast else ["FAST_PATH=off"]
    with _undisturbed():
        for step in (check.unenforced, check.on_arrays) if fast else ():
            try:
                predictor = step(predictor)
            except Exception as error:
                why.append(_describe(error))
        if predictor.predict_array:
            why = []
        try:
            predictor = check.batchable(predictor)
            why.append("rows may be batched")
        except Exception as error:
            reason = _describe(error)
            why.append("rows are not batched" if reason in why else f"rows are not batched: {reason}")
    return replace(predictor, description="; ".join([predictor.description, *dict.fromkeys(why)]))


def _describe(error: Exception) -> str:
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


# Checks


@dataclass(frozen=True)
class CallOutcome:
    """What came of one call: an `answer`, or the `error` that was raised, and warnings."""

    answer: Any
    error: Exception | None
    warned: frozenset[tuple[type[Warning], str]]


def _try_call(call: Callable[[Rows], Any], rows: Rows) -> CallOutcome:
    answer, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = call(copy.deepcopy(rows))  # some models write into their input
        except Exception as raised:
            error = raised
    return CallOutcome(answer, error, frozenset((warning.category, str(warning.message)) for warning in caught))


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
    """The steps of `find_quickest`. Each returns a better predictor, or raises, mostly `NotEquivalent`."""

    def __init__(self, pyfunc: Any, plan: InputSchema, example: Rows | None, budget: float, method: str) -> None:
        self.method = method
        self.pyfunc = pyfunc
        self.plan = plan
        self.example = example
        self.budget = budget

    def unenforced(self, predictor: Predictor) -> Predictor:
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

        def predict_dataframe(rows: Rows, params: Params) -> Any:
            return quicker.predict(_by_column(rows).for_model(), params=dict(params) if params else None)

        return replace(
            predictor,
            predict_dataframe=predict_dataframe,
            description="predicts through pyfunc without a second check of the schema",
        )

    def on_arrays(self, predictor: Predictor) -> Predictor:
        """Call the estimator itself, with kernels if they hold, else without."""
        if isinstance(self.pyfunc._predict_fn, CategoryPredict):
            raise NotEquivalent("some columns are categories")
        samples = self._samples
        numbers = {field.number for field in samples.fields}
        if None in numbers:
            raise NotEquivalent("not all columns are numbers")
        for kernels in (True, False):
            copies = NativeCopies(kernels)
            try:
                predict_array = array_predictor(self.pyfunc, self.method, samples.plan, numbers, copies)
                with single_threaded(copies.forests):
                    self._compare(predict_array, lambda rows: predictor.predict_dataframe(rows, None), samples)
                break
            except Exception as error:
                if not kernels or isinstance(error, NotFaster):
                    raise
        name = type(self.pyfunc.get_raw_model()).__name__
        asked = "" if self.method == "predict" else f" and {self.method}"
        return replace(predictor, predict_array=predict_array, description=f"predicts on arrays with {name}{asked}")

    def _compare(
        self, predict_array: Callable[[Rows], Any], predict_dataframe: Callable[[Rows], Any], samples: SampleRows
    ) -> None:
        """Raise `NotEquivalent` unless whatever `predict_array` answers is what `predict_dataframe` answers."""
        typical, odd = samples.typical, samples.odd
        answered, clock = 0, Clock(self.budget)
        pyfunc: Callable[[Rows], Any] = lambda rows: self.pyfunc.predict(rows.for_model())  # noqa: E731
        needed = [
            (typical[:17], pyfunc),
            *((batch, predict_dataframe) for batch in (typical[:1], typical, typical)),
            # The largest, the smallest, all kinds, nulls.
            *(([row], predict_dataframe) for row in (*odd[7:10], odd[-1])),
        ]
        further = [
            *(([row], predict_dataframe) for row in odd[:7] + odd[10:-1] + typical[1:5]),
            *(([*typical[at : at + 2], row], predict_dataframe) for at, row in enumerate(odd)),
        ]
        for index, (batch, reference) in enumerate(needed + further):
            if index >= len(needed) and clock.spent(FURTHER):
                break
            clock.check()
            rows = samples.rows(batch)
            expected, found = _try_call(reference, rows), _try_call(predict_array, rows)
            if found.error:  # then the tables answer
                if not expected.error and batch[0] is typical[0]:
                    raise NotEquivalent(f"on arrays it raises {_describe(found.error)}")
                continue
            if expected.error:
                raise NotEquivalent(f"on arrays it doesn't raise {_describe(expected.error)}")
            if more := found.warned - expected.warned:
                raise NotEquivalent(f"on arrays it warns: {' '.join(str(next(iter(more))[1]).split())}")
            if not same(found.answer, expected.answer):
                raise NotEquivalent(f"on arrays it answers otherwise, for {len(batch)} rows")
            answered += len(batch)
        if not answered:
            raise NotEquivalent("no row is known that it answers")

    def batchable(self, predictor: Predictor) -> Predictor:
        """Rows predicted together are answered as alone, in an array, table or list with a row for each.

        A float may differ by the last bits: by 1e-9 (64 bits) or 1e-4 (32 bits) of the largest magnitude in its
        column of the answers. Relative to that, and not to the float itself, because a sum's error is relative to its
        summands. Labels, integers and texts are the same, and so are types.
        """
        samples = self._samples
        if self.pyfunc.loader_module == "mlflow.xgboost" and self.pyfunc.metadata.get_params_schema():
            raise NotEquivalent("a param may hold a value for each row")

        def call(rows: Rows) -> Any:
            if predictor.predict_array:
                with contextlib.suppress(Exception):
                    return predictor.predict_array(rows)
            return predictor.predict_dataframe(rows, None)

        alone: list[tuple[list[Any], Any]] = []
        clock = Clock(self.budget)
        for row in samples.typical[:3] + samples.missing + samples.typical[3:13]:
            if len(alone) > 3 and clock.spent(FURTHER):
                break
            clock.check()
            outcome = _try_call(call, samples.rows([row]))
            if not outcome.error:
                alone.append((row, outcome.answer))
        if len(alone) < 3:
            raise NotEquivalent("it answers too few made-up rows")
        for part in (alone, alone[:2], alone[-3:], alone[::-1] * 4):
            clock.check()
            outcome = _try_call(call, samples.rows([row for row, _ in part]))
            if outcome.error:
                raise NotEquivalent(f"rows that it answers one by one make it raise {_describe(outcome.error)}")
            if not splits_into(outcome.answer, [answer for _, answer in part]):
                raise NotEquivalent("what a row is answered depends on the rows beside it")
        return replace(predictor, batchable=True)

    @functools.cached_property
    def _samples(self) -> SampleRows:
        if self.pyfunc.loader_module not in NATIVE_FLAVORS:
            raise NotEquivalent(f"{self.pyfunc.loader_module} may run any code")
        NativeCopies(kernels=False).of(self.pyfunc.get_raw_model())
        return SampleRows.of(self.plan, self.example)


def _by_column(rows: Rows) -> Rows:
    """pyfunc gives models tables whose columns lie together; matrix products differ in the last bits otherwise."""
    return rows if rows.names is None else replace(rows, value=np.array(rows.value, order="F"))
