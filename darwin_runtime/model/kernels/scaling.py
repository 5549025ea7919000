"""Kernel of scikit-learn's scaler: one subtraction and one division."""

from __future__ import annotations

from typing import Any

import numpy as np

from darwin_runtime.model.kernels.arrays import ArrayMethod, require_finite
from darwin_runtime.schema.rows import Array


def standard_scaler(scaler: Any) -> ArrayMethod:
    def transform(matrix: Array) -> Any:
        matrix = np.array(matrix, dtype=matrix.dtype if matrix.dtype.kind == "f" else np.float64)
        require_finite(matrix, nan=True)
        if scaler.with_mean:
            matrix -= scaler.mean_.astype(matrix.dtype, copy=False)
        if scaler.with_std:
            matrix /= scaler.scale_.astype(matrix.dtype, copy=False)
        return matrix

    return transform
