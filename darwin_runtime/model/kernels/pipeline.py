"""Kernels of scikit-learn's pipelines: their steps, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from darwin_runtime.model.kernels.arrays import ArrayMethod


def chained(method: str) -> Callable[[Any], ArrayMethod | None]:
    def kernel(pipeline: Any) -> ArrayMethod | None:
        *steps, last = (step for _, step in pipeline.steps)
        final = getattr(last, method, None)
        transforms = [step.transform for step in steps if step not in (None, "passthrough")]

        def call(matrix: Any) -> Any:
            for transform in transforms:
                matrix = transform(matrix)
            assert final
            return final(matrix)

        return final and call

    return kernel
