"""No signature: requests become the objects that MLflow's scoring server would make of them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from darwin_runtime.errors import InputError
from darwin_runtime.schema.checks import (
    is_missing,
    require_few_columns,
    require_little_padding,
    require_records,
    require_row_labels,
    require_rows,
    require_same_keys,
    require_scalars,
    require_shallow,
    require_short_integers,
)
from darwin_runtime.schema.csv import first_csv_lines
from darwin_runtime.schema.report import refuse
from darwin_runtime.schema.rows import Array, Rows
from darwin_runtime.schema.signature import Spec


class UncheckedSchema:
    """The schema of a model without a signature: the model gets the objects that MLflow's scoring server would pass."""

    inputs: Sequence[Spec] = ()
    specs: Sequence[Spec] = ()
    all_floats = False
    checked = False

    def records(self, rows: Any) -> Rows:
        rows = require_rows(rows, "a list of objects", empty=True)
        if set(map(type, rows)) == {dict}:
            keys = set().union(*rows)
            require_same_keys(rows, len(keys))
            require_few_columns([*keys])
        return self._rows(lambda: pd.DataFrame(rows), rows)

    def split(self, columns: Any, data: Any, index: Any = None) -> Rows:
        data = require_rows(data, "data: a list of rows", empty=True)
        labels = require_row_labels(index, len(data))
        if type(columns) is list:
            require_scalars(columns, "a list of column names")
            if any(map(is_missing, columns)):
                raise refuse("a list of column names", columns, "null or NaN is none")
            require_short_integers("column names", columns)
            require_few_columns(columns)
        return self._rows(lambda: pd.DataFrame(data, index=labels, columns=columns), data)

    def csv(self, body: bytes) -> Rows:
        text = body.decode("utf-8-sig")
        header, first = first_csv_lines(text)
        require_few_columns(header)
        # Values of the first row beyond the header are labels of rows.
        require_few_columns(range(len(first)))
        return self._rows(lambda: pd.read_csv(io.StringIO(text)), text)

    def instances(self, value: Any) -> Rows:
        if type(value) is list and value and type(value[0]) is dict:
            rows = require_records(value)
            keys = dict.fromkeys(itertools.chain.from_iterable(rows))
            require_same_keys(rows, len(keys))
            value = {key: [row[key] for row in rows if key in row] for key in keys}
        if type(value) is dict:
            lengths = {len(part) if type(part) is list else None for part in value.values()}
            if None in lengths or len(lengths) > 1:
                raise refuse("as many values for each name as for the others", value)
            return self.inputs_as_sent(value)
        return self._rows(lambda: _numpy_array(value), value)

    def inputs_as_sent(self, value: Any) -> Rows:
        """The `inputs` of MLflow, where objects stay objects, and their values need not be equally many."""
        if type(value) is dict:
            return self._rows(lambda: _numpy_arrays(value), value)
        if type(value) is list and value and set(map(type, value)) == {dict}:
            return self._rows(lambda: list(map(_numpy_arrays, value)), value)
        return self._rows(lambda: _numpy_array(value), value)

    def features(self, value: Any) -> Rows:
        if type(value) is dict or (type(value) is list and dict in set(map(type, value))):
            return self.records([value] if type(value) is dict else value)
        return self.instances(value)

    def sample(self, rows: Rows | None) -> Any:  # noqa: ARG002 - the schemas share one form
        return None

    def json_schema(self) -> dict[str, Any]:
        return {}

    def _rows(self, make: Callable[[], Any], given: Any) -> Rows:
        require_shallow(given)
        try:
            value = make()
        except InputError:
            raise
        except Exception as error:  # any error of pandas and numpy has its cause in the request
            raise refuse("rows that make a table or an array", given, str(error)[:300]) from None
        if isinstance(value, list):
            return Rows(value, len(value), unvalidated=True)
        sizes = [array.shape[:1] for array in value.values()] if isinstance(value, dict) else [value.shape[:1]]
        if not sizes:
            raise refuse("an object of at least one name", given)
        return Rows(value, sizes[0][0] if sizes[0] else 1, unvalidated=True)


def _numpy_arrays(given: dict[str, Any]) -> dict[str, Array]:
    return {key: _numpy_array(part) for key, part in given.items()}


def _numpy_array(value: Any) -> Array:
    """`value` as an array of numpy's choice, where each text takes the room of the longest."""
    lists, count = [value], 0
    lengths: list[int] = []
    while lists := [part for part in lists if type(part) is list]:
        lists = [*itertools.chain.from_iterable(lists)]
        count += len(lists)
        lengths += [len(part) for part in lists if type(part) is str]
    require_little_padding(value, count, lengths)
    return np.array(value)
