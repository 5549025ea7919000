"""A column of a signature, and the array that a request's values for it become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from darwin_runtime.schema.checks import is_missing
from darwin_runtime.schema.datatypes import NO_NULL, DataType
from darwin_runtime.schema.doubles import double_matrix
from darwin_runtime.schema.report import MISSING, Report
from darwin_runtime.schema.rows import Array

# From a value's index to its row and the name of its column.
Place = Callable[[int], tuple[int | None, str]]


@dataclass(frozen=True)
class Column:
    """A signature's column; one without a name is known by its position."""

    name: str | int
    datatype: DataType
    required: bool

    @property
    def key(self) -> str:
        """The name as JSON and CSV can write it."""
        return str(self.name)

    def place(self, row: int) -> tuple[int, str]:
        return row, self.key


def parse_in_bulk(datatype: DataType, values: Sequence[Any], report: Report) -> Array | None:
    """`values` as an array, or None if some need a look of their own."""
    if float in datatype.plain and (array := double_matrix([values], len(values))) is not None:
        column = datatype.of_floats(array[0])
        if column is not None:
            return column
    types = set(map(type, values))
    array = datatype.bulk(values, types) if types <= datatype.plain else None
    if array is None and float in types and any(map(is_missing, values)):
        values = [None if is_missing(value) else value for value in values]
        types = set(map(type, values))
        array = datatype.bulk(values, types) if types <= datatype.plain else None
    report.nulls = report.nulls or type(None) in types or type(MISSING) in types
    return array


def parse_column(
    datatype: DataType, values: Sequence[Any], required: bool, report: Report, place: Place
) -> Array | None:
    """`values` as an array; None if the column is optional and not there, or if `report` got a problem."""
    array = parse_in_bulk(datatype, values, report)
    if array is not None:
        return array
    if not required:
        if all(value is MISSING for value in values):
            return None
        values = [None if value is MISSING else value for value in values]
        # Integers have no null, so a column of nothing else can only stand for no column.
        if (datatype.optional_null is NO_NULL or datatype.name == "boolean") and all(map(is_missing, values)):
            return None
    null = datatype.null if required else datatype.optional_null
    problems_before = report.total
    converted = []
    index = 0

    def reject(path: str, expected: str, value: Any, why: str) -> None:
        # Which row and column that is can cost more than the check.
        report.at(*place(index))(path, expected, value, why)

    for index, value in enumerate(values):  # noqa: B007 - reject() reads it
        if null is not NO_NULL and (value is None or (is_missing(value) and datatype.name != "any")):
            converted.append(null)
        elif value is None or value is MISSING:
            reject("", datatype.name, value, "")
        else:
            converted.append(datatype.convert(value, reject))
            report.nulls = report.nulls or converted[-1] is null
    return datatype.build(converted) if report.total == problems_before else None
