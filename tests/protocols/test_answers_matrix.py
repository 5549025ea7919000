"""Every kind of answer through every door, decoded by other people's clients, is the same value."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import requests
from tritonclient.http import InferResult

from tests.support.answers import ANSWERS, REFUSED, SERIES_NAMES

V2 = "/v2/models/model/infer"
LENGTH = "Inference-Header-Content-Length"


def ask(url: str, name: str, door: str) -> requests.Response:
    row, headers = {"name": name}, {}
    tensor = {"name": "name", "shape": [1], "datatype": "BYTES", "data": [name]}
    path, body = {
        "darwin": ("/predict", {"features": row}),
        "mlflow": ("/invocations", {"dataframe_records": [row]}),
        "v1": ("/v1/models/model:predict", {"instances": [row]}),
        "v2": (V2, {"inputs": [tensor]}),
        "v2 binary": (V2, {"inputs": [tensor], "parameters": {"binary_data_output": True}}),
        "csv": ("/invocations", {"dataframe_records": [row]}),
    }[door]
    if door == "csv":
        headers["Accept"] = "text/csv"
    return requests.post(url + path, json=body, headers=headers, timeout=60)


def same(found: Any, expected: Any) -> bool:
    """Whether they are one JSON value: the same bits, the same types, but 1 is 1.0."""
    if isinstance(expected, bool) or isinstance(found, bool) or expected is None or isinstance(expected, str):
        return type(found) is type(expected) and found == expected
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and list(found) == list(expected)
            and all(map(same, found.values(), expected.values()))
        )
    return isinstance(found, (int, float)) and found == expected and str(found)[0] == str(expected)[0]


def text_is(text: str, expected: Any) -> bool:
    """Whether a text stands for the value: itself, or its JSON."""
    if isinstance(expected, str):
        return text == expected
    return same(json.loads(text), expected)


def cell_is(cell: Any, expected: Any) -> bool:
    """Whether a tensor's element stands for the value."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return expected is None
    if isinstance(cell, bytes):
        if isinstance(expected, str) and base64.b64encode(cell).decode() == expected:
            return True
        return text_is(cell.decode(), expected)
    return text_is(cell, expected) if isinstance(cell, str) else same(cell, expected)


def tensor_is(values: Any, expected: Any) -> bool:
    """Whether nested elements of a tensor stand for the value; a column has an axis more, a scalar is a list of one."""
    if not isinstance(values, list):
        return cell_is(values, expected)
    if isinstance(expected, list) and len(values) == len(expected) and all(map(tensor_is, values, expected)):
        return True
    return len(values) == 1 and tensor_is(values[0], expected)


def columns(predictions: Any) -> dict[str, Any] | None:
    """The value by names, if it has some."""
    if isinstance(predictions, dict) and predictions:
        return predictions
    if isinstance(predictions, list) and predictions and all(isinstance(row, dict) for row in predictions):
        keys = dict.fromkeys(itertools.chain.from_iterable(predictions))
        return {key: [row.get(key) for row in predictions] for key in keys} or None
    return None


def in_json(answer: requests.Response, expected: Any, door: str, name: str) -> bool:
    if door == "darwin":
        return same(answer.json(), {"scores": expected if isinstance(expected, list) else [expected]})
    if name.startswith("Series") or name == "empty Series":
        key = SERIES_NAMES.get(name, "y")
        expected = [{key: value} for value in expected]
    return same(answer.json(), {"predictions": expected})


def in_v2(answer: requests.Response, expected: Any, door: str, name: str) -> bool:
    length = answer.headers.get(LENGTH)
    result = InferResult.from_response_body(answer.content, header_length=length and int(length))
    outputs = result.get_response()["outputs"]
    missing = any(each["datatype"] == "BYTES" and None in each.get("data", ()) for each in outputs)
    if door == "v2":
        assert length is None
    else:  # what has a null among texts stays in JSON
        assert missing or length is not None
    if name == "empty table":
        return [each["shape"] for each in outputs] == [[0, 1], [0, 1]]
    wanted = columns(expected) or {"predict": expected}
    found = {each["name"]: result.as_numpy(each["name"]) for each in outputs}
    return list(found) == list(wanted) and all(tensor_is(found[key].tolist(), wanted[key]) for key in wanted)


def table_of(expected: Any, name: str) -> tuple[list[str], list[list[Any]]]:
    """The header and the rows of a value in CSV."""
    named = columns(expected)
    if named is not None and isinstance(expected, dict):
        lengths = {len(value) if isinstance(value, list) else 0 for value in named.values()}
        is_table = len(lengths) == 1 and lengths != {0}
        return list(named), [[*row] for row in zip(*named.values(), strict=True)] if is_table else [[*named.values()]]
    if named is not None:
        return list(named), [[*row] for row in zip(*named.values(), strict=True)]
    rows = expected if isinstance(expected, list) else [expected]
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(lengths) == 1 and lengths != {0} and not name.startswith("Series") and name != "MultiIndex":
        return [f"prediction_{index}" for index in range(*lengths)], rows
    key = SERIES_NAMES.get(name, "y") if name.startswith("Series") and name != "Series without a name" else "prediction"
    return [key], [[row] for row in rows]


def in_csv(answer: requests.Response, expected: Any, _: str, name: str) -> bool:
    header, *rows = csv.reader(io.StringIO(answer.content.decode(), newline=""))
    if name in ("empty table", "empty Series"):
        return rows == [] and header == {"empty table": ["a", "b"], "empty Series": ["y"]}[name]
    names, wanted = table_of(expected, name)
    if header != names or len(rows) != len(wanted):
        return False
    for row, values in zip(rows, wanted, strict=True):
        for cell, value in zip(row, values, strict=True):
            if not (value in (None, "") if cell == "" else text_is(cell, value)):
                return False
    return True


DOORS: dict[str, Callable[[requests.Response, Any, str, str], bool]] = {
    "darwin": in_json,
    "mlflow": in_json,
    "v1": in_json,
    "v2": in_v2,
    "v2 binary": in_v2,
    "csv": in_csv,
}


def _infinities(answer: requests.Response) -> bool:
    result = InferResult.from_response_body(answer.content, header_length=int(answer.headers[LENGTH]))
    return bool(np.array_equal(result.as_numpy("predict"), [math.inf, -math.inf, 1.5]))


def _escaped(answer: requests.Response) -> bool:
    return bool(answer.json()["outputs"][0]["data"] == ["\ud800"])


def _utf8(answer: requests.Response) -> bool:
    return answer.status_code == 500 and "surrogates not allowed" in answer.text


# The reason of an answer that is not the same, and what it is instead.
EXCEPTIONS: dict[tuple[str, str], tuple[str, Callable[[requests.Response], bool]]] = {
    ("infinities", "v2 binary"): ("only the binary form has infinities; JSON and CSV have none", _infinities),
    ("surrogate", "v2"): ("Triton's client reads no lone surrogate, as Python's json does", _escaped),
    ("surrogate", "v2 binary"): ("UTF-8 has no lone surrogates; JSON has an escape for them", _utf8),
    ("surrogate", "csv"): ("UTF-8 has no lone surrogates; JSON has an escape for them", _utf8),
}


def test_the_matrix_is_large() -> None:
    assert len(ANSWERS) >= 150
    assert {name for name, _ in EXCEPTIONS} <= ANSWERS.keys()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_the_same_through_every_door(ours: Callable[[str], str], name: str, door: str) -> None:
    answer = ask(ours("every_answer"), name, door)
    if (name, door) in EXCEPTIONS:
        _, holds = EXCEPTIONS[name, door]
        assert holds(answer), answer.text
        return
    assert answer.status_code == 200, answer.text
    assert DOORS[door](answer, ANSWERS[name][1], door, name), answer.text


TWICE = {"two columns of one name": b"a,a\n1,x\n2,y\n", "two keys of one name": b"1,1\n1,2\n"}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_without_a_form_is_an_error_that_names_it(ours: Callable[[str], str], name: str, door: str) -> None:
    url = ours("every_answer")
    answer = ask(url, name, door)
    if door == "csv" and name in TWICE:  # CSV alone can hold them
        assert (answer.status_code, answer.content) == (200, TWICE[name])
        return
    assert answer.status_code == 500, answer.text
    shape = {"darwin": "detail", "mlflow": "error_code", "csv": "error_code"}.get(door, "error")
    assert shape in answer.json()
    for word in REFUSED[name][1]:
        assert word in answer.text
    assert " at 0x" not in answer.text  # what Python shows of an object
    assert ask(url, "text", door).status_code == 200
