"""A signature of tensors, compiled to a parser of requests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from darwin_runtime.schema.checks import (
    cells_of_rows,
    require_column_names,
    require_lists,
    require_records,
    require_row_labels,
    require_rows,
    require_same_keys,
)
from darwin_runtime.schema.columns import parse_column
from darwin_runtime.schema.csv import parse_texts, read_csv_texts
from darwin_runtime.schema.datatypes import DataType, tensor_datatype
from darwin_runtime.schema.report import MISSING, Report, refuse
from darwin_runtime.schema.rows import Array, Rows
from darwin_runtime.schema.signature import JSON_SCHEMA_DIALECT, Spec, describe


@dataclass(frozen=True)
class TensorSpec:
    """A signature's tensor; -1 in `shape` stands for any length."""

    name: str | int | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    datatype: DataType

    @property
    def key(self) -> str:
        return "" if self.name is None else str(self.name)

    @property
    def batched(self) -> bool:
        return self.shape[:1] == (-1,)

    def parse(self, value: Any, report: Report, shape: tuple[int, ...] | None = None) -> Array | None:
        """Nested lists as an array of `shape` (the tensor's own by default), or None with the reasons in `report`."""
        shape = self.shape if shape is None else shape
        expected = f"{self.dtype.name} of shape {list(shape)}"
        level, lengths = [value], list[int]()
        for axis, wanted in enumerate(shape):
            found = {len(part) if type(part) is list else -1 for part in level}
            if -1 in found:
                index, odd = next((index, part) for index, part in enumerate(level) if type(part) is not list)
                row = index // math.prod(lengths[1:]) if lengths else None
                report.mismatch(row, self.key, expected, odd, f"not a list at depth {axis + 1}")
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

        array = parse_column(self.datatype, level, True, report, place)
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
        json_schema: Spec = self.datatype.json_schema
        for length in reversed(self.shape[1:] if row else self.shape):
            size = {} if length == -1 else {"minItems": length, "maxItems": length}
            json_schema = {"type": "array", "items": json_schema, **size}
        return json_schema

    def sample(self) -> Any:
        value = self.datatype.sample
        for length in reversed(self.shape):
            value = [value] * (1 if length == -1 else length)
        return value


class TensorSchema:
    """A signature of one unnamed tensor, or of named ones."""

    all_floats = False
    checked = True

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
        rows = require_records(rows)
        names = [tensor.key for tensor in self.tensors if tensor.key in rows[0]] if self.named else list(rows[0])
        require_same_keys(rows, len(names))
        return self._cells(names, [[row.get(name, MISSING) for row in rows] for name in names], len(rows))

    def split(self, columns: Any, data: Any, index: Any = None) -> Rows:
        data = require_rows(data, "data: a list of at least one row")
        require_row_labels(index, len(data))  # arrays have none
        width = len(data[0]) if type(data[0]) is list else 1
        names = [t.key for t in self.tensors] if self.named else [str(i) for i in range(width)]
        if columns is not None:
            names = require_column_names(columns)
        data = cells_of_rows(data) if len(names) == 1 else data
        require_lists(data, len(names))
        return self._cells(names, [list(column) for column in zip(*data, strict=True)], len(data))

    def csv(self, body: bytes) -> Rows:
        names, rows = read_csv_texts(body)
        tensors = {t.key: t for t in self.tensors} if self.named else dict.fromkeys(names, self.tensors[0])
        parsers = {name: tensor.datatype.from_text for name, tensor in tensors.items()}
        return self._cells(names, parse_texts(names, rows, parsers), len(rows))

    def instances(self, value: Any) -> Rows:
        if self.named and type(value) is list and value and set(map(type, value)) == {dict}:
            value = {t.key: [row.get(t.key, MISSING) for row in value] for t in self.tensors}
        elif self.named and type(value) is not dict and len(self.tensors) == 1:
            value = {self.tensors[0].key: value}
        if self.named and type(value) is not dict:
            raise refuse("an object of named tensors, or a list of such objects", value)
        return self._parse(value if self.named else {"": value}, TensorSpec.parse)

    # Without a signature, these differ.
    inputs_as_sent = instances

    def features(self, value: Any) -> Rows:
        """Darwin's form: the tensor or an object of tensors, each with or without its first axis of length -1."""
        if self.named and type(value) is list:
            return self.instances(value)
        if self.named and type(value) is not dict:
            raise refuse("an object of named tensors", value)
        given = value if self.named else {"": value}
        batched = [t for t in self.tensors if t.batched]
        rows = {
            t.key: [given[t.key]] for t in batched if t.key in given and _list_depth(given[t.key]) == len(t.shape) - 1
        }
        return self._parse({**given, **rows}, TensorSpec.parse)

    def sample(self, rows: Rows | None) -> Any:
        if rows is None:
            given = {tensor.name: tensor.sample() for tensor in self.tensors}
        else:
            given = rows.value if self.named else {None: rows.value}
        first = {t.key: given[t.name][0] if t.batched else given[t.name] for t in self.tensors}
        return first if self.named else first[""]

    def json_schema(self) -> dict[str, Any]:
        schemas = {tensor.key: tensor.json_schema(row=tensor.batched) for tensor in self.tensors}
        features = {"type": "object", "properties": schemas, "required": list(schemas)} if self.named else schemas[""]
        return {"$schema": JSON_SCHEMA_DIALECT, **features}

    def _cells(self, names: list[str], columns: Sequence[Sequence[Any]], count: int) -> Rows:
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
        made = {tensor.name: array for tensor in self.tensors if (array := arrays[tensor.key]) is not None}
        first = made[self.tensors[0].name]
        count = len(first) if first.ndim else 1
        in_rows = all(tensor.batched and len(made[tensor.name]) == count for tensor in self.tensors)
        parts = [(tensor.key, made[tensor.name]) for tensor in self.tensors]
        batch_key = tuple((key, array.dtype, array.shape[1:]) for key, array in parts) if in_rows else None
        return Rows(made if self.named else first, count, unvalidated=report.nulls, batch_key=batch_key)


def _list_depth(value: Any) -> int:
    depth = 0
    while type(value) is list:
        depth += 1
        value = value[0] if value else None
    return depth
