"""The role as a process, and its HTTP application, against MLflow's own scoring server."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest
import requests

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.errors import ConfigError
from darwin_runtime.http.app import make_app
from darwin_runtime.http.service import Service
from darwin_runtime.http.settings import Settings
from darwin_runtime.model.load import load_model
from darwin_runtime.model.self_test import example_rows, self_test
from darwin_runtime.schema.report import MAX_COUNTED_PROBLEMS
from darwin_runtime.settings import Reader
from tests.conftest import ROOT, Finished, clean_environ, run_role, wait_until
from tests.support.models import IRIS, NESTED_ROW, TYPED_ROW, iris_table, load_pyfunc, model_path, scoring_app
from tests.support.servers import Served, in_thread, serving

pytestmark = pytest.mark.usefixtures("serving_environment")


@pytest.fixture(scope="module")
def mlflows() -> Iterator[Callable[[str], str]]:
    """The URL of MLflow's own scoring server for the model asked for."""
    urls: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def start(kind: str) -> str:
            if kind not in urls:
                urls[kind] = stack.enter_context(in_thread(scoring_app(model_path(kind))))
            return urls[kind]

        yield start


@pytest.fixture(scope="module")
def role() -> Iterator[Served]:
    with serving(model_path("iris"), LOG_LEVEL="debug", ENV="prod", SERVICE_NAME="iris-service") as served:
        yield served


def post(url: str, body: Any, content_type: str | None = "application/json") -> requests.Response:
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return requests.post(url, data=data, headers={"Content-Type": content_type} if content_type else {}, timeout=60)


def no_constants(value: Any) -> Any:
    """`value` with what JSON cannot say as null, as we send it."""
    if isinstance(value, list):
        return [no_constants(part) for part in value]
    if isinstance(value, dict):
        return {key: no_constants(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The four JSON shapes, CSV and params, for each kind of signature.

IMAGE = [[1.0, 2.0], [3.0, 4.5]]
PARAMS = {"factor": 3, "count": 5, "mode": "slow", "strict": True, "since": "2025-02-03T04:05:06", "weights": [1, 0.5]}
TYPED_LISTS = {name: [value] for name, value in TYPED_ROW.items()}


def split(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"dataframe_split": {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}}


MATRIX: list[tuple[str, Any]] = [
    ("iris", {"dataframe_records": [IRIS, IRIS]}),
    ("iris", {"dataframe_records": [dict(reversed(IRIS.items())) | {"extra": None}]}),
    ("iris", split(IRIS, IRIS)),
    ("iris", {**split(IRIS), "ignored": 1}),
    ("iris", {"instances": [IRIS]}),
    ("iris", {"inputs": {name: [value, value] for name, value in IRIS.items()}}),
    ("iris", {"inputs": [IRIS]}),
    ("iris", ",".join(IRIS) + "\n6.1,2.8,4.7,1.2\n5,3,1.5,0.2\n"),
    ("matrix", {"instances": [[0.01 * i for i in range(10)]] * 2}),
    ("matrix", {"inputs": [[0] * 10]}),
    ("matrix", {"dataframe_split": {"data": [[0.5] * 10]}}),
    ("matrix", {"dataframe_records": [{str(i): 0.25 for i in range(10)}]}),
    ("no_signature", {"instances": [[6.1, 2.8, 4.7, 1.2]]}),
    ("no_signature", {"inputs": [[6.1, 2.8, 4.7, 1.2]]}),
    ("untyped", {"dataframe_records": [{"a": 1, "b": "x", "c": None}, {"a": 2.5, "b": None, "c": None}]}),
    ("untyped", split({"a": True, "b": [1, 2]})),
    ("untyped", {"instances": [{"a": [1, 2], "b": 1}, {"a": [3, 4], "b": 2}]}),
    ("untyped", {"inputs": {"a": [[1.5]], "b": ["x"]}}),
    ("untyped", {"inputs": "text"}),
    ("untyped", {"instances": ["a", "b"]}),
    ("untyped", "a,b,c\n1,x,2024-01-01\n2,,NA\n"),
    ("typed", {"dataframe_records": [TYPED_ROW, TYPED_ROW]}),
    ("typed", split(TYPED_ROW)),
    ("optional", {"dataframe_records": [{"x": 1.5}]}),
    ("optional", {"dataframe_records": [{"x": 1.5, "maybe_long": 3, "maybe_string": "s", "maybe_double": 2.5}]}),
    ("optional", split({"x": 1.5, "maybe_datetime": "2024-01-01", "maybe_boolean": True, "maybe_integer": 4})),
    ("nested", {"dataframe_records": [NESTED_ROW]}),
    ("nested", split(NESTED_ROW, NESTED_ROW)),
    ("unnamed", {"dataframe_split": {"data": [[1, "x"], [2, "y"]]}}),
    ("numbered", {"dataframe_split": {"columns": [1, 0], "data": [[0.5, 3]]}}),
    ("one_column", {"instances": ["a", "b"]}),
    ("one_column", {"inputs": ["a", "b"]}),
    ("one_column", {"inputs": {"text": ["a"]}}),
    ("optional", "maybe_long,other,x\n3,a,1.5\n4,b,2\n"),
    ("params", "b,a\n1,2.5\n"),
    ("params", {**split({"a": 1.0, "b": 2.0}), "params": PARAMS}),
    ("params", {**split({"a": 1.0, "b": 2.0}), "params": {"count": 7, "undeclared": []}}),
    ("params", {"dataframe_records": [{"a": 1.5, "b": 0.5}]}),
    ("params", {"inputs": {"a": [1.5], "b": [0.5]}, "params": None}),
    ("tensors", {"inputs": {"image": [IMAGE], "weight": [[2]]}}),
    ("tensors", {"instances": [{"image": IMAGE, "weight": [2]}, {"image": IMAGE, "weight": [3]}]}),
    ("tensors", {"dataframe_records": [{"image": [1, 2, 3, 4.5], "weight": 2}]}),
    ("any_length", {"instances": [[1, 2, 3]]}),
    ("answers", {"dataframe_records": [{"form": "series"}]}),
    ("answers", {"dataframe_records": [{"form": "nameless"}]}),
    ("answers", {"dataframe_records": [{"form": "frame"}]}),
    ("answers", {"dataframe_records": [{"form": "float32"}]}),
    ("answers", {"dataframe_records": [{"form": "infinite"}]}),
    ("answers", {"dataframe_records": [{"form": "huge"}]}),
    ("answers", {"dataframe_records": [{"form": "surrogate"}]}),
    ("answers", {"dataframe_records": [{"form": "scalar"}]}),
    ("answers", {"dataframe_records": [{"form": "text"}]}),
    ("answers", {"dataframe_records": [{"form": "dict"}]}),
    ("hinted", {"inputs": [{"a": 1, "b": 2}, {"c": 4}]}),
]


@pytest.mark.parametrize(("kind", "body"), MATRIX)
def test_what_mlflows_server_answers(
    ours: Callable[[str], str], mlflows: Callable[[str], str], kind: str, body: Any
) -> None:
    content_type = "text/csv" if isinstance(body, str) else "application/json"
    expected = post(mlflows(kind) + "/invocations", body, content_type)
    assert expected.status_code == 200, expected.text
    answer = post(ours(kind) + "/invocations", body, content_type)
    assert answer.status_code == 200, answer.text
    assert answer.json() == no_constants(expected.json())
    assert answer.headers["Content-Type"] == expected.headers["Content-Type"] == "application/json"


# What both refuse, for the same kind of reason.
BAD: list[tuple[str, Any]] = [
    ("iris", b"nonsense"),
    ("iris", b"[1]"),
    ("iris", {}),
    ("iris", {"instances": [IRIS], "inputs": [IRIS]}),
    ("iris", {"dataframe_records": [{}]}),
    ("iris", {"dataframe_records": {}}),
    ("iris", {"dataframe_records": [{**IRIS, "petal width (cm)": "wide"}]}),
    ("iris", split({"sepal length (cm)": 1.0})),
    ("iris", {"dataframe_split": {"columns": ["a"]}}),
    ("iris", {"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}}),
    ("iris", {"inputs": {"sepal length (cm)": [1.0]}}),
    ("matrix", {"instances": [[1, 2]]}),
    ("matrix", {"instances": [["x"] * 10]}),
    ("typed", {"dataframe_records": [{**TYPED_ROW, "when": "yesterday"}]}),
    ("params", {**split({"a": 1.0, "b": 2.0}), "params": {"count": "many"}}),
    ("params", {**split({"a": 1.0, "b": 2.0}), "params": {"count": 1.5}}),
    ("params", {**split({"a": 1.0, "b": 2.0}), "params": {"weights": 1.0}}),
    ("params", {**split({"a": 1.0, "b": 2.0}), "params": [1]}),
    ("no_signature", {"instances": [[1.0]]}),
    ("no_signature", {"instances": [["x"] * 4]}),
    ("hinted", {"inputs": [{"a": "x"}]}),
    ("hinted", {"dataframe_records": [{"a": 1}]}),
]


@pytest.mark.parametrize(("kind", "body"), BAD)
def test_what_mlflows_server_refuses(
    ours: Callable[[str], str], mlflows: Callable[[str], str], kind: str, body: Any
) -> None:
    expected = post(mlflows(kind) + "/invocations", body)
    answer = post(ours(kind) + "/invocations", body)
    assert (answer.status_code, expected.status_code) == (400, 400), (answer.text, expected.text)
    assert answer.json().keys() == {"error_code", "message"}
    assert expected.json()["error_code"] in ("BAD_REQUEST", "INVALID_PARAMETER_VALUE")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/json; version=1", "text/csv; charset=latin-1", "application/xml"]
)
def test_media_types_that_both_refuse(
    ours: Callable[[str], str], mlflows: Callable[[str], str], content_type: str
) -> None:
    answers = [post(url + "/invocations", "{}", content_type) for url in (ours("iris"), mlflows("iris"))]
    assert [answer.status_code for answer in answers] == [415, 415]
    assert [answer.headers["Content-Type"] for answer in answers] == ["text/plain; charset=utf-8"] * 2


# Where we part from MLflow.


def test_nothing_lossy_is_accepted_where_mlflow_truncates(
    ours: Callable[[str], str], mlflows: Callable[[str], str]
) -> None:
    for value, shown in ((1.9, "number 1.9"), (2**63, "integer 9223372036854775808")):
        body = {"dataframe_records": [{**TYPED_ROW, "big": value}]}
        assert post(mlflows("typed") + "/invocations", body).status_code == 200
        answer = post(ours("typed") + "/invocations", body)
        assert answer.status_code == 400
        assert f"row 0, 'big': expected long, got {shown}" in answer.json()["message"]


def test_a_table_comes_back_as_it_went(ours: Callable[[str], str], mlflows: Callable[[str], str]) -> None:
    body = {"dataframe_records": [TYPED_ROW]}
    expected: dict[str, Any] = {**TYPED_ROW, "single": float(np.float32(0.1))}
    assert post(ours("typed_echo") + "/invocations", body).json() == {"predictions": [expected]}
    # MLflow ends what it encodes with a line break.
    expected["blob"] += "\n"
    assert post(mlflows("typed_echo") + "/invocations", body).json() == {"predictions": [expected]}


def test_lists_are_lists_in_every_shape(ours: Callable[[str], str]) -> None:
    # MLflow hands the model arrays from `inputs`, lists from the rest.
    url = ours("nested") + "/invocations"
    expected = post(url, {"dataframe_records": [NESTED_ROW]}).json()
    assert post(url, {"inputs": NESTED_ROW}).json() == expected
    assert post(url, {"instances": [NESTED_ROW]}).json() == expected


def test_a_missing_content_type_is_json(ours: Callable[[str], str]) -> None:
    assert post(ours("iris") + "/invocations", {"dataframe_records": [IRIS]}, None).json() == {"predictions": [1]}


@pytest.mark.parametrize(
    ("form", "predictions"),
    [
        ("times", [{"t": "2024-01-31T12:00:00.000000001"}, {"t": None}]),
        ("time_array", ["2024-01-31T12:00:00.500000000", None]),
        ("bytes", ["AP8="]),
        ("mixed", [{"n": 3, "x": 0.5, "a": [0, 1], "none": None}]),
        ("sparse", [[0, 1], [2, 0]]),
    ],
)
def test_answers_that_mlflow_cannot_write_well(ours: Callable[[str], str], form: str, predictions: Any) -> None:
    answer = post(ours("answers") + "/invocations", {"dataframe_records": [{"form": form}]})
    assert answer.json() == {"predictions": predictions}


@pytest.mark.parametrize("form", ["raise", "no such form", "unwritable", "exit"])
def test_a_failing_model_is_a_500_without_a_trace(
    ours: Callable[[str], str], form: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = ours("answers")
    darwin = post(url + "/predict", {"features": {"form": form}})
    mlflow = post(url + "/invocations", {"dataframe_records": [{"form": form}]})
    assert (darwin.status_code, mlflow.status_code) == (500, 500)
    assert darwin.json()["detail"].keys() == {"message", "error", "hint"}
    assert darwin.json()["detail"]["message"] == "Prediction failed"
    assert mlflow.json().keys() == {"error_code", "message"}
    assert mlflow.json()["error_code"] == "INTERNAL_ERROR"
    assert "Traceback" not in darwin.text + mlflow.text
    logged = [record for record in caplog.records if record.name == "darwin.serve"]
    assert [bool(record.exc_info) for record in logged] == [True, True]


# Darwin

SAMPLED = ["iris", "matrix", "typed", "optional", "nested", "unnamed", "numbered", "one_column", "tensors", "hinted"]


@pytest.mark.parametrize("kind", [*SAMPLED, "any_length", "params"])
def test_the_sample_request_works_as_it_is(ours: Callable[[str], str], kind: str) -> None:
    url = ours(kind)
    schema = requests.get(url + "/schema", timeout=60).json()
    assert list(schema) == ["inputs", "outputs", "sample_request", "json_schema"]
    assert all({"name", "type", "required"} <= part.keys() for part in schema["inputs"] + schema["outputs"])
    jsonschema.Draft202012Validator.check_schema(schema["json_schema"])
    features = schema["sample_request"]["features"]
    jsonschema.validate(features, schema["json_schema"], jsonschema.Draft202012Validator)
    answer = post(url + "/predict", schema["sample_request"])
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["scores"]) >= 1


def test_schema_in_full(ours: Callable[[str], str]) -> None:
    schema = requests.get(ours("tensors") + "/schema", timeout=60).json()
    assert schema["inputs"] == [
        {"name": "image", "required": True, "type": "tensor", "dtype": "float32", "shape": [-1, 2, 2]},
        {"name": "weight", "required": True, "type": "tensor", "dtype": "int64", "shape": [-1, 1]},
    ]
    assert schema["sample_request"] == {"features": {"image": [[1.0, 1.0], [1.0, 1.0]], "weight": [3]}}
    schema = requests.get(ours("iris") + "/schema", timeout=60).json()
    assert schema["inputs"][0] == {"name": "sepal length (cm)", "type": "double", "required": True}
    assert schema["sample_request"]["features"] == iris_table()[0].iloc[0].to_dict()


def test_no_schema_without_a_signature(ours: Callable[[str], str]) -> None:
    answer = requests.get(ours("no_signature") + "/schema", timeout=60)
    assert answer.status_code == 404
    assert answer.json()["detail"].keys() == {"message", "reasons", "hint"}


def test_predict_answers_what_pyfunc_does(ours: Callable[[str], str]) -> None:
    features, _ = iris_table()
    expected = load_pyfunc(model_path("iris")).predict(features).tolist()
    answer = post(ours("iris") + "/predict", {"features": features.to_dict("records")})
    assert answer.json() == {"scores": expected}
    assert post(ours("iris") + "/predict", {"features": IRIS}).json() == {"scores": [1]}


def test_predict_with_a_tensor_signature(ours: Callable[[str], str]) -> None:
    row = [0.01 * i for i in range(10)]
    (expected,) = load_pyfunc(model_path("matrix")).predict(np.array([row]))
    assert post(ours("matrix") + "/predict", {"features": row}).json() == {"scores": [expected]}
    named = {"image": IMAGE, "weight": [2]}
    assert post(ours("tensors") + "/predict", {"features": named}).json() == {"scores": [{"total": [21.0]}]}


def test_every_bad_cell_is_reported(ours: Callable[[str], str]) -> None:
    bad = {**TYPED_ROW, "flag": 1, "small": 2**31, "big": 1.9, "single": 1e39, "double": "x", "blob": "?", "when": 3}
    del bad["text"]
    answer = post(ours("typed") + "/predict", {"features": [TYPED_ROW, bad]})
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert list(detail) == ["message", "errors", "error_count", "expected_schema", "hint"]
    assert {error["field"]: error["error_type"] for error in detail["errors"]} == {
        name: "missing" if name == "text" else "type_mismatch" for name in TYPED_ROW
    }
    assert {error["row"] for error in detail["errors"]} == {1}
    answer = post(ours("typed") + "/invocations", {"dataframe_records": [TYPED_ROW, bad]})
    assert all(f"row 1, '{name}'" in answer.json()["message"] for name in TYPED_ROW)


# Bodies for both protocols: a 4xx in the shape of the one that was spoken.

HOSTILE = {
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"features": {"\xff": 1}}',
    "an array": b"[]",
    "null": b"null",
    "NaN": b'{"features": NaN, "instances": NaN}',
    "1e400": b'{"features": 1e400, "instances": 1e400}',
    "a million brackets": b'{"features": ' + b"[" * 1_000_000 + b", " + b'"instances": ' + b"[" * 1_000_000,
    "a thousand brackets": b'{"features": %b, "instances": %b}'
    % (b"[" * 1000 + b"]" * 1000, b"[" * 1000 + b"]" * 1000),
    "no features": b"{}",
    "an empty list": b'{"features": [], "instances": []}',
    "an empty object": b'{"features": {}, "instances": {}}',
    "null features": b'{"features": null, "instances": null}',
    "a number": b'{"features": 7, "instances": 7}',
    "a string": b'{"features": "x", "instances": "x"}',
    "strings": b'{"features": ["x"], "instances": ["x"]}',
    "lists of lists": b'{"features": [[[]]], "instances": [[[]]]}',
    "a huge integer": b'{"features": {"sepal length (cm)": %b}, "instances": [[1, 2, 3, %b]]}' % ((b"9" * 400,) * 2),
    "wrong types": b'{"features": {"sepal length (cm)": {}}, "instances": [[[], {}, "", true]]}',
    "mixed rows": b'{"features": [{}, [], 1], "instances": [{}, [], 1]}',
    "lone surrogate": b'{"features": {"\\ud800": 1}, "instances": [{"\\ud800": 1}]}',
    "params": b'{"features": {}, "instances": [], "params": 7}',
    "zero bytes": b"\x00" * 10,
}


@pytest.mark.filterwarnings("ignore:X has feature names")
@pytest.mark.parametrize("kind", ["iris", "matrix", "typed", "tensors", "nested", "unnamed", "hinted", "no_signature"])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bodies(ours: Callable[[str], str], kind: str, body: bytes) -> None:
    url = ours(kind)
    darwin, mlflow = post(url + "/predict", body), post(url + "/invocations", body)
    # A model that takes anything may also answer.
    accepted = (200,) if kind in ("hinted",) else ()
    assert darwin.status_code in (400, 422, *accepted), darwin.text[:500]
    assert mlflow.status_code in (400, *accepted), mlflow.text[:500]
    if darwin.status_code != 200:
        assert {"message", "hint"} <= darwin.json()["detail"].keys()
    if mlflow.status_code != 200:
        assert mlflow.json().keys() == {"error_code", "message"}
    assert "Traceback" not in darwin.text + mlflow.text
    assert len(darwin.content) < 20_000
    assert len(mlflow.content) < 20_000


@pytest.mark.parametrize(
    "text", ["", "\n\n", "a", "a\n1\n", ",,,\n,,,\n", '"', "sepal length (cm)\nx\n", "\x00", "a,a\n1,2\n", "é" * 9000]
)
def test_hostile_csv(ours: Callable[[str], str], text: str) -> None:
    answer = post(ours("iris") + "/invocations", text.encode(), "text/csv")
    assert answer.status_code == 400, answer.text
    assert answer.json().keys() == {"error_code", "message"}


def test_csv_that_is_not_utf8(ours: Callable[[str], str]) -> None:
    assert post(ours("iris") + "/invocations", b"\xe4\n1\n", "text/csv").status_code == 400


def test_large_bodies_are_parsed_like_small_ones(ours: Callable[[str], str]) -> None:
    rows = 20_000
    answer = post(ours("iris") + "/predict", {"features": [IRIS] * rows})
    assert answer.json() == {"scores": [1] * rows}
    refused = post(ours("iris") + "/predict", {"features": [{}] * (rows // 10)}).json()
    assert refused["detail"]["error_count"] == 4 * rows // 10
    refused = post(ours("iris") + "/predict", {"features": [{}] * rows}).json()
    assert refused["detail"]["error_count"] == MAX_COUNTED_PROBLEMS


@pytest.mark.parametrize(("verb", "path"), [("GET", "/predict"), ("PUT", "/invocations"), ("POST", "/ready")])
def test_wrong_methods(ours: Callable[[str], str], verb: str, path: str) -> None:
    answer = requests.request(verb, ours("iris") + path, timeout=60)
    assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})
    assert answer.headers["Allow"]


def test_unknown_paths(ours: Callable[[str], str]) -> None:
    for path in ("/nowhere", "/predict/"):
        answer = requests.get(ours("iris") + path, timeout=60)
        assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})


def test_root_path_with_and_without_the_proxy_stripping_it() -> None:
    service = Service(BatchLimits())
    service.use(load_model(model_path("iris")))
    with in_thread(make_app(service, "/models/iris")) as url:
        for prefix in ("", "/models/iris"):
            assert requests.get(f"{url}{prefix}/ready", timeout=60).status_code == 200
        assert requests.get(f"{url}/models/other/ready", timeout=60).status_code == 404


def test_not_ready_while_draining() -> None:
    service = Service(BatchLimits())
    service.use(load_model(model_path("iris")))
    service.health.draining = True
    with in_thread(make_app(service)) as url:
        answer = requests.get(f"{url}/ready", timeout=60)
        assert (answer.status_code, answer.json()["detail"]["status"]) == (503, "not_ready")
        assert requests.get(f"{url}/livez", timeout=60).status_code == 200
        assert post(f"{url}/predict", {"features": IRIS}).json() == {"scores": [1]}


def test_a_client_that_leaves_half_way_hurts_nobody(
    ours: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    url = ours("iris")
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert post(url + "/predict", {"features": IRIS}).status_code == 200
    assert not caplog.records


# The role


def test_probes(role: Served) -> None:
    assert role.get("/livez").status_code == 200
    assert role.get("/ready").json() == {"status": "ready", "model_loaded": True}
    for path in ("/healthcheck", "/health"):
        assert (role.get(path).status_code, role.get(path).json()) == (200, {"status": "SUCCESS", "message": "OK"})
    assert (role.get("/ping").status_code, role.get("/ping").text) == (200, "\n")
    version = role.get("/version")
    assert version.headers["Content-Type"].startswith("text/plain")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", version.text)


def test_it_predicts_over_the_wire(role: Served) -> None:
    assert role.post("/predict", {"features": IRIS}).json() == {"scores": [1]}
    assert role.post("/invocations", {"dataframe_records": [IRIS]}).json() == {"predictions": [1]}


def test_log_lines_are_json_outside_development(role: Served) -> None:
    lines = [json.loads(line) for line in role.lines]
    assert {line["service"] for line in lines} == {"iris-service"}
    # Each worker says so.
    (ready,) = {line["message"] for line in lines if "is ready (" in line["message"]}
    assert ready.endswith("it answered its own input example")
    assert "sklearn" in ready
    settings = lines[0]["message"]
    assert settings.startswith("settings: ")
    assert "PORT=0" in settings
    assert "REQUEST_TIMEOUT_SECONDS=60" in settings


@pytest.mark.parametrize("where", ["itself", "its parent", "the parent by way of model"])
def test_where_darwins_chart_may_put_a_model(tmp_path: Path, where: str) -> None:
    target = tmp_path / "model" if where == "its parent" else tmp_path / "m"
    shutil.copytree(model_path("one_column"), target)
    given = {"itself": target, "its parent": tmp_path, "the parent by way of model": target / "model"}[where]
    with serving(given) as served:
        assert served.post("/predict", {"features": {"text": "x"}}).status_code == 200
        assert "it has no input example to test it with" in served.log


def test_the_event_loop_is_free_while_the_model_works(tmp_path: Path) -> None:
    entered, leave = tmp_path / "entered", tmp_path / "leave"
    features = {"entered": str(entered), "leave": str(leave)}
    answers: list[requests.Response] = []
    with serving(model_path("waiting")) as served:
        predicting = threading.Thread(target=lambda: answers.append(served.post("/predict", {"features": features})))
        predicting.start()
        wait_until(entered.exists, "the prediction")
        for path in ("/livez", "/ready", "/healthcheck", "/ping"):
            assert served.get(path).status_code == 200
        assert not answers
        # In flight when the server is asked to stop: it finishes first.
        served.process.send_signal(signal.SIGTERM)
        leave.touch()
        predicting.join(timeout=60)
        assert [answer.json() for answer in answers] == [{"scores": ["done"]}]
        assert served.stop() == 0


def test_a_timeout_is_a_504_in_the_protocols_words(tmp_path: Path) -> None:
    leave = tmp_path / "leave"
    features = {"entered": str(tmp_path / "entered"), "leave": str(leave)}
    with serving(model_path("waiting"), REQUEST_TIMEOUT_SECONDS=0.2) as served:
        darwin = served.post("/predict", {"features": features})
        mlflow = served.post("/invocations", {"dataframe_records": [features]})
        assert (darwin.status_code, mlflow.status_code) == (504, 504)
        assert darwin.json()["detail"]["message"] == "Prediction timed out"
        assert mlflow.json()["error_code"] == "DEADLINE_EXCEEDED"
        leave.touch()


def test_a_prediction_that_never_ends_does_not_keep_the_server(tmp_path: Path) -> None:
    features = {"entered": str(tmp_path / "entered"), "leave": str(tmp_path / "leave")}
    with serving(model_path("waiting"), MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT=1, WORKERS=1) as served:
        assert served.post("/predict", {"features": features}).status_code == 504
        assert served.stop() == 0


def test_a_model_that_hangs_is_not_ready_and_ends_the_process(tmp_path: Path) -> None:
    features = {"entered": str(tmp_path / "entered"), "leave": str(tmp_path / "leave")}
    with serving(model_path("waiting"), code=1, REQUEST_TIMEOUT_SECONDS=2, WORKERS=1) as served:
        assert served.post("/predict", {"features": features}).status_code == 504
        ready = served.get("/ready")
        assert ready.status_code == 503
        assert re.fullmatch(
            r"the model has been computing one answer for \d+ s, longer than a request may take",
            ready.json()["detail"]["message"],
        )
        assert served.get("/livez").status_code == 200
        assert served.process.wait(timeout=60) == 1
    assert "the model did not answer within 4 s: it hangs" in served.log


def test_more_than_may_wait_is_told_when_to_come_back(tmp_path: Path) -> None:
    entered, leave = tmp_path / "entered", tmp_path / "leave"
    features = {"entered": str(entered), "leave": str(leave)}
    with serving(model_path("waiting"), MAX_QUEUE_ROWS=1, WORKERS=1) as served, ThreadPoolExecutor() as pool:
        running = pool.submit(served.post, "/predict", {"features": features})
        wait_until(entered.exists, "the prediction")
        # Which of two comes first is not known: the other is one too many.
        others = [pool.submit(served.post, "/predict", {"features": features}) for _ in range(2)]
        wait_until(lambda: any(other.done() for other in others), "a refusal")
        refused = next(other for other in others if other.done()).result()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json()["detail"]["message"] == "The server is overloaded"
        mlflow = served.post("/invocations", {"dataframe_records": [features]})
        assert (mlflow.status_code, mlflow.headers["Retry-After"]) == (503, "1")
        assert mlflow.json()["error_code"] == "RESOURCE_EXHAUSTED"
        # What would be refused anyway is not even parsed.
        assert served.post("/predict", data=b"no JSON").status_code == 503
        assert served.get("/ready").status_code == 200
        leave.touch()
        waited = next(other for other in others if other.result() is not refused).result()
        assert [running.result().status_code, waited.status_code] == [200, 200]


def test_who_leaves_while_waiting_is_not_run(tmp_path: Path) -> None:
    def ask(name: str) -> dict[str, dict[str, str]]:
        return {"features": {"entered": str(tmp_path / name), "leave": str(tmp_path / "leave")}}

    with serving(model_path("waiting"), WORKERS=1) as served, ThreadPoolExecutor() as pool:
        running = pool.submit(served.post, "/predict", ask("first"))
        wait_until((tmp_path / "first").exists, "the prediction")
        with pytest.raises(requests.ReadTimeout):
            requests.post(served.url + "/predict", json=ask("left"), timeout=1)
        last = pool.submit(served.post, "/predict", ask("last"))
        (tmp_path / "leave").touch()
        assert [running.result().status_code, last.result().status_code] == [200, 200]
    assert (tmp_path / "last").exists()
    assert not (tmp_path / "left").exists()
    assert "ERROR" not in served.log


def test_sigterm_drains() -> None:
    with serving(model_path("iris"), fresh=True, DRAIN_SECONDS=600, WORKERS=1) as served, requests.Session() as session:
        session.get(served.url + "/livez", timeout=60)
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: served.get("/ready").status_code == 503, "draining")
        kept = session.post(served.url + "/predict", json={"features": IRIS}, timeout=60)
        assert (kept.json(), kept.headers["Connection"]) == ({"scores": [1]}, "close")
        assert served.post("/predict", {"features": IRIS}).json() == {"scores": [1]}
        assert served.get("/livez").status_code == 200
        answer = served.get("/v1/models/model")
        assert (answer.status_code, answer.json()) == (503, {"error": "the server is shutting down"})
        # A second one does not wait.
        assert served.stop() == 0


def test_it_ends_when_it_has_drained() -> None:
    with serving(model_path("iris"), DRAIN_SECONDS=0.5, WORKERS=1) as served:
        assert served.stop() == 0
    assert "draining: requests are still taken for 0.5 s" in served.log


def test_sigint_does_not_drain() -> None:
    with serving(model_path("iris"), fresh=True, DRAIN_SECONDS=600, WORKERS=1) as served:
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=60) == 0


def test_while_loading_it_lives_but_is_not_ready(tmp_path: Path) -> None:
    entered, leave = tmp_path / "entered", tmp_path / "leave"
    config = json.dumps({"entered": str(entered), "leave": str(leave)})
    with serving(model_path("slow_to_load"), wait=False, SERVING_MODEL_CONFIG=config) as served:
        wait_until(entered.exists, "loading")
        assert served.get("/livez").status_code == 200
        for path in ("/ready", "/healthcheck", "/health", "/schema"):
            answer = served.get(path)
            assert answer.status_code == 503
            assert answer.json() == {"detail": {"status": "not_ready", "message": "the model is still loading"}}
        assert served.get("/ping").status_code == 503
        answer = served.get("/v1/models/model")
        assert (answer.status_code, answer.json()) == (503, {"error": "the model is still loading"})
        assert served.post("/predict", {"features": {"x": 1}}).status_code == 503
        answer = served.post("/invocations", {"dataframe_records": [{"x": 1}]})
        assert (answer.status_code, answer.json()["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
        leave.touch()
        wait_until(served.ready, "readiness")
        assert served.post("/predict", {"features": {"x": 1}}).json() == {"scores": [str(leave)]}
        assert str(leave) not in served.log


def test_it_can_be_stopped_while_loading(tmp_path: Path) -> None:
    entered = tmp_path / "entered"
    config = json.dumps({"entered": str(entered), "leave": str(tmp_path / "never")})
    with serving(model_path("slow_to_load"), wait=False, SERVING_MODEL_CONFIG=config) as served:
        wait_until(entered.exists, "loading")
        assert served.stop() == 0


@pytest.mark.parametrize("attempt", range(3))
def test_it_can_be_stopped_as_soon_as_it_listens(attempt: int) -> None:
    with serving(model_path("iris"), fresh=True, wait=False) as served:
        assert served.stop() == 0


@pytest.mark.parametrize("form", ["panic", "exit"])
def test_whatever_a_model_raises_is_told_in_the_protocols_words(form: str) -> None:
    with serving(model_path("answers")) as served:
        darwin = served.post("/predict", {"features": {"form": form}})
        assert (darwin.status_code, darwin.json()["detail"]["message"]) == (500, "Prediction failed")
        mlflow = served.post("/invocations", {"dataframe_records": [{"form": form}]})
        assert (mlflow.status_code, mlflow.json()["error_code"]) == (500, "INTERNAL_ERROR")
        assert served.post("/predict", {"features": {"form": "scalar"}}).json() == {"scores": [2.5]}
        assert served.post("/predict", {"features": {"form": "dataclass"}}).json() == {"scores": [{"score": 1.5}]}


def fails(**settings: Any) -> Finished:
    return run_role("darwin_serve.py", HOST="127.0.0.1", PORT=0, **settings)


@pytest.mark.parametrize("config", ['["hunter2"]', '{"hunter2', "hunter2"])
def test_every_bad_setting_is_told_at_once(config: str) -> None:
    done = run_role(
        "darwin_serve.py",
        PORT="http",
        REQUEST_TIMEOUT_SECONDS="-1",
        SERVING_MODEL_CONFIG=config,
        MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT="soon",
    )
    assert done.code == 2
    for name in ("MODEL_LOCAL_PATH", "PORT='http'", "REQUEST_TIMEOUT_SECONDS='-1'", "SERVING_MODEL_CONFIG", "'soon'"):
        assert name in done.err
    assert done.err.count("bad configuration") == 5
    assert "hunter2" not in done.err


def test_settings() -> None:
    read = Reader({"MODEL_LOCAL_PATH": "/m", "MLFLOW_MODEL_URI": "models:/a/1", "ROOT_PATH": "a/b/"})
    settings = Settings.from_env(read)
    assert (settings.model_path, settings.root_path, settings.port) == (Path("/m"), "/a/b", 8000)
    assert (settings.host, settings.request_timeout, settings.model_config) == ("0.0.0.0", 60, {})
    assert read.seen["PORT"] == 8000
    environ = {
        "MLFLOW_MODEL_URI": "m",
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "7",
        "SERVING_MODEL_CONFIG": '{"a": 1}',
    }
    settings = Settings.from_env(Reader(environ))
    assert (settings.model_path, settings.request_timeout, settings.model_config) == (None, 7, {"a": 1})
    assert Settings.from_env(Reader({**environ, "REQUEST_TIMEOUT_SECONDS": "0.5"})).request_timeout == 0.5
    with pytest.raises(ConfigError, match="MLFLOW_MODEL_URI"):
        Settings.from_env(Reader({"MODEL_LOCAL_PATH": " "}))


def test_no_model_is_an_error_even_if_there_is_a_uri(tmp_path: Path) -> None:
    done = fails(MODEL_LOCAL_PATH=tmp_path, MLFLOW_MODEL_URI="models:/a/1")
    assert done.code == 1
    assert f"no model at {tmp_path}, which is empty" in done.last


def test_a_model_that_does_not_load_ends_the_process(tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model_path("iris"), tmp_path / "m"))
    (broken / "model.skops").write_bytes(b"")
    done = fails(MODEL_LOCAL_PATH=broken)
    assert done.code == 1
    assert f"{broken / 'model.skops'} is empty" in done.last
    assert "Traceback" not in done.err


def test_a_model_that_fails_its_own_example_ends_the_process() -> None:
    done = fails(MODEL_LOCAL_PATH=model_path("broken"))
    assert done.code == 1
    assert "fails on its own input example: RuntimeError: this model never works" in done.last


def test_an_example_that_cannot_be_sent_is_tried_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = Path(shutil.copytree(model_path("iris"), tmp_path / "m"))
    (odd / "serving_input_example.json").write_text('{"rows": []}')
    model = load_model(odd)
    assert self_test(model) == "it answered its own input example"
    assert "cannot be sent as a request" in caplog.text
    assert example_rows(model) is None


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_role("darwin_serve.py", HOST="127.0.0.1", PORT=port, MODEL_LOCAL_PATH=model_path("iris"))
    assert done.code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.last


def test_the_address_is_logged_for_ipv6_too() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with serving(model_path("one_column"), HOST="::1") as served:
        assert served.url.startswith("http://[::1]:")


def test_no_secret_in_the_log() -> None:
    uri = "https://me:ur1-s3cr3t@mlflow.example/x"
    settings: dict[str, Any] = {
        "LOG_LEVEL": "debug",
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_MODEL_URI": uri,
        "MLFLOW_TRACKING_PASSWORD": "pa55-w0rd-xyz",
        "AWS_SECRET_ACCESS_KEY": "aws-s3cr3t-xyz",
        "SERVING_MODEL_CONFIG": json.dumps({"api_key": "c0nfig-s3cr3t"}),
    }
    with serving(model_path("iris"), **settings) as served:
        served.post("/predict", {"features": {"sepal length (cm)": "b0dy-s3cr3t"}})
        served.post("/invocations", {"dataframe_records": [IRIS], "params": {"x": "b0dy-s3cr3t"}})
        served.post("/predict?token=qu3ry-s3cr3t", {"features": IRIS})
    assert served.lines
    assert not re.search(r"s3cr3t|w0rd", served.log), served.log


def test_from_a_uri(tmp_path: Path) -> None:
    source = Path(shutil.copytree(model_path("one_column"), tmp_path / "somewhere"))
    with serving(MLFLOW_MODEL_URI=source, TMPDIR=tmp_path) as served:
        assert served.post("/predict", {"features": {"text": "x"}}).status_code == 200
        assert list(tmp_path.glob("darwin-*"))
    assert not list(tmp_path.glob("darwin-*"))


def test_importing_has_no_side_effect_and_does_not_import_mlflow() -> None:
    code = (
        "import os, sys, threading; before = dict(os.environ); import darwin_serve; "
        "assert dict(os.environ) == before; assert 'mlflow' not in sys.modules; assert threading.active_count() == 1"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=clean_environ(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
