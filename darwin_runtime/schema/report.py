"""Problems of a request's values: a report collects them and raises one error with all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from darwin_runtime.errors import InputError, Problem

MAX_PROBLEMS = 100
# The check ends after so many: to count those of a large body can take minutes.
MAX_COUNTED_PROBLEMS = 10_000

# A client can make a name as long as a body, and have it repeated with each problem.
MAX_NAME_LENGTH = 200

# An array, or an object, of which no part was given.
MISSING: Any = object()

# Reports a bad part of a value: the path to it below the value, the expected type, the part, a reason if not obvious.
Reject = Callable[[str, str, Any, str], None]


def refuse(expected: str, value: Any, why: str = "") -> InputError:
    """An `InputError` about the input as a whole."""
    report = Report()
    report.mismatch(None, "", expected, value, why)
    return InputError(report.problems)


def reject_below(reject: Reject, prefix: str) -> Reject:
    """`reject` for the parts of the value at `prefix`."""
    return lambda path, expected, value, why: reject(prefix + path, expected, value, why)


@dataclass
class Report:
    """The first problems of one request, and the number of all.

    `nulls` is true if a value was null or missing, whether or not that is a problem.
    """

    problems: list[Problem] = field(default_factory=list)
    total: int = 0
    nulls: bool = False

    def missing(self, row: int | None, name: str, expected: str) -> None:
        self._add(row, name, "missing", expected, None, f"missing, expected {expected}")

    def mismatch(self, row: int | None, name: str, expected: str, value: Any, why: str = "") -> None:
        if value is MISSING:
            self.missing(row, name, expected)
            return
        reason = f" ({why})" if why else ""
        self._add(row, name, "type_mismatch", expected, value, f"expected {expected}, got {_excerpt(value)}{reason}")

    def at(self, row: int | None, name: str) -> Reject:
        return lambda path, expected, value, why: self.mismatch(row, name + path, expected, value, why)

    def finish(self, error: type[InputError] = InputError) -> None:
        """Raise `error` if there are problems."""
        if self.total:
            raise error(self.problems, self.total)

    def _add(self, row: int | None, name: str, error_type: str, expected: str, value: Any, found: str) -> None:
        self.total += 1
        name = name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}..."
        if self.total >= MAX_COUNTED_PROBLEMS:
            self.finish()
        if self.total <= MAX_PROBLEMS:
            where = [f"row {row}"] if row is not None else []
            where += [repr(name)] if name else []
            place = ", ".join(where) or "input"
            actual = None if error_type == "missing" else _json_type(value)
            self.problems.append(Problem(row, name, error_type, expected, actual, f"{place}: {found}"))


_JSON_TYPES = {
    type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object",
}  # fmt: skip


def _json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value), type(value).__name__)


def _excerpt(value: Any) -> str:
    """The type of `value` and its beginning, in at most some seventy letters."""
    if isinstance(value, (list, dict)):
        return f"{_json_type(value)} of {len(value)}"
    if value is None:
        return "null"
    # JSON's own words for NaN and Infinity
    text = json.dumps(value) if type(value) is float else repr(value[:60] if isinstance(value, (str, bytes)) else value)
    return f"{_json_type(value)} {text if len(text) <= 60 else text[:57] + '...'}"
