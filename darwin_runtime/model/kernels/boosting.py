"""Kernels of LightGBM's estimators: their booster, called as their wrapper for scikit-learn calls it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from darwin_runtime.model.kernels.arrays import ArrayMethod, to_floats
from darwin_runtime.schema.rows import Array


class _OptionsSeen(Exception):
    """Carries the options with which LightGBM's wrapper for scikit-learn asks its booster."""

    def predict(self, _: Any, **options: Any) -> Any:
        self.options = options
        raise self


def boosted(model: Any) -> ArrayMethod:
    booster, asked = model.booster_, _OptionsSeen()
    model._Booster = asked
    try:
        model.predict(pd.DataFrame(np.zeros((1, booster.num_feature()))))
    except _OptionsSeen:
        pass
    finally:
        model._Booster = booster
    return lambda matrix: booster.predict(to_floats(matrix), **asked.options)


def boosted_labels(model: Any) -> ArrayMethod:
    scores, classes, binary = boosted(model), model.classes_, model.n_classes_ <= 2

    def predict(matrix: Array) -> Any:
        found = scores(matrix)
        if binary:
            found = np.vstack((1.0 - found, found)).T
        return classes.take(found.argmax(axis=1))

    return predict
