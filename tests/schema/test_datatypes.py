"""Values that each type accepts or rejects, and the arrays that they become."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from darwin_runtime.errors import InputError
from tests.support.schemas import ARRAY, MAP, OBJECT, columns_by_name, parsed_column, schema_of

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
    array = parsed_column(kind, *values)
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
        parsed_column(kind, value)
    (problem,) = caught.value.problems
    assert (problem.row, problem.field, problem.error_type, problem.expected) == (0, "c", "type_mismatch", kind)
    assert kind in problem.message


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
    np.testing.assert_equal(parsed_column(kind, *values, required=False).tolist(), expected)


@pytest.mark.parametrize("kind", ["integer", "long"])
def test_integers_have_no_null_beside_values(kind: str) -> None:
    with pytest.raises(InputError, match=r"row 1, 'c': expected \w+, got null"):
        parsed_column(kind, 1, None, required=False)


NAN = math.nan
INNER = {"type": "object", "properties": {"d": {"type": "double"}, "o": {"type": "long", "required": False}}}

MISSING = [
    ("double", [NAN, 1], [NAN, 1.0]),
    ("float", [NAN, 2**24 + 2], [NAN, 2**24 + 2]),
    ("string", [NAN, "NaN"], [None, "NaN"]),
    ("datetime", [NAN, "NaT", "2024-01-01"], [None, None, 1704067200000000000]),
    ("any", [NAN, "x"], [NAN, "x"]),
    (ARRAY, [[NAN, 1]], [[NAN, 1.0]]),
    ({"type": "array", "items": {"type": "any"}}, [[NAN, "x"]], [[NAN, "x"]]),
    (INNER, [{"d": NAN, "o": NAN}], [{"d": NAN, "o": None}]),
    ({"type": "map", "values": {"type": "double"}}, [{"a": NAN}], [{"a": NAN}]),
]


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(("kind", "values", "expected"), MISSING)
def test_nan_is_a_missing_value(kind: Any, values: list[Any], expected: list[Any], required: bool) -> None:
    rows = schema_of(kind, required=required).records([{"c": value} for value in values])
    np.testing.assert_equal(columns_by_name(rows)["c"].tolist(), expected)
    assert rows.unvalidated == (values[0] is NAN)


@pytest.mark.parametrize(
    ("kind", "value", "field"),
    [
        *(("boolean", NAN, "c"), ("integer", NAN, "c"), ("long", NAN, "c"), ("binary", NAN, "c"), (OBJECT, NAN, "c")),
        *((ARRAY, NAN, "c"), ({"type": "array", "items": {"type": "string"}}, ["a", NAN], "c[1]")),
        *(({"type": "array", "items": {"type": "long"}}, [NAN], "c[0]"), (MAP, {"a": NAN}, "c.a")),
        *((OBJECT, {"id": NAN}, "c.id"), ({"type": "array", "items": {"type": "binary"}}, [NAN], "c[0]")),
    ],
)
def test_nan_where_null_may_not_stand(kind: Any, value: Any, field: str) -> None:
    with pytest.raises(InputError, match=r"row 0, .*got number NaN") as caught:
        parsed_column(kind, value)
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
@pytest.mark.parametrize(
    "kind", ["boolean", "long", "float", "double", "string", "binary", "datetime", ARRAY, MAP, {"type": "any"}]
)
def test_infinity_is_no_value(kind: Any, infinity: float) -> None:
    inside = [infinity] if kind == ARRAY else {"a": infinity} if kind == MAP else infinity
    with pytest.raises(InputError, match=f"number {'-' if infinity < 0 else ''}Infinity"):
        parsed_column(kind, inside)
    with pytest.raises(InputError, match="row 0, 'c'"):
        parsed_column({"type": "any"}, {"a": [infinity]})


BINARY = {"type": "binary"}


def test_bytes_within_lists_and_objects_are_as_mlflow_gives_them_to_models() -> None:
    assert parsed_column("binary", "AP8=").tolist() == [b"\0\xff"]
    assert parsed_column({"type": "array", "items": BINARY}, ["AP8="]).tolist() == [[b"AP8="]]
    assert parsed_column({"type": "map", "values": BINARY}, {"a": "AP8="}).tolist() == [{"a": "AP8="}]
    assert parsed_column({"type": "object", "properties": {"b": BINARY}}, {"b": "AP8="}).tolist() == [{"b": "AP8="}]


def test_bytes_that_are_bytes_already() -> None:
    assert parsed_column("binary", b"\xff\0").tolist() == [b"\xff\0"]
    assert parsed_column({"type": "array", "items": BINARY}, [b"\0\xff"]).tolist() == [[b"\0\xff"]]
    with pytest.raises(InputError, match=r"'c\[0\]': .*cut off the zeros"):
        parsed_column({"type": "array", "items": BINARY}, [b"\xff\0"])
    with pytest.raises(InputError, match="expected string, got bytes"):
        parsed_column("string", b"x")


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
    np.testing.assert_equal(parsed_column(kind, value, value)[1], expected)


def test_nested_numbers_keep_their_width() -> None:
    assert parsed_column({"type": "array", "items": {"type": "float"}}, [1, 2.5])[0].dtype == np.float32
    assert parsed_column(MAP, {"a": 1})[0]["a"].dtype == np.int32


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
        parsed_column(kind, value)
    assert [problem.field for problem in caught.value.problems] == fields


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        *("boolean", "integer", "long", "float", "double", "string", "binary", "datetime"),
        *(ARRAY, OBJECT, MAP, {"type": "any"}, {"type": "sparkml_vector"}),
    ],
)
def test_made_up_samples_are_accepted(kind: Any, required: bool) -> None:
    schema = schema_of(kind, required=required)
    assert schema.features(schema.sample(None)).count == 1
