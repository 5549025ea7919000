"""Values for the type hints of a Python model, which MLflow itself checks."""

from __future__ import annotations

from typing import Any

from darwin_runtime.schema.signature import Spec

# Up to here, every integer is a float.
MAX_EXACT = 2**53


def with_floats(spec: Spec, value: Any) -> Any:
    """`value` with a float for each integer where `spec` has one: JSON knows only numbers, MLflow tells them apart."""
    kind = spec["type"]
    if kind == "double" and type(value) is int and abs(value) <= MAX_EXACT:
        return float(value)
    if kind == "array" and type(value) is list:
        return [with_floats(spec["items"], part) for part in value]
    if kind == "map" and type(value) is dict:
        return {key: with_floats(spec["values"], part) for key, part in value.items()}
    if kind == "object" and type(value) is dict:
        known = spec["properties"]
        return {key: with_floats(known[key], part) if key in known else part for key, part in value.items()}
    return value
