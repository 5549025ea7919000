"""Tables in every wire shape, and requests that are none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from darwin_runtime.errors import InputError
from darwin_runtime.schema import tabular
from darwin_runtime.schema.model_spec import compile_schema
from tests.support.schemas import AB, ARRAY, NUMBER_DTYPES, columns_by_name, schema_of

SAME_ROWS = [
    ("records", ([{"b": 0.5, "a": 1, "extra": {}}, {"b": 1.5, "a": 2}],)),
    ("split", (["b", "x", "a"], [[0.5, None, 1], [1.5, "", 2]])),
    ("split", (None, [[1, 0.5], [2, 1.5]])),
    ("instances", ([{"a": 1, "b": 0.5}, {"a": 2, "b": 1.5}],)),
    ("instances", ([[1, 0.5], [2, 1.5]],)),
    ("instances", ({"a": [1, 2], "b": [0.5, 1.5], "x": ["other length"]},)),
    ("features", ([{"a": 1, "b": 0.5}, {"a": 2, "b": 1.5}],)),
    ("csv", (b"b,x,a\n0.5,,1\n1.5,,2.0\n",)),
    ("csv", (b'\n"b","x",a\r\n5e-1,"several\nlines",+1\r\n\r\n 1.5 ,,2\r\n',)),
]


@pytest.mark.parametrize(("shape", "arguments"), SAME_ROWS)
def test_every_shape_makes_the_same_table(shape: str, arguments: tuple[Any, ...]) -> None:
    table = getattr(compile_schema(AB), shape)(*arguments).for_model()
    pd.testing.assert_frame_equal(table, pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5]}))


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [("split", (["b", "x", "a"], [])), ("instances", ({"a": [], "b": []},)), ("csv", (b"a,b\n",))],
)
def test_no_rows_have_the_types_of_the_signature(shape: str, arguments: tuple[Any, ...]) -> None:
    rows = getattr(compile_schema(AB), shape)(*arguments)
    expected = pd.DataFrame({"a": pd.Series(dtype="int64"), "b": pd.Series(dtype="float64")})
    pd.testing.assert_frame_equal(rows.for_model(), expected)
    assert (rows.count, rows.unvalidated, rows.batch_key) == (0, True, None)


BAD_SHAPES = [
    ("records", ([],), "at least one"),
    ("records", ({"a": 1},), "list"),
    ("records", ([1, {"a": 1}],), "row 0: expected an object"),
    ("records", ([{}],), "row 0, 'a': missing"),
    ("split", (["b"], []), "'a': missing"),
    ("split", ([], []), "at least one"),
    ("split", (None, []), "at least one"),
    ("split", (["a", "b"], [], [1]), "index: a list of 0 labels"),
    ("split", (["a", "a"], [[1, 2]]), "more than once: a"),
    ("split", ("a", [[1]]), "list of column names"),
    ("split", ([["a"]], [[1]]), "list of column names"),
    ("split", (["a", "b"], [[1, 2], [1], 3]), "row 1: expected 2 values, got array of 1; row 2"),
    ("split", (["b"], [[1]]), "'a': missing"),
    ("split", (None, [[1, 2, 3]]), "2 values"),
    ("instances", ([],), "at least one"),
    ("instances", ([1, 2],), "row 0: expected a list of 2"),
    ("instances", ([[1, 2], {"a": 1}],), "row 1: expected a list of 2"),
    ("instances", ({"a": [1, 2], "b": [1]},), "'b': expected 2 values"),
    ("instances", ({"a": [1], "b": {"x": 2}},), "'b': expected a list"),
    ("split", ([None, "b"], [[1, 2]]), "null or NaN is none"),
    ("split", ([math.nan, "b"], [[1, 2]]), "null or NaN is none"),
    ("split", (["a", "b"], [1, 2]), "row 0: expected a list of 2"),
    ("instances", ({"b": []},), "'a': missing"),
    ("instances", ({"x": []},), "at least one"),
    ("instances", ("text",), "list of rows"),
    ("instances", ({},), "missing"),
    ("features", (None,), "object"),
    ("features", ([],), "at least one"),
    ("features", ([[1, 2]],), "object"),
    ("csv", (b"",), "header"),
    ("csv", (b"b\n",), "'a': missing"),
    ("csv", (b"a,a\n1,2\n",), "more than once"),
    ("csv", (b"a,b\n1\n",), "row 0: expected 2 values"),
    ("csv", (b'a,b\n"1,2\n',), "CSV"),
    ("csv", (b"a,b\n1.5,2\n",), "row 0, 'a'"),
    ("csv", (b"a,b\n,2\n",), "got null"),
    ("csv", (b"a,b\n1,inf\n",), "row 0, 'b'"),
    ("csv", (b"a,b\n1_0,2\n",), "row 0, 'a'"),
    ("csv", (b"a\n" + b"9" * 5000 + b"\n",), "row 0, 'a'"),
    ("csv", (b"a\x00,b\n1\x00,2\n",), "NUL"),
]


@pytest.mark.parametrize(("shape", "arguments", "says"), BAD_SHAPES)
def test_bad_shapes(shape: str, arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        getattr(compile_schema(AB), shape)(*arguments)


def test_models_with_type_hints_take_lists_not_tables() -> None:
    schema = compile_schema([{"type": "string"}], from_type_hint=True)
    assert schema.instances(["a", "b"]).value == ["a", "b"]
    assert schema.features("a").value == ["a"]
    tables: list[tuple[str, tuple[Any, ...]]] = [
        *(("records", ([{"a": 1}],)), ("split", (["a"], [[1]])), ("csv", (b"a\n1\n",)), ("instances", ([],)))
    ]
    for shape, arguments in tables:
        with pytest.raises(InputError):
            getattr(schema, shape)(*arguments)


def test_unnamed_columns_go_by_position() -> None:
    schema = compile_schema([{"type": "long"}, {"type": "string"}])
    for names, rows in (
        ([0, 1], schema.split(None, [[1, "x"]])),
        (["p", "q"], schema.split(["p", "q", "r"], [[1, "x", None]])),
        ([7, 3], schema.split([7, 3], [[1, "x"]])),
        (["p", "q"], schema.records([{"p": 1, "q": "x"}])),
        (["0", "1"], schema.records([{"1": "x", "0": 1}])),
        ([0, 1], schema.instances([[1, "x"]])),
        (["p", "q"], schema.instances({"p": [1], "q": ["x"]})),
        ([0, 1], schema.features([1, "x"])),
        ([0, 1], schema.features([[1, "x"]])),
        (["p", "q"], schema.csv(b"p,q\n1,x\n")),
    ):
        assert {name: values.tolist() for name, values in rows.value.items()} == dict(
            zip(names, [[1], ["x"]], strict=True)
        )
    with pytest.raises(InputError, match="missing"):
        schema.records([{"p": 1}])


def test_columns_named_by_numbers() -> None:
    schema = compile_schema([{"type": "long", "name": 0}, {"type": "double", "name": 1}])
    assert list(schema.split([1, 0], [[0.5, 3]]).for_model().columns) == [0, 1]
    assert schema.records([{"1": 0.5, "0": 3}]).value[0].tolist() == [3]


def test_one_column_takes_bare_values() -> None:
    assert schema_of("string").instances(["a", "b"]).value["c"].tolist() == ["a", "b"]
    assert schema_of("string").instances("a").value["c"].tolist() == ["a"]
    assert schema_of(ARRAY).instances([1, 2]).value["c"].tolist() == [[1.0, 2.0]]
    assert schema_of(ARRAY).instances([[1], [2]]).value["c"].tolist() == [[1.0], [2.0]]
    assert schema_of(ARRAY).instances({"c": [1, 2]}).value["c"].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("kind", ["long", "double"])
def test_the_client_s_names_of_a_matrix_without_names(kind: str) -> None:
    schema = compile_schema([{"type": kind}, {"type": kind}])
    called = [schema.records([{"w": 1, "h": 2}]), schema.split(["w", "h"], [[1, 2]]), schema.csv(b"w,h\n1,2\n")]
    for rows in called:
        expected = pd.DataFrame({"w": [1], "h": [2]}, dtype=NUMBER_DTYPES[kind])
        pd.testing.assert_frame_equal(rows.for_model(), expected, check_column_type=True)
    assert len({rows.batch_key for rows in called}) == 1
    assert called[0].batch_key != schema.split(None, [[1, 2]]).batch_key


def test_a_single_value_stands_for_each_row() -> None:
    schema = compile_schema([{"type": "double", "name": "a"}, {"type": "string", "name": "b"}])
    rows = schema.instances({"a": [1, None], "b": "x"})
    assert rows.for_model()["b"].tolist() == ["x", "x"]
    assert np.isnan(schema.instances({"a": None, "b": ["x", "y"]}).value["a"]).all()
    with pytest.raises(InputError, match="'b': expected string, got integer 1"):
        schema.instances({"a": [1, 2], "b": 1})
    with pytest.raises(InputError, match=r"'b': expected a list.*for 1000001 rows"):
        schema.instances({"a": [1] * 1_000_001, "b": "x"})


def test_the_values_of_a_single_column_need_no_lists() -> None:
    assert columns_by_name(schema_of("double").split(["c"], [1, 2.5]))["c"].tolist() == [1, 2.5]
    assert columns_by_name(schema_of("string").split(None, ["a", None]))["c"].tolist() == ["a", None]
    with pytest.raises(InputError, match="row 1: expected a list of 1"):
        schema_of("double").split(["c"], [[1], 2])


def test_many_names_of_which_one_comes_twice() -> None:
    names = [f"n{index}" for index in range(20_000)]
    with pytest.raises(InputError, match="more than once: n7"):
        schema_of("double").split([*names, "n7"], [[0] * 20_001])


@pytest.mark.parametrize("specs", [[{"type": "double", "name": "c"}], None])
def test_a_table_s_index_reaches_the_model(specs: Any) -> None:
    rows = compile_schema(specs).split(["c"], [[1], [2]], ["x", "y"])
    assert rows.for_model().index.tolist() == ["x", "y"]


@pytest.mark.parametrize("index", [3, [1], [1, 2, 3], [[1], [2]]])
@pytest.mark.parametrize("specs", [[{"type": "double", "name": "c"}], None])
def test_a_bad_index(specs: Any, index: Any) -> None:
    with pytest.raises(InputError, match="2 labels"):
        compile_schema(specs).split(["c"], [[1], [2]], index)


XY: list[tuple[str, tuple[Any, ...]]] = [
    ("records", ([{"y": 2, "x": 1, "z": "z"}, {"x": 3, "y": 4}],)),
    ("split", (["x", "y"], [[1, 2], [3, 4]])),
    ("split", (["y", "z", "x"], [[2, None, 1], [4, "", 3]])),
    ("split", (None, [[1, 2], [3, 4]])),
    ("instances", ([[1, 2], [3, 4]],)),
    ("instances", ({"y": [2, 4], "x": [1, 3], "z": []},)),
    ("features", ([{"x": 1, "y": 2}, {"x": 3, "y": 4}],)),
    ("csv", (b"x,y\n1,2\n3,4\n",)),
    ("csv", (b"y,z,x\r\n2,0,1\r\n4, 0 ,3",)),
]


@pytest.mark.parametrize("kind", NUMBER_DTYPES)
@pytest.mark.parametrize(("shape", "arguments"), XY)
def test_columns_of_one_type_make_a_matrix_in_one_go(
    shape: str, arguments: tuple[Any, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = compile_schema([{"type": kind, "name": "x"}, {"type": kind, "name": "y", "required": False}])
    monkeypatch.setattr(tabular, "parse_column", None)
    monkeypatch.setattr(tabular, "read_csv_texts", None)
    rows = getattr(schema, shape)(*arguments)
    assert rows.value.flags.c_contiguous
    assert rows.first() == {"x": 1, "y": 2}
    as_columns = pd.DataFrame({"x": [1, 3], "y": [2, 4]}, dtype=NUMBER_DTYPES[kind])
    pd.testing.assert_frame_equal(rows.for_model(), as_columns, check_column_type=True)


@pytest.mark.parametrize("names", [[0, 1], [1, 0], [0, "b"], ["a", "0"], [None, None]])
def test_the_columns_of_a_matrix_are_called_as_those_of_a_table(names: list[Any]) -> None:
    specs = [{"type": "long"} if name is None else {"type": "long", "name": name} for name in names]
    expected = pd.DataFrame({index if name is None else name: [1] for index, name in enumerate(names)})
    found = compile_schema(specs).split(None, [[1, 1]]).for_model()
    pd.testing.assert_frame_equal(found, expected, check_column_type=True)


def test_a_name_given_twice_is_refused_even_if_the_signature_has_it_twice() -> None:
    schema = compile_schema([{"type": "long", "name": 0}, {"type": "long", "name": "0"}])
    with pytest.raises(InputError, match="more than once"):
        schema.split(["0", "0"], [[1, 1]])
