"""The one encoder: every value of a prediction as JSON, as a V2 tensor, and as a cell of CSV.

A value has one JSON form. BYTES of V2 and cells of CSV hold texts as they are, and all else as that form.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import dataclasses
import datetime
import decimal
import enum
import io
import itertools
import json
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orjson
import pandas as pd

from darwin_runtime.errors import EncodingError
from darwin_runtime.protocols.v2_tensors import BYTES, DATATYPES
from darwin_runtime.schema.doubles import double_array, double_matrix
from darwin_runtime.schema.rows import Array

_OPTIONS = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS
_LEAVES = frozenset({type(None), bool, int, float, str})
_JSON_TYPES = _LEAVES | {list, dict}
_VECTORS = (pd.Series, pd.Index, pd.api.extensions.ExtensionArray)

# A double holds every integer up to this.
_EXACT = 2**53


# JSON


def dump(value: Any) -> bytes:
    """`value` as JSON: NaN and infinities as null, digits as Python writes them. Raises `EncodingError`."""
    try:
        return _json(value)
    except EncodingError as error:
        raise EncodingError(f"the model's output cannot be written as JSON: {error}") from error


def _json(value: Any) -> bytes:
    try:
        return orjson.dumps(value, default=plain, option=_OPTIONS)
    except TypeError:
        # Keys that are no text, integers of more than 64 bits, lone surrogates, deep nesting, or a value without form.
        pass
    try:
        return json.dumps(_walked(value), allow_nan=False, separators=(",", ":")).encode()
    except EncodingError as error:
        raise EncodingError(f"{error}{_place(value)}") from error
    except (RecursionError, ValueError) as error:  # Python writes no integer of more than 4,300 digits
        raise EncodingError(str(error)) from error


def _walked(value: Any) -> Any:
    """`value` in exactly the types of JSON."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if type(value) in _LEAVES:
        return value
    made = plain(value)
    if type(made) is dict:
        return dict(zip(names_of(made), map(_walked, made.values()), strict=True))
    return [*map(_walked, made)] if type(made) is list else _walked(made)


def _place(value: Any, path: str = "") -> str:
    """Where in `value` the first part without a form is."""
    with contextlib.suppress(EncodingError):
        made = plain(value)
        parts = zip(names_of(made), made.values(), strict=True) if type(made) is dict else enumerate(made)
        for key, part in parts:
            try:
                _walked(part)
            except EncodingError:
                return _place(part, f"{path}[{key!r}]"[:200])
    return path and f" (at {path})"


def plain(value: Any) -> Any:
    """`value` as a type that JSON has. The parts of a list or dict stay as they are. Raises `EncodingError`."""
    if type(value) in _JSON_TYPES:
        return value
    if type(value) is np.ndarray and value.dtype.kind not in "mM" and value.ndim:
        return value.tolist()
    leaf = _leaf(value)
    return base64.b64encode(leaf).decode() if type(leaf) is bytes else leaf


def _leaf(value: Any) -> Any:
    """The same, but bytes stay bytes."""
    if type(value) in _JSON_TYPES:
        return value
    try:
        return _of_scalar(value)
    except EncodingError:
        raise
    except Exception as error:  # of the model's own classes, or of a time that pandas cannot hold
        raise EncodingError(f"{type(value).__name__} has no JSON form: {type(error).__name__}: {error}") from error


def _of_scalar(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return _leaf(value.value)
    if value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, (np.datetime64, np.timedelta64)) and np.isnat(value):
        return None
    if isinstance(value, np.datetime64):
        return str(np.datetime_as_string(value))
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (datetime.timedelta, np.timedelta64)):
        return pd.Timedelta(value).isoformat()
    if isinstance(value, np.longdouble):
        if value != float(value) and not np.isnan(value):
            raise EncodingError(f"{type(value).__name__} has no JSON form: {value} has more digits than a double")
        return float(value)
    if isinstance(value, np.generic) and not isinstance(value, np.complexfloating):
        return _leaf(value.item())
    if isinstance(value, decimal.Decimal):
        return str(value) if value.is_finite() else None
    return str(value) if isinstance(value, uuid.UUID) else _of_container(value)


def _of_container(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "mM":
            return list(value) if value.ndim else _leaf(value[()])
        return value.tolist() if value.ndim else _leaf(value.tolist())
    if isinstance(value, pd.DataFrame):
        return _records(value)
    if isinstance(value, _VECTORS):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # As orjson does, without fields that are private.
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if not f.name.startswith("_")}
    if hasattr(type(value), "model_dump"):
        return plain(value.model_dump())
    if hasattr(type(value), "toarray"):
        return value.toarray().tolist()
    raise EncodingError(f"{type(value).__name__} has no JSON form")


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    names, dtypes = names_of(frame.columns), set(frame.dtypes)
    if len(dtypes) == 1 and isinstance(dtype := dtypes.pop(), np.dtype) and dtype.kind in "iufb":
        rows: Iterable[Any] = frame.to_numpy().tolist()
    else:
        rows = zip(*[column.tolist() for _, column in frame.items()], strict=True) if names else [()] * len(frame)
    return [dict(zip(names, row, strict=True)) for row in rows]


def names_of(keys: Iterable[Any]) -> list[str]:
    """The names of `keys`: a text as it is, all else as its JSON. Raises `EncodingError` if two are alike."""
    names = [_name(key) for key in keys]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise EncodingError(f"the model's output has two columns or keys that are called {twice[:100]!r}")
    return names


def _name(key: Any) -> str:
    if type(key) is str or type(key) is int:
        return str(key)
    text = text_of(key)
    return "null" if text is None else text


def text_of(value: Any) -> str | None:
    """A text as it is, None for a missing value, all else as JSON."""
    form = plain(value)
    if type(form) is str or form is None:
        return form
    return None if type(form) is float and not math.isfinite(form) else _json(form).decode()


# Tables


def opened(value: Any) -> Any:
    """An object or a list of any class as a dict or a list, a sparse matrix as an array, all else as it is."""
    if isinstance(value, np.matrix):
        return np.asarray(value)
    if type(value) in _JSON_TYPES or isinstance(value, (np.ndarray, np.generic, list, tuple, pd.DataFrame, *_VECTORS)):
        return value
    with contextlib.suppress(EncodingError):  # the encoding of the value raises it again
        form = _leaf(value)
        if type(form) in (dict, list):
            return value.toarray() if hasattr(type(value), "toarray") else form
    return value


def as_table(output: Any) -> list[tuple[Any, Any]] | None:
    """The columns of a DataFrame, or of a list of objects, each with its key; None if `output` is neither."""
    if isinstance(output, pd.DataFrame):
        return list(output.items())
    if not isinstance(output, list) or not output:
        return None
    rows = []
    for each in output:
        row = opened(each)
        if type(row) is not dict:
            return None
        rows.append(row)
    keys = dict.fromkeys(itertools.chain.from_iterable(rows))
    # A key that an object lacks is a missing value. A Series, because lists in it do not add to its shape.
    return [(key, pd.Series([row.get(key) for row in rows], dtype=object)) for key in keys] or None


# Tensors


def to_tensor(name: str, values: Any, *, column: bool) -> tuple[str, tuple[int, ...], Any]:
    """Datatype, shape and flat values: an array of numbers, or a list of str, bytes and None.

    The shape of a `column` is [n, 1] instead of [n]. Raises `EncodingError`.
    """
    try:
        if type(values) is np.ndarray and values.ndim and (datatype := DATATYPES.get(values.dtype)):
            flat, shape = values.ravel(), values.shape
        else:
            datatype, flat, shape = _typed(values)
    except EncodingError as error:
        raise EncodingError(f"the model's output {name[:100]!r} cannot be written as a tensor: {error}") from error
    column = len(shape) == 1 and (column or isinstance(values, pd.Series))
    return datatype, (*shape, 1) if column else shape, flat


def _typed(values: Any) -> tuple[str, Any, tuple[int, ...]]:
    """The datatype, the flat values and the shape. The values are an array of numbers, or as `_of_one_type` says."""
    if isinstance(values, np.ndarray):
        return _typed_array(np.atleast_1d(values))
    if isinstance(values, (list, tuple)):
        if (array := _array_of(values)) is not None:
            return _typed_array(array)
        shape, flat = _unnested(values)
        return (*_of_one_type(flat), shape) if flat else ("FP64", np.empty(0), shape)
    if isinstance(values, _VECTORS):
        numbers = _numbers(values)
        return (*_of_one_type(values.tolist()), (len(values),)) if numbers is None else _typed_array(numbers)
    form = opened(values)
    return (*_of_one_type([values]), (1,)) if form is values or type(form) is dict else _typed(form)


def _typed_array(array: Array) -> tuple[str, Any, tuple[int, ...]]:
    kind = array.dtype.kind
    if isinstance(array, np.ma.MaskedArray) and kind == "f":
        array = array.filled(np.nan)
    if kind in "biuf" and (native := array.dtype.newbyteorder("=")) in DATATYPES and not np.ma.is_masked(array):
        return DATATYPES[native], np.asarray(array, dtype=native).ravel(), array.shape
    if kind == "V":
        return _typed(array.tolist())
    flat = array.reshape(-1)
    return *_of_one_type(list(flat) if kind in "mM" else flat.tolist()), array.shape


def _numbers(vector: Any) -> Array | None:
    """The numbers of a Series, an Index or an extension array; None if some are missing, or are none."""
    dtype = vector.dtype
    if isinstance(dtype, np.dtype):
        return np.asarray(vector.values) if dtype.kind in "biuf" else None
    number = getattr(dtype, "numpy_dtype", None)
    if number is None or number.kind not in "biuf" or (number.kind != "f" and pd.isna(vector).any()):
        return None
    return np.asarray(vector.to_numpy(dtype=number, na_value=np.nan))


def _array_of(values: Any) -> Array | None:
    """A list of floats, of lists of them, or of arrays that are alike, as an array; None if it is something else."""
    if not values:
        return None
    first = values[0]
    if type(first) is float:
        matrix = double_matrix([values], len(values))
        return None if matrix is None else matrix[0]
    if type(first) in (list, tuple):
        return double_matrix(values, len(first)) if first else None
    if type(first) is not np.ndarray or not first.ndim:
        return None
    alike = all(type(each) is np.ndarray and (each.dtype, each.shape) == (first.dtype, first.shape) for each in values)
    return np.stack(values) if alike else None


def _unnested(values: Any) -> tuple[tuple[int, ...], list[Any]]:
    """The shape of lists in lists, down to where lengths differ, and the flat values."""
    shape: tuple[int, ...] = (len(values),)
    level, above = list(values), [values]
    while level and all(isinstance(p, (list, tuple)) or (isinstance(p, np.ndarray) and p.ndim) for p in level):
        lengths = set(map(len, level))
        if len(lengths) > 1 or any(level[0] is each for each in above):  # a list that holds itself has no end
            break
        above.append(level[0])
        shape, level = (*shape, *lengths), list(itertools.chain.from_iterable(level))
    return shape, level


def _of_one_type(flat: list[Any]) -> tuple[str, Any]:
    """A datatype that holds all values exactly, and these: an array of numbers, or a list of str, bytes and None."""
    kinds = set(map(type, flat))
    if kinds == {str}:
        return BYTES, flat
    if kinds == {float}:
        return "FP64", double_array(flat)
    kind = next(iter(kinds), str)
    if len(kinds) == 1 and issubclass(kind, np.generic) and np.dtype(kind) in DATATYPES:
        return DATATYPES[np.dtype(kind)], np.array(flat, dtype=kind)
    leaves = [_leaf(value) for value in flat]
    kinds = set(map(type, leaves))
    if kinds <= {float, int, type(None)} and kinds - {type(None)}:
        for dtype in (np.float64,) if kinds != {int} else (np.int64, np.uint64):
            with contextlib.suppress(OverflowError):
                array = np.array([math.nan if leaf is None else leaf for leaf in leaves], dtype=dtype)
                if kinds == {int} or all(type(leaf) is not int or abs(leaf) <= _EXACT for leaf in leaves):
                    return DATATYPES[array.dtype], array
    if kinds == {bool}:
        return "BOOL", np.array(leaves, dtype=bool)
    return BYTES, [leaf if type(leaf) is bytes else text_of(leaf) for leaf in leaves]


# CSV


def dump_csv(output: Any, name: str) -> bytes:
    """A header and a line for each row; `name` is that of a column that has none. Raises `EncodingError`."""
    names, columns = [], []
    try:
        for key, column in _csv_columns(output, name):
            names.append(_name(key))
            columns.append(_cells(column))
        rows = [names, *zip(*columns, strict=True)]
        # Python quotes a carriage return only where one ends lines.
        for end in ("\n", "\r\n"):
            text = io.StringIO()
            csv.writer(text, lineterminator=end).writerows(rows)
            if "\r" not in text.getvalue():
                break
        return text.getvalue().encode()
    except (EncodingError, ValueError) as error:
        where = f"column {names[-1][:100]!r}: " if len(columns) < len(names) else ""
        raise EncodingError(f"the model's output cannot be written as CSV: {where}{error}") from error


def _csv_columns(output: Any, name: str) -> Iterable[tuple[Any, Any]]:
    """The columns of `output` as a table. A value that is none is a table of one row."""
    output = opened(output)
    if isinstance(output, _VECTORS):
        own = getattr(output, "name", None)
        return [(name if own is None else own, output)]
    if (columns := as_table(output)) is not None:
        return columns
    if type(output) is dict and output:
        return output.items() if _width(list(output.values())) else [(key, [part]) for key, part in output.items()]
    rows = output if _is_list(output) else [output]
    if isinstance(rows, np.ndarray):
        rows = rows.tolist() if rows.dtype.kind == "V" else rows
    if width := rows.shape[1] if isinstance(rows, np.ndarray) and rows.ndim > 1 else _width(rows):
        by_column = rows.swapaxes(0, 1) if isinstance(rows, np.ndarray) else zip(*rows, strict=True)
        return zip([f"{name}_{index}" for index in range(width)], by_column, strict=True)
    return [(name, rows)]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, *_VECTORS)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _width(rows: Any) -> int:
    """How long each of `rows` is, if all are lists of one length, else 0."""
    lengths = {len(row) if _is_list(row) else 0 for row in rows}
    return lengths.pop() if len(lengths) == 1 else 0


def _cells(column: Any) -> Any:
    values = column if isinstance(column, (list, tuple)) else plain(column)
    kinds = set(map(type, values))
    if kinds <= {str, int, type(None)}:
        return values
    if kinds <= {float, type(None)}:
        return [value if value is not None and math.isfinite(value) else None for value in values]
    forms = map(plain, values)
    return [form if type(form) is int else text_of(form) for form in forms]
