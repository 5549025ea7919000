"""Answers of a model, compared: bit for bit, or row by row with those to the same rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


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


def splits_into(output: Any, parts: Sequence[Any]) -> bool:
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
