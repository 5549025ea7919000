"""CSV: texts of each type, numbers, and lines that are no table."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from darwin_runtime.errors import InputError
from darwin_runtime.schema.model_spec import compile_schema
from tests.support.schemas import ARRAY, columns_by_name, schema_of


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
    assert schema_of(ARRAY).csv(b'c,d\n"[1, 2.5]",\n').value["c"].tolist() == [[1.0, 2.5]]
    with pytest.raises(InputError, match="row 0, 'c': expected array of double, got string"):
        schema_of(ARRAY).csv(b"c\n[1\n")


def test_csv_integers_are_exact() -> None:
    rows = schema_of("long").csv(b"c\n9007199254740993.0\n9007199254740993\n-7.\n")
    assert columns_by_name(rows)["c"].tolist() == [9007199254740993, 9007199254740993, -7]


def test_csv_digits_are_ascii() -> None:
    with pytest.raises(InputError):
        schema_of("double").csv("c\n\uff11\uff12\n".encode())


def test_csv_cells_may_be_large() -> None:
    text = "x" * 200_000
    assert schema_of("string").csv(f"c\n{text}\n".encode()).value["c"].tolist() == [text]


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
        schema_of("double").csv(text.encode())


def test_a_negative_zero_stays_one_however_it_is_written() -> None:
    many = "c\n" + "-0.0\n" * 300
    for text in ("c\n-0.0\n", 'c\n"-0.0"\n', many, many + "\n1\n"):
        assert str(schema_of("double").csv(text.encode()).value[0, 0]) == "-0.0"
    assert schema_of("long").csv(b'c\n"-0.0"\n').value.tolist() == [[0]]
