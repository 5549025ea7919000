"""Columns with nulls, and columns converted in bulk, compared with a conversion value by value."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from darwin_runtime.errors import InputError
from darwin_runtime.schema import doubles, tabular
from darwin_runtime.schema.model_spec import compile_schema
from darwin_runtime.schema.rows import Rows
from tests.support.schemas import NUMBER_DTYPES, columns_by_name, schema_of


@pytest.mark.parametrize("kind", ["boolean", "integer", "long"])
def test_an_optional_column_of_nulls_only_is_an_absent_one_where_the_type_has_no_null(kind: str) -> None:
    rows = schema_of(kind, required=False).records([{"c": None}, {}])
    assert (rows.value, rows.count) == ({}, 2)
    assert len(rows.for_model()) == 2


def test_an_optional_column_that_no_row_has_is_absent() -> None:
    schema = compile_schema([{"type": "double", "name": "a"}, {"type": "double", "name": "b", "required": False}])
    assert list(columns_by_name(schema.records([{"a": 1}, {"a": 2}]))) == ["a"]
    np.testing.assert_equal(columns_by_name(schema.records([{"a": 1}, {"a": 2, "b": 3}]))["b"], [math.nan, 3.0])


def outcome(schema: Any, shape: str, arguments: tuple[Any, ...]) -> Any:
    try:
        rows: Rows = getattr(schema, shape)(*arguments)
    except InputError as error:
        return str(error), error.total
    cells = {name: (array.dtype, repr(array.tolist())) for name, array in columns_by_name(rows).items()}
    return cells, rows.count, rows.unvalidated, rows.complete, rows.index, rows.batch_key


ODD: list[Any] = [
    *(None, True, "1", [], {}, 2.0, -0.0, 2**24 + 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**64),
    *(9007199254740992.0, 16777217.0, 3.4028235e38, 3.5e38, 1e300, math.nan, math.inf),
]
ODD_TEXT = [
    *("1.", "+1", ".5", "007", "-01", "1e5", "1E-3", "-0", "-0.0", "-0e0", "1e400", "-1e-400", "1e", "--1", "2.00"),
    *("nan", "inf", "null", "null,1", "true", "1_0", "1,2", "{}", "[1]", "[1", "1]", "1],[2", '"1"', '"1,2"'),
    *("16777217", "16777217.0", "9007199254740993", "9007199254740993.0", "3.4028235e38", "3.5e38", "1" * 400),
    *("9" * 19, "9" * 20, "9" * 25, str(2**63), str(-(2**63)), str(2**64 - 1), "12345678901234567890123.5e-20"),
    *("", " ", " 1", "2 ", "1 2", "1\n2", "1\r2", "\t3", "1\x0b", "\xa01", "\u0661", "\0"),
]


def some_signature(rng: random.Random) -> list[dict[str, Any]]:
    most = rng.choice([*NUMBER_DTYPES])
    kinds = [
        most if rng.random() < 0.9 else rng.choice([*NUMBER_DTYPES, "boolean"]) for _ in range(rng.randrange(1, 4))
    ]
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
        schema, (shape, arguments) = compile_schema(specs), some_request(rng, specs)
        with monkeypatch.context() as patch:
            patch.setattr(doubles, "_MIN_VALUES", 1)
            found = outcome(schema, shape, arguments)
        with monkeypatch.context() as patch:
            patch.setattr(tabular, "parse_in_bulk", lambda *_: None)
            patch.setattr(tabular, "double_matrix", lambda *_: None)
            patch.setattr(tabular, "read_csv_matrix", lambda *_: None)
            expected = outcome(schema, shape, arguments)
        assert found == expected, (specs, shape, arguments)
        accepted += len(found) > 2
    assert 1500 < accepted < 4500
