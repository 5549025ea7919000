"""A model's signature, compiled once into a parser of requests.

A plan turns one of the wire shapes (records, split, inputs, CSV, Darwin's features) into `Rows` whose dtypes are
exactly those the signature names, or raises `InputError` with every bad cell. It is made from the signature's JSON form
(https://mlflow.org/docs/latest/ml/model/signatures/): this module knows numpy and pandas, neither MLflow nor HTTP.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import math
import operator
import struct
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
import pandas as pd

from darwin_runtime.errors import InputError, ParamsError
from darwin_runtime.schema.datatypes import (
    MISSING,
    MOST_DEPTH,
    Array,
    Bad,
    DataType,
    Report,
    Spec,
    below,
    datatype_of,
    floats,
    in_bulk,
    need_even,
    nested_too_deep,
    or_null,
    parse_column,
    refuse,
    tensor_datatype,
)

# Of a table without a signature. For each column, pandas takes as long as for a hundred numbers.
MOST_COLUMNS = 50_000
MOST_ALIKE = 100

# Each takes some sixty bytes while CSV is read, and two of the body.
MOST_CELLS = 4_000_000


@dataclass(frozen=True)
class Rows:
    """Parsed input of `count` rows.

    A `table` has in `value` a dict of one-dimensional columns or, where all its columns have one numeric type, a
    matrix whose columns are called `names`. Else `value` is what the model takes: an array, a DataFrame, a list, …
    `index` labels a table's rows, where the request did. `unvalidated` input was not checked or holds nulls: if the
    model fails on it, it may be to blame. A table that is not `complete` lacks an optional column. Rows with an equal
    `batch_key` may go through `concat` without any of them seeing a difference; rows with None stay alone.
    """

    value: Any
    count: int
    table: bool = False
    unvalidated: bool = False
    index: list[Any] | None = None
    names: pd.Index[Any] | None = None
    complete: bool = True
    batch_key: Hashable | None = None
    passthrough: bool = False

    def for_model(self) -> Any:
        if not self.table:
            return self.value
        index = pd.RangeIndex(self.count) if self.index is None else self.index
        return pd.DataFrame(self.value, index=index, columns=self.names, copy=self.names is None)

    def first(self) -> dict[str, Any]:
        """A table's first row, by name."""
        if self.names is not None:
            return {str(name): value for name, value in zip(self.names, self.value[0], strict=True)}
        return {str(name): values[0] for name, values in self.value.items()}

    def matrix(self) -> Array | None:
        """A number for each row and column of the signature, in its order; None if there is anything but numbers."""
        if self.table and self.names is None:
            columns = list(self.value.values())
            numbers = self.complete and all(column.dtype.kind in "iuf" for column in columns)
            return _stack(columns) if numbers else None
        numbers = type(self.value) is np.ndarray and self.value.ndim == 2 and self.value.dtype.kind in "iuf"
        return self.value if numbers else None


def concat(parts: Sequence[Rows]) -> Rows:
    """The rows of all `parts`, which have one `batch_key`, in their order."""
    first, values = parts[0], [part.value for part in parts]
    value: Any = (
        {name: np.concatenate([arrays[name] for arrays in values]) for name in first.value}
        if type(first.value) is dict
        else np.concatenate(values)
    )
    unvalidated = any(part.unvalidated for part in parts)
    return replace(first, value=value, count=sum(part.count for part in parts), unvalidated=unvalidated)


def _stack(columns: Sequence[Array]) -> Array:
    # What np.column_stack() makes, in a third of the time.
    return np.ascontiguousarray(np.concatenate(columns).reshape(len(columns), -1).T)


def _look(column: Array) -> str:
    """The type that `column` will have in a DataFrame, where columns of one type stay of that type when joined."""
    if column.dtype.hasobject:
        types = set(map(type, column.tolist()))
        # Of such a column, pandas makes one of strings.
        return "text" if str in types and types <= {str, type(None)} else "objects"
    return column.dtype.char


@dataclass(frozen=True)
class Column:
    """A signature's column; one without a name is known by its position."""

    name: str | int
    cell: DataType
    required: bool

    @property
    def key(self) -> str:
        """The name as JSON and CSV can write it."""
        return str(self.name)

    def place(self, row: int) -> tuple[int, str]:
        return row, self.key


def _need_rows(rows: Any, expected: str) -> list[Any]:
    if type(rows) is not list or not rows:
        raise refuse(expected, rows)
    return rows


def _need_lists(rows: Sequence[Any], width: int) -> None:
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


def _need_objects(rows: Sequence[Any]) -> None:
    if set(map(type, rows)) == {dict}:
        return
    report = Report()
    for index, row in enumerate(rows):
        if type(row) is not dict:
            report.mismatch(index, "", "an object", row)
    report.finish()


def _need_same_keys(rows: Sequence[Mapping[str, Any]], width: int) -> None:
    """Raise `InputError` where `rows` have keys of their own, `width` in all: a table of them would be far larger."""
    given = sum(map(len, rows))
    if len(rows) * width > 1000 + 100 * given:
        raise refuse("rows with the same keys", rows, f"{width} keys in all, {given} values")


def _need_shallow(value: Any) -> None:
    if nested_too_deep(value):
        raise refuse(f"values nested at most {MOST_DEPTH} deep", value)


def _as_array(value: Any) -> Array:
    """What numpy makes of it, which gives each of several texts the room of the longest."""
    lists, count = [value], 0
    lengths: list[int] = []
    while lists := [part for part in lists if type(part) is list]:
        lists = [*itertools.chain.from_iterable(lists)]
        count += len(lists)
        lengths += [len(part) for part in lists if type(part) is str]
    need_even(value, count, lengths)
    return np.array(value)


def _need_names(columns: Any) -> list[str]:
    if type(columns) is not list or {list, dict} & set(map(type, columns)):
        raise refuse("a list of column names", columns)
    names = list(map(str, columns))
    if len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise refuse("column names that differ", columns, f"more than once: {', '.join(twice)[:200]}")
    return names


def _need_labels(index: Any, count: int) -> list[Any] | None:
    if index is not None and (type(index) is not list or len(index) != count or {list, dict} & set(map(type, index))):
        raise refuse(f"index: a list of {count} labels, as many as rows", index)
    _need_short("index", index or [])
    return index


def _need_short(what: str, labels: list[Any]) -> None:
    """Raise `InputError` for integers of more than 64 bits, of which any number can be found whose hashes are equal."""
    if any(type(label) is int and not -(2**63) <= label < 2**63 for label in labels):
        raise refuse(f"{what}: no integers of more than 64 bits", labels)


def _need_few(columns: Sequence[Any]) -> None:
    """Raise `InputError` for a table that pandas would take long for, far longer if columns have the same name."""
    twice = len(columns) - len(set(map(str, columns)))
    if len(columns) > MOST_COLUMNS or twice > MOST_ALIKE:
        raise refuse(f"at most {MOST_COLUMNS} columns", list(columns), f"{twice} of them called as another")


def _picker(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """What takes the values at `keys` from a row. Raises `KeyError` for one that isn't there."""
    # With one key, itemgetter() takes a bare value.
    return operator.itemgetter(*keys) if len(keys) > 1 else lambda row: (row[keys[0]],)


def _read_csv(body: bytes) -> tuple[list[str], list[list[str]]]:
    csv.field_size_limit(sys.maxsize)  # of the whole process; the size of bodies is not this module's business
    if len(body) > MOST_CELLS and (cells := sum(map(body.count, (b",", b"\n", b"\r")))) > MOST_CELLS:
        raise refuse(f"CSV of at most {MOST_CELLS} cells that are not all numbers", "", f"about {cells}")
    text = body.decode("utf-8-sig")
    if "\0" in text:
        raise refuse("CSV with a header row", text, "it contains NUL")  # csv itself says so before Python 3.11 only
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
    except csv.Error as error:
        raise refuse("CSV with a header row", text, str(error)) from None
    if len(lines) < 2:
        raise refuse("CSV with a header row and at least one row of data", text)
    names, rows = _need_names(lines[0]), lines[1:]
    _need_lists(rows, len(names))
    return names, rows


def _pieces(lines: bytes, begin: int) -> Iterator[bytes]:
    """`lines` from `begin` on in pieces of whole lines, small enough that what one becomes stays in the cache."""
    while begin < len(lines):
        end = lines.find(b"\n", begin + 32 * 1024)
        end = len(lines) if end < 0 else end
        yield lines[begin:end]
        begin = end + 1


# struct's own cache holds fewer, and pieces of lines have many lengths.
_doubles = functools.lru_cache(maxsize=1024)(lambda count: struct.Struct(f"{count}d"))


def _csv_matrix(lines: bytes, begin: int, width: int) -> Array | None:
    """The `lines` of `width` numbers from `begin` on, read as JSON with a null after each; None if not that."""
    # Without these letters, there is no true, false or null in it but ours.
    if any(lines.find(letter, begin) >= 0 for letter in b"ul"):
        return None
    parts = []
    for piece in _pieces(lines, begin):
        try:
            cells = orjson.loads(b"[%b,null]" % piece.rstrip(b"\n").replace(b"\n", b",null,"))
            ends = cells[width :: width + 1]
            del cells[width :: width + 1]
            # Where there is a null too many among the numbers, packing raises.
            if len(cells) != width * len(ends) or ends.count(None) < len(ends):
                return None
            parts.append(_doubles(len(cells)).pack(*cells))
        except (ValueError, struct.error):
            return None
    matrix = np.frombuffer(bytearray().join(parts)).reshape(-1, width)
    return matrix if len(matrix) else None


class TabularSchema:
    """A signature of typed columns. Extra columns are ignored; the order of named ones does not matter.

    If `all_floats`, complete tables are one matrix of them.
    """

    def __init__(self, specs: Sequence[Spec]) -> None:
        self.specs = specs
        self.named = specs[0].get("name") is not None
        self.columns = tuple(
            Column(spec["name"] if self.named else index, datatype_of(spec), bool(spec.get("required", True)))
            for index, spec in enumerate(specs)
        )
        # With these, MLflow takes an object of lists for one row.
        self._row_of_lists = any(spec["type"] in ("array", "object") for spec in specs)
        self._keys = [column.key for column in self.columns]
        self._distinct = len(set(self._keys)) == len(specs)
        of_type: dict[str, list[int]] = {}
        for index, column in enumerate(self.columns):
            of_type.setdefault(column.cell.name, []).append(index)
        self._groups = [indices for indices in of_type.values() if len(indices) > 1]
        # Columns of one numeric type make a matrix, called this.
        uniform = self._distinct and len(of_type) == 1 and int in self.columns[0].cell.plain
        self._names = pd.DataFrame({column.name: [] for column in self.columns}).columns if uniform else None
        self._dtype = self.columns[0].cell.build([]).dtype
        self.all_floats = uniform and self.columns[0].cell.name in ("float", "double")
        self._kind = f"{'matrix' if uniform else 'table'} of {specs}"
        self.inputs = describe(specs)

    def records(self, rows: Any) -> Rows:
        """`[{"a": 1, "b": 2}, …]`: an object per row."""
        rows = _need_rows(rows, "a list of at least one object")
        _need_objects(rows)
        keys = self._keys_by_position(rows[0])
        try:
            picked = list(map(_picker(keys), rows))
        except KeyError:
            return self._table([[row.get(key, MISSING) for row in rows] for key in keys], len(rows))
        return self._floats(picked) or self._rows(picked)

    def split(self, columns: Any, data: Any, index: Any = None) -> Rows:
        """`["a", "b"]` and `[[1, 2], …]`: names once, then a list per row; without names, by position."""
        data = _need_rows(data, "data: a list of at least one row")
        if columns is None or (columns == self._keys and self._distinct):
            rows = self.positional(data)
        else:
            names = _need_names(columns)
            _need_lists(data, len(names))
            rows = self._split(names, list(zip(*data, strict=True)), len(data))
        return rows if index is None else replace(rows, index=_need_labels(index, rows.count), batch_key=None)

    def positional(self, rows: list[Any]) -> Rows:
        """`[[1, 2], …]`: a list per row, in the signature's order."""
        if matrix := self._floats(rows):
            return matrix
        _need_lists(rows, len(self.columns))
        return self._rows(rows)

    def numbers(self, array: Array, shape: tuple[int, int]) -> Rows | None:
        """The rows of an array of this shape, if they are a matrix as it is; else they need a closer look."""
        if self._names is None or shape[1] != len(self.columns):
            return None
        same = array.dtype == self._dtype and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))
        return self._matrix(array.reshape(shape), Report()) if same else None

    def flat(self, values: list[Any], shape: tuple[int, int]) -> Rows | None:
        """The same for values as JSON has them, row after row."""
        if self._names is None or shape[1] != len(self.columns):
            return None
        report = Report()
        array = in_bulk(self.columns[0].cell, values, report)
        return None if array is None else self._matrix(array.reshape(shape), report)

    def arrays(self, columns: Mapping[str, Any]) -> Rows:
        """`{"a": [1, …], "b": [2, …]}`: a list per column, all equally long."""
        report = Report()
        wanted = set(self._keys)
        used = {name: part for name, part in columns.items() if name in wanted or not self.named}
        lengths = {name: len(part) for name, part in used.items() if type(part) is list}
        count = max(lengths.values(), default=0)
        for name, length in lengths.items():
            if length != count:
                report.mismatch(None, name, f"{count} values, as many as the longest column", columns[name])
        for name, value in used.items():
            if type(value) is not list:
                report.mismatch(None, name, "a list, a value for each row", value)
        report.finish()
        if not count:
            raise refuse("a list of at least one value in each column", dict(columns))
        return self._split(list(used), list(used.values()), count)

    def instances(self, value: Any) -> Rows:
        """The `instances` or `inputs` of TensorFlow Serving's REST form: rows, or an object of columns."""
        if type(value) is dict:
            lists = any(type(part) is list for part in value.values())
            return self.arrays(value) if lists and not self._row_of_lists else self.records([value])
        single = len(self.columns) == 1
        if type(value) is not list:
            if single:
                return self._table([[value]], 1)
            raise refuse("a list of rows or an object of columns", value)
        rows = _need_rows(value, "a list of at least one row")
        kinds = set(map(type, rows))
        if kinds == {dict}:
            return self.records(rows)
        if single and self.columns[0].cell.name.startswith("array"):
            return self._table([rows if list in kinds else [rows]], len(rows) if list in kinds else 1)
        if single and list not in kinds:
            return self._table([rows], len(rows))
        return self.positional(rows)

    def features(self, value: Any) -> Rows:
        """Darwin's form: one object, or a list of them; for unnamed columns also a list, or a list of lists."""
        if type(value) is dict:
            return self.records([value])
        if not self.named and type(value) is list and value and dict not in set(map(type, value)):
            return self.positional(value if type(value[0]) is list else [value])
        if type(value) is not list:
            raise refuse("an object of named values, or a list of such objects", value)
        return self.records(value)

    def csv(self, body: bytes) -> Rows:
        """CSV whose first row names the columns. An empty cell is null. Raises `UnicodeDecodeError`, too."""
        numbers = self._csv_of_numbers(body)
        if numbers is not None:
            return numbers
        names, rows = _read_csv(body)
        parsers = dict(zip(self._keys_by_position(names), (c.cell.from_text for c in self.columns), strict=True))
        cells = [
            [None if text == "" else parsers[name](text) for text in texts] if name in parsers else texts
            for name, texts in zip(names, zip(*rows, strict=True), strict=True)
        ]
        return self._split(names, cells, len(rows))

    def _csv_of_numbers(self, body: bytes) -> Rows | None:
        """What `csv` makes of `body`, read as JSON; None if they could differ, or it makes no matrix."""
        if self._names is None:
            return None
        if b"\r" in body:
            body = body.replace(b"\r\n", b"\n")
            if b"\r" in body:
                return None
        begin = body.find(b"\n") + 1
        header = body[:begin].decode("utf-8-sig")[:-1]
        if not header or any(char in header for char in '"\0'):
            return None
        names = header.split(",")
        where = {name: index for index, name in enumerate(names)}
        order = [where.get(key, -1) for key in self._keys_by_position(names)]
        if len(where) < len(names) or -1 in order:
            return None
        matrix = _csv_matrix(body, begin, len(names))
        if matrix is None:
            return None
        if order != [*range(len(names))]:
            matrix = matrix.take(order, axis=1)
        cells = self.columns[0].cell.of_doubles(matrix)
        return None if cells is None else self._matrix(cells, Report())

    def sample(self, rows: Rows | None) -> Any:
        """`features` for one row: the first of `rows`, or else made up from the types."""
        if rows is None:
            return {column.key: column.cell.sample for column in self.columns}
        return rows.first()

    def json_schema(self) -> dict[str, Any]:
        """JSON Schema (draft 2020-12) of `features` for one row."""
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {c.key: c.cell.schema if c.required else or_null(c.cell.schema) for c in self.columns},
            "required": [column.key for column in self.columns if column.required],
        }

    def _keys_by_position(self, given: Iterable[str]) -> list[str]:
        if self.named or set(self._keys) <= set(given):
            return self._keys
        names = list(given)[: len(self._keys)]
        return names + self._keys[len(names) :]

    def _floats(self, rows: list[Any]) -> Rows | None:
        """The rows that are lists or tuples of as many floats as there are columns; None if they need a closer look."""
        if not self.all_floats or (matrix := floats(rows, len(self.columns))) is None:
            return None
        cells = self.columns[0].cell.of_floats(matrix)
        return None if cells is None else self._matrix(cells, Report())

    def _rows(self, rows: Sequence[Sequence[Any]]) -> Rows:
        """`rows` hold a value for each column of the signature."""
        shape = len(rows), len(self.columns)
        if self._names is not None and (matrix := self.flat([*itertools.chain.from_iterable(rows)], shape)):
            return matrix
        return self._table(list(zip(*rows, strict=True)), len(rows))

    def _split(self, names: list[str], cells: Sequence[Sequence[Any]], count: int) -> Rows:
        by_name = dict(zip(names, cells, strict=True))
        return self._table([by_name.get(key) for key in self._keys_by_position(names)], count)

    def _table(self, cells: Sequence[Sequence[Any] | None], count: int) -> Rows:
        """`cells` holds a column's values, or None, for each column of the signature."""
        report = Report()
        # Columns of one type are checked and converted as one, if no cell needs a closer look.
        ready: dict[int, Array] = {}
        for indices in self._groups:
            given = [values for index in indices if (values := cells[index]) is not None]
            if len(given) < len(indices):
                continue
            block = in_bulk(self.columns[indices[0]].cell, [*itertools.chain.from_iterable(given)], report)
            if block is not None and self._names is not None:
                return self._matrix(np.ascontiguousarray(block.reshape(-1, count).T), report)
            if block is not None:
                ready.update(zip(indices, block.reshape(-1, count), strict=True))
        columns: dict[str | int, Array] = {}
        for index, (column, values) in enumerate(zip(self.columns, cells, strict=True)):
            array = ready.get(index)
            if array is None and values is not None:
                array = parse_column(column.cell, values, column.required, report, column.place)
            elif array is None and column.required:
                report.missing(None, column.key, column.cell.name)
            if array is not None:
                columns[column.name] = array
        report.finish()
        complete = len(columns) == len(self.columns)
        if self._names is not None and complete:
            return self._matrix(_stack(list(columns.values())), report)
        kind = (self._kind, *columns, *map(_look, columns.values()))
        return Rows(columns, count, True, report.nulls, complete=complete, batch_key=kind)

    def _matrix(self, value: Array, report: Report) -> Rows:
        return Rows(value, len(value), True, report.nulls, names=self._names, batch_key=self._kind)


@dataclass(frozen=True)
class TensorSpec:
    """A signature's tensor; -1 in `shape` stands for any length."""

    name: str | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    cell: DataType

    @property
    def key(self) -> str:
        return self.name or ""

    @property
    def batched(self) -> bool:
        return self.shape[:1] == (-1,)

    def parse(self, value: Any, report: Report, shape: tuple[int, ...] | None = None) -> Array | None:
        """Nested lists as an array of `shape` (the tensor's own by default), or None with the reasons in `report`."""
        shape = self.shape if shape is None else shape
        expected = f"{self.dtype.name} of shape {list(shape)}"
        level, lengths = [value], []
        for axis, wanted in enumerate(shape):
            found = {len(part) if type(part) is list else -1 for part in level}
            if -1 in found:
                odd = next(part for part in level if type(part) is not list)
                report.mismatch(None, self.key, expected, odd, f"not a list at depth {axis + 1}")
                return None
            if len(found) > 1 or (found and wanted not in (-1, *found)):
                why = f"lengths along axis {axis}: {', '.join(map(str, sorted(found)[:5]))}"
                report.mismatch(None, self.key, expected, value, why)
                return None
            lengths.append(found.pop() if found else max(wanted, 0))
            level = list(itertools.chain.from_iterable(level))
        if lengths and not lengths[0]:
            report.mismatch(None, self.key, expected, value, "no rows")
            return None

        def place(index: int) -> tuple[int | None, str]:
            indices = [int(i) for i in np.unravel_index(index, lengths)] if lengths else []
            return (indices[0] if indices else None), self.key + "".join(f"[{i}]" for i in indices[1:])

        array = parse_column(self.cell, level, True, report, place)
        if array is None:
            return None
        try:
            array = array if self.dtype.kind in "SU" else array.astype(self.dtype, copy=False)
        except (TypeError, ValueError) as error:
            report.mismatch(None, self.key, expected, value, str(error)[:200])
            return None
        return array.reshape(lengths)

    def from_cells(self, cells: list[Any], report: Report) -> Array | None:
        """The values of a table's column, one a row: numbers, or lists that may be flattened."""
        nested = [type(cell) is list for cell in cells]
        if self.shape == (-1, 1) and not any(nested):
            cells = [[cell] for cell in cells]
        flat = all(nested) and not any(cell and type(cell[0]) is list for cell in cells)
        if len(self.shape) > 2 and flat and self.batched and -1 not in self.shape[1:]:
            array = self.parse(cells, report, (-1, math.prod(self.shape[1:])))
            return None if array is None else array.reshape(self.shape)
        return self.parse(cells, report)

    def json_schema(self, row: bool) -> Spec:
        schema: Spec = self.cell.schema
        for length in reversed(self.shape[1:] if row else self.shape):
            size = {} if length == -1 else {"minItems": length, "maxItems": length}
            schema = {"type": "array", "items": schema, **size}
        return schema

    def sample(self) -> Any:
        value = self.cell.sample
        for length in reversed(self.shape):
            value = [value] * (1 if length == -1 else length)
        return value


class TensorSchema:
    """A signature of one unnamed tensor, or of named ones."""

    all_floats = False

    def __init__(self, specs: Sequence[Spec]) -> None:
        self.specs = specs
        self.tensors = []
        for spec in specs:
            dtype = np.dtype(spec["tensor-spec"]["dtype"])
            shape = tuple(spec["tensor-spec"]["shape"])
            self.tensors.append(TensorSpec(spec.get("name"), dtype, shape, tensor_datatype(dtype)))
        self.named = self.tensors[0].name is not None
        self.inputs = describe(specs)

    def records(self, rows: Any) -> Rows:
        rows = _need_rows(rows, "a list of at least one object")
        _need_objects(rows)
        names = [tensor.key for tensor in self.tensors if tensor.key in rows[0]] if self.named else list(rows[0])
        _need_same_keys(rows, len(names))
        return self._cells(names, [[row.get(name, MISSING) for row in rows] for name in names], len(rows))

    def split(self, columns: Any, data: Any, index: Any = None) -> Rows:
        data = _need_rows(data, "data: a list of at least one row")
        _need_labels(index, len(data))  # arrays have none
        width = len(data[0]) if type(data[0]) is list else 0
        names = [t.key for t in self.tensors] if self.named else [str(i) for i in range(width)]
        if columns is not None:
            names = _need_names(columns)
        _need_lists(data, len(names))
        return self._cells(names, [list(column) for column in zip(*data, strict=True)], len(data))

    def csv(self, body: bytes) -> Rows:
        names, rows = _read_csv(body)
        cells = {t.key: t.cell for t in self.tensors} if self.named else dict.fromkeys(names, self.tensors[0].cell)
        parsers = [cells[name].from_text if name in cells else str for name in names]
        columns = [
            [None if text == "" else parse(text) for text in texts]
            for parse, texts in zip(parsers, zip(*rows, strict=True), strict=True)
        ]
        return self._cells(names, columns, len(rows))

    def instances(self, value: Any) -> Rows:
        if self.named and type(value) is list and value and set(map(type, value)) == {dict}:
            value = {t.key: [row.get(t.key, MISSING) for row in value] for t in self.tensors}
        elif self.named and type(value) is not dict and len(self.tensors) == 1:
            value = {self.tensors[0].key: value}
        if self.named and type(value) is not dict:
            raise refuse("an object of named tensors, or a list of such objects", value)
        return self._parse(value if self.named else {"": value}, TensorSpec.parse)

    def features(self, value: Any) -> Rows:
        """Darwin's form: the tensor or an object of tensors, each with or without its first axis of length -1."""
        if self.named and type(value) is list:
            return self.instances(value)
        if self.named and type(value) is not dict:
            raise refuse("an object of named tensors", value)
        given = value if self.named else {"": value}
        batched = [t for t in self.tensors if t.batched]
        rows = {t.key: [given[t.key]] for t in batched if _depth(given.get(t.key)) == len(t.shape) - 1}
        return self._parse({**given, **rows}, TensorSpec.parse)

    def sample(self, rows: Rows | None) -> Any:
        if rows is None:
            given = {tensor.key: tensor.sample() for tensor in self.tensors}
        else:
            given = rows.value if self.named else {"": rows.value}
        first = {t.key: given[t.key][0] if t.batched else given[t.key] for t in self.tensors}
        return first if self.named else first[""]

    def json_schema(self) -> dict[str, Any]:
        schemas = {tensor.key: tensor.json_schema(row=tensor.batched) for tensor in self.tensors}
        features = {"type": "object", "properties": schemas, "required": list(schemas)} if self.named else schemas[""]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **features}

    def _cells(self, names: list[str], columns: list[list[Any]], count: int) -> Rows:
        if self.named:
            return self._parse(dict(zip(names, columns, strict=True)), TensorSpec.from_cells)
        if len(columns) == 1:
            return self._parse({"": columns[0]}, TensorSpec.from_cells)
        rows = [list(row) for row in zip(*columns, strict=True)] or [[]] * count
        return self._parse({"": rows}, TensorSpec.parse)

    def _parse(self, given: Mapping[str, Any], parse: Callable[[TensorSpec, Any, Report], Array | None]) -> Rows:
        report, arrays = Report(), {}
        for tensor in self.tensors:
            if tensor.key in given:
                arrays[tensor.key] = parse(tensor, given[tensor.key], report)
            else:
                report.missing(None, tensor.key, f"{tensor.dtype.name} of shape {list(tensor.shape)}")
        report.finish()
        made = {name: array for name, array in arrays.items() if array is not None}
        first = next(iter(made.values()))
        count = len(first) if first.ndim else 1
        in_rows = all(tensor.batched and len(made[tensor.key]) == count for tensor in self.tensors)
        kind = tuple((t.key, made[t.key].dtype, made[t.key].shape[1:]) for t in self.tensors) if in_rows else None
        return Rows(made if self.named else first, count, unvalidated=report.nulls, batch_key=kind)


def _depth(value: Any) -> int:
    depth = 0
    while type(value) is list:
        depth += 1
        value = value[0] if value else None
    return depth


class UncheckedSchema:
    """No signature: the same objects that MLflow's scoring server would hand to such a model."""

    inputs: Sequence[Spec] = ()
    specs: Sequence[Spec] = ()
    all_floats = False

    def records(self, rows: Any) -> Rows:
        rows = _need_rows(rows, "a list of at least one object")
        if set(map(type, rows)) == {dict}:
            keys = set().union(*rows)
            _need_same_keys(rows, len(keys))
            _need_few([*keys])
        return self._rows(lambda: pd.DataFrame(rows), rows)

    def split(self, columns: Any, data: Any, index: Any = None) -> Rows:
        data = _need_rows(data, "data: a list of at least one row")
        labels = _need_labels(index, len(data))
        if type(columns) is list:
            if {list, dict} & set(map(type, columns)):
                raise refuse("a list of column names", columns)
            _need_short("column names", columns)
            _need_few(columns)
        return self._rows(lambda: pd.DataFrame(data, index=labels, columns=columns), data)

    def csv(self, body: bytes) -> Rows:
        text = body.decode("utf-8-sig")
        csv.field_size_limit(sys.maxsize)
        lines = csv.reader(io.StringIO(text, newline=""))
        try:
            # As pandas, which skips blank ones; what the first of data has more than the header are labels of rows.
            header, *first = itertools.islice((line for line in lines if len(line) > 1 or "".join(line).strip()), 2)
        except (csv.Error, ValueError):
            header, first = [], []  # pandas says what is wrong
        _need_few(header)
        _need_few([*range(max(map(len, first), default=0))])
        return self._rows(lambda: pd.read_csv(io.StringIO(text)), text)

    def instances(self, value: Any) -> Rows:
        if type(value) is list and value and set(map(type, value)) == {dict}:
            keys = dict.fromkeys(itertools.chain.from_iterable(value))
            _need_same_keys(value, len(keys))
            value = {key: [row[key] for row in value if key in row] for key in keys}
        if type(value) is dict:
            return self._rows(lambda: {key: _as_array(part) for key, part in value.items()}, value)
        return self._rows(lambda: _as_array(value), value)

    def features(self, value: Any) -> Rows:
        if type(value) is dict or (type(value) is list and dict in set(map(type, value))):
            return self.records([value] if type(value) is dict else value)
        return self.instances(value)

    def sample(self, rows: Rows | None) -> Any:  # noqa: ARG002 - the plans share one form
        return None

    def json_schema(self) -> dict[str, Any]:
        return {}

    def _rows(self, make: Callable[[], Any], given: Any) -> Rows:
        _need_shallow(given)
        try:
            value = make()
        except InputError:
            raise
        except Exception as error:  # whatever pandas and numpy raise, the cause is what they were given
            raise refuse("rows that make a table or an array", given, str(error)[:300]) from None
        sizes = [array.shape[:1] for array in value.values()] if isinstance(value, dict) else [value.shape[:1]]
        if not sizes or 0 in sizes[0] or (isinstance(value, pd.DataFrame) and not len(value)):
            raise refuse("at least one row", given)
        return Rows(value, sizes[0][0] if sizes[0] else 1, unvalidated=True)


class TypeHintSchema(TabularSchema):
    """A signature made from a Python model's type hints: MLflow itself checks the list against the hints."""

    def records(self, rows: Any) -> Rows:
        raise refuse("`inputs`, a list: this model takes what its type hints say, not a table", rows)

    def split(self, columns: Any, data: Any, index: Any = None) -> Rows:  # noqa: ARG002 - the plans share one form
        return self.records(data)

    def csv(self, body: bytes) -> Rows:
        return self.records(body.decode())

    def instances(self, value: Any) -> Rows:
        if type(value) is list and not value:
            raise refuse("a list of at least one value", value)
        _need_shallow(value)
        return Rows(value, len(value) if type(value) is list else 1, unvalidated=True)

    def features(self, value: Any) -> Rows:
        return self.instances(value if type(value) is list else [value])

    def sample(self, rows: Rows | None) -> Any:
        if rows is not None:
            return rows.value[:1] if type(rows.value) is list else rows.value
        return [super().sample(None) if self.named else self.columns[0].cell.sample]

    def json_schema(self) -> dict[str, Any]:
        schema = super().json_schema()
        items = schema if self.named else self.columns[0].cell.schema
        return {"$schema": schema.pop("$schema"), "type": "array", "items": items}


InputSchema = TabularSchema | TensorSchema | UncheckedSchema


def describe(specs: Sequence[Spec]) -> list[dict[str, Any]]:
    """A signature's inputs or outputs for a reader: `[{"name", "type", "required", …}, …]`."""
    described = []
    for index, spec in enumerate(specs):
        name = spec.get("name")
        if spec["type"] == "tensor":
            tensor = spec["tensor-spec"]
            rest: Spec = {"type": "tensor", "dtype": tensor["dtype"], "shape": list(tensor["shape"])}
            name = name or ""
        else:
            rest = {key: value for key, value in spec.items() if key != "name"}
        described.append({"name": str(index if name is None else name), "required": True, **rest})
    return described


def compile_schema(inputs: Sequence[Spec] | None, *, from_type_hint: bool = False) -> InputSchema:
    """The plan for a signature's inputs, in the JSON form that MLflow stores in `MLmodel`; None for no signature."""
    if not inputs:
        return UncheckedSchema()
    if from_type_hint:
        return TypeHintSchema(inputs)
    return TensorSchema(inputs) if inputs[0]["type"] == "tensor" else TabularSchema(inputs)


class ParamSchema:
    """A signature's parameters. Undeclared ones are ignored, absent ones left to MLflow, which knows their defaults."""

    def __init__(self, specs: Sequence[Spec] | None) -> None:
        self.specs = list(specs or ())
        self._cells = {spec["name"]: (datatype_of(spec), spec.get("shape") is not None) for spec in self.specs}

    def schema(self, name: str) -> Spec:
        """JSON Schema of the parameter `name`."""
        cell, many = self._cells[name]
        return or_null({"type": "array", "items": cell.schema} if many else cell.schema)

    def parse(self, given: Any) -> dict[str, Any]:
        """The declared parameters among `given`, as Python values; `ParamsError` lists all that don't fit."""
        if given is None or not self._cells:
            return {}
        if type(given) is not dict:
            raise ParamsError(refuse("params: an object", given).problems)
        report, result = Report(), {}
        for name, (cell, many) in self._cells.items():
            if name not in given:
                continue
            value, bad = given[name], report.at(None, f"params.{name}")
            if many and type(value) is not list:
                bad("", f"a list of {cell.name}", value, "")
            elif many:
                result[name] = [_param(cell, part, below(bad, f"[{index}]")) for index, part in enumerate(value)]
            else:
                result[name] = _param(cell, value, bad)
        report.finish(ParamsError)
        return result


def _param(cell: DataType, value: Any, bad: Bad) -> Any:
    if value is None:
        return None
    converted = cell.convert(value, bad)
    if cell.name == "datetime" and type(value) is str:
        # MLflow takes a date or a datetime, which nanoseconds would not become.
        unit = "D" if len(value) == 10 else "us"
        return np.datetime64(converted, "ns").astype(f"datetime64[{unit}]").item()
    return value if cell.name == "object" else converted


@dataclass(frozen=True)
class ModelSpec:
    """What requests to a model are read by, and its answers written by.

    `name` and `version` are what it is called in URLs. `methods` are those that it can be asked for; `method` is what
    it does unless asked. `classes` are the labels that the columns of its probabilities stand for, if they are known.
    It `streams` if it can answer piece by piece.
    """

    plan: InputSchema
    params: ParamSchema
    outputs: Sequence[Spec] = ()
    name: str = "model"
    version: str = ""
    methods: tuple[str, ...] = ("predict",)
    method: str = "predict"
    classes: Sequence[Any] | None = None
    streams: bool = False
