"""Wire formats: bodies to requests, answers and failures to bodies."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from darwin_runtime.errors import (
    BadRequest,
    DeadlineExceeded,
    EncodingError,
    InputError,
    InputRejected,
    NotReady,
    Overloaded,
    ParamsError,
    PredictionFailed,
    RequestError,
    TooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from darwin_runtime.protocols import base as protocols
from darwin_runtime.protocols import darwin, kserve_v1, mlflow_scoring, open_inference
from darwin_runtime.protocols.base import Request
from darwin_runtime.protocols.encoding import dump
from darwin_runtime.schema.model_spec import ModelSpec, compile_schema
from darwin_runtime.schema.params import ParamSchema

PLAN = compile_schema([{"type": "long", "name": "a"}])
PARAMS = ParamSchema([{"name": "p", "type": "double", "default": 1.0, "shape": None}])
CONTRACT = ModelSpec(PLAN, PARAMS)


def predict(body: bytes) -> Request:
    return darwin.read(body, {}, CONTRACT)


def invoke(body: bytes, content_type: str | None = "application/json") -> Request:
    headers = {} if content_type is None else {b"content-type": content_type.encode()}
    return mlflow_scoring.read(body, headers, CONTRACT)


@pytest.mark.parametrize(
    "body",
    [
        b'{"dataframe_records": [{"a": 1}], "params": {"p": 2}, "other": 1}',
        b'{"dataframe_split": {"columns": ["a"], "data": [[1]], "index": [7]}, "params": {"p": 2}}',
        b'{"instances": [1], "params": {"p": 2}}',
        b'{"inputs": {"a": [1]}, "params": {"p": 2}}',
    ],
)
def test_invocations_json(body: bytes) -> None:
    request = invoke(body)
    assert request.rows.value.tolist() == [[1]]
    assert request.params == {"p": 2.0}


def test_predict() -> None:
    assert predict(b'{"features": {"a": 1}}').rows.value.tolist() == [[1]]
    assert predict(b'{"features": [{"a": 1}, {"a": 2}]}').rows.count == 2
    assert predict(b'{"features": {"a": 1}, "params": {"p": 3}}').params == {"p": 3.0}
    assert predict(b'{"features": {"a": 1}, "feature_group": null}').rows.count == 1


@pytest.mark.parametrize("content_type", [None, "", "application/json", "Application/JSON; charset=UTF-8"])
def test_json_content_types(content_type: str | None) -> None:
    assert invoke(b'{"instances": [1]}', content_type).rows.count == 1


@pytest.mark.parametrize("content_type", ["text/csv", 'text/csv;charset="utf-8"', "text/csv ; Charset=utf-8 ;"])
def test_csv_content_types(content_type: str) -> None:
    assert invoke(b"\xef\xbb\xbfa\n1\n", content_type).rows.value.tolist() == [[1]]


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/xml", "text/csv; charset=latin-1", "application/json; version=2", "nonsense", ";"],
)
def test_other_content_types(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        invoke(b"", content_type)


# In both protocols, whatever the model.
NOT_JSON = [
    *(b"", b" ", b"{", b"nonsense", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e400}', b'{"a": "\\ud800"}', b'{"a": 1,}'),
    *(b"[" * 1_000_000, b'{"a":' * 1_000_000, b"1" * 5000, b"[]", b"null", b'"text"', b"{} {}", b"\x00"),
]


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:20]))
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        predict(body)
    assert len(str(caught.value)) < 300
    with pytest.raises(BadRequest):
        invoke(body)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"features": {"a": 1}, "feature_group": "g", "ofs_keys": [1]}',
        b'{"feature_group": "g"}',
        b'{"ofs_keys": [1]}',
        b'{"features": {"a": 1}, "feature_group": "g"}',
        b'{"features": null, "feature_group": "g"}',
        b'{"feature_group": "g", "ofs_keys": [1]}',
    ],
)
def test_features_or_keys_but_not_both(body: bytes) -> None:
    with pytest.raises(BadRequest):
        predict(body)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"data": []}',
        b'{"instances": [1], "inputs": [1]}',
        b'{"dataframe_split": []}',
        b'{"dataframe_split": {"columns": ["a"]}}',
        b'{"dataframe_split": {"data": [[1]], "rows": 1}}',
        b'{"dataframe_split": {"columns": ["a"], "data": [[1]], "index": [1, 2]}}',
        b'{"dataframe_split": {"columns": ["a"], "data": [[1]], "index": 3}}',
    ],
)
def test_exactly_one_well_formed_shape(body: bytes) -> None:
    with pytest.raises((BadRequest, InputError)):
        invoke(body)


@pytest.mark.parametrize("fields", ["", '"features": null, ', '"params": null, "features": null, '])
def test_null_beside_keys_is_no_features(fields: str) -> None:
    body = f'{{{fields}"feature_group": "g", "ofs_keys": {{"id": 1}}}}'.encode()
    rows = darwin.read(body, {}, CONTRACT, lookup=lambda group, keys: {"a": 2, **keys}).rows
    assert rows.first() == {"a": 2}


SEVERAL = ParamSchema([{"name": "x", "type": "double"}, {"name": "n", "type": "long"}, {"name": "s", "type": "string"}])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"features": {"a": Infinity}}', "row 0, 'a': expected long, got number Infinity"),
        (b'{"features": {"a": 1}, "params": {"x": -Infinity}}', "'params.x': expected double, got number -Infinity"),
        (b'{"features": {"a": 1}, "params": {"n": NaN}}', "'params.n': expected long, got number NaN"),
        (b'{"features": {"a": 1}, "params": {"s": NaN}}', "'params.s': expected string, got number NaN"),
        (b'{"features": {"a": NaN}}', "row 0, 'a': expected long, got number NaN"),
        (b'{"features": NaN}', "object of named values"),
    ],
)
def test_nan_and_infinity_are_refused_by_name(body: bytes, why: str) -> None:
    with pytest.raises(InputError) as caught:
        darwin.read(body, {}, replace(CONTRACT, params=SEVERAL))
    assert why in str(caught.value)


def test_nan_is_a_param() -> None:
    request = darwin.read(
        b'{"features": {"a": 1}, "params": {"x": NaN, "n": null}}', {}, replace(CONTRACT, params=SEVERAL)
    )
    assert math.isnan(request.params["x"])
    assert request.params["n"] is None


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'{"dataframe_records": [{"a": 1}, {"a": [0, Infinity]}]}', r"'dataframe_records\[1\].a\[1\]'"),
        (b'{"dataframe_split": {"columns": ["a"], "data": [[-Infinity]]}}', r"'dataframe_split.data\[0\]\[0\]'"),
        (b'{"inputs": [NaN, Infinity]}', r"'inputs\[1\]'"),
        (b'{"messages": [{"weight": Infinity}]}', r"'messages\[0\].weight'"),
        (b'{"inputs": [1], "' + b"k" * 500 + b'": [[Infinity]]}', r"'k{200}\.\.\.'"),
    ],
)
def test_infinity_without_a_signature_is_refused_by_its_path(body: bytes, path: str) -> None:
    with pytest.raises(InputError, match=path + ": expected a finite number, got number -?Infinity"):
        mlflow_scoring.read(body, {}, ModelSpec(compile_schema(None), ParamSchema(None)))


def test_csv_must_be_utf8() -> None:
    with pytest.raises(BadRequest, match="UTF-8"):
        invoke(b"a\n\xe4\n", "text/csv")


@pytest.mark.parametrize(
    ("output", "predictions", "scores"),
    [
        (np.array([1, 2]), [1, 2], [1, 2]),
        (np.array([[0.1, math.nan], [math.inf, 1.0]]), [[0.1, None], [None, 1.0]], [[0.1, None], [None, 1.0]]),
        (np.array([0.1], dtype=np.float32), [0.10000000149011612], [0.10000000149011612]),
        (pd.Series([1.5, math.nan], name="y"), [{"y": 1.5}, {"y": None}], [1.5, None]),
        (pd.Series([True]), [{"0": True}], [True]),
        (pd.Series([1, None], dtype="Int64"), [{"0": 1}, {"0": None}], [1, None]),
        (pd.DataFrame({"a": [1], 2: ["x"]}), [{"a": 1, "2": "x"}], [{"a": 1, "2": "x"}]),
        (pd.Categorical(["u", "v"]), ["u", "v"], ["u", "v"]),
        (pd.DataFrame({"t": pd.to_datetime(["2024-01-31T12:00"])}), *[[{"t": "2024-01-31T12:00:00"}]] * 2),
        (np.array(["2024-01-31", "NaT"], dtype="datetime64[D]"), *[["2024-01-31", None]] * 2),
        (np.array([90, "NaT"], dtype="timedelta64[s]"), *[["P0DT0H1M30S", None]] * 2),
        ([pd.Timestamp("2024-01-31", tz="UTC"), pd.NaT, pd.NA], *[["2024-01-31T00:00:00+00:00", None, None]] * 2),
        ([b"\x00\xff", bytearray(b"a")], *[["AP8=", "YQ=="]] * 2),
        ([{"n": np.int64(3), "f": np.float32(0.5), "b": np.True_}], *[[{"n": 3, "f": 0.5, "b": True}]] * 2),
        (("a", None), ["a", None], ["a", None]),
        (2**70, 2**70, [2**70]),
        ([2**70, math.nan, np.float64("inf"), {"x": (1,)}], *[[2**70, None, None, {"x": [1]}]] * 2),
        ("\ud800", "\ud800", ["\ud800"]),
        (np.float64(2.5), 2.5, [2.5]),
        (np.array(2.5), 2.5, [2.5]),
        ("text", "text", ["text"]),
        ({"a": np.array([1])}, {"a": [1]}, [{"a": [1]}]),
        (None, None, [None]),
        ([], [], []),
    ],
)
def test_answers(output: Any, predictions: Any, scores: Any) -> None:
    assert json.loads(mlflow_scoring.write_predictions(output).body) == {"predictions": predictions}
    assert json.loads(darwin.write_scores(output).body) == {"scores": scores}


@pytest.mark.parametrize("output", [object(), [object()], {"a": 1j}, {"deep": {1, 2}}])
def test_answers_without_a_json_form(output: Any) -> None:
    with pytest.raises(EncodingError):
        mlflow_scoring.write_predictions(output)
    with pytest.raises(EncodingError):
        darwin.write_scores(output)


def input_error(error: type[InputError] = InputError, **row: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        PLAN.records([row])
    return error(caught.value.problems)


@pytest.mark.parametrize(
    ("error", "status", "code", "darwin_status"),
    [
        (input_error(a="x"), 400, "BAD_REQUEST", 422),
        (input_error(), 400, "INVALID_PARAMETER_VALUE", 422),
        (input_error(ParamsError, a="x"), 400, "INVALID_PARAMETER_VALUE", 422),
        (BadRequest("no JSON"), 400, "BAD_REQUEST", 422),
        (InputRejected("no"), 400, "BAD_REQUEST", 400),
        (InputRejected("no", by_schema=True), 400, "INVALID_PARAMETER_VALUE", 400),
        (NotReady("loading"), 503, "TEMPORARILY_UNAVAILABLE", 503),
        (DeadlineExceeded("60 s"), 504, "DEADLINE_EXCEEDED", 504),
        (PredictionFailed("ValueError: oh"), 500, "INTERNAL_ERROR", 500),
        (EncodingError("set"), 500, "INTERNAL_ERROR", 500),
        (RuntimeError("/secret/path"), 500, "INTERNAL_ERROR", 500),
    ],
)
def test_failures(error: Exception, status: int, code: str, darwin_status: int) -> None:
    reply = mlflow_scoring.render_error(error)
    body = json.loads(reply.body)
    assert (reply.status, body["error_code"], body.keys()) == (status, code, {"error_code", "message"})
    reply = darwin.render_error(error, PLAN.inputs)
    assert (reply.status, list(json.loads(reply.body))) == (darwin_status, ["detail"])
    assert b"secret" not in reply.body


def test_darwin_mismatch_in_full() -> None:
    reply = darwin.render_error(input_error(a="x"), PLAN.inputs)
    assert json.loads(reply.body)["detail"] == {
        "message": "Input does not match the model's signature",
        "errors": [
            {
                "field": "a",
                "row": 0,
                "error_type": "type_mismatch",
                "message": "row 0, 'a': expected long, got string 'x'",
                "expected_type": "long",
                "actual_type": "string",
            }
        ],
        "error_count": 1,
        "expected_schema": [{"name": "a", "required": True, "type": "long"}],
        "hint": "GET /schema shows the names and types, and a sample request",
    }


def test_unsupported_media_types_are_answered_in_plain_text() -> None:
    assert mlflow_scoring.render_error(UnsupportedMediaType("no")) == protocols.Reply(
        415, b"no", "text/plain; charset=utf-8"
    )


def test_integers_beyond_64_bits_are_exact() -> None:
    body = b'{"dataframe_records": [{"a": 18446744073709551617, "b": "99999999999999999999"}]}'
    rows = mlflow_scoring.read(body, {}, ModelSpec(compile_schema(None), PARAMS)).rows
    assert rows.for_model()["a"].tolist() == [2**64 + 1]
    with pytest.raises(InputError):
        mlflow_scoring.read(body, {}, ModelSpec(compile_schema([{"type": "double", "name": "a"}]), PARAMS))


@pytest.mark.parametrize("value", [2**64 + 1, -(2**63) - 1, [2**64 + 1], [0.5, -(2**64) - 1], 10**30 + 1])
def test_integers_beyond_64_bits_are_exact_wherever_they_are(value: Any) -> None:
    rows = mlflow_scoring.read(dump({"inputs": {"a": [value]}}), {}, ModelSpec(compile_schema(None), PARAMS)).rows
    assert rows.value["a"].tolist() == [value]


@pytest.mark.parametrize("body", [b"1" * 5000, b'{"inputs": [' + b"1" * 5000 + b"]}"])
def test_an_integer_too_long_for_python_is_malformed(body: bytes) -> None:
    with pytest.raises(BadRequest):
        invoke(body)


def test_keys_are_written_alike_with_and_without_huge_numbers() -> None:
    value = {None: 1, True: 2, 3: 4}
    told = {"null": 1, "true": 2, "3": 4}
    assert json.loads(dump(value)) == told
    assert json.loads(dump({**value, "big": 2**70})) == {**told, "big": 2**70}


def test_a_dataclass_is_a_score() -> None:
    @dataclass
    class Answer:
        score: float

    assert darwin.write_scores(Answer(1.5)).body == dump({"scores": [{"score": 1.5}]})


def test_deep_nesting_beside_a_long_integer() -> None:
    body = b'{"features": ' + b"[" * 1010 + b"1234567890123456789" + b"]" * 1010 + b"}"
    with pytest.raises((BadRequest, InputError)):
        predict(body)


@pytest.mark.parametrize("value", ["100000000000000000001", "123456789012345678901234567890", "-9223372036854775809"])
@pytest.mark.parametrize("place", ["cell", "param", "extra"])
def test_integers_are_exact_in_large_bodies_too(value: str, place: str) -> None:
    plan = compile_schema([{"type": "double", "name": "a"}])
    params = ParamSchema([{"name": "p", "type": "double", "default": 1.0, "shape": None}])

    def read(rows: int) -> Request:
        cell = value if place == "cell" else "1.5"
        extra = f', "b": {value}' if place == "extra" else ""
        records = ", ".join([f'{{"a": 0.5{extra}}}'] * rows + [f'{{"a": {cell}}}'])
        param = f', "params": {{"p": {value}}}' if place == "param" else ""
        body = f'{{"dataframe_records": [{records}]{param}}}'.encode()
        assert (len(body) > 16 * 1024) == (rows > 1)
        return protocols.read_request(mlflow_scoring, body, {}, ModelSpec(plan, params))

    for rows in (1, 2000):
        if place == "extra":
            assert read(rows).rows.value[-1] == 1.5
        else:
            with pytest.raises(InputError, match="no such number has this type exactly"):
                read(rows)


@pytest.mark.parametrize(
    ("rows", "params"),
    [([[0.5]], {}), ([[0.5], [None]], {}), ([[0.5]], {"p": 1.5}), ([[2.0**64]], {}), ([[0.5]], {"p": 2.0**64})],
)
def test_only_what_may_have_been_a_long_integer_is_searched_for_one(
    rows: list[list[float | None]], params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = ModelSpec(compile_schema([{"type": "double", "name": "a"}]), PARAMS)
    body = json.dumps({"inputs": rows * 5000, "params": params}).encode()
    expected = mlflow_scoring.read(body, {}, contract)
    doubtful = 2.0**64 in (rows[0][0], params.get("p"))
    monkeypatch.setattr(protocols, "_LONG_INTEGER", None)
    if doubtful:
        with pytest.raises(TypeError):
            protocols.read_request(mlflow_scoring, body, {}, contract)
    else:
        found = protocols.read_request(mlflow_scoring, body, {}, contract)
        np.testing.assert_array_equal(found.rows.value, expected.rows.value)
        assert found.params == expected.params


@pytest.mark.parametrize("error", [Overloaded(7), Unauthorized("no key", (("WWW-Authenticate", "Bearer"),))])
def test_an_error_s_headers_are_the_answer_s(error: RequestError) -> None:
    replies = [module.render_error(error) for module in (mlflow_scoring, kserve_v1, open_inference)]
    for reply in (darwin.render_error(error, ()), *replies):
        assert (reply.status, reply.headers) == (error.status, error.headers)


@pytest.mark.parametrize("error", [RuntimeError("/secret/path"), KeyError("secret"), ValueError("secret")])
def test_what_is_unexpected_shows_nothing_of_itself(error: Exception) -> None:
    replies = [module.render_error(error) for module in (mlflow_scoring, kserve_v1, open_inference)]
    for reply in (darwin.render_error(error, ()), *replies):
        assert reply.status == 500
        assert b"internal error" in reply.body
        assert b"secret" not in reply.body


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"[[1]],"])
def test_what_would_take_far_more_memory_than_its_size_is_not_parsed(
    piece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"instances":[' + piece * protocols.MAX_CONTAINERS + b"0]}"
    monkeypatch.setattr("orjson.loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(TooLarge, match="more than 4000000 arrays and objects"):
        protocols.read_object(body, exact=True)
