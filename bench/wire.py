"""What the servers are asked and what they answer: one request format for each, the one its own users send."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

JSON = "application/json"
CSV = "text/csv"

Columns = Sequence[str]
Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Format:
    """Where and how to ask for predictions. `read` finds them in the answer's body."""

    path: str
    content_type: str
    write: Callable[[Columns, Rows], bytes]
    read: Callable[[bytes], list[Any]]


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _mlflow_json(columns: Columns, rows: Rows) -> bytes:
    return _dump({"dataframe_split": {"columns": columns, "data": rows}})


def _mlflow_csv(columns: Columns, rows: Rows) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()


def _mlflow_answer(body: bytes) -> list[Any]:
    return list(json.loads(body)["predictions"])


def _v2(_: Columns, rows: Rows) -> bytes:
    data = [value for row in rows for value in row]
    tensor = {"name": "input", "shape": [len(rows), len(rows[0])], "datatype": "FP64", "data": data}
    # Without an id of ours every answer would bear one of its own, and no two would be alike.
    return _dump({"id": "1", "inputs": [tensor]})


def _v2_answer(body: bytes) -> list[Any]:
    return list(json.loads(body)["outputs"][0]["data"])


def _one_row(_: Columns, rows: Rows) -> bytes:
    [row] = rows
    return _dump({"input": row})


MLFLOW_JSON = Format("/invocations", JSON, _mlflow_json, _mlflow_answer)
MLFLOW_CSV = Format("/invocations", CSV, _mlflow_csv, _mlflow_answer)
V2_JSON = Format("/v2/models/model/infer", JSON, _v2, _v2_answer)
LITSERVE_JSON = Format("/predict", JSON, _one_row, lambda body: [json.loads(body)["output"]])
BENTOML_JSON = Format("/predict", JSON, lambda _, rows: _dump({"rows": rows}), lambda body: list(json.loads(body)))
