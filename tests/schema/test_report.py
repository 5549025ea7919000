"""Problems in a report: all of them, in their order, within bounds."""

from __future__ import annotations

from typing import Any

import pytest

from darwin_runtime.errors import InputError
from darwin_runtime.schema.model_spec import compile_schema
from darwin_runtime.schema.report import MAX_PROBLEMS
from tests.support.schemas import parsed_column


def test_every_bad_cell_is_reported_and_only_those() -> None:
    schema = compile_schema([{"type": "long", "name": "a"}, {"type": "string", "name": "b"}])
    with pytest.raises(InputError) as caught:
        schema.records([{"a": 1.9, "b": "x"}, {"a": 2}, {"a": True, "b": 3}])
    assert [(p.row, p.field, p.error_type, p.actual) for p in caught.value.problems] == [
        (0, "a", "type_mismatch", "number"),
        (2, "a", "type_mismatch", "boolean"),
        (1, "b", "missing", None),
        (2, "b", "type_mismatch", "integer"),
    ]


def test_the_report_is_bounded_but_counts_all() -> None:
    with pytest.raises(InputError, match="and 150 more") as caught:
        parsed_column("long", *["x"] * (MAX_PROBLEMS + 150))
    assert (len(caught.value.problems), caught.value.total) == (MAX_PROBLEMS, MAX_PROBLEMS + 150)


def test_a_message_never_repeats_a_long_value() -> None:
    with pytest.raises(InputError) as caught:
        parsed_column("long", "x" * 100_000)
    assert len(str(caught.value)) < 200


def test_no_more_problems_are_looked_for_than_anybody_reads() -> None:
    schema = compile_schema([{"type": "double", "name": name} for name in "abcd"])
    rows: list[Any] = [{}]
    for row in (rows, [{"a": "x"}]):
        with pytest.raises(InputError) as caught:
            schema.records(row * 100_000)
        assert caught.value.total == 10_000
