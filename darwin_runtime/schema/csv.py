"""CSV text, read as columns of text or as a matrix of numbers."""

from __future__ import annotations

import csv
import io
import itertools
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from darwin_runtime.schema.checks import MAX_CELLS, require_column_names, require_lists
from darwin_runtime.schema.doubles import Doubles, packer
from darwin_runtime.schema.report import refuse


def _csv_lines(text: str, *, strict: bool = False) -> Iterable[list[str]]:
    csv.field_size_limit(sys.maxsize)  # of the whole process; the size of bodies is not this module's business
    return csv.reader(io.StringIO(text, newline=""), strict=strict)


def read_csv_texts(body: bytes) -> tuple[list[str], list[list[str]]]:
    """The names in the first row of `body`, and the other rows. Raises `InputError` and `UnicodeDecodeError`."""
    if len(body) > MAX_CELLS and (cells := sum(map(body.count, (b",", b"\n", b"\r")))) > MAX_CELLS:
        raise refuse(f"CSV of at most {MAX_CELLS} cells that are not all numbers", "", f"about {cells}")
    text = body.decode("utf-8-sig")
    if "\0" in text:
        raise refuse("CSV with a header row", text, "it contains NUL")  # csv itself rejects it before Python 3.11 only
    try:
        lines = [line for line in _csv_lines(text, strict=True) if line]
    except csv.Error as error:
        raise refuse("CSV with a header row", text, str(error)) from None
    if not lines:
        raise refuse("CSV with a header row", text)
    names, rows = require_column_names(lines[0]), lines[1:]
    require_lists(rows, len(names))
    return names, rows


def parse_texts(
    names: Sequence[str], rows: Sequence[Sequence[str]], parsers: Mapping[str, Callable[[str], Any]]
) -> list[Sequence[Any]]:
    """The columns of `rows`: parsed, with null for an empty cell, where `parsers` has the column's name."""
    return [
        [None if text == "" else parsers[name](text) for text in texts] if name in parsers else texts
        for name, texts in zip(names, zip(*rows, strict=True) if rows else [[]] * len(names), strict=True)
    ]


def first_csv_lines(text: str) -> tuple[list[str], list[str]]:
    """The first two lines, without blank ones, which pandas skips. A line that is missing or no CSV is empty."""
    try:
        rows = (line for line in _csv_lines(text) if len(line) > 1 or "".join(line).strip())
        header, *data = itertools.islice(rows, 2)
    except (csv.Error, ValueError):
        return [], []
    return header, data[0] if data else []


def plain_header(body: bytes) -> tuple[list[str], int] | None:
    """The names in the first line, and the index of the second; None if only a parser of CSV can read that line."""
    begin = body.find(b"\n") + 1
    header = body[:begin].decode("utf-8-sig")[:-1]
    if not header or any(char in header for char in '"\0'):
        return None
    return header.split(","), begin


def _csv_pieces(lines: bytes, begin: int) -> Iterator[bytes]:
    """`lines` from `begin` on in pieces of whole lines, small enough that a piece's values stay in the CPU's cache."""
    while begin < len(lines):
        end = lines.find(b"\n", begin + 32 * 1024)
        end = len(lines) if end < 0 else end
        yield lines[begin:end]
        begin = end + 1


def read_csv_matrix(lines: bytes, begin: int, width: int) -> Doubles | None:
    """The `lines` of `width` numbers from `begin` on, read as JSON with a null after each; None if not that."""
    # Without these letters, there is no true, false or null in it but ours.
    if any(lines.find(letter, begin) >= 0 for letter in b"ul"):
        return None
    parts = []
    for piece in _csv_pieces(lines, begin):
        try:
            cells = orjson.loads(b"[%b,null]" % piece.rstrip(b"\n").replace(b"\n", b",null,"))
            ends = cells[width :: width + 1]
            del cells[width :: width + 1]
            # Where there is a null too many among the numbers, packing raises.
            if len(cells) != width * len(ends) or ends.count(None) < len(ends):
                return None
            parts.append(packer(len(cells)).pack(*cells))
        except (ValueError, struct.error):
            return None
    matrix = np.frombuffer(bytearray().join(parts)).reshape(-1, width)
    return matrix if len(matrix) else None
