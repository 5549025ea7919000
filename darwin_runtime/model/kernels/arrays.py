"""Arrays as the kernels take them: their checks and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from darwin_runtime.schema.rows import Array

# A method of an estimator, on an array.
ArrayMethod = Callable[..., Any]


def require_finite(matrix: Array, *, nan: bool = False) -> None:
    if np.isinf(matrix).any() if nan else not np.isfinite(matrix).all():
        raise ValueError("not finite")


def to_float32(matrix: Array) -> Array:
    with np.errstate(over="ignore"):
        return matrix.astype(np.float32)


def to_floats(matrix: Array) -> Array:
    """As LightGBM makes of a table; of an array of integers it would make one of 32 bits."""
    return matrix.astype(np.result_type(matrix.dtype, np.float32), copy=False)
