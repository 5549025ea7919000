"""A signature of typed columns, compiled to a parser of requests.

The parser takes one of the wire shapes (records, split, inputs, CSV, Darwin's features) and returns `Rows`. The
dtypes of the rows are exactly those that the signature names. Else the parser raises `InputError` with every bad value.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from darwin_runtime.schema.checks import (
    MAX_REPEATED,
    cells_of_rows,
    require_column_names,
    require_lists,
    require_records,
    require_row_labels,
    require_rows,
    require_shallow,
)
from darwin_runtime.schema.columns import Column, parse_column, parse_in_bulk
from darwin_runtime.schema.csv import parse_texts, plain_header, read_csv_matrix, read_csv_texts
from darwin_runtime.schema.datatypes import datatype_of, or_null
from darwin_runtime.schema.doubles import double_matrix
from darwin_runtime.schema.hints import with_floats
from darwin_runtime.schema.report import MISSING, Report, refuse
from darwin_runtime.schema.rows import Array, Rows, dataframe_type, stack_columns
from darwin_runtime.schema.signature import JSON_SCHEMA_DIALECT, Spec, describe


class TabularSchema:
    """A signature of typed columns. Extra columns are ignored; the order of named ones does not matter.

    If `all_floats`, complete tables are one matrix of them.
    """

    checked = True

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
            of_type.setdefault(column.datatype.name, []).append(index)
        self._groups = [indices for indices in of_type.values() if len(indices) > 1]
        # Columns of one numeric type make a matrix, called this.
        uniform = self._distinct and len(of_type) == 1 and int in self.columns[0].datatype.plain
        self._names = pd.DataFrame({column.name: [] for column in self.columns}).columns if uniform else None
        self._dtype = self.columns[0].datatype.build([]).dtype
        self.all_floats = uniform and self.columns[0].datatype.name in ("float", "double")
        self._batch_key = f"{'matrix' if uniform else 'table'} of {specs}"
        self.inputs = describe(specs)

    def records(self, rows: Any) -> Rows:
        """`[{"a": 1, "b": 2}, …]`: an object per row."""
        rows = require_records(rows)
        keys = self._keys_by_position(rows[0])
        try:
            picked = list(map(_values_at(keys), rows))
        except KeyError:
            table = self._table([[row.get(key, MISSING) for row in rows] for key in keys], len(rows))
        else:
            table = self._floats(picked) or self._rows(picked)
        return table if self.named else self._called(table, keys)

    def split(self, columns: Any, data: Any, index: Any = None) -> Rows:
        """`["a", "b"]` and `[[1, 2], …]`: names once, then a list per row; without names, by position."""
        if data == [] and columns:
            require_row_labels(index, 0)
            return self._no_rows(require_column_names(columns))
        data = require_rows(data, "data: a list of at least one row")
        if columns is None or (columns == self._keys and self._distinct):
            rows = self.positional(cells_of_rows(data) if len(self.columns) == 1 else data)
            rows = rows if self.named else self._called(rows, columns)
        else:
            names = require_column_names(columns)
            data = cells_of_rows(data) if len(names) == 1 else data
            require_lists(data, len(names))
            rows = self._split(names, list(zip(*data, strict=True)), len(data))
            called = dict(zip(names, columns, strict=True))
            rows = self._called(rows, [called.get(key) for key in self._keys_by_position(names)])
        return rows if index is None else replace(rows, index=require_row_labels(index, rows.count), batch_key=None)

    def positional(self, rows: list[Any]) -> Rows:
        """`[[1, 2], …]`: a list per row, in the signature's order."""
        if matrix := self._floats(rows):
            return matrix
        require_lists(rows, len(self.columns))
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
        array = parse_in_bulk(self.columns[0].datatype, values, report)
        return None if array is None else self._matrix(array.reshape(shape), report)

    def arrays(self, columns: Mapping[str, Any]) -> Rows:
        """`{"a": [1, …], "b": 2}`: a list per column, all equally long, or a single value for all rows."""
        report = Report()
        wanted = set(self._keys)
        used = {name: part for name, part in columns.items() if name in wanted or not self.named}
        lengths = {name: len(part) for name, part in used.items() if type(part) is list}
        count = max(lengths.values(), default=0)
        for name, length in lengths.items():
            if length != count:
                report.mismatch(None, name, f"{count} values, as many as the longest column", columns[name])
        single = [(name, value) for name, value in used.items() if type(value) is not list]
        for name, value in single:
            if type(value) is dict:
                report.mismatch(None, name, "a list, a value for each row, or a single value for all", value)
            elif count * len(single) > MAX_REPEATED:
                report.mismatch(None, name, "a list, a value for each row", value, f"for {count} rows")
        report.finish()
        if not lengths:
            raise refuse("a list of at least one value in each column", dict(columns))
        used = {name: part if type(part) is list else [part] * count for name, part in used.items()}
        if not count:
            return self._no_rows(list(used))
        return self._split(list(used), list(used.values()), count)

    def instances(self, value: Any) -> Rows:
        """The `instances` or `inputs` of TensorFlow Serving's REST form: rows, or an object of columns."""
        if type(value) is dict:
            lists = any(type(part) is list for part in value.values())
            if not lists or self._row_of_lists:
                return self.records([value])
            return self._called(self.arrays(value), self._keys_by_position(value))
        single = len(self.columns) == 1
        if type(value) is not list:
            if single:
                return self._table([[value]], 1)
            raise refuse("a list of rows or an object of columns", value)
        if single and not value and not self.columns[0].datatype.nested:
            return self._no_rows(self._keys)
        rows = require_rows(value, "a list of at least one row")
        types = set(map(type, rows))
        if types == {dict}:
            return self.records(rows)
        if single and self.columns[0].datatype.name.startswith("array"):
            return self._table([rows if list in types else [rows]], len(rows) if list in types else 1)
        if single and list not in types:
            return self._table([rows], len(rows))
        return self.positional(rows)

    # Without a signature, these differ.
    inputs_as_sent = instances

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
        names, rows = read_csv_texts(body)
        keys = self._keys_by_position(names)
        if not rows:
            return self._no_rows(names)
        parsers = dict(zip(keys, (c.datatype.from_text for c in self.columns), strict=True))
        return self._called(self._split(names, parse_texts(names, rows, parsers), len(rows)), keys)

    def _csv_of_numbers(self, body: bytes) -> Rows | None:
        """The rows of `csv`, read as JSON; None if they could differ, or make no matrix."""
        if self._names is None:
            return None
        if b"\r" in body:
            body = body.replace(b"\r\n", b"\n")
            if b"\r" in body:
                return None
        if (header := plain_header(body)) is None:
            return None
        names, begin = header
        where, keys = {name: index for index, name in enumerate(names)}, self._keys_by_position(names)
        order = [where.get(key, -1) for key in keys]
        if len(where) < len(names) or -1 in order:
            return None
        matrix = read_csv_matrix(body, begin, len(names))
        if matrix is None:
            return None
        if order != [*range(len(names))]:
            matrix = matrix.take(order, axis=1)
        cells = self.columns[0].datatype.of_doubles(matrix)
        return None if cells is None else self._called(self._matrix(cells, Report()), keys)

    def sample(self, rows: Rows | None) -> Any:
        """`features` for one row: the first of `rows`, or else made up from the types."""
        if rows is None:
            return {column.key: column.datatype.sample for column in self.columns}
        return rows.first()

    def json_schema(self) -> dict[str, Any]:
        """JSON Schema (draft 2020-12) of `features` for one row."""
        return {
            "$schema": JSON_SCHEMA_DIALECT,
            "type": "object",
            "properties": {
                c.key: c.datatype.json_schema if c.required else or_null(c.datatype.json_schema) for c in self.columns
            },
            "required": [column.key for column in self.columns if column.required],
        }

    def _keys_by_position(self, given: Iterable[str]) -> list[str]:
        if self.named or set(self._keys) <= set(given):
            return self._keys
        names = list(given)[: len(self._keys)]
        return names + self._keys[len(names) :]

    def _called(self, rows: Rows, names: Sequence[Any] | None) -> Rows:
        """`rows` with the client's `names` of the columns, where the signature has none, as MLflow leaves them."""
        if self.named or names is None:
            return rows
        if rows.names is not None:
            return replace(rows, names=pd.Index(names), batch_key=(rows.batch_key, *names))
        value = dict(zip(names, rows.value.values(), strict=True))
        return replace(rows, value=value, batch_key=(rows.batch_key, *names))

    def _floats(self, rows: list[Any]) -> Rows | None:
        """The rows that are lists or tuples of as many floats as there are columns; None if they need a closer look."""
        if not self.all_floats or (matrix := double_matrix(rows, len(self.columns))) is None:
            return None
        cells = self.columns[0].datatype.of_floats(matrix)
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

    def _no_rows(self, names: list[str]) -> Rows:
        """No row of the columns `names`, as a table of their types; not every model can answer that."""
        report, columns = Report(), {}
        for column, key in zip(self.columns, self._keys_by_position(names), strict=True):
            if key in names:
                empty = column.datatype.build([])
                dtype = str if column.datatype.name == "string" else empty.dtype
                columns[column.name if self.named else key] = pd.Series(empty, dtype=dtype)
            elif column.required:
                report.missing(None, column.key, column.datatype.name)
        report.finish()
        return Rows(pd.DataFrame(columns), 0, unvalidated=True)

    def _table(self, cells: Sequence[Sequence[Any] | None], count: int) -> Rows:
        """`cells` holds a column's values, or None, for each column of the signature."""
        report = Report()
        # Columns of one type are checked and converted as one, if no value needs a closer look.
        ready: dict[int, Array] = {}
        for indices in self._groups:
            given = [values for index in indices if (values := cells[index]) is not None]
            if len(given) < len(indices):
                continue
            block = parse_in_bulk(self.columns[indices[0]].datatype, [*itertools.chain.from_iterable(given)], report)
            if block is not None and self._names is not None:
                return self._matrix(np.ascontiguousarray(block.reshape(-1, count).T), report)
            if block is not None:
                ready.update(zip(indices, block.reshape(-1, count), strict=True))
        columns: dict[str | int, Array] = {}
        for index, (column, values) in enumerate(zip(self.columns, cells, strict=True)):
            array = ready.get(index)
            if array is None and values is not None:
                array = parse_column(column.datatype, values, column.required, report, column.place)
            elif array is None and column.required:
                report.missing(None, column.key, column.datatype.name)
            if array is not None:
                columns[column.name] = array
        report.finish()
        complete = len(columns) == len(self.columns)
        if self._names is not None and complete:
            return self._matrix(stack_columns(list(columns.values())), report)
        batch_key = (self._batch_key, *columns, *map(dataframe_type, columns.values()))
        return Rows(columns, count, True, report.nulls, complete=complete, batch_key=batch_key)

    def _matrix(self, value: Array, report: Report) -> Rows:
        return Rows(value, len(value), True, report.nulls, names=self._names, batch_key=self._batch_key)


class TypeHintSchema(TabularSchema):
    """A signature made from a Python model's type hints: MLflow itself checks the list against the hints."""

    checked = False

    def records(self, rows: Any) -> Rows:
        raise refuse("`inputs`, a list: this model takes what its type hints say, not a table", rows)

    def split(self, columns: Any, data: Any, index: Any = None) -> Rows:  # noqa: ARG002 - the schemas share one form
        return self.records(data)

    def csv(self, body: bytes) -> Rows:
        return self.records(body.decode())

    def instances(self, value: Any) -> Rows:
        if type(value) is list and not value:
            raise refuse("a list of at least one value", value)
        require_shallow(value)
        if type(value) is not list:
            return Rows(with_floats(self.specs[0], value), 1, unvalidated=True)
        return Rows([with_floats(self.specs[0], part) for part in value], len(value), unvalidated=True)

    inputs_as_sent = instances

    def features(self, value: Any) -> Rows:
        return self.instances(value if type(value) is list else [value])

    def sample(self, rows: Rows | None) -> Any:
        if rows is not None:
            return rows.value[:1] if type(rows.value) is list else rows.value
        return [super().sample(None) if self.named else self.columns[0].datatype.sample]

    def json_schema(self) -> dict[str, Any]:
        json_schema = super().json_schema()
        items = json_schema if self.named else self.columns[0].datatype.json_schema
        return {"$schema": json_schema.pop("$schema"), "type": "array", "items": items}


def _values_at(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that takes the values at `keys` from a row, and raises `KeyError` if one is not there."""
    # With one key, itemgetter() takes a bare value.
    return operator.itemgetter(*keys) if len(keys) > 1 else lambda row: (row[keys[0]],)
