"""The same rows through every protocol give the same predictions, for every kind of signature."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import requests

from tests.support import tensors
from tests.support.models import IRIS, NESTED_ROW, TYPED_ROW, load_pyfunc, model_path

IMAGE = [[1.0, 2.0], [3.0, 4.5]]


TABLES: list[tuple[str, list[dict[str, Any]]]] = [
    ("iris", [IRIS, {**IRIS, "petal width (cm)": 0.2}]),
    ("typed", [TYPED_ROW, {**TYPED_ROW, "flag": False, "text": ""}]),
    ("typed_echo", [TYPED_ROW]),
    ("optional", [{"x": 1.5}]),
    ("optional", [{"x": 1.5, "maybe_long": 3, "maybe_string": "s", "maybe_datetime": "2024-01-01"}]),
    ("nested", [NESTED_ROW]),
    ("one_column", [{"text": "a"}, {"text": "b"}]),
    ("params", [{"a": 1.5, "b": 0.5}, {"a": 2.0, "b": 1.0}]),
]


def ask(url: str, path: str, body: Any, headers: dict[str, str] | None = None) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body)
    answer = requests.post(url + path, data=data, headers=headers or {"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 200, (path, answer.text)
    return answer


def flat(predictions: Any) -> dict[str, list[Any]] | list[Any]:
    """Predictions as the protocol of tensors has them: values by name, if they have names, else all in a row."""
    if isinstance(predictions, dict):
        return predictions
    if predictions and isinstance(predictions[0], dict):
        return {key: [row[key] for row in predictions] for key in predictions[0]}
    return list(itertools.chain.from_iterable(predictions)) if isinstance(predictions[0], list) else predictions


def check_tensors(url: str, request: dict[str, Any], expected: Any, blobs: list[str]) -> None:
    body, headers = tensors.binary(request, blobs)
    for answer in (
        ask(url, "/v2/models/model/infer", request),
        ask(
            url,
            "/v2/models/model/infer",
            {**request, "parameters": {**request.get("parameters", {}), "binary_data_output": True}},
        ),
        ask(url, "/v2/models/model/infer", body, headers),
    ):
        found = tensors.values(answer.content, answer.headers.get("Inference-Header-Content-Length"), blobs)
        wanted = flat(expected)
        if isinstance(wanted, list):
            [found] = found.values()
        assert found == wanted


@pytest.mark.parametrize(("kind", "rows"), TABLES)
def test_rows_of_columns(ours: Callable[[str], str], kind: str, rows: list[dict[str, Any]]) -> None:
    url = ours(kind)
    expected = ask(url, "/invocations", {"dataframe_records": rows}).json()["predictions"]
    assert ask(url, "/predict", {"features": rows}).json() == {"scores": expected}
    assert ask(url, "/v1/models/model:predict", {"instances": rows}).json() == {"predictions": expected}
    specs = load_pyfunc(model_path(kind)).metadata.signature.inputs.to_dict()
    check_tensors(url, {"inputs": tensors.column_tensors(specs, rows)}, expected, ["blob"])


@pytest.mark.parametrize(
    ("kind", "rows", "datatype"),
    [
        ("iris", [[6.1, 2.8, 4.7, 1.2], [5, 3, 1.5, 0.2]], "FP64"),
        ("iris", [[6.5, 2.75, 4.5, 1.25]], "FP32"),
        ("iris", [[6, 3, 5, 1]], "INT8"),
        ("matrix", [[0.01 * i for i in range(10)]] * 2, "FP64"),
        ("no_signature", [[6.1, 2.8, 4.7, 1.2]] * 2, "FP64"),
        ("any_length", [[1, 2, 3], [4, 5, 6]], "INT32"),
        ("words", [["a", "b"], ["c", "ü"]], "BYTES"),
        ("untyped", [[1, 2], [3, 4]], "INT64"),
    ],
)
def test_whole_rows(ours: Callable[[str], str], kind: str, rows: list[list[Any]], datatype: str) -> None:
    url = ours(kind)
    expected = ask(url, "/invocations", {"instances": rows}).json()["predictions"]
    assert ask(url, "/v1/models/model:predict", {"instances": rows}).json() == {"predictions": expected}
    shape = [len(rows), len(rows[0])]
    for data in (rows, list(itertools.chain.from_iterable(rows))):
        tensor = {"name": "whatever", "shape": shape, "datatype": datatype, "data": data}
        check_tensors(url, {"inputs": [tensor]}, expected, [])


def test_columns_without_names(ours: Callable[[str], str]) -> None:
    url = ours("unnamed")
    expected = ask(url, "/invocations", {"dataframe_split": {"data": [[1, "x"], [2, "y"]]}}).json()["predictions"]
    assert ask(url, "/predict", {"features": [[1, "x"], [2, "y"]]}).json() == {"scores": expected}
    inputs = [
        {"name": "first", "shape": [2], "datatype": "INT64", "data": [1, 2]},
        {"name": "second", "shape": [2], "datatype": "BYTES", "data": ["x", "y"]},
    ]
    check_tensors(url, {"inputs": inputs}, expected, [])


def test_named_tensors(ours: Callable[[str], str]) -> None:
    url = ours("tensors")
    expected = ask(url, "/invocations", {"inputs": {"image": [IMAGE], "weight": [[2]]}}).json()["predictions"]
    inputs = [
        {"name": "weight", "shape": [1, 1], "datatype": "INT64", "data": [2]},
        {"name": "image", "shape": [1, 2, 2], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.5]},
    ]
    check_tensors(url, {"inputs": inputs}, expected, [])


def test_params(ours: Callable[[str], str]) -> None:
    url, rows, params = ours("params"), [{"a": 1.5, "b": 0.5}], {"factor": 3, "mode": "slow", "undeclared": 1}
    expected = ask(url, "/invocations", {"dataframe_records": rows, "params": params}).json()["predictions"]
    assert expected[0]["factor"] == "3.0"
    assert ask(url, "/predict", {"features": rows, "params": params}).json()["scores"] == expected
    body = {"instances": rows, "parameters": params}
    assert ask(url, "/v1/models/model:predict", body).json()["predictions"] == expected
    specs = load_pyfunc(model_path("params")).metadata.signature.inputs.to_dict()
    check_tensors(url, {"inputs": tensors.column_tensors(specs, rows), "parameters": params}, expected, [])


@pytest.mark.parametrize("missing", ["float('nan')", "null"])
def test_missing_numbers(ours: Callable[[str], str], missing: str) -> None:
    url = ours("optional")
    expected = ask(url, "/invocations", {"dataframe_records": [{"x": 1, "maybe_double": None}]}).json()["predictions"]
    inputs = [
        {"name": "x", "shape": [1], "datatype": "FP64", "data": [1.0]},
        {"name": "maybe_double", "shape": [1], "datatype": "FP64", "data": [None]},
    ]
    if missing == "null":
        answer = ask(url, "/v2/models/model/infer", {"inputs": inputs})
    else:
        inputs[1]["data"] = [float("nan")]
        answer = ask(url, "/v2/models/model/infer", *tensors.binary({"inputs": inputs}))
    assert answer.json()["outputs"][0]["data"] == expected
