"""Signatures of one column or tensor for tests, and the arrays that requests become."""

from __future__ import annotations

from typing import Any

from darwin_runtime.schema.model_spec import compile_schema
from darwin_runtime.schema.rows import Rows


def schema_of(kind: Any, *, required: bool = True) -> Any:
    """The schema of one column, called c."""
    spec = {"type": kind} if isinstance(kind, str) else kind
    return compile_schema([{**spec, "name": "c", "required": required}])


def columns_by_name(rows: Rows) -> Any:
    """A table's columns by name, however it keeps them."""
    return rows.value if rows.names is None else dict(zip(rows.names, rows.value.T, strict=True))


def parsed_column(kind: Any, *values: Any, required: bool = True) -> Any:
    """The array that `values` become in a column of this type."""
    return columns_by_name(schema_of(kind, required=required).records([{"c": value} for value in values]))["c"]


ARRAY = {"type": "array", "items": {"type": "double"}}
OBJECT = {
    "type": "object",
    "properties": {"id": {"type": "long", "required": True}, "note": {"type": "string", "required": False}},
}
MAP = {"type": "map", "values": {"type": "integer"}}
AB: list[dict[str, Any]] = [{"type": "long", "name": "a"}, {"type": "double", "name": "b", "required": False}]


def tensor_spec(dtype: str, *shape: int, name: str | None = None) -> dict[str, Any]:
    spec: dict[str, Any] = {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}
    return spec if name is None else {**spec, "name": name}


NUMBER_DTYPES = {"double": "float64", "float": "float32", "long": "int64", "integer": "int32"}
