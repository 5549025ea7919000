"""What one value of each MLflow type may be on the wire, and what it becomes in memory.

The types are those of a signature (https://mlflow.org/docs/latest/ml/model/signatures/) in the JSON form that `MLmodel`
stores. Nothing lossy is accepted: `1.9` is no long. This module knows numpy, neither MLflow nor HTTP.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import marshal
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import orjson

from darwin_runtime.errors import InputError, Problem

MAX_PROBLEMS = 100
# After so many, nothing more is looked at: to count those of a large body can take minutes.
ENOUGH_PROBLEMS = 10_000

# Of a name in a message; a client can make one as long as a body, and have it told with each problem.
MAX_NAME = 200

# What is deeper can be read, but neither shown nor written any more, and few models could bear it.
MOST_DEPTH = 200

# Letters in an array of text, where all take as much room as the longest, unless there are so many anyway.
MOST_PADDED = 16 * 1024 * 1024

# An array, or an object, of which no part was given.
MISSING: Any = object()
_REFUSED: Any = object()

Spec = Mapping[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
# From a cell's index to its row and the name of its column.
Place = Callable[[int], tuple[int | None, str]]
# Reports a bad part of a cell: the path to it below the cell, what was expected, what was there, why if not obvious.
Bad = Callable[[str, str, Any, str], None]


def refuse(expected: str, value: Any, why: str = "") -> InputError:
    """An `InputError` about the input as a whole."""
    report = Report()
    report.mismatch(None, "", expected, value, why)
    return InputError(report.problems)


@dataclass
class Report:
    problems: list[Problem] = field(default_factory=list)
    total: int = 0
    nulls: bool = False

    def missing(self, row: int | None, name: str, expected: str) -> None:
        self._add(row, name, "missing", expected, None, f"missing, expected {expected}")

    def mismatch(self, row: int | None, name: str, expected: str, value: Any, why: str = "") -> None:
        reason = f" ({why})" if why else ""
        self._add(row, name, "type_mismatch", expected, value, f"expected {expected}, got {_shown(value)}{reason}")

    def at(self, row: int | None, name: str) -> Bad:
        return lambda path, expected, value, why: (
            self.missing(row, name + path, expected)
            if value is MISSING
            else self.mismatch(row, name + path, expected, value, why)
        )

    def finish(self, error: type[InputError] = InputError) -> None:
        if self.total:
            raise error(self.problems, self.total)

    def _add(self, row: int | None, name: str, kind: str, expected: str, value: Any, found: str) -> None:
        self.total += 1
        name = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
        if self.total >= ENOUGH_PROBLEMS:
            self.finish()
        if self.total <= MAX_PROBLEMS:
            where = [f"row {row}"] if row is not None else []
            where += [repr(name)] if name else []
            place = ", ".join(where) or "input"
            actual = None if kind == "missing" else _type_name(value)
            self.problems.append(Problem(row, name, kind, expected, actual, f"{place}: {found}"))


_TYPE_NAMES = {
    type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object",
}  # fmt: skip


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"{_type_name(value)} of {len(value)}"
    if value is None:
        return "null"
    text = repr(value[:60] if isinstance(value, str) else value)
    return f"{_type_name(value)} {text if len(text) <= 60 else text[:57] + '...'}"


# Cells: what one value of each type may be on the wire, and becomes.


@dataclass(frozen=True)
class DataType:
    """How values of one type are checked and stored.

    `convert` takes one value that is not null; `build` makes a column of what `convert` returned. A column whose
    Python types are all in `plain` is first offered whole to `bulk`, with its types, which returns None when a cell
    needs a look.
    `of_floats` makes a column of 64-bit floats, or None when one needs a look; `of_doubles` one of numbers that were
    read as 64-bit floats, or None when one may have been another.
    `null` and `optional_null` are what null becomes in a required and in an optional column.
    """

    name: str
    schema: Spec
    sample: Any
    convert: Callable[[Any, Bad], Any]
    build: Callable[[Sequence[Any]], Array]
    from_text: Callable[[str], Any] = str
    plain: frozenset[type] = frozenset()
    bulk: Callable[[Sequence[Any], AbstractSet[type]], Array | None] = lambda *_: None
    of_floats: Callable[[Array], Array | None] = lambda _: None
    of_doubles: Callable[[Array], Array | None] = lambda _: None
    null: Any = _REFUSED
    optional_null: Any = None
    # Inside an array or object, MLflow would take a Python number for one of 64 bits: a numpy value keeps its width.
    packed: bool = False

    @property
    def nested(self) -> bool:
        """Whether its values are lists or objects, which text holds as JSON."""
        return self.from_text is _json_from_text


def _objects(values: Sequence[Any]) -> Array:
    # np.array() would make a matrix of lists that happen to be equally long.
    return np.fromiter(values, dtype=object, count=len(values))


# Negative zero is a float's alone.
_INTEGER_TEXT = re.compile(r"(?!-0+\.)([+-]?\d{1,20})(\.0*)?\Z", re.ASCII)


def _number_from_text(text: str) -> Any:
    text = text.strip()
    if match := _INTEGER_TEXT.match(text):
        return int(match[1])
    try:
        value = float(text) if text.isascii() and "_" not in text else math.inf
    except ValueError:
        return text
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else text


def _boolean_from_text(text: str) -> Any:
    return {"true": True, "false": False}.get(text.strip().lower(), text)


def _json_from_text(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _integer(name: str, dtype: str) -> DataType:
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)

    def convert(value: Any, bad: Bad) -> int:
        # From 2**53 on, floats stand for integers that they are not.
        if type(value) is float and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if type(value) is not int:
            bad("", name, value, "")
        elif not low <= value <= high:
            bad("", name, value, f"outside {low} to {high}")
        else:
            return value
        return 0

    def bulk(values: Sequence[Any], _: AbstractSet[type]) -> Array | None:
        try:
            array = np.array(values, dtype=np.int64)
        except OverflowError:
            return None
        if array.size and not (low <= int(array.min()) and int(array.max()) <= high):
            return None
        return array.astype(dtype, copy=False)

    def of_doubles(array: Array) -> Array | None:
        if not (max(low, -_EXACT) < array.min() and array.max() < min(high, _EXACT)):
            return None
        integers = array.astype(dtype)
        return integers if (integers == array).all() else None

    return DataType(
        name=name,
        schema={"type": "integer", "minimum": low, "maximum": high},
        sample=0,
        convert=convert,
        build=lambda values: np.array(values, dtype=dtype),
        from_text=_number_from_text,
        plain=frozenset({int}),
        bulk=bulk,
        of_doubles=of_doubles,
        optional_null=_REFUSED,
        packed=dtype != "int64",
    )


def _largest_exact(dtype: Any) -> float:
    """Up to here, all integers are numbers of this type."""
    return float(2.0 ** (np.finfo(dtype).nmant + 1))


_EXACT = _largest_exact("float64")


# So many values are worth a way of their own.
_MANY = 200


def doubles(values: Sequence[float]) -> Array:
    """`values`, floats and integers, as an array of 64 bits; a third of the time that numpy takes for many of them."""
    if len(values) < _MANY:
        return np.array(values, dtype=np.float64)
    # A copy, for bytes can't be written to.
    array: Array = np.frombuffer(struct.pack(f"{len(values)}d", *values), dtype=np.float64).copy()
    return array


def floats(rows: list[Any], width: int) -> Array | None:
    """`rows`, all lists or all tuples of `width` floats, as a matrix of 64 bits; None if they are not, or are few.

    A third of the time it takes to ask each value for its type, and then for its number. `marshal` is what writes both:
    in its version 2, a float is the byte "g" and eight more, and a list or a tuple a byte, its length in four, and its
    values. So whatever has these bytes where they have to be is nothing else.
    """
    if len(rows) * width < _MANY:
        return None
    first = rows[0]
    if type(first) not in (list, tuple) or len(first) != width or not type(first[0]) is type(first[-1]) is float:
        return None
    row = np.dtype([("kind", "u1"), ("length", "<u4"), ("cells", [("kind", "u1"), ("value", "<f8")], (width,))])
    try:
        written = marshal.dumps(rows, 2)
    except ValueError:  # there is another object among them
        return None
    if len(written) != 5 + len(rows) * row.itemsize:
        return None
    read = np.frombuffer(written, row, offset=5)
    kinds, cells = read["kind"], read["cells"]
    if kinds[0] not in b"[(" or (kinds != kinds[0]).any() or (read["length"] != width).any():
        return None
    return None if (cells["kind"] != ord("g")).any() else np.ascontiguousarray(cells["value"])


def _floating(name: str, dtype: str) -> DataType:
    largest = float(np.finfo(dtype).max)
    exact = _largest_exact(dtype)
    rounded = np.dtype(dtype).type

    def convert(value: Any, bad: Bad) -> float:
        if type(value) is int:
            if abs(value) > largest or int(rounded(value)) != value:
                bad("", name, value, "no such number has this type exactly")
                return 0.0
            value = float(value)
        if type(value) is not float:
            bad("", name, value, "")
            return 0.0
        with np.errstate(over="ignore"):
            if not np.isfinite(rounded(value)):
                bad("", name, value, f"outside ±{largest:g}")
                return 0.0
        return value

    def bulk(values: Sequence[Any], types: AbstractSet[type]) -> Array | None:
        array = np.array(values, dtype=np.float64) if type(None) in types else doubles(values)
        # Quicker for few values than numpy: no sum of infinities is finite.
        if types == {float} and dtype == "float64" and math.isfinite(sum(values)):
            return array
        sizes = np.abs(array)
        if (sizes >= exact).any() and ((sizes > largest).any() or int in types):
            return None
        return array.astype(dtype, copy=False)

    def of_floats(array: Array) -> Array | None:
        return array.astype(dtype, copy=False) if -largest <= array.min() and array.max() <= largest else None

    def of_doubles(array: Array) -> Array | None:
        return array.astype(dtype, copy=False) if -exact < array.min() and array.max() < exact else None

    return DataType(
        name=name,
        schema={"type": ["number", "null"]},
        sample=0.0,
        convert=convert,
        build=lambda values: np.array(values, dtype=dtype),
        from_text=_number_from_text,
        plain=frozenset({int, float, type(None)}),
        bulk=bulk,
        of_floats=of_floats,
        of_doubles=of_doubles,
        null=math.nan,
        optional_null=math.nan,
        packed=dtype != "float64",
    )


def _check(kind: type, name: str) -> Callable[[Any, Bad], Any]:
    def convert(value: Any, bad: Bad) -> Any:
        if type(value) is not kind:
            bad("", name, value, "")
        return value

    return convert


_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)"
    r"(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?(?:Z|([+-])(\d\d):?(\d\d))?)?",
    re.ASCII,
)
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - MLflow's datetimes are naive
_NOT_A_TIME = int(np.iinfo(np.int64).min)


def _nanoseconds(text: str) -> int:
    """Nanoseconds since 1970 in UTC of an ISO 8601 date or date and time; ValueError says why it isn't one.

    Python 3.10 can't parse these itself, and numpy wraps silently around what 64 bits of nanoseconds hold.
    """
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError("not ISO 8601")
    year, month, day, hour, minute, second, fraction, sign, off_hours, off_minutes = match.groups()
    moment = datetime(*(int(part or 0) for part in (year, month, day, hour, minute, second)))  # type: ignore[arg-type]  # noqa: DTZ001
    if sign:
        if int(off_hours) > 23 or int(off_minutes) > 59:
            raise ValueError("no such offset from UTC")
        offset = timedelta(hours=int(off_hours), minutes=int(off_minutes))
    else:
        offset = timedelta(0)
    since = moment - _EPOCH
    seconds = since.days * 86400 + since.seconds - (-1 if sign == "-" else 1) * int(offset.total_seconds())
    value = seconds * 10**9 + int((fraction or "").ljust(9, "0"))
    if not _NOT_A_TIME < value <= np.iinfo(np.int64).max:
        raise ValueError("outside 1677-09-21 to 2262-04-11")
    return value


def _datetime(value: Any, bad: Bad) -> int:
    if type(value) is str:
        try:
            return _nanoseconds(value)
        except ValueError as error:
            bad("", "datetime", value, str(error))
    else:
        bad("", "datetime", value, "not an ISO 8601 string")
    return 0


def _binary(value: Any, bad: Bad) -> bytes:
    if type(value) is str:
        try:
            # MLflow's own encoder wraps lines.
            return base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            bad("", "binary", value, "not base64")
    else:
        bad("", "binary", value, "not a base64 string")
    return b""


_STRING_SCHEMA = {"type": ["string", "null"]}

SCALARS = {
    "boolean": DataType(
        name="boolean",
        schema={"type": "boolean"},
        sample=False,
        convert=_check(bool, "boolean"),
        build=lambda values: np.array(values, dtype=object if None in values else bool),
        from_text=_boolean_from_text,
        plain=frozenset({bool}),
        bulk=lambda values, _: np.array(values, dtype=bool),
    ),
    "integer": _integer("integer", "int32"),
    "long": _integer("long", "int64"),
    "float": _floating("float", "float32"),
    "double": _floating("double", "float64"),
    "string": DataType(
        name="string",
        schema=_STRING_SCHEMA,
        sample="text",
        convert=_check(str, "string"),
        build=_objects,
        plain=frozenset({str, type(None)}),
        bulk=lambda values, _: np.array(values, dtype=object),
        null=None,
    ),
    "binary": DataType(
        name="binary",
        schema={"type": "string", "contentEncoding": "base64"},
        sample="AA==",
        convert=_binary,
        build=_objects,
    ),
    "datetime": DataType(
        name="datetime",
        schema={**_STRING_SCHEMA, "pattern": f"^{_TIME.pattern}$"},
        sample="2024-01-31T12:00:00",
        convert=_datetime,
        build=lambda values: np.array(values, dtype=np.int64).view("datetime64[ns]"),
        from_text=str.strip,
        null=_NOT_A_TIME,
        optional_null=_NOT_A_TIME,
        packed=True,
    ),
}


_CONTAINERS = {list, dict}


def nested_too_deep(value: Any) -> bool:
    """Whether lists and objects of JSON are nested more than `MOST_DEPTH` deep."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        # Most parts are neither, and many are empty.
        parts = [part for part in level if part and type(part) in _CONTAINERS]
        if not parts:
            return False
        level = [*itertools.chain.from_iterable(part.values() if type(part) is dict else part for part in parts)]
    return True


def need_even(values: list[Any], count: int, lengths: Sequence[int]) -> None:
    """Raise `InputError` where an array of the `count` `values`, among them texts of these `lengths`, would be huge."""
    longest = max(lengths, default=0)
    if count * longest > max(MOST_PADDED, 2 * sum(lengths)):
        raise refuse("texts of about the same length", values, f"one of them has {longest} letters")


def _even(texts: Sequence[str]) -> Sequence[str]:
    need_even(list(texts), len(texts), [*map(len, texts)])
    return texts


def _anything(value: Any, bad: Bad) -> Any:
    if nested_too_deep(value):
        bad("", "any", value, f"nested more than {MOST_DEPTH} deep")
    return value


_ANY = DataType("any", {}, "any", _anything, _objects, _json_from_text, null=None)


def below(bad: Bad, prefix: str) -> Bad:
    return lambda path, expected, value, why: bad(prefix + path, expected, value, why)


def _pack(cell: DataType, value: Any) -> Any:
    return cell.build([value])[0] if cell.packed else value


def _array(item: DataType) -> DataType:
    # MLflow turns a null among strings into the text "nan", and one among booleans into false.
    null = item.null if item.packed or item.null is not None or item is _ANY else _REFUSED
    name = f"array of {item.name}"

    def convert(value: Any, bad: Bad) -> Any:
        if type(value) is not list:
            bad("", name, value, "")
            return []
        items = [
            null if element is None and null is not _REFUSED else item.convert(element, below(bad, f"[{index}]"))
            for index, element in enumerate(value)
        ]
        return item.build(items) if item.packed and items else items

    schema = {"type": "array", "items": item.schema}
    return DataType(
        name, schema, [item.sample], convert, _objects, _json_from_text, null=None if item is _ANY else _REFUSED
    )


def _object(properties: Mapping[str, tuple[DataType, bool]]) -> DataType:
    required = [key for key, (_, needed) in properties.items() if needed]

    def convert(value: Any, bad: Bad) -> Any:
        if type(value) is not dict:
            bad("", "object", value, "")
            return {}
        for key in required:
            if key not in value:
                bad(f".{key}", properties[key][0].name, MISSING, "")
        result: dict[str, Any] = {}
        for key, part in value.items():
            if key not in properties:
                bad(f".{key}", "no property of this name", part, "")
                continue
            cell, needed = properties[key]
            if part is None and (not needed or cell is _ANY):
                result[key] = None
            else:
                result[key] = _pack(cell, cell.convert(part, below(bad, f".{key}")))
        return result

    schema: Spec = {
        "type": "object",
        "properties": {
            key: cell.schema if needed else or_null(cell.schema) for key, (cell, needed) in properties.items()
        },
        "required": required,
        "additionalProperties": False,
    }
    sample = {key: cell.sample for key, (cell, _) in properties.items()}
    return DataType("object", schema, sample, convert, _objects, _json_from_text)


def _map(item: DataType) -> DataType:
    name = f"map of {item.name}"

    def convert(value: Any, bad: Bad) -> Any:
        if type(value) is not dict:
            bad("", name, value, "")
            return {}
        return {key: _pack(item, item.convert(part, below(bad, f".{key}"))) for key, part in value.items()}

    schema = {"type": "object", "additionalProperties": item.schema}
    null = None if item is _ANY else _REFUSED
    return DataType(name, schema, {"key": item.sample}, convert, _objects, _json_from_text, null=null)


def or_null(schema: Spec) -> Spec:
    return {"anyOf": [schema, {"type": "null"}]} if schema else schema


def datatype_of(spec: Spec) -> DataType:
    """The cell type that a signature's JSON names: `{"type": "double"}`, `{"type": "array", "items": {…}}`, …"""
    kind = spec["type"]
    if kind == "array":
        return _array(datatype_of(spec["items"]))
    if kind == "object":
        return _object({k: (datatype_of(v), v.get("required", True)) for k, v in spec["properties"].items()})
    if kind == "map":
        return _map(datatype_of(spec["values"]))
    if kind == "sparkml_vector":
        return _array(SCALARS["double"])
    return _ANY if kind == "any" else SCALARS[kind]


_TENSOR_CELLS = {"f": _floating, "i": _integer, "u": _integer}


def tensor_datatype(dtype: np.dtype[Any]) -> DataType:
    if dtype.kind in _TENSOR_CELLS:
        return _TENSOR_CELLS[dtype.kind](dtype.name, dtype.name)
    if dtype.kind == "S":
        return DataType(
            name="bytes",
            schema={"type": "string"},
            sample="text",
            convert=_check(str, "string"),
            build=lambda values: np.array([value.encode() for value in _even(values)], dtype=bytes),
        )
    if dtype.kind == "U":
        return DataType(
            name="string",
            schema={"type": "string"},
            sample="text",
            convert=_check(str, "string"),
            build=lambda values: np.array(_even(values), dtype=str),
        )
    if dtype.kind == "M":
        return SCALARS["datetime"]
    return SCALARS["boolean"] if dtype.kind == "b" else _ANY


def in_bulk(cell: DataType, values: Sequence[Any], report: Report) -> Array | None:
    """`values` as an array, or None if some need a look of their own."""
    if float in cell.plain and (array := floats([values], len(values))) is not None:
        column = cell.of_floats(array[0])
        if column is not None:
            return column
    types = set(map(type, values))
    report.nulls = report.nulls or type(None) in types or type(MISSING) in types
    return cell.bulk(values, types) if types <= cell.plain else None


def parse_column(cell: DataType, values: Sequence[Any], required: bool, report: Report, place: Place) -> Array | None:
    """`values` as an array; None if the column is optional and not there, or if `report` has something to say."""
    array = in_bulk(cell, values, report)
    if array is not None:
        return array
    if not required:
        if all(value is MISSING for value in values):
            return None
        values = [None if value is MISSING else value for value in values]
        # Integers have no null, so a column of nothing else can only stand for no column.
        if (cell.optional_null is _REFUSED or cell.name == "boolean") and all(value is None for value in values):
            return None
    null = cell.null if required else cell.optional_null
    found = report.total
    converted = []
    index = 0

    def bad(path: str, expected: str, value: Any, why: str) -> None:
        # Which row and column that is can cost more than the check.
        report.at(*place(index))(path, expected, value, why)

    for index, value in enumerate(values):  # noqa: B007 - bad() reads it
        if value is None and null is not _REFUSED:
            converted.append(null)
        elif value is None or value is MISSING:
            bad("", cell.name, value, "")
        else:
            converted.append(cell.convert(value, bad))
    return cell.build(converted) if report.total == found else None
