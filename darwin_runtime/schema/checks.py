"""Checks of a request's shape and size, which do not depend on the types of its values.

A function `require_…` raises `InputError` unless the request is as its name says.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from darwin_runtime.schema.report import MAX_NAME_LENGTH, Report, refuse

# Python reads deeper values, but can neither print nor write them, and few models could bear them.
MAX_NESTING = 200

# Letters in an array of text, where all texts take as much room as the longest. More are allowed if a request has them.
MAX_PADDED = 16 * 1024 * 1024

# Columns of a table without a signature. For each, pandas takes as long as for a hundred numbers.
MAX_COLUMNS = 50_000
MAX_REPEATED_NAMES = 100

# Cells of single values that stand for a whole column.
MAX_REPEATED = 1_000_000

# Each cell takes some sixty bytes while CSV is read, and two of the body.
MAX_CELLS = 4_000_000

_CONTAINERS = {list, dict}


def is_missing(value: Any) -> bool:
    """Whether `value` is null, or NaN, which many clients write for it."""
    return value is None or (type(value) is float and value != value)


def nested_too_deep(value: Any) -> bool:
    """Whether lists and objects of JSON are nested more than `MAX_NESTING` deep."""
    level = [value]
    for _ in range(MAX_NESTING + 1):
        # Most parts are neither, and many are empty.
        parts = [part for part in level if part and type(part) in _CONTAINERS]
        if not parts:
            return False
        level = [*itertools.chain.from_iterable(part.values() if type(part) is dict else part for part in parts)]
    return True


def unfit(value: Any) -> str:
    """The reason why the JSON `value` may not go to a model as it is; empty if there is none."""
    if nested_too_deep(value):
        return f"nested more than {MAX_NESTING} deep"
    level = [value]
    while level:
        if math.inf in level or -math.inf in level:
            return "there is an Infinity in it"
        parts = [part for part in level if type(part) in _CONTAINERS]
        level = [*itertools.chain.from_iterable(part.values() if type(part) is dict else part for part in parts)]
    return ""


def require_shallow(value: Any) -> None:
    if nested_too_deep(value):
        raise refuse(f"values nested at most {MAX_NESTING} deep", value)


def require_little_padding(values: list[Any], count: int, lengths: Sequence[int]) -> None:
    """Raise `InputError` where an array of the `count` `values`, among them texts of these `lengths`, would be huge."""
    longest = max(lengths, default=0)
    if count * longest > max(MAX_PADDED, 2 * sum(lengths)):
        raise refuse("texts of about the same length", values, f"one of them has {longest} letters")


def require_finite(value: Any) -> None:
    """Raise `InputError` that names each Infinity in the JSON `value`, of which no signature says anything."""
    report, waiting = Report(), deque([("", value)] if type(value) in _CONTAINERS else [])
    while waiting:
        place, part = waiting.popleft()
        objects = type(part) is dict
        for key, below in part.items() if objects else enumerate(part):
            if type(below) in _CONTAINERS or below in (math.inf, -math.inf):
                # A key can be as long as the body, and have any number of values below.
                name = f"{place}.{str(key)[:MAX_NAME_LENGTH]}" if objects else f"{place}[{key}]"
                if type(below) in _CONTAINERS:
                    waiting.append((name[: MAX_NAME_LENGTH + 1], below))
                else:
                    report.mismatch(None, name.removeprefix("."), "a finite number", below)
    report.finish()


def require_rows(rows: Any, expected: str, *, empty: bool = False) -> list[Any]:
    if type(rows) is not list or not (rows or empty):
        raise refuse(expected, rows)
    return rows


def cells_of_rows(rows: list[Any]) -> list[Any]:
    """`rows` of a single column as lists: they may be its bare values."""
    bare = type(rows[0]) not in _CONTAINERS and not _CONTAINERS & set(map(type, rows))
    return [[value] for value in rows] if bare else rows


def require_records(rows: Any) -> list[dict[str, Any]]:
    """`rows`, a list of at least one object."""
    records: list[dict[str, Any]] = require_rows(rows, "a list of at least one object")
    if set(map(type, records)) == {dict}:
        return records
    report = Report()
    for index, row in enumerate(records):
        if type(row) is not dict:
            report.mismatch(index, "", "an object", row)
    report.finish()
    return records


def require_lists(rows: Sequence[Any], width: int) -> None:
    """Raise `InputError` unless each row is a list of `width` values."""
    if set(map(type, rows)) == {list} and set(map(len, rows)) == {width}:
        return
    report = Report()
    for index, row in enumerate(rows):
        if type(row) is not list:
            report.mismatch(index, "", f"a list of {width} values", row)
        elif len(row) != width:
            report.mismatch(index, "", f"{width} values", row)
    report.finish()


def require_same_keys(rows: Sequence[Mapping[str, Any]], width: int) -> None:
    """Raise `InputError` where `rows` have keys of their own, `width` in all: a table of them would be far larger."""
    given = sum(map(len, rows))
    if len(rows) * width > 1000 + 100 * given:
        raise refuse("rows with the same keys", rows, f"{width} keys in all, {given} values")


def require_scalars(labels: Any, expected: str) -> None:
    """Raise `InputError` unless `labels` is a list that holds neither lists nor objects."""
    if type(labels) is not list or _CONTAINERS & set(map(type, labels)):
        raise refuse(expected, labels)


def require_column_names(columns: Any) -> list[str]:
    """The names in `columns`, no two the same, as text."""
    require_scalars(columns, "a list of column names")
    if any(is_missing(column) for column in columns):
        raise refuse("a list of column names", columns, "null or NaN is none")
    names = list(map(str, columns))
    if len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise refuse("column names that differ", columns, f"more than once: {', '.join(twice)[:200]}")
    return names


def require_row_labels(index: Any, count: int) -> list[Any] | None:
    """`index`, None or a label for each of the `count` rows."""
    if index is None:
        return None
    labels: list[Any] = index
    expected = f"index: a list of {count} labels, as many as rows"
    require_scalars(labels, expected)
    if len(labels) != count:
        raise refuse(expected, labels)
    require_short_integers("index", labels)
    return labels


def require_short_integers(name: str, labels: list[Any]) -> None:
    """Raise `InputError` for integers of more than 64 bits, of which any number can be found whose hashes are equal."""
    if any(type(label) is int and not -(2**63) <= label < 2**63 for label in labels):
        raise refuse(f"{name}: no integers of more than 64 bits", labels)


def require_few_columns(columns: Sequence[Any]) -> None:
    """Raise `InputError` for a table that pandas would take long for, far longer if columns have the same name."""
    repeated = len(columns) - len(set(map(str, columns)))
    if len(columns) > MAX_COLUMNS or repeated > MAX_REPEATED_NAMES:
        raise refuse(f"at most {MAX_COLUMNS} columns", list(columns), f"{repeated} of them called as another")
