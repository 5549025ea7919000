"""A signature in the JSON form that `MLmodel` stores, and its description for a reader.

MLflow documents the form at https://mlflow.org/docs/latest/ml/model/signatures/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Spec = Mapping[str, Any]

JSON_SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def describe(specs: Sequence[Spec]) -> list[dict[str, Any]]:
    """A signature's inputs or outputs for a reader: `[{"name", "type", "required", …}, …]`."""
    described = []
    for index, spec in enumerate(specs):
        name = spec.get("name")
        if spec["type"] == "tensor":
            tensor = spec["tensor-spec"]
            rest: Spec = {"type": "tensor", "dtype": tensor["dtype"], "shape": list(tensor["shape"])}
            name = "" if name is None else name
        else:
            rest = {key: value for key, value in spec.items() if key != "name"}
        described.append({"name": str(index if name is None else name), "required": True, **rest})
    return described
