"""Parquet files as pandas and Spark write them: labels of rows, and decimals."""

from __future__ import annotations

import decimal
import io
import json
from typing import Any

import pandas as pd
import pyarrow.parquet
import pytest

from darwin_runtime.errors import BadRequest, InputError
from darwin_runtime.protocols.parquet import read_parquet
from darwin_runtime.schema.model_spec import compile_schema


def parquet(table: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    table.to_parquet(file)
    return file.getvalue()


@pytest.mark.parametrize(
    "index",
    [
        *(["x", "y"], pd.RangeIndex(5, 7), pd.Index([3, 4], name="id"), pd.date_range("2024-01-31", periods=2)),
        pd.MultiIndex.from_tuples([(1, "x"), (2, "y")]),
    ],
    ids=str,
)
def test_the_index_of_parquet_is_the_table_s(index: Any) -> None:
    table = pd.DataFrame({"a": [1.0, 2.0]}, index=index)
    for spec in ({"type": "double", "name": "a"}, {"type": "double"}):
        rows = read_parquet(parquet(table), compile_schema([spec]))
        pd.testing.assert_frame_equal(rows.for_model(), pd.read_parquet(io.BytesIO(parquet(table))), check_freq=False)
        assert rows.batch_key is None
    specs = [{"type": "double", "name": "a"}, {"type": "long", "name": "id"}]
    if table.index.name == "id":
        assert read_parquet(parquet(table), compile_schema(specs)).for_model()["id"].tolist() == [3, 4]


def test_an_index_of_other_rows() -> None:
    table = pyarrow.table({"a": [1.0]})
    labels = {"index_columns": [{"kind": "range", "name": None, "start": 0, "stop": 10**9, "step": 1}]}
    file = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"pandas": json.dumps(labels)}), file)
    with pytest.raises(BadRequest, match="not Parquet"):
        read_parquet(file.getvalue(), compile_schema([{"type": "double", "name": "a"}]))


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("double", ["1.25", None, "2.00"], [1.25, None, 2.0]),
        ("float", ["0.5"], [0.5]),
        ("long", ["9007199254740993", "2.00"], [9007199254740993, 2]),
        ("double", ["9007199254740993"], "no such number"),
        ("long", ["1.5"], "expected long, got number 1.5"),
        ("string", ["1.5"], "expected string"),
    ],
)
def test_decimals_are_numbers(kind: str, values: list[Any], expected: Any) -> None:
    cells = [None if value is None else decimal.Decimal(value) for value in values]
    body, schema = parquet(pd.DataFrame({"a": cells})), compile_schema([{"type": kind, "name": "a"}])
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read_parquet(body, schema)
    else:
        found = read_parquet(body, schema).for_model()["a"]
        assert [None if pd.isna(value) else value for value in found.tolist()] == expected
