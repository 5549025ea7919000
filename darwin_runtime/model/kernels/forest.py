"""Kernels of scikit-learn's forests: the mean of their trees, one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from darwin_runtime.model.kernels.arrays import ArrayMethod, require_finite, to_float32
from darwin_runtime.schema.rows import Array


def _trees(forest: Any, classes: int) -> ArrayMethod | None:
    """The mean of what the trees hold, without joblib, which costs some fifty times what the trees do."""
    if forest.n_outputs_ > 1:
        return None
    trees = [tree.tree_ for tree in forest.estimators_]
    takes_nan = forest.estimators_[0]._support_missing_values(np.empty((0, 0)))

    def mean(matrix: Array) -> Any:
        if matrix.shape[1] != forest.n_features_in_:
            raise ValueError("trees would read beyond the row's end")
        matrix = to_float32(matrix)
        require_finite(matrix, nan=takes_nan)
        total = np.zeros((len(matrix), classes))
        for tree in trees:
            total += tree.predict(matrix)
        total /= len(trees)
        return total

    return mean


def forest_probabilities(forest: Any) -> ArrayMethod | None:
    return _trees(forest, forest.n_classes_)


def forest_mean(forest: Any) -> ArrayMethod | None:
    mean = _trees(forest, 1)

    def predict(matrix: Array) -> Any:
        assert mean
        return mean(matrix)[:, 0]

    return mean and predict
