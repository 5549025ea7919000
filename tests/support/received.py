"""Models that answer with what they received, one for each type of a signature: `SIGNATURES`.

A description tells types apart, and one missing value from no other: null, NaN and NaT are the same to it.
"""

# MLflow takes type hints for a signature, so its models here have none.
# mypy: disable-error-code="no-untyped-def, misc, import-untyped"

from __future__ import annotations

import datetime
import json
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pydantic

from tests.support.models import BUILDERS, REQUIREMENTS

with warnings.catch_warnings():
    # MLflow warns of its own type hints.
    warnings.simplefilter("ignore")
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import AnyType, Array, Map, Object, Property

cloudpickle.register_pickle_by_value(sys.modules[__name__])

MISSING = "missing"


def describe(value: Any) -> Any:
    """`value` as JSON, with its types."""
    if isinstance(value, pd.DataFrame):
        labels = [] if value.index.equals(pd.RangeIndex(len(value))) else [describe(value.index.tolist())]
        return {"table": [[describe(name), *column(value[name])] for name in value], "labels": labels}
    if isinstance(value, np.ndarray):
        return {"array": [value.dtype.kind, list(value.shape), [describe(part) for part in value.ravel()]]}
    if isinstance(value, pydantic.BaseModel):
        return {type(value).__name__: describe(value.model_dump())}
    if isinstance(value, dict):
        return {str(key): describe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(part) for part in value]
    if pd.isna(value):
        return MISSING
    if isinstance(value, (np.datetime64, pd.Timestamp, datetime.datetime)):
        return f"time {pd.Timestamp(value).isoformat()}"
    value = value.item() if isinstance(value, np.generic) else value
    return f"{type(value).__name__} {value!r}"


def column(values: Any) -> list[Any]:
    """The type of a table's column, and its values. Those of text and of objects are of one type, and so are texts."""
    kind = values.dtype.name if values.dtype.kind in "biufM" else "object"
    return [kind, [describe(each.tolist() if isinstance(each, np.ndarray) else each) for each in values.tolist()]]


class Received:
    """Answers with the description of what it received."""

    def predict(self, context, model_input, params=None):
        return [json.dumps(describe(model_input), sort_keys=True)]


class Item(pydantic.BaseModel):
    name: str
    price: float
    note: str | None = None


def _hinted(hint: Any) -> Any:
    def predict(self, model_input):
        return [json.dumps(describe(model_input), sort_keys=True)]

    predict.__annotations__ = {"model_input": list[hint], "return": list[str]}
    return type("Hinted", (mlflow.pyfunc.PythonModel,), {"predict": predict})


def _builder(inputs: list[Any] | None) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        python = type("Received", (Received, mlflow.pyfunc.PythonModel), {})
        options = {"signature": ModelSignature(inputs=Schema(inputs))} if inputs else {}
        mlflow.pyfunc.save_model(path, python_model=python(), **REQUIREMENTS, **options)

    return build


def _hint_builder(hint: Any) -> Callable[[Path], None]:
    return lambda path: mlflow.pyfunc.save_model(path, python_model=_hinted(hint)(), **REQUIREMENTS)


OBJECT = Object([Property("id", DataType.long), Property("note", DataType.string, required=False)])

# The types of columns; each is there as a required column `c`, and as an optional one beside `x`.
COLUMN_TYPES: dict[str, Any] = {
    **{name: name for name in ("boolean", "integer", "long", "float", "double", "string", "binary", "datetime")},
    "array of double": Array(DataType.double),
    "array of long": Array(DataType.long),
    "array of string": Array(DataType.string),
    "array of binary": Array(DataType.binary),
    "array of arrays": Array(Array(DataType.long)),
    "array of any": Array(AnyType()),
    "object": OBJECT,
    "map of double": Map(DataType.double),
    "map of binary": Map(DataType.binary),
    "any": AnyType(),
}

TENSOR_DTYPES = ("float32", "float64", "int64", "uint8", "bool", "str", "bytes", "object", "datetime64[ns]")

HINTS: dict[str, Any] = {
    **{kind.__name__: kind for kind in (bool, int, float, str, bytes, datetime.datetime)},
    "list[float]": list[float],
    "dict[str, int]": dict[str, int],
    "Item": Item,
    "Any": typing.Any,
}

SIGNATURES: dict[str, Callable[[Path], None]] = {
    **{f"required {name}": _builder([ColSpec(kind, "c")]) for name, kind in COLUMN_TYPES.items()},
    **{
        f"optional {name}": _builder([ColSpec("double", "x"), ColSpec(kind, "c", required=False)])
        for name, kind in COLUMN_TYPES.items()
    },
    "unnamed double": _builder([ColSpec("double")]),
    "unnamed string": _builder([ColSpec("string")]),
    "called 0": _builder([ColSpec("long", 0)]),
    **{f"tensor of {dtype}": _builder([TensorSpec(np.dtype(dtype), (-1,))]) for dtype in TENSOR_DTYPES},
    **{f"named tensor of {dtype}": _builder([TensorSpec(np.dtype(dtype), (-1, 1), "c")]) for dtype in TENSOR_DTYPES},
    "tensor called 0": _builder([TensorSpec(np.dtype("float64"), (-1, 1), 0)]),
    "none": _builder(None),
    **{f"hint {name}": _hint_builder(hint) for name, hint in HINTS.items()},
}

BUILDERS.update({f"received {name}": build for name, build in SIGNATURES.items()})
