"""Types of values: the JSON that each MLflow type accepts, and the value in memory that it becomes.

The types are those of a signature. Nothing lossy is accepted: `1.9` is no long. This module knows numpy, neither MLflow
nor HTTP.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from darwin_runtime.schema.checks import is_missing, require_little_padding, unfit
from darwin_runtime.schema.doubles import double_array
from darwin_runtime.schema.json_text import read_json
from darwin_runtime.schema.report import MISSING, Reject, reject_below
from darwin_runtime.schema.rows import Array
from darwin_runtime.schema.signature import Spec

# What null becomes in a type that has no null.
NO_NULL: Any = object()


@dataclass(frozen=True)
class DataType:
    """How values of one type are checked and stored.

    `convert` takes one value that is not null; `build` makes a column of the results of `convert`. A column whose
    Python types are all in `plain` is first offered whole to `bulk`, with its types. `bulk` returns None if a value
    needs a look of its own.
    `of_floats` makes a column of 64-bit floats, or returns None if one needs a look. `of_doubles` takes numbers that
    were read as 64-bit floats, and returns None if one may have been another.
    `null` and `optional_null` are the values of null in a required and in an optional column.
    """

    name: str
    json_schema: Spec
    sample: Any
    convert: Callable[[Any, Reject], Any]
    build: Callable[[Sequence[Any]], Array]
    from_text: Callable[[str], Any] = str
    plain: frozenset[type] = frozenset()
    bulk: Callable[[Sequence[Any], AbstractSet[type]], Array | None] = lambda *_: None
    of_floats: Callable[[Array], Array | None] = lambda _: None
    of_doubles: Callable[[Array], Array | None] = lambda _: None
    null: Any = NO_NULL
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
        return read_json(text.encode())
    except (ValueError, RecursionError):
        return text


def _integer_type(name: str, dtype: str) -> DataType:
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)

    def convert(value: Any, reject: Reject) -> int:
        # From 2**53 on, floats stand for integers that they are not.
        if type(value) is float and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if type(value) is not int:
            reject("", name, value, "")
        elif not low <= value <= high:
            reject("", name, value, f"outside {low} to {high}")
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
        json_schema={"type": "integer", "minimum": low, "maximum": high},
        sample=0,
        convert=convert,
        build=lambda values: np.array(values, dtype=dtype),
        from_text=_number_from_text,
        plain=frozenset({int}),
        bulk=bulk,
        of_doubles=of_doubles,
        optional_null=NO_NULL,
        packed=dtype != "int64",
    )


def _largest_exact(dtype: Any) -> float:
    """Up to here, all integers are numbers of this type."""
    return float(2.0 ** (np.finfo(dtype).nmant + 1))


_EXACT = _largest_exact("float64")


def _float_type(name: str, dtype: str) -> DataType:
    largest = float(np.finfo(dtype).max)
    exact = _largest_exact(dtype)
    rounded = np.dtype(dtype).type

    def convert(value: Any, reject: Reject) -> float:
        if is_missing(value) and value is not None:
            return math.nan
        if type(value) is int:
            if abs(value) > largest or int(rounded(value)) != value:
                reject("", name, value, "no such number has this type exactly")
                return 0.0
            value = float(value)
        if type(value) is not float:
            reject("", name, value, "")
            return 0.0
        with np.errstate(over="ignore"):
            if not np.isfinite(rounded(value)):
                reject("", name, value, f"outside ±{largest:g}")
                return 0.0
        return value

    def bulk(values: Sequence[Any], types: AbstractSet[type]) -> Array | None:
        array = np.array(values, dtype=np.float64) if type(None) in types else double_array(values)
        # Quicker for few values than numpy: no sum of infinities is finite.
        if types == {float} and dtype == "float64" and math.isfinite(sum(values)):
            return array
        largest_given = np.abs(array).max(initial=0.0)
        if not largest_given < exact:
            # NaN among them is the largest.
            if np.isnan(largest_given) and type(None) not in types:
                return None
            sizes = np.abs(array)
            if (sizes > largest).any() or (int in types and (sizes >= exact).any()):
                return None
        return array.astype(dtype, copy=False)

    def of_floats(array: Array) -> Array | None:
        return array.astype(dtype, copy=False) if -largest <= array.min() and array.max() <= largest else None

    def of_doubles(array: Array) -> Array | None:
        return array.astype(dtype, copy=False) if -exact < array.min() and array.max() < exact else None

    return DataType(
        name=name,
        json_schema={"type": ["number", "null"]},
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


def _exactly(python_type: type, name: str) -> Callable[[Any, Reject], Any]:
    def convert(value: Any, reject: Reject) -> Any:
        if type(value) is not python_type:
            reject("", name, value, "")
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
    """Nanoseconds since 1970 in UTC of an ISO 8601 date or date and time. Else raises `ValueError` with the reason.

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


def _datetime(value: Any, reject: Reject) -> int:
    if type(value) is str:
        if value == "NaT":  # as pandas writes a missing one
            return _NOT_A_TIME
        try:
            return _nanoseconds(value)
        except ValueError as error:
            reject("", "datetime", value, str(error))
    else:
        reject("", "datetime", value, "not an ISO 8601 string")
    return 0


def _binary(value: Any, reject: Reject) -> bytes:
    if type(value) is bytes:  # formats other than JSON have bytes
        return value
    if type(value) is str:
        try:
            # MLflow's own encoder wraps lines.
            return base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            reject("", "binary", value, "not base64")
    else:
        reject("", "binary", value, "not a base64 string")
    return b""


def _binary_item(value: Any, reject: Reject) -> bytes:
    """An item of an array: MLflow gives models the bytes of the base64 text, and cuts zeros off the end of others."""
    decoded = _binary(value, reject)
    if type(value) is str:
        return value.encode(errors="replace")
    if decoded.endswith(b"\0"):
        reject("", "binary", value, "MLflow would cut off the zeros at its end")
    return decoded


def _binary_part(value: Any, reject: Reject) -> Any:
    """A value of an object or map: MLflow gives models the base64 text."""
    _binary(value, reject)
    return value


_STRING_SCHEMA = {"type": ["string", "null"]}

_BINARY = DataType("binary", {"type": "string", "contentEncoding": "base64"}, "AA==", _binary, _objects)
_BINARY_ITEM = replace(_BINARY, convert=_binary_item)
_BINARY_PART = replace(_BINARY, convert=_binary_part)

_SCALAR_TYPES = {
    "boolean": DataType(
        name="boolean",
        json_schema={"type": "boolean"},
        sample=False,
        convert=_exactly(bool, "boolean"),
        build=lambda values: np.array(values, dtype=object if None in values else bool),
        from_text=_boolean_from_text,
        plain=frozenset({bool}),
        bulk=lambda values, _: np.array(values, dtype=bool),
    ),
    "integer": _integer_type("integer", "int32"),
    "long": _integer_type("long", "int64"),
    "float": _float_type("float", "float32"),
    "double": _float_type("double", "float64"),
    "string": DataType(
        name="string",
        json_schema=_STRING_SCHEMA,
        sample="text",
        convert=_exactly(str, "string"),
        build=_objects,
        plain=frozenset({str, type(None)}),
        bulk=lambda values, _: np.array(values, dtype=object),
        null=None,
    ),
    "binary": _BINARY,
    "datetime": DataType(
        name="datetime",
        json_schema={**_STRING_SCHEMA, "pattern": f"^{_TIME.pattern}$"},
        sample="2024-01-31T12:00:00",
        convert=_datetime,
        build=lambda values: np.array(values, dtype=np.int64).view("datetime64[ns]"),
        from_text=str.strip,
        null=_NOT_A_TIME,
        optional_null=_NOT_A_TIME,
        packed=True,
    ),
}


def _alike_in_length(texts: Sequence[Any]) -> Sequence[Any]:
    require_little_padding(list(texts), len(texts), [*map(len, texts)])
    return texts


def _padded(*types: type) -> Callable[[Any, Reject], Any]:
    """Text as the last of `types`, of which numpy's arrays fill up the short ones with zeros."""

    def convert(value: Any, reject: Reject) -> Any:
        if type(value) not in types:
            reject("", "string", value, "")
        elif value[-1:] in ("\0", b"\0"):
            reject("", "string", value, "numpy would cut off the zeros at its end")
        else:
            return value.encode() if type(value) is str and bytes in types else value
        return types[-1]()

    return convert


def _anything(value: Any, reject: Reject) -> Any:
    if why := unfit(value):
        reject("", "any", value, why)
    return value


_ANY = DataType("any", {}, "any", _anything, _objects, _json_from_text, null=None)


def _pack(datatype: DataType, value: Any) -> Any:
    return datatype.build([value])[0] if datatype.packed else value


def _array_type(item: DataType) -> DataType:
    # MLflow turns a null among strings into the text "nan", and one among booleans into false.
    null = item.null if item.packed or item.null is not None else NO_NULL
    item = _BINARY_ITEM if item is _BINARY else item
    name = f"array of {item.name}"

    def convert(value: Any, reject: Reject) -> Any:
        if type(value) is not list:
            reject("", name, value, "")
            return []
        items = [
            null
            if null is not NO_NULL and is_missing(element)
            else item.convert(element, reject_below(reject, f"[{index}]"))
            for index, element in enumerate(value)
        ]
        return item.build(items) if item.packed and items else items

    json_schema = {"type": "array", "items": item.json_schema}
    return DataType(
        name, json_schema, [item.sample], convert, _objects, _json_from_text, null=None if item is _ANY else NO_NULL
    )


def _object_type(properties: dict[str, tuple[DataType, bool]]) -> DataType:
    properties = {key: (_within(datatype), needed) for key, (datatype, needed) in properties.items()}
    required = [key for key, (_, needed) in properties.items() if needed]

    def convert(value: Any, reject: Reject) -> Any:
        if type(value) is not dict:
            reject("", "object", value, "")
            return {}
        for key in required:
            if key not in value:
                reject(f".{key}", properties[key][0].name, MISSING, "")
        result: dict[str, Any] = {}
        for key, part in value.items():
            if key not in properties:
                reject(f".{key}", "no property of this name", part, "")
                continue
            datatype, needed = properties[key]
            if not needed and datatype is not _ANY and is_missing(part):
                result[key] = None
            else:
                result[key] = _pack(datatype, datatype.convert(part, reject_below(reject, f".{key}")))
        return result

    json_schema: Spec = {
        "type": "object",
        "properties": {
            key: datatype.json_schema if needed else or_null(datatype.json_schema)
            for key, (datatype, needed) in properties.items()
        },
        "required": required,
        "additionalProperties": False,
    }
    sample = {key: datatype.sample for key, (datatype, _) in properties.items()}
    return DataType("object", json_schema, sample, convert, _objects, _json_from_text)


def _within(item: DataType) -> DataType:
    """The type `item` of a value in an object or map."""
    return _BINARY_PART if item is _BINARY else item


def _map_type(item: DataType) -> DataType:
    name, item = f"map of {item.name}", _within(item)

    def convert(value: Any, reject: Reject) -> Any:
        if type(value) is not dict:
            reject("", name, value, "")
            return {}
        return {key: _pack(item, item.convert(part, reject_below(reject, f".{key}"))) for key, part in value.items()}

    json_schema = {"type": "object", "additionalProperties": item.json_schema}
    null = None if item is _ANY else NO_NULL
    return DataType(name, json_schema, {"key": item.sample}, convert, _objects, _json_from_text, null=null)


def or_null(json_schema: Spec) -> Spec:
    """JSON Schema of null, or of a value that `json_schema` allows."""
    return {"anyOf": [json_schema, {"type": "null"}]} if json_schema else json_schema


def datatype_of(spec: Spec) -> DataType:
    """The type that a signature's JSON names: `{"type": "double"}`, `{"type": "array", "items": {…}}`, …"""
    kind = spec["type"]
    if kind == "array":
        return _array_type(datatype_of(spec["items"]))
    if kind == "object":
        return _object_type({k: (datatype_of(v), v.get("required", True)) for k, v in spec["properties"].items()})
    if kind == "map":
        return _map_type(datatype_of(spec["values"]))
    if kind == "sparkml_vector":
        return _array_type(_SCALAR_TYPES["double"])
    return _ANY if kind == "any" else _SCALAR_TYPES[kind]


_TENSOR_NUMBERS = {"f": _float_type, "i": _integer_type, "u": _integer_type}


def tensor_datatype(dtype: np.dtype[Any]) -> DataType:
    if dtype.kind in _TENSOR_NUMBERS:
        return _TENSOR_NUMBERS[dtype.kind](dtype.name, dtype.name)
    if dtype.kind == "S":
        return DataType(
            name="bytes",
            json_schema={"type": "string"},
            sample="text",
            convert=_padded(str, bytes),
            build=lambda values: np.array(_alike_in_length(values), dtype=bytes),
        )
    if dtype.kind == "U":
        return DataType(
            name="string",
            json_schema={"type": "string"},
            sample="text",
            convert=_padded(str),
            build=lambda values: np.array(_alike_in_length(values), dtype=str),
        )
    if dtype.kind == "M":
        return _SCALAR_TYPES["datetime"]
    return _SCALAR_TYPES["boolean"] if dtype.kind == "b" else _ANY
