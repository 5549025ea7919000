"""A request's parameters."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from darwin_runtime.errors import ParamsError
from darwin_runtime.schema.params import ParamSchema

DECLARED: list[dict[str, Any]] = [
    {"name": "factor", "type": "double", "default": 1.0, "shape": None},
    {"name": "count", "type": "long", "default": 1, "shape": None},
    {"name": "since", "type": "datetime", "default": "2024-01-01", "shape": None},
    {"name": "list", "type": "integer", "default": [1], "shape": [-1]},
    {"name": "object", "default": {"a": 1}, "shape": None, "type": "object", "properties": {"a": {"type": "long"}}},
]


def test_params() -> None:
    schema = ParamSchema(DECLARED)
    given = {"factor": 2, "count": 3.0, "since": "2024-01-31T12:00:00Z", "list": [1, 2], "object": {"a": 1}, "x": 1}
    parsed = schema.parse(given)
    assert parsed == {
        "factor": 2.0,
        "count": 3,
        "since": pd.Timestamp("2024-01-31T12:00:00").to_pydatetime(),
        "list": [1, 2],
        "object": {"a": 1},
    }
    assert [type(parsed[name]) for name in ("factor", "count")] == [float, int]
    assert schema.parse(None) == schema.parse({}) == ParamSchema(None).parse(["anything"]) == {}


def test_every_bad_param_is_reported() -> None:
    given = {"factor": "x", "count": 1.5, "since": 3, "list": [1, "y"], "object": {"a": True}}
    with pytest.raises(ParamsError) as caught:
        ParamSchema(DECLARED).parse(given)
    assert [problem.field for problem in caught.value.problems] == [
        *("params.factor", "params.count", "params.since", "params.list[1]", "params.object.a")
    ]
    with pytest.raises(ParamsError, match="object"):
        ParamSchema(DECLARED).parse([1])
    with pytest.raises(ParamsError, match="list"):
        ParamSchema(DECLARED).parse({"list": 1})
