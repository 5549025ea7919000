"""Made-up rows to try a model on, as requests write them, over the types of its signature."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from darwin_runtime.model.native import NotEquivalent
from darwin_runtime.schema.model_spec import InputSchema
from darwin_runtime.schema.rows import Array, Rows
from darwin_runtime.schema.tabular import TabularSchema
from darwin_runtime.schema.tensors import TensorSchema

NUMBER_DTYPES = {"integer": "int32", "long": "int64", "float": "float32", "double": "float64"}
SCALAR_TYPES = frozenset({*NUMBER_DTYPES, "boolean", "string", "binary", "datetime"})

EXTREMES = (0.0, 1.0, -1.0, 1e-40, 1e-310, 2.0**24 + 1, 1e30, math.inf, -math.inf)


@dataclass(frozen=True)
class Field:
    """A column of sample rows: values like the `near` ones, as requests write them. `number` is its dtype."""

    near: list[Any]
    number: np.dtype[Any] | None = None
    nulls: bool = False

    def typical(self, rng: np.random.Generator, count: int, shown: int) -> list[Any]:
        """`count` values: the first `shown` of the example, then numbers near those, or of any usual magnitude."""
        first = [self.near[index % len(self.near)] for index in range(shown)] if self.near else []
        count -= len(first)
        picked = [self.near[index] for index in rng.integers(len(self.near), size=count)] if self.near else None
        if self.number is None:
            return first + (picked or [])
        values = rng.normal(size=count) * 10 ** rng.uniform(-1, 3, size=count)
        if picked:
            found = np.array(picked, dtype=np.float64)
            values = np.where(np.isnan(found) | (found == 0), values, found)
        return first + _fit(values * 10 ** (rng.uniform(-1, 1, size=count) * (np.arange(count) % 3) / 2), self.number)

    def odd(self) -> list[Any]:
        """One for each of `EXTREMES`: what is nearest to it in this type. Where this is no number, an ordinary one."""
        return self.near[:1] * len(EXTREMES) if self.number is None else _extremes(self.number)


def _fit(values: Array, number: np.dtype[Any]) -> list[Any]:
    if number.kind == "f":
        return list(np.clip(values, np.finfo(number).min, np.finfo(number).max).astype(number).tolist())
    limits = np.iinfo(number)
    return [int(min(max(value, limits.min), limits.max)) for value in values.tolist()]


@functools.cache
def _extremes(number: np.dtype[Any]) -> list[Any]:
    return _fit(np.array(EXTREMES), number)


def _columns_to_fill(plan: InputSchema, example: Rows | None) -> list[Field]:
    """The columns of a table, or of an unnamed tensor that is like one."""
    if isinstance(plan, TabularSchema):
        fields = []
        shown = _example_columns(example) if example else {}
        for column in plan.columns:
            cell = column.datatype
            if cell.name not in SCALAR_TYPES:
                raise NotEquivalent(f"column {column.key!r} is of {cell.name}")
            number = np.dtype(NUMBER_DTYPES[cell.name]) if cell.name in NUMBER_DTYPES else None
            near = shown.get(column.key) or ([] if number else [cell.sample])
            nulls = "null" in cell.json_schema["type"] or (not column.required and number is None)
            fields.append(Field(near, number, nulls))
        return fields
    if isinstance(plan, TensorSchema) and not plan.named and len(plan.tensors[0].shape) == 2:
        tensor = plan.tensors[0]
        width = example.value.shape[1] if example else tensor.shape[1]
        if tensor.batched and width > 0 and tensor.dtype.kind in "iuf":
            near = [_wire(values) for values in example.value.T] if example else [[]] * width
            return [Field(values, tensor.dtype, tensor.dtype.kind == "f") for values in near]
    raise NotEquivalent("its input is not a table" if plan.inputs else "it has no signature")


def _example_columns(example: Rows) -> dict[str, list[Any]]:
    """A table's columns by name, as requests write them."""
    columns = example.value.items() if example.names is None else zip(example.names, example.value.T, strict=True)
    return {str(name): _wire(values) for name, values in columns}


def _wire(values: Array) -> list[Any]:
    if values.dtype.kind == "M":
        return [None if np.isnat(value) else str(value) for value in values]
    if values.dtype.kind == "f":
        return [None if np.isnan(value) else float(value) for value in values]
    plain = values.tolist()
    return [base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in plain]


@dataclass(frozen=True)
class SampleRows:
    """Rows to try a model on, as requests write them: 64 like the example, odd ones, and ones with nulls."""

    plan: InputSchema
    fields: list[Field]
    typical: list[list[Any]]
    odd: list[list[Any]]
    missing: list[list[Any]]

    def rows(self, values: list[list[Any]]) -> Rows:
        return self.plan.split(None, values)

    @classmethod
    def of(cls, plan: InputSchema, example: Rows | None) -> SampleRows:
        fields = _columns_to_fill(plan, example)
        rng = np.random.default_rng(0)
        shown = min(example.count, 8) if example else 0
        typical = _transpose([field.typical(rng, 64, shown) for field in fields])
        odd = _transpose([field.odd() for field in fields])
        odd.append([odd[index % len(odd)][index] for index in range(len(fields))])
        nullable = [index for index, field in enumerate(fields) if field.nulls]
        alone = [{index} for index in nullable[:3]]
        missing = [
            [None if index in absent else value for index, value in enumerate(row)]
            for absent, row in zip([*alone, set(nullable)], typical, strict=False)
            if absent
        ]
        return cls(plan, fields, typical, odd + missing, missing)


def _transpose(columns: list[list[Any]]) -> list[list[Any]]:
    return [list(row) for row in zip(*columns, strict=True)]


def forms(plan: InputSchema, example: Rows | None) -> Iterator[Rows]:
    """Every form that rows can have for MLflow's check of the schema, which looks at types, names and labels."""
    if isinstance(plan, TensorSchema):
        if any(tensor.dtype.kind not in "iufbM" for tensor in plan.tensors):
            raise NotEquivalent("it takes tensors of text")
        samples = {tensor.key: tensor.sample() for tensor in plan.tensors}
        yield plan.instances(samples if plan.named else samples[""])
    elif isinstance(plan, TabularSchema):
        fields = _columns_to_fill(plan, example)
        full = _transpose([field.odd() for field in fields])[-3:]
        nulls = [None if field.nulls else value for field, value in zip(fields, full[0], strict=True)]
        yield plan.split(None, full)
        yield plan.split(None, [*full, nulls], ["b", 1, "b", None])
        if any(field.number is None for field in fields):
            yield plan.split(None, [nulls])
        if not all(column.required for column in plan.columns):
            yield plan.records(
                [{c.key: v for c, v in zip(plan.columns, row, strict=True) if c.required} for row in full]
            )
