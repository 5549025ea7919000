"""Values for type hints."""

from __future__ import annotations

from typing import Any

import pytest

from darwin_runtime.schema.hints import with_floats
from darwin_runtime.schema.model_spec import compile_schema

DOUBLE = {"type": "double"}
ITEM = {"type": "object", "properties": {"price": DOUBLE, "n": {"type": "long"}}}


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        (DOUBLE, 1, 1.0),
        (DOUBLE, -(2**53), -(2.0**53)),
        (DOUBLE, 2**53 + 1, 2**53 + 1),
        (DOUBLE, True, True),
        (DOUBLE, "1", "1"),
        ({"type": "long"}, 1, 1),
        ({"type": "any"}, 1, 1),
        ({"type": "array", "items": DOUBLE}, [1, 2.5, None], [1.0, 2.5, None]),
        ({"type": "map", "values": {"type": "array", "items": DOUBLE}}, {"a": [1]}, {"a": [1.0]}),
        (ITEM, {"price": 1, "n": 1, "other": 1}, {"price": 1.0, "n": 1, "other": 1}),
        (ITEM, [1], [1]),
    ],
)
def test_an_integer_for_a_float(spec: dict[str, Any], value: Any, expected: Any) -> None:
    found = compile_schema([spec], from_type_hint=True).instances([value]).value
    assert repr(found) == repr([expected])
    assert repr(with_floats(spec, value)) == repr(expected)
