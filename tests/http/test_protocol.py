"""What all protocols share on HTTP: encodings, media types, unknown routes, ids, log lines."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
import requests

from darwin_runtime.engine.admission import MAX_QUEUE_BYTES
from darwin_runtime.http.request_log import PIPE_BYTES, AccessLog, Line, _pieces
from darwin_runtime.http.tracing import Trace
from darwin_runtime.protocols.base import PARQUET
from tests.conftest import wait_until
from tests.support.models import IRIS, TYPED_ROW, model_path
from tests.support.servers import Served, serving

BODIES: dict[str, Any] = {
    "/predict": {"features": IRIS},
    "/invocations": {"dataframe_records": [IRIS]},
    "/v1/models/model:predict": {"instances": [IRIS]},
    "/v2/models/model/infer": {
        "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP64", "data": [6.1, 2.8, 4.7, 1.2]}]
    },
}


@pytest.fixture(scope="module")
def role() -> Iterator[Served]:
    with serving(model_path("iris"), WORKERS=1, MODEL_NAME="iris", ENV="prod", SERVICE_NAME="flowers") as served:
        yield served


def shape(path: str, answer: requests.Response) -> str:
    """The shape of an error, by its protocol: checks that it is that, and returns its message."""
    if answer.headers["Content-Type"].startswith("text/plain"):
        return answer.text
    body = answer.json()
    if path.startswith(("/v1", "/v2")):
        assert body.keys() == {"error"}
        return str(body["error"])
    if path == "/invocations" and "detail" not in body:
        assert body.keys() == {"error_code", "message"}
        return str(body["message"])
    assert body.keys() == {"detail"}
    return json.dumps(body["detail"])


# Encodings


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("encoding", "encode"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("Deflate", zlib.compress), ("identity", bytes)],
)
def test_compressed_bodies(
    ours: Callable[[str], str], path: str, encoding: str, encode: Callable[[bytes], bytes]
) -> None:
    url, body = ours("iris") + path, json.dumps(BODIES[path]).encode()
    expected = requests.post(url, data=body, timeout=60)
    answer = requests.post(url, data=encode(body), headers={"Content-Encoding": encoding}, timeout=60)
    assert (answer.status_code, answer.content) == (200, expected.content)


BOMB = gzip.compress(b" " * (MAX_QUEUE_BYTES + 1))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("encoding", "body", "status", "why"),
    [
        ("gzip", b"nonsense", (400, 422), "not gzip"),
        ("gzip", gzip.compress(b"{}")[:-1], (400, 422), "cut short"),
        ("gzip", gzip.compress(b"{}") + b"x", (400, 422), "more follows"),
        ("br", b"{}", (415,), "Content-Encoding 'br' is not supported"),
        ("gzip, gzip", b"{}", (415,), "not supported"),
        ("gzip", BOMB, (413,), "once it is decompressed"),
    ],
    ids=["nonsense", "short", "long", "unknown", "twice", "bomb"],
)
def test_compressed_bodies_that_can_not_be_read(
    ours: Callable[[str], str], path: str, encoding: str, body: bytes, status: tuple[int, ...], why: str
) -> None:
    answer = requests.post(ours("iris") + path, data=body, headers={"Content-Encoding": encoding}, timeout=60)
    assert answer.status_code in status, answer.text
    assert why in shape(path, answer)


# Media types


def as_csv(url: str, path: str, body: Any, accept: str = "text/csv") -> list[list[str]]:
    answer = requests.post(url + path, json=body, headers={"Accept": accept}, timeout=60)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/csv; charset=utf-8"), answer.text
    return list(csv.reader(io.StringIO(answer.text)))


@pytest.mark.parametrize("path", ["/predict", "/invocations", "/v1/models/model:predict"])
def test_answers_as_csv(ours: Callable[[str], str], path: str) -> None:
    assert as_csv(ours("iris"), path, BODIES[path]) == [["prediction"], ["1"]]


def test_tables_as_csv(ours: Callable[[str], str]) -> None:
    found = as_csv(ours("answers"), "/invocations", {"dataframe_records": [{"form": "frame"}]})
    assert found == [["a", "3"], ["1", "x"], ["2", ""]]
    found = as_csv(ours("answers"), "/invocations", {"dataframe_records": [{"form": "series"}]})
    assert found == [["y"], ["1.5"], [""]]
    found = as_csv(ours("answers"), "/invocations", {"dataframe_records": [{"form": "infinite"}]})
    assert found[0] == ["prediction_0", "prediction_1"]
    body = {"dataframe_records": [IRIS], "params": {"predict_method": "predict_proba"}}
    assert as_csv(ours("iris"), "/invocations", body)[0] == [f"predict_proba_{index}" for index in range(3)]
    records = as_csv(ours("params"), "/invocations", {"dataframe_records": [{"a": 1, "b": 2}]})
    assert (records[0][0], records[1][0]) == ("sum", "3.0")


def test_what_is_no_table_can_not_be_csv(ours: Callable[[str], str]) -> None:
    answer = requests.post(
        ours("answers") + "/invocations",
        json={"dataframe_records": [{"form": "sparse"}]},
        headers={"Accept": "text/csv"},
        timeout=60,
    )
    assert answer.status_code == 200
    answer = requests.post(
        ours("answers") + "/invocations",
        json={"dataframe_records": [{"form": "unwritable"}]},
        headers={"Accept": "text/csv"},
        timeout=60,
    )
    assert answer.status_code == 500
    assert "object has no JSON form" in answer.json()["message"]


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "application/json"),
        ("text/csv;q=0.5, application/json", "application/json"),
        ("text/csv, application/json;q=0.5", "text/csv; charset=utf-8"),
        ("text/*", "text/csv; charset=utf-8"),
        ("text/csv, */*;q=0.1", "text/csv; charset=utf-8"),
        ("application/*;q=0.2, text/csv;q=nonsense", "application/json"),
        ("", "application/json"),
    ],
)
def test_what_a_client_prefers(ours: Callable[[str], str], accept: str, media_type: str) -> None:
    answer = requests.post(
        ours("iris") + "/invocations", json=BODIES["/invocations"], headers={"Accept": accept}, timeout=60
    )
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, media_type)


@pytest.mark.parametrize("path", ["/predict", "/v1/models/model:predict"])
@pytest.mark.parametrize("rows", [1, 1000])
def test_nothing_acceptable(ours: Callable[[str], str], path: str, rows: int) -> None:
    key, value = next(iter(BODIES[path].items()))
    body = {key: (value if isinstance(value, list) else [value]) * rows}
    for accept in ("application/xml", "application/json;q=0, text/csv;q=0"):
        answer = requests.post(ours("iris") + path, json=body, headers={"Accept": accept}, timeout=60)
        assert answer.status_code == 406
        assert "ask for application/json or text/csv" in shape(path, answer)


@pytest.mark.parametrize("accept", ["application/xml", "application/json;q=0, text/csv;q=0", "text/html", "a/b;q=nan"])
def test_mlflow_answers_json_whatever_is_accepted(ours: Callable[[str], str], accept: str) -> None:
    answer = requests.post(
        ours("iris") + "/invocations", json=BODIES["/invocations"], headers={"Accept": accept}, timeout=60
    )
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")


@pytest.mark.parametrize("path", BODIES)
def test_a_byte_order_mark(ours: Callable[[str], str], path: str) -> None:
    body = json.dumps(BODIES[path]).encode()
    expected, found = (
        requests.post(ours("iris") + path, data=data, headers={"Content-Type": "application/json"}, timeout=60)
        for data in (body, b"\xef\xbb\xbf" + body)
    )
    assert (found.status_code, found.json()) == (200, expected.json())


@pytest.mark.parametrize("path", ["/invocations", "/v1/models/model:predict"])
def test_unknown_media_types(ours: Callable[[str], str], path: str) -> None:
    answer = requests.post(ours("iris") + path, data="{}", headers={"Content-Type": "application/xml"}, timeout=60)
    assert answer.status_code == 415
    assert "'application/xml' is not supported" in shape(path, answer)


def parquet(table: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    table.to_parquet(file)
    return file.getvalue()


def post_parquet(url: str, body: bytes) -> requests.Response:
    return requests.post(url + "/invocations", data=body, headers={"Content-Type": PARQUET}, timeout=60)


def test_parquet(ours: Callable[[str], str]) -> None:
    url = ours("iris")
    answer = post_parquet(url, parquet(pd.DataFrame([IRIS, IRIS])))
    assert answer.json() == {"predictions": [1, 1]}
    url = ours("typed")
    expected = requests.post(url + "/invocations", json={"dataframe_records": [TYPED_ROW]}, timeout=60).json()
    row = {**TYPED_ROW, "blob": b"\0\xff", "when": pd.Timestamp(str(TYPED_ROW["when"]))}
    table = pd.DataFrame([row]).astype({"small": "int32", "single": "float32"})
    assert post_parquet(url, parquet(table)).json() == expected
    table = pd.DataFrame({"x": [1.0, 2.0], "maybe_double": [None, 1.5], "maybe_string": ["a", None]})
    rows = [{"x": 1, "maybe_string": "a", "maybe_double": None}, {"x": 2, "maybe_string": None, "maybe_double": 1.5}]
    url = ours("optional")
    expected = requests.post(url + "/invocations", json={"dataframe_records": rows}, timeout=60).json()
    assert post_parquet(url, parquet(table)).json() == expected
    assert post_parquet(ours("untyped"), parquet(pd.DataFrame({"a": [1], "b": ["x"]}))).json() == {
        "predictions": ["a:int64:[1]", "b:str:['x']" if pd.__version__ >= "3" else "b:object:['x']"]
    }


@pytest.mark.parametrize("body", [b"", b"PAR1", b"nonsense", parquet(pd.DataFrame({"a": [1]}))[:-9]])
def test_broken_parquet(ours: Callable[[str], str], body: bytes) -> None:
    answer = post_parquet(ours("iris"), body)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "BAD_REQUEST")
    assert "not Parquet" in answer.json()["message"]


def test_parquet_that_does_not_fit(ours: Callable[[str], str]) -> None:
    answer = post_parquet(ours("iris"), parquet(pd.DataFrame([{**IRIS, "petal width (cm)": "wide"}])))
    assert answer.status_code == 400
    assert "row 0, 'petal width (cm)': expected double, got string 'wide'" in answer.json()["message"]


def test_parquet_without_rows(ours: Callable[[str], str]) -> None:
    body = parquet(pd.DataFrame({name: pd.Series(dtype=float) for name in IRIS}))
    answer = post_parquet(ours("iris"), body)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "BAD_REQUEST")
    assert "0 sample(s)" in answer.json()["message"]
    assert post_parquet(ours("untyped"), body).status_code == 200


@pytest.mark.parametrize("cells", [["x" * 10_000] * 100_000, [["x" * 100] * 10_000] * 100, [[1] * 5_000_000]])
def test_parquet_that_is_larger_than_it_looks(ours: Callable[[str], str], cells: list[Any]) -> None:
    file = io.BytesIO()
    pd.DataFrame({"a": cells}).to_parquet(file, compression="gzip")
    assert len(file.getvalue()) < 10_000
    for kind in ("iris", "untyped"):
        answer = post_parquet(ours(kind), file.getvalue())
        assert answer.status_code == 413
        assert "more than" in answer.json()["message"]


def test_parquet_of_more_cells_than_may_be(ours: Callable[[str], str]) -> None:
    body = parquet(pd.DataFrame({name: [0.0] * 1_100_000 for name in IRIS}))
    assert len(body) < 100_000
    answer = post_parquet(ours("iris"), body)
    assert answer.status_code == 413
    assert "4400000 cells, more than 4000000" in answer.json()["message"]


def test_parquet_without_its_library(ours: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    body = parquet(pd.DataFrame([IRIS]))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    answer = post_parquet(ours("iris"), body)
    assert answer.status_code == 415
    assert "pyarrow, which is not installed" in answer.text


# Routes


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/v2/nothing", "/v2/models", "/predict/", "/%0a"])
def test_unknown_routes(ours: Callable[[str], str], path: str) -> None:
    answer = requests.get(ours("iris") + path, timeout=60)
    assert answer.status_code == 404
    assert shape(path, answer)


@pytest.mark.parametrize("path", [*BODIES, "/ping", "/version", "/v2", "/v2/models/model", "/v1/models/model"])
def test_a_slash_at_the_end(ours: Callable[[str], str], path: str) -> None:
    body = BODIES.get(path)
    plain, slash, two = (
        requests.request(
            "POST" if body else "GET", ours("iris") + path + end, json=body, timeout=60, allow_redirects=False
        )
        for end in ("", "/", "//")
    )
    if path == "/predict":
        assert slash.status_code == 404
    else:
        assert (slash.status_code, slash.content) == (200, plain.content)
    assert two.status_code == 404


@pytest.mark.parametrize("path", [*BODIES])
def test_the_wrong_verb(ours: Callable[[str], str], path: str) -> None:
    answer = requests.get(ours("iris") + path, timeout=60)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert shape(path, answer)


@pytest.mark.parametrize(
    "path", ["/v1/models/other:predict", "/v2/models/other/infer", "/v2/models/model/versions/7/infer"]
)
def test_another_model(ours: Callable[[str], str], path: str) -> None:
    answer = requests.post(ours("iris") + path, json={}, timeout=60)
    assert answer.status_code == 404
    assert "there is no" in shape(path, answer)


def test_heads_have_no_body(ours: Callable[[str], str]) -> None:
    answer = requests.head(ours("iris") + "/schema", timeout=60)
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["Content-Length"]) > 100


def test_names_in_paths(role: Served) -> None:
    assert role.post("/v1/models/iris:predict", BODIES["/v1/models/model:predict"]).json() == {"predictions": [1]}
    assert role.post("/v2/models/iris/infer", BODIES["/v2/models/model/infer"]).json()["model_name"] == "iris"
    assert role.get("/v1/models").json() == {"models": ["iris"]}
    assert role.get("/v1/models/iris").json() == {"name": "iris", "ready": True}
    assert role.get("/v2/models/iris/ready").status_code == 200
    assert role.get("/v2/models/other/ready").status_code == 404
    assert role.get("/v2/health/live").json() == {"live": True}
    assert role.get("/v2/health/ready").json() == {"ready": True}
    assert role.get("/v2").json()["extensions"] == ["binary_tensor_data"]


# Ids and log lines

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_ids_are_taken_over_and_returned(ours: Callable[[str], str]) -> None:
    url = ours("iris")
    answer = requests.get(url + "/schema", headers={"X-Request-ID": "abc-1", "traceparent": PARENT}, timeout=60)
    assert answer.headers["X-Request-ID"] == "abc-1"
    returned = answer.headers["traceparent"]
    assert re.fullmatch(r"00-4bf92f3577b34da6a3ce929d0e0e4736-[0-9a-f]{16}-01", returned)
    assert returned != PARENT
    ids = {requests.get(url + "/schema", timeout=60).headers["X-Request-ID"] for _ in range(3)}
    assert len(ids) == 3
    assert "traceparent" not in requests.get(url + "/schema", timeout=60).headers
    assert requests.get(url + "/nothing", headers={"X-Request-ID": "abc-2"}, timeout=60).headers["X-Request-ID"]


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "a\tb"])
def test_ids_that_are_none_are_not_taken_over(ours: Callable[[str], str], given: str) -> None:
    answer = requests.get(ours("iris") + "/schema", headers={"X-Request-ID": given}, timeout=60)
    assert re.fullmatch(r"[0-9a-f]{20}", answer.headers["X-Request-ID"])


@pytest.mark.parametrize(
    "given", ["nonsense", PARENT.replace("00-4", "ff-4"), PARENT.upper(), "00-" + "0" * 32 + PARENT[35:]]
)
def test_traces_that_are_none_are_not_taken_over(ours: Callable[[str], str], given: str) -> None:
    assert (
        "traceparent" not in requests.get(ours("iris") + "/schema", headers={"traceparent": given}, timeout=60).headers
    )


def lines(served: Served) -> list[dict[str, Any]]:
    return [json.loads(line) for line in served.lines if '"darwin.access"' in line]


def test_one_line_for_each_request(role: Served) -> None:
    role.post(
        "/invocations?secret=x",
        {"dataframe_records": [IRIS, IRIS]},
        headers={"X-Request-ID": "two-rows", "traceparent": PARENT},
    )
    role.post("/predict", {}, headers={"X-Request-ID": "bad"})
    role.get("/livez", headers={"X-Request-ID": "probe"})
    role.get("/nothing%0aINFO", headers={"X-Request-ID": "nowhere"})
    wait_until(lambda: any(line["request_id"] == "nowhere" for line in lines(role)), "the line")
    found = {line["request_id"]: line for line in lines(role)}
    line = found["two-rows"]
    assert 0 < line.pop("duration_ms") < 60_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "INFO",
        "logger": "darwin.access",
        "message": "POST /invocations 200",
        "request_id": "two-rows",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "protocol": "mlflow",
        "status": 200,
        "rows": 2,
        "service": "flowers",
    }
    assert (found["bad"]["status"], found["bad"]["rows"]) == (422, 0)
    assert found["nowhere"]["message"] == "GET /nothing%0AINFO 404"
    assert "probe" not in found


def test_lines_for_people() -> None:
    with serving(model_path("iris"), WORKERS=1) as served:
        served.post("/predict", BODIES["/predict"], headers={"X-Request-ID": "abc", "traceparent": PARENT})
    assert re.search(
        r"Z INFO darwin\.access: POST /predict 200 protocol=darwin rows=1 ms=\d+\.\d\d id=abc trace=4bf92f3577b3\w+\n",
        served.log,
    )


def test_lines_are_written_whole_and_few_at_a_time() -> None:
    lines = [f"{number:04d} " + "x" * (number % 300) + "\n" for number in range(2000)]
    pieces = list(_pieces(lines))
    assert "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") and len(piece) <= PIPE_BYTES for piece in pieces)
    assert len(pieces) < len(lines) / 10


def test_no_lines_for_those_who_want_none(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.WARNING, logger="darwin.access")
    access = AccessLog()
    access.note(Line(time.time(), "GET", "/", 200, "other", 0, 0.001, Trace("id")))
    access.flush()
    assert capsys.readouterr().err == ""
