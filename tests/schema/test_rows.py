"""Rows as a matrix, and rows in one batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from darwin_runtime.schema.model_spec import compile_schema
from darwin_runtime.schema.rows import concat
from tests.support.schemas import AB, ARRAY, NUMBER_DTYPES, tensor_spec


def test_rows_of_numbers_are_a_matrix() -> None:
    def matrix(*kinds: str, required: bool = True, row: dict[str, Any]) -> Any:
        specs = [{"type": kind, "name": f"c{index}", "required": required} for index, kind in enumerate(kinds)]
        return compile_schema(specs).records([row, row]).matrix()

    assert matrix("long", "long", row={"c1": 2, "c0": 1}).tolist() == [[1, 2], [1, 2]]
    mixed = matrix("integer", "float", "long", row={"c0": 1, "c1": None, "c2": 2**60})
    np.testing.assert_array_equal(mixed, [[1, math.nan, 2**60]] * 2)
    assert (mixed.dtype, mixed.flags.c_contiguous) == (np.float64, True)
    assert matrix("integer", "long", row={"c0": 1, "c1": 2}).dtype == np.int64
    assert matrix("double", "double", required=False, row={"c0": 1}) is None
    assert matrix("double", "long", required=False, row={"c0": 1, "c1": None}) is None
    for kind, value in (("boolean", True), ("string", "x"), ("datetime", "2024-01-01")):
        assert matrix("double", kind, row={"c0": 1, "c1": value}) is None


@pytest.mark.parametrize("kinds", [*itertools.product(NUMBER_DTYPES, repeat=2)])
def test_the_matrix_of_columns_is_pandas_own(kinds: tuple[str, str]) -> None:
    specs = [{"type": kind, "name": name} for name, kind in zip("ab", kinds, strict=True)]
    rows = compile_schema(specs).instances([[1, 2], [3, 4]])
    array: Any = rows.matrix()
    expected = rows.for_model().to_numpy()
    assert (array.dtype, array.tolist()) == (expected.dtype, expected.tolist())


def test_a_tensor_of_numbers_is_a_matrix_if_it_has_two_axes() -> None:
    array: Any = compile_schema([tensor_spec("uint8", -1, 2)]).instances([[1, 2]]).matrix()
    assert (array.dtype, array.tolist()) == (np.uint8, [[1, 2]])
    for spec, value in (
        (tensor_spec("float64", -1), [1]),
        (tensor_spec("float64", -1, 1, 1), [[[1]]]),
        (tensor_spec("bool", -1, 1), [[True]]),
        (tensor_spec("str", -1, 1), [["a"]]),
        (tensor_spec("float64", -1, 1, name="x"), [[1]]),
    ):
        assert compile_schema([spec]).instances(value).matrix() is None
    assert compile_schema(None).records([{"a": 1}]).matrix() is None
    assert compile_schema([{"type": "long"}], from_type_hint=True).instances([1]).matrix() is None


FLAG: dict[str, Any] = {"type": "boolean", "name": "f", "required": False}
TEXT: dict[str, Any] = {"type": "string", "name": "t"}
ALIKE = [
    ([{"type": "double", "name": "a"}], [{"a": 1}], [{"a": None}, {"a": 0.5}], {"a": 2}),
    ([*AB], [{"a": 1, "b": 0.5}], [{"a": 2.0, "b": None}]),
    ([*AB], [{"a": 1}], [{"a": 2}, {"a": 3}]),
    ([FLAG, TEXT], [{"f": True, "t": "x"}], [{"f": False, "t": None}, {"f": False, "t": "y"}]),
    ([FLAG, TEXT], [{"f": None, "t": None}, {"f": True, "t": None}], [{"f": None, "t": None}, {"f": False, "t": None}]),
    ([{**ARRAY, "name": "a"}], [{"a": [1]}], [{"a": [2, 3]}, {"a": []}]),
    ([{"type": "any", "name": "a"}], [{"a": "x"}, {"a": 1}], [{"a": None}]),
    ([tensor_spec("float32", -1, 2)], [[1, 2]], [[3, 4], [5, 6]]),
    ([tensor_spec("str", -1)], ["ab"], ["c", "de"]),
    (
        [tensor_spec("int8", -1, 1, name="x"), tensor_spec("bool", -1, name="y")],
        {"x": [[1]], "y": [True]},
        {"x": [1], "y": True},
    ),
]


@pytest.mark.parametrize(("specs", "parts"), [(specs, parts) for specs, *parts in ALIKE])
def test_rows_alike_go_together_and_no_row_sees_it(specs: list[dict[str, Any]], parts: list[Any]) -> None:
    schema = compile_schema(specs)
    rows = [schema.features(part) for part in parts]
    assert len({part.batch_key for part in rows}) == 1
    assert None not in {part.batch_key for part in rows}
    batch = concat(rows)
    assert (batch.count, batch.batch_key, batch.unvalidated) == (
        sum(part.count for part in rows),
        rows[0].batch_key,
        any(part.unvalidated for part in rows),
    )
    start = 0
    for part in rows:
        alone, joined = part.for_model(), batch.for_model()
        for name in alone if isinstance(alone, (dict, pd.DataFrame)) else [slice(None)]:
            assert joined[name].dtype == alone[name].dtype
            np.testing.assert_equal(
                np.asarray(joined[name])[start : start + part.count].tolist(), np.asarray(alone[name]).tolist()
            )
        start += part.count


UNLIKE: list[tuple[list[dict[str, Any]], Any, Any]] = [
    ([*AB], [{"a": 1, "b": 0.5}], [{"a": 1}]),
    ([{**AB[1], "name": "a"}, AB[1]], [{"a": 1, "b": 0.5}], [{"a": 1}]),
    ([FLAG, TEXT], [{"f": True, "t": "x"}], [{"f": True, "t": "x"}, {"f": None, "t": "x"}]),
    ([FLAG, TEXT], [{"f": True, "t": "x"}], [{"t": "x"}]),
    ([FLAG, TEXT], [{"f": True, "t": "x"}], [{"f": True, "t": None}]),
    ([{"type": "any", "name": "a"}], [{"a": "x"}], [{"a": "x"}, {"a": 1}]),
    ([tensor_spec("str", -1)], ["ab"], ["abc"]),
    ([tensor_spec("bytes", -1)], ["a"], ["ä"]),
    ([tensor_spec("float32", -1, -1)], [[1, 2]], [[1, 2, 3]]),
]


@pytest.mark.parametrize(("specs", "one", "other"), UNLIKE)
def test_rows_unlike_have_different_batch_keys(specs: list[dict[str, Any]], one: Any, other: Any) -> None:
    schema = compile_schema(specs)
    kinds = [schema.features(rows).batch_key for rows in (one, other)]
    assert kinds[0] != kinds[1]
    assert None not in kinds


def test_other_signatures_make_other_batch_keys() -> None:
    specs = [{"type": kind, "name": name} for kind in ("long", "double") for name in "ab"]
    assert len({compile_schema([spec]).instances([1]).batch_key for spec in specs}) == 4


def test_some_rows_stay_alone() -> None:
    ab = compile_schema([{"type": "double", "name": "a"}])
    named = compile_schema([tensor_spec("float32", -1, name="x"), tensor_spec("float32", -1, name="y")])
    alone = [
        ab.split(["a"], [[1]], [7]),
        compile_schema(AB).split(["a"], [[1]], [7]),
        compile_schema(None).records([{"a": 1}]),
        compile_schema(None).instances([[1]]),
        compile_schema([{"type": "long"}], from_type_hint=True).instances([1]),
        compile_schema([tensor_spec("float32", 2)]).instances([1, 2]),
        compile_schema([tensor_spec("float32")]).instances(1),
        compile_schema([tensor_spec("float32", -1, name="x"), tensor_spec("float32", 1, name="y")]).instances(
            {"x": [1], "y": [1]}
        ),
        named.instances({"x": [1, 2], "y": [1]}),
    ]
    assert [rows.batch_key for rows in alone] == [None] * len(alone)
    assert named.instances({"x": [1, 2], "y": [1, 2]}).batch_key is not None
