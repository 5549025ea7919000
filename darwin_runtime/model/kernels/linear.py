"""Kernels of scikit-learn's linear models: one matrix product."""

from __future__ import annotations

from typing import Any

import numpy as np

from darwin_runtime.model.kernels.arrays import ArrayMethod, require_finite
from darwin_runtime.schema.rows import Array


def linear_scores(model: Any) -> ArrayMethod:
    weights, intercept = model.coef_.T, model.intercept_

    def decision_function(matrix: Array) -> Any:
        require_finite(matrix)
        scores = matrix @ weights + intercept
        return scores.reshape(-1) if scores.ndim > 1 and scores.shape[1] == 1 else scores

    return decision_function


def linear_labels(model: Any) -> ArrayMethod:
    decide, classes = model.decision_function, model.classes_

    def predict(matrix: Array) -> Any:
        scores = decide(matrix)
        return classes.take((scores > 0).astype(np.intp) if scores.ndim == 1 else scores.argmax(axis=1), axis=0)

    return predict


def linear_sum(model: Any) -> ArrayMethod:
    weights, intercept = model.coef_.T, model.intercept_

    def predict(matrix: Array) -> Any:
        require_finite(matrix)
        return matrix @ weights + intercept

    return predict
