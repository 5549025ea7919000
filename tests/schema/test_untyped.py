"""Requests to a model without a signature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from darwin_runtime.errors import InputError
from darwin_runtime.schema.model_spec import compile_schema
from darwin_runtime.schema.untyped import UncheckedSchema


def test_without_a_signature_there_is_nothing_to_check() -> None:
    schema = compile_schema(None)
    assert schema.records([{"a": 1}]).for_model().to_dict("list") == {"a": [1]}
    assert schema.split(["a", "b"], [[1, "x"]]).for_model().to_dict("list") == {"a": [1], "b": ["x"]}
    assert schema.instances([[1, 2]]).value.tolist() == [[1, 2]]
    assert schema.instances({"a": [1, 2]}).value["a"].tolist() == [1, 2]
    assert schema.instances([{"a": 1}, {"a": 2}]).value["a"].tolist() == [1, 2]
    assert schema.csv(b"a,b\n1,x\n").for_model().to_dict("list") == {"a": [1], "b": ["x"]}
    assert schema.features({"a": 1}).for_model().to_dict("list") == {"a": [1]}


def test_inputs_stay_a_list_of_objects_where_instances_become_columns() -> None:
    schema = UncheckedSchema()
    rows = schema.inputs_as_sent([{"a": 1, "b": [1, 2]}, {"a": "x"}])
    assert (rows.count, [{key: part.tolist() for key, part in row.items()} for row in rows.value]) == (
        2,
        [{"a": 1, "b": [1, 2]}, {"a": "x"}],
    )
    assert schema.inputs_as_sent({"a": [1, 2], "b": 3}).value["b"].tolist() == 3
    assert schema.inputs_as_sent([1, math.nan]).value.dtype == np.float64


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [("records", ([],)), ("split", (["a"], [])), ("instances", ([],)), ("csv", (b"a\n",)), ("features", ([],))],
)
def test_no_rows_are_the_models_own_business(shape: str, arguments: tuple[Any, ...]) -> None:
    rows = getattr(compile_schema(None), shape)(*arguments)
    assert (rows.count, len(rows.value), rows.unvalidated, rows.batch_key) == (0, 0, True, None)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ("records", ("x",)),
        ("split", (["a"], [[1, 2]])),
        ("split", ("a", [[1]])),
        ("split", ([None, None], [])),
        ("split", (["a", math.nan], [[1, 2]])),
        ("instances", ([[1], [2, 3]],)),
        ("instances", ({},)),
        ("instances", ({"a": 1},)),
        ("instances", ({"a": [1], "b": [1, 2]},)),
        ("instances", ([{"a": 1}, {"b": 1}, {"b": 2}],)),
        ("instances", ([{"a": 1}, 2],)),
        ("inputs_as_sent", ({},)),
        ("csv", (b"",)),
    ],
)
def test_without_a_signature_some_input_is_still_none(shape: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError):
        getattr(compile_schema(None), shape)(*arguments)


def test_a_small_request_does_not_become_a_huge_table() -> None:
    with pytest.raises(InputError, match="same keys"):
        compile_schema(None).records([{f"k{row}": row} for row in range(5000)])
    assert compile_schema(None).records([{"a": 1}, {"b": 2}]).count == 2
