"""Lists of Python floats as arrays of 64-bit floats, in a third of numpy's time.

The functions let `struct` and `marshal` read the values; numpy then takes the bytes that these two write.
"""

from __future__ import annotations

import functools
import marshal
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

Doubles = np.ndarray[Any, np.dtype[np.float64]]

# For fewer values, numpy itself is as fast.
_MIN_VALUES = 200

# struct's own cache holds fewer, and pieces of CSV have many lengths.
packer = functools.lru_cache(maxsize=1024)(lambda count: struct.Struct(f"{count}d"))


def double_array(values: Sequence[float]) -> Doubles:
    """`values`, floats and integers, as an array."""
    if len(values) < _MIN_VALUES:
        return np.array(values, dtype=np.float64)
    # A copy, for bytes can't be written to.
    array: Doubles = np.frombuffer(struct.pack(f"{len(values)}d", *values), dtype=np.float64).copy()
    return array


def double_matrix(rows: list[Any], width: int) -> Doubles | None:
    """`rows`, all lists or all tuples of `width` floats, as a matrix; None if they are not, or are few.

    Version 2 of `marshal` writes a float as the byte "g" and eight more. It writes a list or a tuple as a byte, its
    length in four bytes, and its values. So `rows` with these bytes at these places hold floats and nothing else.
    """
    if len(rows) * width < _MIN_VALUES:
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
