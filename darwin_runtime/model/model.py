"""One loaded model: it predicts, streams, and knows how clients may ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from darwin_runtime.errors import InputRejected, PredictionFailed
from darwin_runtime.model import fast_path
from darwin_runtime.model.diagnose import short_message
from darwin_runtime.schema.model_spec import InputSchema, ModelSpec
from darwin_runtime.schema.params import ParamSchema
from darwin_runtime.schema.rows import Rows
from darwin_runtime.schema.signature import Spec


@dataclass(frozen=True)
class Model:
    """A loaded model. `input_schema` and `params` parse its input; `outputs` is its output signature in JSON form.

    `example` is the JSON body of a request the model was logged with, None if it has none. `predictors` are by the name
    of the method that clients may ask for, the one it was logged with first; `method` is the usual one. `load_seconds`
    is how long loading took.
    """

    directory: Path
    flavors: tuple[str, ...]
    input_schema: InputSchema
    params: ParamSchema
    outputs: Sequence[Spec]
    example: bytes | None
    pyfunc: Any
    predictors: Mapping[str, fast_path.Predictor]
    method: str
    load_seconds: float = 0.0

    @property
    def predictor(self) -> fast_path.Predictor:
        """The predictor of the usual method."""
        return self.predictors[self.method]

    def contract(self, name: str, version: str = "") -> ModelSpec:
        """The requests and answers of clients that know the model by `name` and `version`."""
        classes: Any = getattr(fast_path.raw_model(self.pyfunc), "classes_", None)
        one_output = isinstance(classes, np.ndarray) and classes.ndim == 1
        return ModelSpec(
            input_schema=self.input_schema,
            params=self.params,
            # They were inferred from what the method that the model was logged with answers.
            outputs=self.outputs if self.method == next(iter(self.predictors)) else (),
            name=name,
            version=version,
            methods=tuple(self.predictors),
            method=self.method,
            classes=classes.tolist() if one_output else None,
            streams=getattr(self.pyfunc, "_predict_stream_fn", None) is not None,
        )

    @property
    def batchable(self) -> bool:
        """Whether rows of several requests may be predicted together."""
        return self.predictor.batchable

    def with_quickest_predictor(
        self, example: Rows | None = None, *, fast: bool = True, budget: float = fast_path.BUDGET
    ) -> Model:
        """This model with the quickest predictor that is proven to answer the same; its `description` names it.

        `example` is the model's own, parsed. This runs the model, so not before a fork: mostly for some 50 ms, and for
        about twice `budget`, in seconds, at most.
        """
        pyfunc = fast_path.with_method(self.pyfunc, self.method)
        predictor = fast_path.find_quickest(
            pyfunc, self.input_schema, example, method=self.method, fast=fast, budget=budget
        )
        return replace(self, predictors={**self.predictors, self.method: predictor})

    def predict(self, rows: Rows, params: Mapping[str, Any] | None = None, method: str = "") -> Any:
        """What `mlflow.pyfunc`, or another `method` than the usual one, answers to `rows`.

        Raises `RequestRefused` or `PredictionFailed`.
        """
        if rows.passthrough:
            return _run(lambda: self.pyfunc.predict(rows.value, params=dict(params or {})), unvalidated=True)
        predictor = self.predictors[method or self.method]
        if predictor.predict_array and not params and rows.count:
            # If it raises, pyfunc answers or raises instead.
            with contextlib.suppress(BaseException):
                return predictor.predict_array(rows)
        return _run(lambda: predictor.predict_dataframe(rows, params), unvalidated=rows.unvalidated)

    def stream(self, rows: Rows, params: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """The pieces of an answer, as the model yields them. Raises, also later, as `predict` does."""
        pieces = _run(lambda: self.pyfunc.predict_stream(rows.value, params=dict(params or {})), unvalidated=True)
        done = object()
        try:
            while (piece := _run(lambda: next(pieces, done), unvalidated=False)) is not done:
                yield piece
        except PredictionFailed as error:
            if isinstance(error.__cause__, NotImplementedError):  # as all classes of MLflow's do that don't stream
                raise InputRejected("this model cannot answer piece by piece: leave out stream") from error
            raise
        finally:
            if hasattr(pieces, "close"):
                pieces.close()

    def predict_own_example(self) -> Any:
        """What the model answers to its input example as MLflow stored it. Raises like `predict`."""
        params = self.pyfunc.metadata.load_input_example_params(str(self.directory))
        return _run(lambda: self.pyfunc.predict(self.pyfunc.input_example, params=params), unvalidated=False)


def _run(predict: Callable[[], Any], *, unvalidated: bool) -> Any:
    """The value of `predict()`. Raises `InputRejected` or `PredictionFailed` for any exception of it."""
    from mlflow.exceptions import MlflowException

    try:
        return predict()
    except InputRejected:
        raise
    except MlflowException as error:
        # What MLflow raises on input it was left to check has any code.
        if unvalidated or error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise InputRejected(
                short_message(error), by_schema=error.error_code == "INVALID_PARAMETER_VALUE"
            ) from error
        raise PredictionFailed(short_message(error)) from error
    except BaseException as error:  # a model's code may raise anything, and only the one who asked is to hear of it
        blameless = isinstance(error, (MemoryError, OSError)) or not isinstance(error, Exception)
        raise (InputRejected if unvalidated and not blameless else PredictionFailed)(short_message(error)) from error
