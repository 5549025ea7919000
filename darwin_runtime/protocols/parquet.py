"""Parquet to rows, within bounds: a Parquet file can hold any number of equal cells, of any length, in a few bytes."""

from __future__ import annotations

import decimal
import io
from dataclasses import replace
from typing import Any

import pandas as pd

from darwin_runtime.errors import BadRequest, TooLarge, UnsupportedMediaType
from darwin_runtime.protocols.base import CSV, JSON, PARQUET
from darwin_runtime.protocols.encoding import plain
from darwin_runtime.schema.checks import MAX_CELLS
from darwin_runtime.schema.model_spec import InputSchema
from darwin_runtime.schema.rows import Rows

MAX_BYTES = 64 * 1024 * 1024


def read_parquet(body: bytes, plan: InputSchema) -> Rows:
    """The rows of a Parquet file. Raises `BadRequest`, `InputError`, `TooLarge` or `UnsupportedMediaType`."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedMediaType(
            f"{PARQUET} needs the library pyarrow, which is not installed: send {JSON} or {CSV}"
        ) from None
    try:
        _check(pyarrow.parquet.ParquetFile(io.BytesIO(body)), body)
        table = pyarrow.parquet.ParquetFile(io.BytesIO(body)).read()
        if not plan.inputs:
            return Rows(table.to_pandas(), table.num_rows, unvalidated=True)
        index, table = _without_index(table, [spec.get("name") for spec in plan.specs])
        rows = [list(map(_as_json, row.values())) for row in table.to_pylist()]
    except TooLarge:
        raise
    except Exception as error:  # of many kinds, all of them about the body
        raise BadRequest(f"the body is not Parquet: {error}") from None
    made = plan.split(table.column_names, rows)
    return made if index is None else replace(made, index=index, batch_key=None)


def _check(file: Any, body: bytes) -> None:
    """Raise `TooLarge` for what a few bytes make large: cells that are equal, or so many in a row, or long texts."""
    import pyarrow.parquet

    told, schema = file.metadata, file.schema
    if told.num_rows * told.num_columns > MAX_CELLS:
        raise TooLarge(f"the Parquet file has {told.num_rows * told.num_columns} cells, more than {MAX_CELLS}")
    # In a file that is not sound, pyarrow ends the process where it is asked for a column's metadata.
    file.scan_contents()
    groups = range(told.num_row_groups)
    values = sum(told.row_group(group).column(index).num_values for group in groups for index in range(len(schema)))
    if values > MAX_CELLS:
        raise TooLarge(f"the Parquet file has {values} values, more than {MAX_CELLS}")
    columns = map(schema.column, range(len(schema)))
    texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type != "DECIMAL"]
    packed = pyarrow.parquet.ParquetFile(io.BytesIO(body), read_dictionary=texts).read()
    size = sum(_unpacked_bytes(chunk) for column in packed.columns for chunk in column.chunks)
    if size > MAX_BYTES:
        raise TooLarge(f"the Parquet file has {size} bytes of data, more than {MAX_BYTES}")


def _unpacked_bytes(array: Any) -> int:
    """How large a pyarrow array is without dictionaries, in which equal texts are one."""
    import pyarrow.compute

    if hasattr(array, "dictionary"):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return int(pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)
    if hasattr(array, "keys"):  # a map
        return _unpacked_bytes(array.keys) + _unpacked_bytes(array.items)
    if not hasattr(array, "flatten") or not array.type.num_fields:
        return int(array.nbytes)
    parts = array.flatten()
    return sum(map(_unpacked_bytes, parts if isinstance(parts, list) else [parts]))


def _without_index(table: Any, wanted: list[Any]) -> tuple[Any, Any]:
    """The labels of the rows, if pandas wrote any, and the table without their columns, unless they are `wanted`."""
    labels = (table.schema.pandas_metadata or {}).get("index_columns", [])
    stored = [label for label in labels if isinstance(label, str)]
    usual = pd.RangeIndex(table.num_rows)
    index = table.select(stored).to_pandas().index if labels else usual
    if len(index) != table.num_rows:
        raise ValueError(f"{len(index)} labels for {table.num_rows} rows")
    table = table.drop_columns([label for label in stored if label not in wanted])
    return None if index.identical(usual) else index, table


def _as_json(value: Any) -> Any:
    """`value` as JSON would have said it, but for bytes."""
    if isinstance(value, list):
        return list(map(_as_json, value))
    if isinstance(value, decimal.Decimal):
        # MLflow, too, makes floats of them.
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return value if isinstance(value, bytes) else plain(value)
