"""Cells and plans: what a request may hold, cell by cell, and what becomes of it."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pandas as pd
import pytest

from darwin_runtime.errors import InputError, ParamsError
from darwin_runtime.schema import datatypes, tabular
from darwin_runtime.schema.datatypes import MAX_PROBLEMS, floats
from darwin_runtime.schema.tabular import ParamSchema, Rows, compile_schema, concat


def one(kind: Any, *, required: bool = True) -> Any:
    spec = {"type": kind} if isinstance(kind, str) else kind
    return compile_schema([{**spec, "name": "c", "required": required}])


def columns(rows: Rows) -> Any:
    """A table's columns by name, however it keeps them."""
    return rows.value if rows.names is None else dict(zip(rows.names, rows.value.T, strict=True))


def column(kind: Any, *values: Any, required: bool = True) -> Any:
    """The array that a column of `values` becomes."""
    return columns(one(kind, required=required).records([{"c": value} for value in values]))["c"]


ARRAY = {"type": "array", "items": {"type": "double"}}
OBJECT = {
    "type": "object",
    "properties": {"id": {"type": "long", "required": True}, "note": {"type": "string", "required": False}},
}
MAP = {"type": "map", "values": {"type": "integer"}}

ACCEPTED = [
    ("boolean", [True, False], np.array([True, False])),
    ("integer", [1, -(2**31), 2.0], np.array([1, -(2**31), 2], dtype=np.int32)),
    ("long", [2**63 - 1, -(2**63)], np.array([2**63 - 1, -(2**63)])),
    ("long", [3, 4.0], np.array([3, 4])),
    ("float", [1, 0.1, None], np.array([1, 0.1, math.nan], dtype=np.float32)),
    ("float", [3.4028234663852886e38], np.array([np.finfo(np.float32).max])),
    ("float", [3.4028235e38, 2**24, 2**30], np.array([3.4028235e38, 2**24, 2**30], dtype=np.float32)),
    ("double", [1, 0.1, None, 1e308], np.array([1, 0.1, math.nan, 1e308])),
    ("double", [2**53, 2**60, 1.8446744073709552e19], np.array([2**53, 2**60, 2**64], dtype=np.float64)),
    ("string", ["a", "", None], np.array(["a", "", None], dtype=object)),
    ("binary", ["AP8=", "AP\n8=\n", ""], np.array([b"\x00\xff", b"\x00\xff", b""], dtype=object)),
    ("datetime", ["2024-02-29"], np.array(["2024-02-29"], dtype="datetime64[ns]")),
    ("datetime", ["2024-02-29T01:02"], np.array(["2024-02-29T01:02"], dtype="datetime64[ns]")),
    ("datetime", ["2024-02-29 01:02:03.5"], np.array(["2024-02-29T01:02:03.5"], dtype="datetime64[ns]")),
    ("datetime", ["2024-02-29T01:02:03.123456789Z"], np.array(["2024-02-29T01:02:03.123456789"], "datetime64[ns]")),
    ("datetime", ["2024-02-29T01:02:03+05:30"], np.array(["2024-02-28T19:32:03"], dtype="datetime64[ns]")),
    ("datetime", ["2024-02-29T01:02:03-0030"], np.array(["2024-02-29T01:32:03"], dtype="datetime64[ns]")),
    ("datetime", ["1677-09-21T00:12:43.145224193"], np.array([-(2**63) + 1]).view("datetime64[ns]")),
    ("datetime", ["2262-04-11T23:47:16.854775807"], np.array([2**63 - 1]).view("datetime64[ns]")),
    ("datetime", ["1969-12-31T23:59:59.9", None], np.array(["1969-12-31T23:59:59.9", "NaT"], dtype="datetime64[ns]")),
]


@pytest.mark.parametrize(("kind", "values", "expected"), ACCEPTED)
def test_accepted(kind: str, values: list[Any], expected: Any) -> None:
    array = column(kind, *values)
    assert array.dtype == expected.dtype
    assert array.dtype != object or kind in ("string", "binary")
    np.testing.assert_array_equal(array, expected.astype(array.dtype))


REFUSED = [
    ("boolean", [0, 1, "true", 1.0, None, [], {}]),
    ("integer", [2**31, -(2**31) - 1, 1.9, True, "1", None, 1e300]),
    ("long", [2**63, 1.9, True, "1", None, 9.3e18, -9.3e18, [], {}, float(2**53), float(-(2**60))]),
    ("float", [3.5e38, -1e300, True, "1.0", [], 2**24 + 1, -(2**24) - 1]),
    ("double", [2**53 + 1, 2**63 + 1, True, "1.0", {}]),
    ("string", [1, 1.5, True, [], {}]),
    ("binary", ["AP8", "ä", "A===", 1, None]),
    (
        "datetime",
        [
            *("2024-02-30", "2024-1-1", "20240101", "2024-01-01T25:00", "2024-01-01T00:00:00.1234567890", "now", ""),
            *("2024-01-01T00:00:00+24:00", "2024-01-01T00:00+01:60", "2024-01-01Z", " 2024-01-01", "2024-01-01\n"),
            *(
                "٢٠٢٤-01-01",
                "1677-09-21T00:12:43.145224192",
                "2262-04-11T23:47:16.854775808",
                "9999-12-31",
                0,
                1.5,
                True,
            ),
        ],
    ),
]


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in REFUSED for value in values])
def test_refused(kind: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        column(kind, value)
    (problem,) = caught.value.problems
    assert (problem.row, problem.field, problem.error_type, problem.expected) == (0, "c", "type_mismatch", kind)
    assert kind in problem.message


def test_every_bad_cell_is_reported_and_only_those() -> None:
    plan = compile_schema([{"type": "long", "name": "a"}, {"type": "string", "name": "b"}])
    with pytest.raises(InputError) as caught:
        plan.records([{"a": 1.9, "b": "x"}, {"a": 2}, {"a": True, "b": 3}])
    assert [(p.row, p.field, p.error_type, p.actual) for p in caught.value.problems] == [
        (0, "a", "type_mismatch", "number"),
        (2, "a", "type_mismatch", "boolean"),
        (1, "b", "missing", None),
        (2, "b", "type_mismatch", "integer"),
    ]


def test_the_report_is_bounded_but_counts_all() -> None:
    with pytest.raises(InputError, match="and 150 more") as caught:
        column("long", *["x"] * (MAX_PROBLEMS + 150))
    assert (len(caught.value.problems), caught.value.total) == (MAX_PROBLEMS, MAX_PROBLEMS + 150)


def test_a_message_never_repeats_a_long_value() -> None:
    with pytest.raises(InputError) as caught:
        column("long", "x" * 100_000)
    assert len(str(caught.value)) < 200


OPTIONAL = [
    ("boolean", [True, None], [True, None]),
    ("float", [1.5, None], [1.5, math.nan]),
    ("double", [None, None], [math.nan, math.nan]),
    ("string", [None, "x"], [None, "x"]),
    ("binary", [None, "AA=="], [None, b"\x00"]),
    (ARRAY, [None, [1]], [None, [1.0]]),
    (OBJECT, [None], [None]),
]


@pytest.mark.parametrize(("kind", "values", "expected"), OPTIONAL)
def test_null_in_an_optional_column(kind: Any, values: list[Any], expected: list[Any]) -> None:
    np.testing.assert_equal(column(kind, *values, required=False).tolist(), expected)


@pytest.mark.parametrize("kind", ["boolean", "integer", "long"])
def test_an_optional_column_of_nulls_only_is_an_absent_one_where_the_type_has_no_null(kind: str) -> None:
    rows = one(kind, required=False).records([{"c": None}, {}])
    assert (rows.value, rows.count) == ({}, 2)
    assert len(rows.for_model()) == 2


def test_an_optional_column_that_no_row_has_is_absent() -> None:
    plan = compile_schema([{"type": "double", "name": "a"}, {"type": "double", "name": "b", "required": False}])
    assert list(columns(plan.records([{"a": 1}, {"a": 2}]))) == ["a"]
    np.testing.assert_equal(columns(plan.records([{"a": 1}, {"a": 2, "b": 3}]))["b"], [math.nan, 3.0])


@pytest.mark.parametrize("kind", ["integer", "long"])
def test_integers_have_no_null_beside_values(kind: str) -> None:
    with pytest.raises(InputError, match=r"row 1, 'c': expected \w+, got null"):
        column(kind, 1, None, required=False)


NESTED = [
    (ARRAY, [1, 2.5, None], [1.0, 2.5, math.nan]),
    ({"type": "sparkml_vector"}, [1, 2], [1.0, 2.0]),
    ({"type": "array", "items": ARRAY}, [[1], [2, 3], []], [[1.0], [2.0, 3.0], []]),
    (OBJECT, {"id": 2.0}, {"id": 2}),
    (OBJECT, {"id": 1, "note": None}, {"id": 1, "note": None}),
    ({"type": "any"}, {"x": [None, 1]}, {"x": [None, 1]}),
    ({"type": "array", "items": {"type": "any"}}, [None, "x"], [None, "x"]),
]


@pytest.mark.parametrize(("kind", "value", "expected"), NESTED)
def test_nested(kind: Any, value: Any, expected: Any) -> None:
    np.testing.assert_equal(column(kind, value, value)[1], expected)


def test_nested_numbers_keep_their_width() -> None:
    assert column({"type": "array", "items": {"type": "float"}}, [1, 2.5])[0].dtype == np.float32
    assert column(MAP, {"a": 1})[0]["a"].dtype == np.int32


@pytest.mark.parametrize(
    ("kind", "value", "fields"),
    [
        (ARRAY, [1, "x", [2]], ["c[1]", "c[2]"]),
        (ARRAY, "x", ["c"]),
        ({"type": "array", "items": {"type": "array", "items": {"type": "long"}}}, [[1], [2, 3.5]], ["c[1][1]"]),
        ({"type": "array", "items": {"type": "string"}}, ["a", None], ["c[1]"]),
        (OBJECT, {"note": 3, "other": 1}, ["c.id", "c.note", "c.other"]),
        (OBJECT, [], ["c"]),
        (MAP, {"a": 1, "b": 2.5, "c": None}, ["c.b", "c.c"]),
        (MAP, 3, ["c"]),
    ],
)
def test_nested_refusals_name_the_place(kind: Any, value: Any, fields: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        column(kind, value)
    assert [problem.field for problem in caught.value.problems] == fields


AB: list[dict[str, Any]] = [{"type": "long", "name": "a"}, {"type": "double", "name": "b", "required": False}]
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


BAD_SHAPES = [
    ("records", ([],), "at least one"),
    ("records", ({"a": 1},), "list"),
    ("records", ([1, {"a": 1}],), "row 0: expected an object"),
    ("records", ([{}],), "row 0, 'a': missing"),
    ("split", (["a"], []), "at least one"),
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
    ("instances", ({"a": [], "b": []},), "at least one"),
    ("instances", ({"a": [1], "b": 2},), "'b': expected a list"),
    ("instances", ("text",), "list of rows"),
    ("instances", ({},), "missing"),
    ("features", (None,), "object"),
    ("features", ([],), "at least one"),
    ("features", ([[1, 2]],), "object"),
    ("csv", (b"",), "header"),
    ("csv", (b"a,b\n",), "at least one row"),
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


def test_csv_cells_of_each_type() -> None:
    specs: list[dict[str, Any]] = [
        {"type": kind, "name": kind}
        for kind in ("boolean", "integer", "long", "float", "double", "string", "binary", "datetime")
    ]
    text = (
        "boolean,integer,long,float,double,string,binary,datetime\n"
        "True,1,-9223372036854775808,0.5,1e3,01,AA==,2024-01-01\n"
        "false,2,3.0,,nan,,AA==,\n"
    )
    table = compile_schema(specs).csv(text.encode()).for_model()
    assert [str(dtype) for dtype in table.dtypes][:5] == ["bool", "int32", "int64", "float32", "float64"]
    assert table["string"][0] == "01"
    assert table["long"].tolist() == [-(2**63), 3]
    assert table["datetime"].tolist() == [pd.Timestamp("2024-01-01"), pd.NaT]
    assert table.isna().sum().sum() == 4


def test_csv_cells_hold_json_for_nested_types() -> None:
    assert one(ARRAY).csv(b'c,d\n"[1, 2.5]",\n').value["c"].tolist() == [[1.0, 2.5]]
    with pytest.raises(InputError, match="row 0, 'c': expected array of double, got string"):
        one(ARRAY).csv(b"c\n[1\n")


def test_models_with_type_hints_take_lists_not_tables() -> None:
    plan = compile_schema([{"type": "string"}], from_type_hint=True)
    assert plan.instances(["a", "b"]).value == ["a", "b"]
    assert plan.features("a").value == ["a"]
    tables: list[tuple[str, tuple[Any, ...]]] = [
        *(("records", ([{"a": 1}],)), ("split", (["a"], [[1]])), ("csv", (b"a\n1\n",)), ("instances", ([],)))
    ]
    for shape, arguments in tables:
        with pytest.raises(InputError):
            getattr(plan, shape)(*arguments)


def test_unnamed_columns_go_by_position() -> None:
    plan = compile_schema([{"type": "long"}, {"type": "string"}])
    for rows in (
        plan.split(None, [[1, "x"]]),
        plan.split(["p", "q", "r"], [[1, "x", None]]),
        plan.records([{"p": 1, "q": "x"}]),
        plan.records([{"1": "x", "0": 1}]),
        plan.instances([[1, "x"]]),
        plan.features([1, "x"]),
        plan.features([[1, "x"]]),
        plan.csv(b"p,q\n1,x\n"),
    ):
        assert {name: values.tolist() for name, values in rows.value.items()} == {0: [1], 1: ["x"]}
    with pytest.raises(InputError, match="missing"):
        plan.records([{"p": 1}])


def test_columns_named_by_numbers() -> None:
    plan = compile_schema([{"type": "long", "name": 0}, {"type": "double", "name": 1}])
    assert list(plan.split([1, 0], [[0.5, 3]]).for_model().columns) == [0, 1]
    assert plan.records([{"1": 0.5, "0": 3}]).value[0].tolist() == [3]


def test_one_column_takes_bare_values() -> None:
    assert one("string").instances(["a", "b"]).value["c"].tolist() == ["a", "b"]
    assert one("string").instances("a").value["c"].tolist() == ["a"]
    assert one(ARRAY).instances([1, 2]).value["c"].tolist() == [[1.0, 2.0]]
    assert one(ARRAY).instances([[1], [2]]).value["c"].tolist() == [[1.0], [2.0]]
    assert one(ARRAY).instances({"c": [1, 2]}).value["c"].tolist() == [[1.0, 2.0]]


def tensor(dtype: str, *shape: int, name: str | None = None) -> dict[str, Any]:
    spec: dict[str, Any] = {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}
    return spec if name is None else {**spec, "name": name}


TENSORS = [
    ("instances", tensor("float64", -1, 2), [[1, 2.5], [3, None]], [[1, 2.5], [3, math.nan]]),
    ("features", tensor("float64", -1, 2), [1, 2.5], [[1, 2.5]]),
    ("features", tensor("float64", -1, 2), [[1, 2.5]], [[1, 2.5]]),
    ("instances", tensor("int8", -1), [1, -128, 2.0], [1, -128, 2]),
    ("instances", tensor("uint8", -1, -1), [[255], [0]], [[255], [0]]),
    ("instances", tensor("float32", -1, 2, 1), [[[1], [2]]], [[[1], [2]]]),
    ("instances", tensor("bool", 2), [True, False], [True, False]),
    ("instances", tensor("str", -1), ["a", "bc"], ["a", "bc"]),
    ("instances", tensor("bytes", -1), ["ä"], ["ä".encode()]),
    ("instances", tensor("object", -1), ["a", 1], ["a", 1]),
    ("instances", tensor("float64"), 2, 2.0),
    ("records", tensor("float64", -1, 2), [{"x": 1, "y": 2}, {"x": 3, "y": 4}], [[1, 2], [3, 4]]),
    ("records", tensor("float64", -1, 1), [{"x": 1}], [[1]]),
    ("records", tensor("float64", -1, 2, 2), [{"x": [1, 2, 3, 4]}], [[[1, 2], [3, 4]]]),
    ("csv", tensor("int64", -1, 2), b"x,y\n1,2\n3,4\n", [[1, 2], [3, 4]]),
    ("csv", tensor("float32", -1), b"x\n1\n\n2.5\n", [1, 2.5]),
]


@pytest.mark.parametrize(("shape", "spec", "value", "expected"), TENSORS)
def test_tensors(shape: str, spec: dict[str, Any], value: Any, expected: Any) -> None:
    array = getattr(compile_schema([spec]), shape)(value).value
    assert array.dtype.kind == np.dtype(spec["tensor-spec"]["dtype"]).kind
    assert array.dtype.itemsize == np.dtype(spec["tensor-spec"]["dtype"]).itemsize or array.dtype.kind in "SU"
    np.testing.assert_equal(array.tolist(), expected)


BAD_TENSORS = [
    (tensor("int64", -1, 2), [[1, 1.9]], r"row 0, '\[1\]': expected int64, got number 1.9"),
    (tensor("int64", -1, 2), [[1, 2], [3]], "lengths along axis 1: 1, 2"),
    (tensor("int64", -1, 2), [[1, 2, 3]], "axis 1: 3"),
    (tensor("int64", -1, 2), [1, 2], "not a list at depth 2"),
    (tensor("int64", -1, 2), [[[1], [2]]], "got array"),
    (tensor("int64", -1, 2), [], "no rows"),
    (tensor("int64", 2, 2), [[1, 2]], "axis 0: 1"),
    (tensor("uint8", -1), [256, -1], "outside 0 to 255.*outside 0 to 255"),
    (tensor("float32", -1), [1e39], "outside"),
    (tensor("float32", -1), [True, "x", {}], "boolean.*string.*object"),
    (tensor("str", -1), [1], "expected string"),
    (tensor("bool", -1), [None], "got null"),
    (tensor("float64", -1, 2, name="x"), [[1, 2, 3]], "'x'"),
    (tensor("float64", -1, 2, name="x"), {"y": [[1, 2]]}, "'x': missing"),
    (tensor("float64", -1, 2, name="x"), "text", "'x'"),
]


@pytest.mark.parametrize(("spec", "value", "says"), BAD_TENSORS)
def test_bad_tensors(spec: dict[str, Any], value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        compile_schema([spec]).instances(value)


def test_named_tensors_in_every_shape() -> None:
    plan = compile_schema([tensor("float32", -1, 2, 2, name="image"), tensor("int64", -1, 1, name="n")])
    image, n = [[1, 2], [3, 4]], [7]
    for rows in (
        plan.instances([{"image": image, "n": n}]),
        plan.instances({"image": [image], "n": [n], "extra": 1}),
        plan.features({"image": image, "n": n}),
        plan.features({"image": [image], "n": [n]}),
        plan.features([{"image": image, "n": n}]),
        plan.records([{"image": [1, 2, 3, 4], "n": 7}]),
        plan.split(["n", "image"], [[7, image]]),
    ):
        assert rows.count == 1
        assert rows.value["image"].tolist() == [image]
        assert rows.value["n"].tolist() == [n]


def test_without_a_signature_there_is_nothing_to_check() -> None:
    plan = compile_schema(None)
    assert plan.records([{"a": 1}]).for_model().to_dict("list") == {"a": [1]}
    assert plan.split(["a", "b"], [[1, "x"]]).for_model().to_dict("list") == {"a": [1], "b": ["x"]}
    assert plan.instances([[1, 2]]).value.tolist() == [[1, 2]]
    assert plan.instances({"a": [1, 2]}).value["a"].tolist() == [1, 2]
    assert plan.instances([{"a": 1}, {"a": 2}]).value["a"].tolist() == [1, 2]
    assert plan.csv(b"a,b\n1,x\n").for_model().to_dict("list") == {"a": [1], "b": ["x"]}
    assert plan.features({"a": 1}).for_model().to_dict("list") == {"a": [1]}


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ("records", ([],)),
        ("records", ("x",)),
        ("split", (["a"], [[1, 2]])),
        ("split", ("a", [[1]])),
        ("instances", ([[1], [2, 3]],)),
        ("instances", ([],)),
        ("instances", ({},)),
        ("csv", (b"",)),
        ("csv", (b"a\n",)),
        ("features", ([],)),
    ],
)
def test_without_a_signature_some_input_is_still_none(shape: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError):
        getattr(compile_schema(None), shape)(*arguments)


DECLARED: list[dict[str, Any]] = [
    {"name": "factor", "type": "double", "default": 1.0, "shape": None},
    {"name": "count", "type": "long", "default": 1, "shape": None},
    {"name": "since", "type": "datetime", "default": "2024-01-01", "shape": None},
    {"name": "list", "type": "integer", "default": [1], "shape": [-1]},
    {"name": "object", "default": {"a": 1}, "shape": None, "type": "object", "properties": {"a": {"type": "long"}}},
]


def test_params() -> None:
    plan = ParamSchema(DECLARED)
    given = {"factor": 2, "count": 3.0, "since": "2024-01-31T12:00:00Z", "list": [1, 2], "object": {"a": 1}, "x": 1}
    parsed = plan.parse(given)
    assert parsed == {
        "factor": 2.0,
        "count": 3,
        "since": pd.Timestamp("2024-01-31T12:00:00").to_pydatetime(),
        "list": [1, 2],
        "object": {"a": 1},
    }
    assert [type(parsed[name]) for name in ("factor", "count")] == [float, int]
    assert plan.parse(None) == plan.parse({}) == ParamSchema(None).parse(["anything"]) == {}


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


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        *("boolean", "integer", "long", "float", "double", "string", "binary", "datetime"),
        *(ARRAY, OBJECT, MAP, {"type": "any"}, {"type": "sparkml_vector"}),
    ],
)
def test_made_up_samples_are_accepted(kind: Any, required: bool) -> None:
    plan = one(kind, required=required)
    assert plan.features(plan.sample(None)).count == 1


def test_csv_integers_are_exact() -> None:
    rows = one("long").csv(b"c\n9007199254740993.0\n9007199254740993\n-7.\n")
    assert columns(rows)["c"].tolist() == [9007199254740993, 9007199254740993, -7]


def test_csv_digits_are_ascii() -> None:
    with pytest.raises(InputError):
        one("double").csv("c\n\uff11\uff12\n".encode())


def test_csv_cells_may_be_large() -> None:
    text = "x" * 200_000
    assert one("string").csv(f"c\n{text}\n".encode()).value["c"].tolist() == [text]


def test_many_names_of_which_one_comes_twice() -> None:
    names = [f"n{index}" for index in range(20_000)]
    with pytest.raises(InputError, match="more than once: n7"):
        one("double").split([*names, "n7"], [[0] * 20_001])


@pytest.mark.parametrize("specs", [[{"type": "double", "name": "c"}], None])
def test_a_table_s_index_reaches_the_model(specs: Any) -> None:
    rows = compile_schema(specs).split(["c"], [[1], [2]], ["x", "y"])
    assert rows.for_model().index.tolist() == ["x", "y"]


@pytest.mark.parametrize("index", [3, [1], [1, 2, 3], [[1], [2]]])
@pytest.mark.parametrize("specs", [[{"type": "double", "name": "c"}], None])
def test_a_bad_index(specs: Any, index: Any) -> None:
    with pytest.raises(InputError, match="2 labels"):
        compile_schema(specs).split(["c"], [[1], [2]], index)


def test_a_small_request_does_not_become_a_huge_table() -> None:
    with pytest.raises(InputError, match="same keys"):
        compile_schema(None).records([{f"k{row}": row} for row in range(5000)])
    assert compile_schema(None).records([{"a": 1}, {"b": 2}]).count == 2


def test_where_a_bad_cell_is_is_told_in_a_tensor_of_strings() -> None:
    plan = compile_schema([{"type": "tensor", "tensor-spec": {"dtype": "str", "shape": [-1, 2]}}])
    with pytest.raises(InputError) as caught:
        plan.instances([["a", "b"], ["c", 4]])
    assert [(problem.row, problem.field) for problem in caught.value.problems] == [(1, "[1]")]


TYPES = {"double": "float64", "float": "float32", "long": "int64", "integer": "int32"}
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


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("shape", "arguments"), XY)
def test_columns_of_one_type_make_a_matrix_in_one_go(
    shape: str, arguments: tuple[Any, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = compile_schema([{"type": kind, "name": "x"}, {"type": kind, "name": "y", "required": False}])
    monkeypatch.setattr(tabular, "parse_column", None)
    monkeypatch.setattr(tabular, "_read_csv", None)
    rows = getattr(plan, shape)(*arguments)
    assert rows.value.flags.c_contiguous
    assert rows.first() == {"x": 1, "y": 2}
    as_columns = pd.DataFrame({"x": [1, 3], "y": [2, 4]}, dtype=TYPES[kind])
    pd.testing.assert_frame_equal(rows.for_model(), as_columns, check_column_type=True)


@pytest.mark.parametrize("names", [[0, 1], [1, 0], [0, "b"], ["a", "0"], [None, None]])
def test_the_columns_of_a_matrix_are_called_as_those_of_a_table(names: list[Any]) -> None:
    specs = [{"type": "long"} if name is None else {"type": "long", "name": name} for name in names]
    expected = pd.DataFrame({index if name is None else name: [1] for index, name in enumerate(names)})
    found = compile_schema(specs).split(None, [[1, 1]]).for_model()
    pd.testing.assert_frame_equal(found, expected, check_column_type=True)


def outcome(plan: Any, shape: str, arguments: tuple[Any, ...]) -> Any:
    try:
        rows: Rows = getattr(plan, shape)(*arguments)
    except InputError as error:
        return str(error), error.total
    cells = {name: (array.dtype, repr(array.tolist())) for name, array in columns(rows).items()}
    return cells, rows.count, rows.unvalidated, rows.complete, rows.index, rows.batch_key


ODD: list[Any] = [
    *(None, True, "1", [], {}, 2.0, -0.0, 2**24 + 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**64),
    *(9007199254740992.0, 16777217.0, 3.4028235e38, 3.5e38, 1e300),
]
ODD_TEXT = [
    *("1.", "+1", ".5", "007", "-01", "1e5", "1E-3", "-0", "-0.0", "-0e0", "1e400", "-1e-400", "1e", "--1", "2.00"),
    *("nan", "inf", "null", "null,1", "true", "1_0", "1,2", "{}", "[1]", "[1", "1]", "1],[2", '"1"', '"1,2"'),
    *("16777217", "16777217.0", "9007199254740993", "9007199254740993.0", "3.4028235e38", "3.5e38", "1" * 400),
    *("9" * 19, "9" * 20, "9" * 25, str(2**63), str(-(2**63)), str(2**64 - 1), "12345678901234567890123.5e-20"),
    *("", " ", " 1", "2 ", "1 2", "1\n2", "1\r2", "\t3", "1\x0b", "\xa01", "\u0661", "\0"),
]


def some_signature(rng: random.Random) -> list[dict[str, Any]]:
    most = rng.choice([*TYPES])
    kinds = [most if rng.random() < 0.9 else rng.choice([*TYPES, "boolean"]) for _ in range(rng.randrange(1, 4))]
    named = rng.random() < 0.9
    return [
        {"type": kind, "required": rng.random() < 0.7, **({"name": name} if named else {})}
        for name, kind in zip("abc", kinds, strict=False)
    ]


def some_cells(rng: random.Random, specs: list[dict[str, Any]], odd: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Names and rows that mostly fit."""

    def good(kind: str) -> Any:
        if kind == "boolean":
            return rng.random() < 0.5
        return rng.gauss(0, 1) if kind in ("float", "double") and rng.random() < 0.8 else rng.randrange(-99, 99)

    kinds = {str(spec.get("name", index)): spec["type"] for index, spec in enumerate(specs)}
    if rng.random() < 0.2:
        kinds["x"] = "long"
    names = rng.sample([*kinds], len(kinds)) if rng.random() < 0.3 else [*kinds]
    rows = [
        [rng.choice(odd) if rng.random() < 0.06 else good(kinds[name]) for name in names]
        for _ in range(rng.randrange(1, 4))
    ]
    return names, rows


def some_json(rng: random.Random, specs: list[dict[str, Any]]) -> tuple[str, tuple[Any, ...]]:
    names, rows = some_cells(rng, specs, ODD)
    records: list[Any] = [dict(zip(names, row, strict=True)) for row in rows]
    arrays: dict[str, Any] = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    if rng.random() < 0.1:
        odd: Any = rng.choice([[], [1], {}, {"a": 1}, 1, "ab", None])
        rng.choice([rows, records])[0] = arrays[names[0]] = odd
    requests = [
        ("records", (records,)),
        ("split", (names, rows)),
        ("split", (None, rows)),
        ("split", (names, rows, [*range(len(rows))])),
        ("instances", (rows,)),
        ("instances", (arrays,)),
        ("features", (rng.choice([records, records[0], rows, rows[0]]),)),
    ]
    return rng.choice(requests)


def some_csv(rng: random.Random, specs: list[dict[str, Any]]) -> tuple[str, tuple[Any, ...]]:
    names, rows = some_cells(rng, specs, ODD_TEXT)
    if rng.random() < 0.05:
        names[-1] = rng.choice(["a", "", " a", "\0", '"a"', 'a"', "a\r", "é"])
    lines = [",".join(map(str, row)) for row in [names, *rows]]
    if rng.random() < 0.15:
        index = rng.randrange(len(lines))
        line = lines[index]
        lines[index] = rng.choice(["", " ", ",", f"{line},", f"{line},1", f"{line} ", "[1", "1]"])
    end = rng.choice(["\n", "\n", "\n", "\r\n", "\r"])
    before, after = rng.choice(["", "", "", end, " "]), rng.choice([end, end, "", end + end, f"{end} "])
    return "csv", ((before + end.join(lines) + after).encode(),)


@pytest.mark.parametrize("some_request", [some_json, some_csv])
def test_all_at_once_is_as_cell_by_cell(some_request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    accepted = 0
    for _ in range(5000):
        specs = some_signature(rng)
        plan, (shape, arguments) = compile_schema(specs), some_request(rng, specs)
        with monkeypatch.context() as patch:
            patch.setattr(datatypes, "_MANY", 1)
            found = outcome(plan, shape, arguments)
        with monkeypatch.context() as patch:
            patch.setattr(tabular, "in_bulk", lambda *_: None)
            patch.setattr(tabular, "floats", lambda *_: None)
            patch.setattr(tabular, "_csv_matrix", lambda *_: None)
            expected = outcome(plan, shape, arguments)
        assert found == expected, (specs, shape, arguments)
        accepted += len(found) > 2
    assert 1500 < accepted < 4500


@pytest.mark.parametrize(
    "text",
    [
        "c,x,y\n1\n2\n",
        "c\n1,2,3\n",
        "c\n1,null,2\n",
        "c,x\n1\r,2\n",
        "c,x\ry\n1,2\n",
        "c,x\n[1,2],3\n",
        "c,x,y\n1,2,3,-0.0,4\n6\n",
        "c,x,y\n1,2,3,null,4\n6\n",
    ],
)
def test_lines_of_other_lengths_never_make_a_matrix(text: str) -> None:
    with pytest.raises(InputError, match="values, got array"):
        one("double").csv(text.encode())


@pytest.mark.parametrize("form", [list, tuple])
def test_many_floats_are_read_at_once_and_nothing_else_is(form: Any) -> None:
    def rows() -> list[Any]:
        return [form(row * 1.5 + column for column in range(8)) for row in range(40)]

    np.testing.assert_array_equal(floats(rows(), 8), np.array(rows()))
    for index, column in ((20, 3), (20, 7), (39, 7), (0, 1)):
        # The bytes of a long text may look like those of floats.
        for odd in (
            1,
            2**40,
            True,
            None,
            "g" * 8,
            "g",
            b"ggg",
            object(),
            [1.5],
            {},
            np.float64(1.5),
            1.5 + 0j,
            "g" * 9 * 9,
        ):
            other = [list(row) for row in rows()]
            other[index][column] = odd
            assert floats([form(row) for row in other], 8) is None, (index, odd)
    for at in (0, 20, 39):
        row: Any
        for row in (rows()[0][:7], rows()[0] * 2, [], (), {}, 1, None, 1.5, "g" * 72, {str(n): 1.5 for n in range(8)}):
            assert floats([*rows()[:at], row, *rows()[at:]], 8) is None, (at, row)
    assert floats([*rows()[:20], list(rows()[0]), tuple(rows()[0])], 8) is None
    assert floats(rows(), 9) is floats(rows()[:2], 8) is floats([], 8) is floats([[]] * 300, 0) is None


def test_a_negative_zero_stays_one_however_it_is_written() -> None:
    many = "c\n" + "-0.0\n" * 300
    for text in ("c\n-0.0\n", 'c\n"-0.0"\n', many, many + "\n1\n"):
        assert str(one("double").csv(text.encode()).value[0, 0]) == "-0.0"
    assert one("long").csv(b'c\n"-0.0"\n').value.tolist() == [[0]]


def test_a_name_given_twice_is_refused_even_if_the_signature_has_it_twice() -> None:
    plan = compile_schema([{"type": "long", "name": 0}, {"type": "long", "name": "0"}])
    with pytest.raises(InputError, match="more than once"):
        plan.split(["0", "0"], [[1, 1]])


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


@pytest.mark.parametrize("kinds", [*itertools.product(TYPES, repeat=2)])
def test_the_matrix_of_columns_is_pandas_own(kinds: tuple[str, str]) -> None:
    specs = [{"type": kind, "name": name} for name, kind in zip("ab", kinds, strict=True)]
    rows = compile_schema(specs).instances([[1, 2], [3, 4]])
    array: Any = rows.matrix()
    expected = rows.for_model().to_numpy()
    assert (array.dtype, array.tolist()) == (expected.dtype, expected.tolist())


def test_a_tensor_of_numbers_is_a_matrix_if_it_has_two_axes() -> None:
    array: Any = compile_schema([tensor("uint8", -1, 2)]).instances([[1, 2]]).matrix()
    assert (array.dtype, array.tolist()) == (np.uint8, [[1, 2]])
    for spec, value in (
        (tensor("float64", -1), [1]),
        (tensor("float64", -1, 1, 1), [[[1]]]),
        (tensor("bool", -1, 1), [[True]]),
        (tensor("str", -1, 1), [["a"]]),
        (tensor("float64", -1, 1, name="x"), [[1]]),
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
    ([tensor("float32", -1, 2)], [[1, 2]], [[3, 4], [5, 6]]),
    ([tensor("str", -1)], ["ab"], ["c", "de"]),
    ([tensor("int8", -1, 1, name="x"), tensor("bool", -1, name="y")], {"x": [[1]], "y": [True]}, {"x": [1], "y": True}),
]


@pytest.mark.parametrize(("specs", "parts"), [(specs, parts) for specs, *parts in ALIKE])
def test_rows_alike_go_together_and_no_row_sees_it(specs: list[dict[str, Any]], parts: list[Any]) -> None:
    plan = compile_schema(specs)
    rows = [plan.features(part) for part in parts]
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
    ([tensor("str", -1)], ["ab"], ["abc"]),
    ([tensor("bytes", -1)], ["a"], ["ä"]),
    ([tensor("float32", -1, -1)], [[1, 2]], [[1, 2, 3]]),
]


@pytest.mark.parametrize(("specs", "one", "other"), UNLIKE)
def test_rows_unlike_are_of_different_kinds(specs: list[dict[str, Any]], one: Any, other: Any) -> None:
    plan = compile_schema(specs)
    kinds = [plan.features(rows).batch_key for rows in (one, other)]
    assert kinds[0] != kinds[1]
    assert None not in kinds


def test_plans_of_other_signatures_make_other_kinds() -> None:
    specs = [{"type": kind, "name": name} for kind in ("long", "double") for name in "ab"]
    assert len({compile_schema([spec]).instances([1]).batch_key for spec in specs}) == 4


def test_some_rows_stay_alone() -> None:
    ab = compile_schema([{"type": "double", "name": "a"}])
    named = compile_schema([tensor("float32", -1, name="x"), tensor("float32", -1, name="y")])
    alone = [
        ab.split(["a"], [[1]], [7]),
        compile_schema(AB).split(["a"], [[1]], [7]),
        compile_schema(None).records([{"a": 1}]),
        compile_schema(None).instances([[1]]),
        compile_schema([{"type": "long"}], from_type_hint=True).instances([1]),
        compile_schema([tensor("float32", 2)]).instances([1, 2]),
        compile_schema([tensor("float32")]).instances(1),
        compile_schema([tensor("float32", -1, name="x"), tensor("float32", 1, name="y")]).instances(
            {"x": [1], "y": [1]}
        ),
        named.instances({"x": [1, 2], "y": [1]}),
    ]
    assert [rows.batch_key for rows in alone] == [None] * len(alone)
    assert named.instances({"x": [1, 2], "y": [1, 2]}).batch_key is not None


def test_no_more_problems_are_looked_for_than_anybody_reads() -> None:
    plan = compile_schema([{"type": "double", "name": name} for name in "abcd"])
    rows: list[Any] = [{}]
    for row in (rows, [{"a": "x"}]):
        with pytest.raises(InputError) as caught:
            plan.records(row * 100_000)
        assert caught.value.total == 10_000
