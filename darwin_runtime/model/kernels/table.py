"""The table of kernels: which method of which library each of them replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from darwin_runtime.model.kernels import boosting, forest, linear, pipeline, scaling
from darwin_runtime.model.kernels.arrays import ArrayMethod

# A kernel gets a native copy and returns the replacement of a method, or None. The replacement has the same arithmetic
# without the checks of types, shapes and names, which cost ten to fifty times as much. It raises where the method does.
Kernel = Callable[[Any], ArrayMethod | None]

# By the place of the method in its library.
KERNELS: dict[str, Kernel] = {
    "sklearn.linear_model._base.LinearClassifierMixin.decision_function": linear.linear_scores,
    "sklearn.linear_model._base.LinearClassifierMixin.predict": linear.linear_labels,
    "sklearn.linear_model._base.LinearModel.predict": linear.linear_sum,
    "sklearn.preprocessing._data.StandardScaler.transform": scaling.standard_scaler,
    "sklearn.ensemble._forest.ForestClassifier.predict_proba": forest.forest_probabilities,
    "sklearn.ensemble._forest.ForestRegressor.predict": forest.forest_mean,
    "sklearn.pipeline.Pipeline.predict": pipeline.chained("predict"),
    "sklearn.pipeline.Pipeline.predict_proba": pipeline.chained("predict_proba"),
    "lightgbm.sklearn.LGBMModel.predict": boosting.boosted,
    "lightgbm.sklearn.LGBMClassifier.predict": boosting.boosted_labels,
}

# Kernels that add up trees in order; the methods that they replace may do so in threads.
FORESTS = (forest.forest_probabilities, forest.forest_mean)
