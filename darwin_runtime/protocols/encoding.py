"""A model's answer as JSON or CSV, whatever it is made of: numpy, pandas, dates, bytes, dataclasses."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import pandas as pd

from darwin_runtime.errors import EncodingError

_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATETIME


def dump(value: Any) -> bytes:
    """`value` as JSON: NaN and infinities as null, digits as Python writes them. Raises `EncodingError`."""
    try:
        return orjson.dumps(value, default=plain, option=_OPTIONS)
    except TypeError:
        # Integers of more than 64 bits, lone surrogates, deep nesting: rare, but other servers write them.
        pass
    try:
        return json.dumps(_finite(value), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodingError(f"the model's output cannot be written as JSON: {error}") from error


def dump_csv(output: Any, name: str) -> bytes:
    """A header and a line for each row; `name` is that of a column that has none. Raises `EncodingError`."""
    try:
        table = _table(output, name)
        dump([table[column].tolist() for column in table if table[column].dtype == object])  # refuses what JSON does
        text = table.replace([np.inf, -np.inf], np.nan).to_csv(index=False)
    except (TypeError, ValueError) as error:
        raise EncodingError(f"the model's output is no table that could be written as CSV: {error}") from error
    return str(text).encode()


def _table(output: Any, name: str) -> Any:
    if isinstance(output, pd.DataFrame):
        return output
    if isinstance(output, pd.Series):
        return pd.DataFrame({name if output.name is None else output.name: output})
    if isinstance(output, dict) or (isinstance(output, list) and output and isinstance(output[0], dict)):
        return pd.DataFrame(output)
    cells = np.atleast_1d(np.asarray(plain(output)))
    if cells.ndim == 1:
        return pd.DataFrame({name: cells})
    return pd.DataFrame(cells, columns=[f"{name}_{index}" for index in range(cells.shape[1])])


def plain(value: Any) -> Any:
    """A value of numpy, pandas, datetime, pydantic or bytes, as lists, dicts and scalars that JSON has."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "mM":
            return [plain(part) for part in value] if value.ndim else plain(value[()])
        return value.tolist()
    if isinstance(value, pd.DataFrame):
        return value.to_dict(orient="records")
    if isinstance(value, (pd.Series, pd.Index, pd.api.extensions.ExtensionArray)):
        return list(value)
    if value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else str(np.datetime_as_string(value))
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (pd.Timedelta, datetime.timedelta)):
        return pd.Timedelta(value).isoformat()
    if isinstance(value, np.timedelta64):
        return None if np.isnat(value) else pd.Timedelta(value).isoformat()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if hasattr(value, "toarray"):
        return value.toarray().tolist()
    if isinstance(value, (bool, int, float, str, list, tuple, dict, type(None))):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else dump(key).decode(): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, (str, int, type(None))):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _finite(dataclasses.asdict(value))
    return _finite(plain(value))
