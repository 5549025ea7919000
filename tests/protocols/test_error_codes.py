"""`error_code` is MLflow's: its own scoring server refuses the same bodies with the same code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from tests.support.models import IRIS, NESTED_ROW, TYPED_ROW, model_path, scoring_app
from tests.support.servers import in_thread

ROW = [6.1, 2.8, 4.7, 1.2]
NAMES = list(IRIS)
IMAGE = [[1.0, 2.0], [3.0, 4.5]]
CSV = {"Content-Type": "text/csv"}


@pytest.fixture(scope="module")
def mlflows() -> Iterator[Callable[[str], str]]:
    """The URL of MLflow's own server for a model."""
    with contextlib.ExitStack() as servers:
        urls: dict[str, str] = {}

        def url(kind: str) -> str:
            if kind not in urls:
                urls[kind] = servers.enter_context(in_thread(scoring_app(model_path(kind))))
            return urls[kind]

        yield url


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


BODIES: list[Any] = [{}, [], {"data": [ROW]}, {"instances": [ROW], "inputs": [ROW]}, b"nonsense"]

CASES: list[tuple[str, Any]] = [
    # The body
    *[("iris", body) for body in BODIES],
    ("iris", {"dataframe_records": IRIS}),
    ("iris", {"dataframe_split": {"columns": NAMES}}),
    # Columns that are not there, or too few of them
    ("iris", {"dataframe_records": [without(IRIS, NAMES[0])]}),
    ("iris", {"dataframe_records": [{}]}),
    ("iris", {"dataframe_records": [{"other": 1.0}]}),
    ("iris", {"dataframe_split": {"columns": NAMES[:3], "data": [ROW[:3]]}}),
    ("iris", {"dataframe_split": {"data": [ROW[:3]]}}),
    ("iris", {"instances": [ROW[:3]]}),
    ("iris", {"inputs": [ROW[:3]]}),
    ("iris", {"inputs": {"other": [1.0]}}),
    ("iris", {"inputs": {name: [1.0] for name in NAMES[:3]}}),
    ("iris", {"inputs": {**{name: [1.0] for name in NAMES[:3]}, NAMES[3]: [1.0, 2.0]}}),
    ("iris", b"a,b\n1,2\n"),
    ("typed", {"dataframe_records": [without(TYPED_ROW, "text")]}),
    ("typed", {"instances": [without(TYPED_ROW, "flag")]}),
    ("nested", {"dataframe_records": [without(NESTED_ROW, "grid")]}),
    ("optional", {"dataframe_records": [{"maybe_long": 1}]}),
    ("unnamed", {"dataframe_split": {"data": [[1]]}}),
    ("unnamed", {"inputs": [[1]]}),
    ("unnamed", {"instances": [[1], [2]]}),
    # Columns of another number than names
    ("iris", {"dataframe_split": {"columns": NAMES, "data": [ROW[:3]]}}),
    ("iris", {"dataframe_split": {"columns": NAMES[:3], "data": [ROW]}}),
    # Values that do not convert
    ("iris", {"dataframe_records": [{**IRIS, NAMES[0]: "x"}]}),
    ("iris", {"dataframe_records": [{**IRIS, NAMES[0]: [1.0]}]}),
    ("iris", {"dataframe_records": [{**without(IRIS, NAMES[0]), NAMES[1]: "x"}]}),
    ("iris", {"dataframe_split": {"columns": NAMES, "data": [["x", *ROW[1:]]]}}),
    ("iris", {"inputs": {**{name: [1.0] for name in NAMES[:3]}, NAMES[3]: ["x"]}}),
    ("iris", {"instances": [{**IRIS, NAMES[0]: "x"}]}),
    ("typed", {"dataframe_records": [{**TYPED_ROW, "blob": "x"}]}),
    ("typed", {"dataframe_records": [{**TYPED_ROW, "when": "x"}]}),
    ("typed", {"dataframe_records": [{**TYPED_ROW, "big": None}]}),
    ("typed", {"dataframe_records": [{**TYPED_ROW, "small": "x"}]}),
    ("nested", {"dataframe_records": [{**NESTED_ROW, "item": {"note": "x"}}]}),
    ("nested", {"dataframe_records": [{**NESTED_ROW, "item": {"id": "x"}}]}),
    ("nested", {"dataframe_records": [{**NESTED_ROW, "numbers": 1.0}]}),
    ("nested", {"dataframe_records": [{**NESTED_ROW, "scores": []}]}),
    ("unnamed", {"inputs": [["x", "y"]]}),
    # Tensors of another shape
    *(("any_length", {key: value}) for key in ("inputs", "instances") for value in ([1, 2], [[[1, 2]]], [[[[1]]]])),
    ("any_length", {"inputs": 1}),
    ("words", {"inputs": [["a", "b", "c"]]}),
    ("words", {"inputs": [["a"]]}),
    ("words", {"instances": [[["a", "b"]]]}),
    ("matrix", {"inputs": [[0.5] * 9]}),
    ("matrix", {"inputs": [[0.5] * 11]}),
    ("matrix", {"inputs": [0.5] * 10}),
    ("matrix", {"inputs": [[[0.5] * 10]]}),
    ("matrix", {"instances": [[0.5]]}),
    ("tensors", {"inputs": {"image": [IMAGE]}}),
    ("tensors", {"inputs": {"image": [[1.0, 2.0]], "weight": [[2]]}}),
    ("tensors", {"inputs": {"image": [IMAGE], "weight": [2]}}),
    ("tensors", {"inputs": {"image": [IMAGE], "weight": [[2, 3]]}}),
    ("tensors", {"instances": [{"image": IMAGE}]}),
    # Tensors of values that do not convert
    ("any_length", {"inputs": [["x"]]}),
    ("any_length", {"inputs": [[1, 2], [3]]}),
    ("any_length", {"inputs": "x"}),
    ("any_length", {"inputs": {"a": [1]}}),
    ("matrix", {"inputs": [["x"] * 10]}),
    ("matrix", {"instances": [[0.5] * 10, [0.5]]}),
    ("tensors", {"inputs": {"image": [[["x", 1], [1, 1]]], "weight": [[2]]}}),
    ("tensors", {"inputs": {"image": "x", "weight": [[2]]}}),
    # Params
    ("params", {"dataframe_records": [{"a": 1.0, "b": 2.0}], "params": {"factor": "x"}}),
    ("params", {"dataframe_records": [{"a": 1.0, "b": 2.0}], "params": {"weights": 1.5}}),
]


@pytest.mark.parametrize(("kind", "body"), CASES, ids=lambda value: str(value)[:80])
def test_the_code_is_mlflows(ours: Callable[[str], str], mlflows: Callable[[str], str], kind: str, body: Any) -> None:
    options: dict[str, Any] = {"json": body}
    if isinstance(body, bytes):
        options = {"data": body, "headers": CSV if b"," in body else {"Content-Type": "application/json"}}
    answers = [requests.post(url(kind) + "/invocations", timeout=60, **options) for url in (ours, mlflows)]
    found, expected = [(answer.status_code, answer.json().get("error_code")) for answer in answers]
    assert found == expected, [answer.text[:300] for answer in answers]


NO_ROWS: list[tuple[str, Any]] = [
    ("typed_echo", {"dataframe_split": {"columns": list(TYPED_ROW), "data": []}}),
    ("typed_echo", {"dataframe_split": {"columns": list(TYPED_ROW), "index": [], "data": []}}),
    ("typed_echo", {"inputs": {name: [] for name in TYPED_ROW}}),
    ("typed_echo", ",".join(TYPED_ROW).encode() + b"\n"),
    ("typed_echo", {"dataframe_records": []}),
    ("typed_echo", {"dataframe_split": {"columns": list(TYPED_ROW)[1:], "data": []}}),
    ("typed_echo", {"dataframe_split": {"data": []}}),
    ("typed_echo", {"instances": []}),
    ("typed_echo", {"inputs": []}),
    ("typed_echo", {"inputs": {}}),
    ("typed_echo", b",\n"),
    ("one_column", {"instances": []}),
    ("one_column", {"inputs": []}),
    ("one_column", {"inputs": {"text": []}}),
    ("unnamed", {"instances": []}),
    ("optional", {"inputs": {"x": []}}),
    ("nested", {"dataframe_split": {"columns": list(NESTED_ROW), "data": []}}),
    ("untyped_echo", {"dataframe_records": []}),
    ("untyped_echo", {"dataframe_split": {"columns": ["a"], "data": []}}),
    ("untyped_echo", {"dataframe_split": {"data": []}}),
    ("untyped_echo", {"instances": []}),
    ("untyped_echo", {"inputs": []}),
    ("untyped_echo", {"inputs": {"a": []}}),
    ("untyped_echo", b"a,b\n"),
    ("any_length", {"inputs": []}),
    ("any_length", {"instances": []}),
    ("tensors", {"inputs": {"image": [], "weight": []}}),
    ("iris", {"dataframe_split": {"columns": NAMES, "data": []}}),
    ("iris", {"inputs": {name: [] for name in NAMES}}),
    ("iris", ",".join(NAMES).encode() + b"\n"),
]


@pytest.mark.parametrize(("kind", "body"), NO_ROWS, ids=lambda value: str(value)[:80])
def test_no_rows_are_answered_as_by_mlflow(
    ours: Callable[[str], str], mlflows: Callable[[str], str], kind: str, body: Any
) -> None:
    options: dict[str, Any] = {"data": body, "headers": CSV} if isinstance(body, bytes) else {"json": body}
    found, expected = [requests.post(url(kind) + "/invocations", timeout=60, **options) for url in (ours, mlflows)]
    assert found.status_code == expected.status_code, (found.text, expected.text[:300])
    if found.status_code == 200:
        assert found.json() == expected.json()
    else:
        assert found.json()["error_code"] == expected.json()["error_code"], (found.text, expected.text[:300])


def test_no_rows_leave_the_next_request_alone(ours: Callable[[str], str]) -> None:
    url = ours("typed_echo")
    for _ in range(3):
        body = {"dataframe_split": {"columns": list(TYPED_ROW), "data": []}}
        assert requests.post(url + "/invocations", json=body, timeout=60).json() == {"predictions": []}
        answer = requests.post(url + "/predict", json={"features": TYPED_ROW}, timeout=60)
        assert len(answer.json()["scores"]) == 1
    for accept, expected in (("text/csv", ",".join(TYPED_ROW) + "\n"), ("application/json", '{"predictions":[]}')):
        answer = requests.post(url + "/invocations", json=body, headers={"Accept": accept}, timeout=60)
        assert answer.text == expected
