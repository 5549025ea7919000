"""The tensors of the Open Inference Protocol: named, of a datatype and a shape, their values in JSON or in binary.

Pure functions. Sources: see `open_inference`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from darwin_runtime.errors import BadRequest, EncodingError
from darwin_runtime.schema.checks import is_missing
from darwin_runtime.schema.rows import Array

BYTES = "BYTES"
NUMBERS = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
DATATYPES = {np.dtype(code).newbyteorder("="): name for name, code in NUMBERS.items()}

# As many as any numpy can have.
MAX_AXES = 32


@dataclass(frozen=True)
class Tensor:
    """One of a request. `values` are flat, in row-major order, as JSON would have them, or numbers as an array."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Any

    def nested(self) -> Any:
        """Lists in lists, as other protocols have them."""
        if isinstance(self.values, np.ndarray):
            return self.values.reshape(self.shape).tolist()
        array = np.empty(len(self.values), dtype=object)
        array[:] = self.values
        return array.reshape(self.shape).tolist()

    def column(self) -> list[Any] | None:
        """A value for each row; None if a row has more."""
        if len(self.shape) != 1 and self.shape[1:] != (1,):
            return None
        return list(self.values.tolist()) if isinstance(self.values, np.ndarray) else self.values


def parameters_of(given: Mapping[str, Any], whose: str) -> dict[str, Any]:
    parameters = given.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequest(f"the parameters of {whose} must be an object")
    return parameters


def read_tensors(inputs: Any, tail: memoryview) -> list[Tensor]:
    if not isinstance(inputs, list) or not inputs:
        raise BadRequest("inputs must be a list of at least one tensor")
    tensors: dict[str, Tensor] = {}
    for given in inputs:
        name = given.get("name") if isinstance(given, dict) else None
        if not isinstance(name, str):
            raise BadRequest("each of inputs must be an object with name, shape, datatype and data")
        if name in tensors:
            raise BadRequest(f"input {name[:100]!r} is there twice")
        tensors[name], tail = _tensor(given, name, tail)
    if tail:
        raise BadRequest(f"{len(tail)} bytes are left over after the last input")
    return list(tensors.values())


def _tensor(given: Mapping[str, Any], whole_name: str, tail: memoryview) -> tuple[Tensor, memoryview]:
    """The tensor, and what of the binary data belongs to those after it."""
    name = whole_name[:100]
    datatype, shape = given.get("datatype"), _shape(given.get("shape"), name)
    if not isinstance(datatype, str) or (datatype != BYTES and datatype not in NUMBERS):
        raise BadRequest(
            f"input {name!r}: unknown datatype {_shown(datatype)}, it may be {', '.join(NUMBERS)}, {BYTES}"
        )
    count = math.prod(shape)
    size = parameters_of(given, f"input {name!r}").get("binary_data_size")
    if size is None:
        values = _flat(given.get("data"), count, name, shape)
        if datatype == BYTES:
            values = [None if is_missing(value) else value for value in values]
        _check(values, datatype, name)
        return Tensor(whole_name, datatype, shape, values), tail
    if type(size) is not int or not 0 <= size <= len(tail):
        raise BadRequest(
            f"input {name!r}: binary_data_size {_shown(size)} is not within the {len(tail)} bytes that are left"
        )
    if "data" in given:
        raise BadRequest(f"input {name!r}: there may be data or binary_data_size, not both")
    part, tail = tail[:size], tail[size:]
    binary = _texts(part, count, name) if datatype == BYTES else _array(part, count, datatype, name, shape)
    return Tensor(whole_name, datatype, shape, binary), tail


def _shown(value: Any) -> str:
    """The beginning of it; a list or an object can be nested too deep to be shown."""
    if isinstance(value, (list, dict)):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    return repr(str(value)[:50])


def _shape(given: Any, name: str) -> tuple[int, ...]:
    good = isinstance(given, list) and 0 < len(given) <= MAX_AXES
    if not good or any(type(part) is not int or not 0 < part < 2**63 for part in given):
        raise BadRequest(f"input {name!r}: shape must be a list of at most {MAX_AXES} lengths, none of them 0")
    return tuple(given)


def _flat(data: Any, count: int, name: str, shape: Sequence[int]) -> list[Any]:
    """`data`, flat or nested as `shape` is, as a flat list of `count` values."""
    if not isinstance(data, list):
        raise BadRequest(f"input {name!r}: data must be a list")
    level = data
    for axis, length in enumerate(shape[1:], 1):
        if not level or not isinstance(level[0], list):
            break
        if any(not isinstance(part, list) or len(part) != length for part in level):
            raise BadRequest(
                f"input {name!r}: data is not nested as its shape {list(shape)}: axis {axis} is not {length} long"
            )
        level = [value for part in level for value in part]
    if len(level) != count:
        raise BadRequest(
            f"input {name!r}: data has {len(level)} values, and its shape {list(shape)} stands for {count}"
        )
    return level


_KINDS: dict[str, set[type]] = {"BOOL": {bool}, BYTES: {str, type(None)}}
_FLOATS: set[type] = {int, float, type(None)}


def _check(values: list[Any], datatype: str, name: str) -> None:
    """Raise `BadRequest` unless `values`, of JSON, are of the type that the client says they are."""
    allowed = _KINDS.get(datatype) or (_FLOATS if datatype.startswith("FP") else {int})
    if odd := set(map(type, values)) - allowed:
        example = next(value for value in values if type(value) in odd)
        raise BadRequest(f"input {name!r}: {_shown(example)} is no {datatype}")
    if allowed == {int} and values:
        limits = np.iinfo(NUMBERS[datatype])
        if min(values) < limits.min or max(values) > limits.max:
            raise BadRequest(f"input {name!r}: not all values are within {datatype}")


def _array(part: memoryview, count: int, datatype: str, name: str, shape: Sequence[int]) -> Array:
    dtype = np.dtype(NUMBERS[datatype])
    if len(part) != count * dtype.itemsize:
        needed = f"{count * dtype.itemsize} for shape {list(shape)} of {datatype}"
        raise BadRequest(f"input {name!r}: binary_data_size is {len(part)}, and has to be {needed}")
    if datatype == "BOOL" and bytes(part).strip(b"\0\1"):
        raise BadRequest(f"input {name!r}: a BOOL is a byte of 0 or 1")
    # A copy, since where the data begins may suit no number.
    return np.frombuffer(bytes(part), dtype)


def _texts(part: memoryview, count: int, name: str) -> list[Any]:
    values: list[Any] = []
    at = 0
    while at < len(part):
        if at + 4 > len(part):
            raise BadRequest(f"input {name!r}: its binary data ends within the length of element {len(values)}")
        (length,) = struct.unpack_from("<I", part, at)
        at += 4
        if length > len(part) - at:
            raise BadRequest(
                f"input {name!r}: element {len(values)} is said to have {length} bytes, {len(part) - at} are left"
            )
        values.append(bytes(part[at : at + length]))
        at += length
    if len(values) != count:
        raise BadRequest(
            f"input {name!r}: its binary data holds {len(values)} elements, and its shape stands for {count}"
        )
    return values


def pack(name: str, values: Any) -> bytes | None:
    """The flat values of an output in binary; None if one is missing among texts, for which binary has no form.

    The values are an array of numbers, or a list of str, bytes and None. Raises `EncodingError`.
    """
    if isinstance(values, np.ndarray):
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    if None in values:
        return None
    try:
        datas = [value if isinstance(value, bytes) else value.encode() for value in values]
    except UnicodeEncodeError as error:
        raise EncodingError(f"the model's output {name[:100]!r} cannot be written in binary: {error}") from None
    return b"".join(part for data in datas for part in (struct.pack("<I", len(data)), data))
