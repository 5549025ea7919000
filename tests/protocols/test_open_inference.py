"""The Open Inference Protocol: what it refuses, and how answers of every kind are put."""

from __future__ import annotations

import datetime
import json
import math
import struct
from typing import Any

import numpy as np
import pandas as pd
import pytest

from darwin_runtime.errors import BadRequest, EncodingError, InputError
from darwin_runtime.protocols import open_inference
from darwin_runtime.schema.model_spec import ModelSpec, compile_schema
from darwin_runtime.schema.params import ParamSchema
from tests.support import tensors
from tests.support.schemas import tensor_spec

NO_PARAMS = ParamSchema(None)
TWO = ModelSpec(compile_schema([{"type": "double", "name": "a"}, {"type": "string", "name": "b"}]), NO_PARAMS)
ROWS = ModelSpec(compile_schema([{"type": "double", "name": "a"}, {"type": "double", "name": "b"}]), NO_PARAMS)
METHODS = ModelSpec(ROWS.input_schema, NO_PARAMS, methods=("predict", "predict_proba"))

A = {"name": "a", "shape": [2], "datatype": "FP64", "data": [1.5, 2]}
B = {"name": "b", "shape": [2, 1], "datatype": "BYTES", "data": ["x", "y"]}


def read(request: Any, contract: ModelSpec = TWO, headers: dict[bytes, bytes] | None = None) -> Any:
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return open_inference.read(body, headers or {}, contract)


def read_binary(body: bytes, length: int | str, contract: ModelSpec = TWO) -> Any:
    return read(body, contract, {b"inference-header-content-length": str(length).encode()})


def test_columns() -> None:
    rows = read({"inputs": [B, A, {**A, "name": "other"}]}).rows
    assert rows.for_model().to_dict("list") == {"a": [1.5, 2.0], "b": ["x", "y"]}


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (b"nonsense", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        ([], "JSON object"),
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [1]}, "name, shape"),
        ({"inputs": [{**A, "name": 1}]}, "name, shape"),
        ({"inputs": [A, A]}, "twice"),
        ({"inputs": [{**A, "datatype": "FP8"}]}, "unknown datatype 'FP8'"),
        ({"inputs": [{**A, "datatype": None}]}, "unknown datatype"),
        ({"inputs": [{**A, "shape": None}]}, "shape"),
        ({"inputs": [{**A, "shape": []}]}, "shape"),
        ({"inputs": [{**A, "shape": [-1]}]}, "shape"),
        ({"inputs": [{**A, "shape": [0, 2], "data": []}]}, "none of them 0"),
        ({"inputs": [{**A, "shape": [1] * 33, "data": [1]}]}, "at most 32 lengths"),
        ({"inputs": [{**A, "shape": [2**63] * 32}]}, "shape"),
        ({"inputs": [{**A, "datatype": []}]}, "unknown datatype"),
        ({"inputs": [{**A, "name": "n" * 100_000, "shape": [3]}]}, "stands for 3"),
        ({"inputs": [{**A, "shape": [True]}]}, "shape"),
        ({"inputs": [{**A, "shape": [1.0]}]}, "shape"),
        ({"inputs": [{**A, "shape": [3]}]}, "data has 2 values, and its shape [3] stands for 3"),
        ({"inputs": [{**A, "shape": [10**9, 10**9]}]}, "stands for"),
        ({"inputs": [{**A, "data": 1}]}, "data must be a list"),
        ({"inputs": [{**A, "shape": [2, 1], "data": [[1], [2, 3]]}]}, "axis 1"),
        ({"inputs": [{**A, "shape": [2, 1], "data": [[1], 2]}]}, "axis 1"),
        ({"inputs": [{**A, "data": ["x", 1]}]}, "'x' is no FP64"),
        ({"inputs": [{**A, "datatype": "INT64", "data": [1.5, 2]}]}, "'1.5' is no INT64"),
        ({"inputs": [{**A, "datatype": "INT8", "data": [1, 200]}]}, "not all values are within INT8"),
        ({"inputs": [{**A, "datatype": "UINT8", "data": [1, -1]}]}, "not all values are within UINT8"),
        ({"inputs": [{**A, "datatype": "BOOL", "data": [True, 1]}]}, "'1' is no BOOL"),
        ({"inputs": [{**A, "datatype": "BYTES", "data": [1, 2]}]}, "'1' is no BYTES"),
        ({"inputs": [{**A, "parameters": []}]}, "parameters"),
        ({"inputs": [{**A, "parameters": {"binary_data_size": 1}}]}, "not within the 0 bytes"),
        ({"inputs": [A, B], "id": 1}, "id"),
        ({"inputs": [A, B], "parameters": 1}, "parameters"),
        ({"inputs": [A, B], "outputs": {}}, "outputs"),
        ({"inputs": [A, B], "outputs": [{}]}, "outputs"),
    ],
)
def test_what_is_refused(request_: Any, why: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(request_)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ([A], "missing, expected string"),
        ([A, {**B, "shape": [1], "data": ["x"]}], "2 values, as many as the longest column"),
        ([{**A, "datatype": "BYTES", "data": ["1", "2"]}, B], "row 0, 'a': expected double, got string '1'"),
        ([{**A, "datatype": "BOOL", "data": [True, False]}, B], "got boolean"),
        ([{**A, "shape": [1, 2]}, {**B, "shape": [1], "data": ["x"]}], "expected double, got array of 2"),
        ([{"name": "x", "shape": [1, 3], "datatype": "FP64", "data": [1, 2, 3]}], "2 values"),
    ],
)
def test_what_does_not_fit_the_signature(inputs: list[Any], why: str) -> None:
    with pytest.raises(InputError) as caught:
        read({"inputs": inputs})
    assert why in str(caught.value)


def test_binary() -> None:
    body, headers = tensors.binary({"inputs": [A, B]})
    rows = read_binary(body, headers["Inference-Header-Content-Length"]).rows
    assert rows.for_model().to_dict("list") == {"a": [1.5, 2.0], "b": ["x", "y"]}


def packed(tensor: dict[str, Any], data: bytes, size: int | None = None) -> tuple[bytes, int]:
    described = {key: value for key, value in tensor.items() if key != "data"}
    described["parameters"] = {"binary_data_size": len(data) if size is None else size}
    head = json.dumps({"inputs": [described]}).encode()
    return head + data, len(head)


LONG = struct.pack("<I", 2**32 - 1)


@pytest.mark.parametrize(
    ("tensor", "data", "size", "why"),
    [
        (A, b"\0" * 15, None, "binary_data_size is 15, and has to be 16"),
        (A, b"\0" * 24, None, "binary_data_size is 24, and has to be 16"),
        (A, b"\0" * 16, 15, "binary_data_size is 15"),
        (A, b"\0" * 16, 17, "not within the 16 bytes"),
        (A, b"\0" * 16, -1, "not within the 16 bytes"),
        (A, b"\0" * 20, 16, "4 bytes are left over"),
        (A, b"\0" * 16, 2**70, "not within the 16 bytes"),
        ({**A, "datatype": "BOOL"}, b"\1\2", None, "0 or 1"),
        ({**A, "shape": [2**40]}, b"\0" * 16, None, "has to be"),
        (B, b"\1\0\0\0x\1\0\0", None, "ends within the length of element 1"),
        (B, b"\1\0\0\0x" + LONG + b"y", None, "element 1 is said to have 4294967295 bytes, 1 are left"),
        (B, b"\1\0\0\0x\2\0\0\0y", None, "element 1 is said to have 2 bytes, 1 are left"),
        (B, b"\1\0\0\0x", None, "holds 1 elements, and its shape stands for 2"),
        (B, b"\0\0\0\0" * 3, None, "holds 3 elements"),
        (B, b"\1\0\0\0\xff\0\0\0\0", None, "not UTF-8"),
    ],
)
def test_binary_data_that_lies(tensor: dict[str, Any], data: bytes, size: int | None, why: str) -> None:
    body, length = packed(tensor, data, size)
    with pytest.raises(BadRequest) as caught:
        read_binary(body, length)
    assert why in str(caught.value)


PNG, TEXT = b"\x89PNG\0", "ü"


@pytest.mark.parametrize(
    ("specs", "takes"),
    [
        (None, "both"),
        ([tensor_spec("bytes", -1)], "bytes"),
        ([tensor_spec("object", -1, name="b")], "both"),
        ([{"type": "binary", "name": "b"}], "bytes"),
        ([{"type": "any", "name": "b"}], "both"),
        ([{"type": "string", "name": "b"}], "text"),
        ([tensor_spec("str", -1)], "text"),
        ([{"type": "array", "items": {"type": "string"}, "name": "b"}], None),
    ],
)
def test_bytes_that_are_no_text(specs: Any, takes: str | None) -> None:
    contract = ModelSpec(compile_schema(specs), NO_PARAMS)

    def values(*parts: bytes) -> list[Any]:
        data = b"".join(struct.pack("<I", len(part)) + part for part in parts)
        given = read_binary(
            *packed({"name": "b", "shape": [len(parts)], "datatype": "BYTES"}, data), contract
        ).rows.value
        return list((next(iter(given.values())) if isinstance(given, dict) else given).tolist())

    png = PNG if takes == "both" or (specs and specs[0]["type"] == "binary") else PNG[:-1]
    if takes in ("bytes", "both"):
        # All of a tensor is of one type, whatever is in it.
        assert values(png, TEXT.encode()) == [png, TEXT.encode()]
    else:
        with pytest.raises((BadRequest, InputError), match="not UTF-8"):
            values(png)
    if takes:
        assert values(TEXT.encode()) == [TEXT.encode() if takes == "bytes" else TEXT]


def test_bytes_beside_text_in_whole_rows() -> None:
    columns = [{"type": "string", "name": "s"}, {"type": "binary", "name": "b"}, {"type": "any", "name": "x"}]
    data = b"".join(struct.pack("<I", len(part)) + part for part in (b"AAAA", b"AAAA", b'{"a": NaN}'))
    body, length = packed({"name": "rows", "shape": [1, 3], "datatype": "BYTES"}, data)
    rows = read_binary(body, length, ModelSpec(compile_schema(columns), NO_PARAMS)).rows
    np.testing.assert_equal(
        {name: column.tolist() for name, column in rows.value.items()},
        {"s": ["AAAA"], "b": [b"AAAA"], "x": [{"a": np.nan}]},
    )


@pytest.mark.parametrize(
    ("spec", "tensor", "expected"),
    [
        ({"type": "string"}, {"shape": [2, 1], "datatype": "BYTES", "data": ["a", "b"]}, ["a", "b"]),
        ({"type": "string"}, {"shape": [2], "datatype": "BYTES", "data": ["a", "b"]}, ["a", "b"]),
        ({"type": "double"}, {"shape": [2, 1], "datatype": "FP64", "data": [1, 2.5]}, [1.0, 2.5]),
        ({"type": "long"}, {"shape": [1, 1], "datatype": "INT64", "data": [1]}, [1]),
        (
            {"type": "map", "values": {"type": "long"}},
            {"shape": [1, 1], "datatype": "BYTES", "data": ['{"a":1}']},
            [{"a": 1}],
        ),
        (
            {"type": "array", "items": {"type": "double"}},
            {"shape": [2, 1], "datatype": "FP64", "data": [1, 2]},
            [[1.0], [2.0]],
        ),
        (
            {"type": "array", "items": {"type": "long"}},
            {"shape": [1], "datatype": "BYTES", "data": ["[1, 2]"]},
            [[1, 2]],
        ),
        (
            {"type": "array", "items": {"type": "string"}},
            {"shape": [1, 2], "datatype": "BYTES", "data": ["a", "b"]},
            [["a", "b"]],
        ),
        (
            {"type": "array", "items": {"type": "string"}},
            {"shape": [1, 1], "datatype": "BYTES", "data": ["a"]},
            [["a"]],
        ),
        ({"type": "any"}, {"shape": [2], "datatype": "BYTES", "data": ["a", '{"b": 1}']}, ["a", {"b": 1}]),
    ],
)
def test_tensors_for_type_hints(spec: dict[str, Any], tensor: dict[str, Any], expected: list[Any]) -> None:
    contract = ModelSpec(compile_schema([spec], from_type_hint=True), NO_PARAMS)
    found = read({"inputs": [{"name": "0", **tensor}]}, contract).rows.value
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        ({**A, "data": [1, math.inf]}, "row 1, 'a': expected double, got number Infinity"),
        ({**A, "datatype": "INT64", "data": [1, math.nan]}, "'nan' is no INT64"),
        ({**A, "datatype": "BOOL", "data": [True, math.nan]}, "'nan' is no BOOL"),
    ],
)
def test_what_no_number_is(tensor: dict[str, Any], why: str) -> None:
    with pytest.raises((BadRequest, InputError)) as caught:
        read({"inputs": [tensor, B]})
    assert why in str(caught.value)


def test_nan_in_tensors() -> None:
    rows = read({"inputs": [{**A, "data": [1, math.nan]}, {**B, "data": ["x", math.nan]}]}).rows
    assert rows.for_model().isna().to_numpy().tolist() == [[False, False], [True, True]]
    unchecked = ModelSpec(compile_schema(None), NO_PARAMS)
    np.testing.assert_equal(read({"inputs": [{**A, "data": [1, math.nan]}]}, unchecked).rows.value, [1, math.nan])
    with pytest.raises(InputError, match=r"'inputs\[0\].data\[1\]': expected a finite number, got number Infinity"):
        read({"inputs": [{**A, "data": [1, math.inf]}]}, unchecked)


@pytest.mark.parametrize("length", ["-1", "x", "", "99999", "1e1", "\u0664", "9" * 5000])
def test_a_header_length_that_lies(length: str) -> None:
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length"):
        read_binary(b"{}", length)


def test_integers_are_exact() -> None:
    for data in ([2**64 + 1, 1], [10**30, 1]):
        with pytest.raises(InputError, match="no such number has this type exactly"):
            read({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP64", "data": data}]}, ROWS)


def test_data_and_binary_data_exclude_each_other() -> None:
    head = json.dumps({"inputs": [{**A, "parameters": {"binary_data_size": 16}}]}).encode()
    with pytest.raises(BadRequest, match="not both"):
        read_binary(head + b"\0" * 16, len(head))


@pytest.mark.parametrize("values", [[[1.5, float("inf")]], [[1.5, float("nan")]], [[1e308, -1e308]]])
def test_numbers_that_json_has_not(values: list[list[float]]) -> None:
    body, length = packed({"name": "x", "shape": [1, 2], "datatype": "FP64"}, np.array(values).tobytes())
    if np.isinf(values).any():
        with pytest.raises(InputError, match="outside"):
            read_binary(body, length, ROWS)
    else:
        rows = read_binary(body, length, ROWS).rows
        np.testing.assert_array_equal(rows.value, values)
        assert rows.unvalidated == bool(np.isnan(values).any())


def test_every_prefix_and_every_flipped_byte_is_read_or_refused() -> None:
    body, headers = tensors.binary({"inputs": [A, B]})
    length = int(headers["Inference-Header-Content-Length"])
    for end in range(len(body)):
        with pytest.raises(BadRequest):
            read_binary(body[:end], min(length, end))
    for at in range(len(body)):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(body)
            changed[at] ^= flip
            try:
                read_binary(bytes(changed), length)
            except (BadRequest, InputError):
                continue


# Answers


def answer(output: Any, contract: ModelSpec = ROWS, **request: Any) -> dict[str, Any]:
    asked = read({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}], **request}, contract)
    return dict(json.loads(open_inference.write(output, asked).body))


TIMES = np.array(["2024-01-31T12:00:00.5", "NaT"], dtype="datetime64[ns]")


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (np.array([1, 2]), ("INT64", [2], [1, 2])),
        (np.array([[0.5, np.nan]]), ("FP64", [1, 2], [0.5, None])),
        (np.array([1, 2], dtype=">i4"), ("INT32", [2], [1, 2])),
        (np.array([1.5], dtype=np.float16), ("FP16", [1], [1.5])),
        (np.array([True, False]), ("BOOL", [2], [True, False])),
        (np.array(["a", "b"]), ("BYTES", [2], ["a", "b"])),
        (["a", None, ""], ("BYTES", [3], ["a", None, ""])),
        ([b"\0\xff"], ("BYTES", [1], ["AP8="])),
        ([1.5, 2.5], ("FP64", [2], [1.5, 2.5])),
        ([[1], [2, 3]], ("BYTES", [2], ["[1]", "[2,3]"])),
        (TIMES, ("BYTES", [2], ["2024-01-31T12:00:00.500000000", None])),
        (pd.Series([1, 2], dtype="Int64"), ("INT64", [2, 1], [1, 2])),
        (3.5, ("FP64", [1], [3.5])),
        ("text", ("BYTES", [1], ["text"])),
        (2**70, ("BYTES", [1], ["1180591620717411303424"])),
        ([datetime.date(2024, 1, 31)], ("BYTES", [1], ["2024-01-31"])),
    ],
)
def test_an_output_without_a_name_is_the_method_s(output: Any, told: tuple[str, list[int], list[Any]]) -> None:
    [tensor] = answer(output)["outputs"]
    assert tensor == dict(zip(("name", "datatype", "shape", "data"), ("predict", *told), strict=True))


def test_outputs_with_names() -> None:
    table = pd.DataFrame({"p": [0.5, 1.0], "q": ["x", "y"]})
    for output in (table, table.to_dict("records")):
        assert answer(output)["outputs"] == [
            {"name": "p", "datatype": "FP64", "shape": [2, 1], "data": [0.5, 1.0]},
            {"name": "q", "datatype": "BYTES", "shape": [2, 1], "data": ["x", "y"]},
        ]
    named = ModelSpec(
        ROWS.input_schema, NO_PARAMS, outputs=[{"type": "double", "name": "p"}, {"type": "double", "name": "q"}]
    )
    told = answer(np.array([[1.0, 2.0], [3.0, 4.0]]), named)["outputs"]
    assert [(each["name"], each["shape"], each["data"]) for each in told] == [
        ("p", [2, 1], [1.0, 3.0]),
        ("q", [2, 1], [2.0, 4.0]),
    ]
    one = ModelSpec(ROWS.input_schema, NO_PARAMS, outputs=[{"type": "long", "name": "label"}])
    assert answer(np.array([1]), one)["outputs"][0]["name"] == "label"


def test_names_versions_and_ids() -> None:
    contract = ModelSpec(ROWS.input_schema, NO_PARAMS, name="iris", version="3")
    assert answer(np.array([1]), contract, id="7")["id"] == "7"
    told = answer(np.array([1]), contract)
    assert (told["model_name"], told["model_version"], "id" in told) == ("iris", "3", False)


def test_only_the_outputs_asked_for() -> None:
    table = pd.DataFrame({"p": [0.5], "q": [1.5]})
    told = answer(table, outputs=[{"name": "q"}])
    assert [output["name"] for output in told["outputs"]] == ["q"]
    with pytest.raises(BadRequest, match="no output 'r': there is p, q"):
        answer(table, outputs=[{"name": "r"}])


def test_binary_for_some_or_for_all() -> None:
    table = pd.DataFrame({"p": [0.5], "q": ["é"]})
    base = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}]}
    for asked, kinds in (
        ({"parameters": {"binary_data_output": True}}, [True, True]),
        ({"outputs": [{"name": "p", "parameters": {"binary_data": True}}, {"name": "q"}]}, [True, False]),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "p", "parameters": {"binary_data": False}}, {"name": "q"}],
            },
            [False, True],
        ),
    ):
        reply = open_inference.write(table, read({**base, **asked}, ROWS))
        length = dict(reply.headers)["Inference-Header-Content-Length"]
        head = json.loads(reply.body[: int(length)])
        assert ["data" not in output for output in head["outputs"]] == kinds
        assert tensors.values(reply.body, length) == {"p": [0.5], "q": ["é"]}
        assert reply.media_type == "application/octet-stream"


def test_methods_are_asked_for_as_outputs_or_as_a_parameter() -> None:
    base = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}]}
    by_output = read({**base, "outputs": [{"name": "predict_proba"}]}, METHODS)
    by_parameter = read({**base, "parameters": {"predict_method": "predict_proba"}}, METHODS)
    assert (by_output.method, by_parameter.method) == ("predict_proba", "predict_proba")
    for request in (by_output, by_parameter):
        [output] = json.loads(open_inference.write(np.array([[0.25, 0.75]]), request).body)["outputs"]
        assert output == {"name": "predict_proba", "datatype": "FP64", "shape": [1, 2], "data": [0.25, 0.75]}
    assert read({**base, "outputs": [{"name": "predict"}]}, METHODS).method == ""
    both = read({**base, "outputs": [{"name": "predict"}, {"name": "predict_proba"}]}, METHODS)
    assert (both.method, both.methods) == ("", ("", "predict_proba"))
    answers = {"": np.array([1]), "predict_proba": np.array([[0.25, 0.75]])}
    assert [each["data"] for each in json.loads(open_inference.write(answers, both).body)["outputs"]] == [
        [1],
        [0.25, 0.75],
    ]
    named = ModelSpec(
        ROWS.input_schema, NO_PARAMS, outputs=[{"type": "long", "name": "label"}], methods=METHODS.methods
    )
    request = read({**base, "outputs": [{"name": "predict_proba"}, {"name": "label"}]}, named)
    assert request.methods == ("predict_proba", "")
    outputs = json.loads(open_inference.write(answers, request).body)["outputs"]
    assert [(each["name"], each["shape"]) for each in outputs] == [("predict_proba", [1, 2]), ("label", [1, 1])]
    unknown = read({**base, "outputs": [{"name": "predict_proba"}, {"name": "other"}]}, named)
    with pytest.raises(BadRequest, match="no output 'other': there is label, predict_proba"):
        open_inference.write(answers, unknown)
    with pytest.raises(InputError, match="predict_method: one of predict, predict_proba"):
        read({**base, "parameters": {"predict_method": "fit"}}, METHODS)


def test_what_has_no_form_as_a_tensor() -> None:
    with pytest.raises(EncodingError):
        answer([object()])


def test_metadata() -> None:
    specs = [
        *({"type": kind, "name": kind} for kind in ("boolean", "integer", "long", "float", "double", "string")),
        {"type": "datetime", "name": "datetime"},
    ]
    outputs = [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 3]}}]
    contract = ModelSpec(compile_schema(specs), NO_PARAMS, outputs=outputs, name="m", version="2")
    told = json.loads(open_inference.model_metadata(contract, "sklearn").body)
    assert [tensor["datatype"] for tensor in told["inputs"]] == [
        *("BOOL", "INT32", "INT64", "FP32", "FP64", "BYTES", "BYTES"),
    ]
    assert {tuple(tensor["shape"]) for tensor in told["inputs"]} == {(-1, 1)}
    assert told["outputs"] == [{"name": "predict", "datatype": "FP32", "shape": [-1, 3]}]
    assert (told["name"], told["versions"], told["platform"]) == ("m", ["2"], "mlflow_sklearn")


def test_a_label_that_contradicts_the_method_is_refused() -> None:
    base = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}]}
    for method, label in (("predict", "predict_proba"), ("predict_proba", "predict")):
        with pytest.raises(BadRequest, match=f"output '{label}' is asked for, and '{method}' by predict_method"):
            read({**base, "parameters": {"predict_method": method}, "outputs": [{"name": label}]}, METHODS)


@pytest.mark.parametrize("binary", [True, False])
def test_without_a_signature_the_datatype_is_the_client_s(binary: bool) -> None:
    nothing = ModelSpec(compile_schema(None), NO_PARAMS)

    def rows(*inputs: Any) -> Any:
        if not binary:
            return read({"inputs": inputs}, nothing).rows
        body, headers = tensors.binary({"inputs": inputs})
        return read_binary(body, headers["Inference-Header-Content-Length"], nothing).rows

    value = rows({"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1.5, None, 2, 3]}).value
    assert (value.dtype, value.shape, value.flags.writeable) == (np.float32, (2, 2), True)
    assert np.isnan(value[0, 1])
    table = rows(
        {"name": "a", "shape": [2], "datatype": "UINT8", "data": [1, 2]},
        {"name": "b", "shape": [2, 1], "datatype": "BYTES", "data": ["x", "y"]},
    ).value
    assert table["a"].dtype == np.uint8
    assert table["b"].tolist() == ["x", "y"]
    named = rows(
        {"name": "a", "shape": [1, 2], "datatype": "INT16", "data": [1, 2]},
        {"name": "b", "shape": [3], "datatype": "FP64", "data": [1, 2, 3]},
    ).value
    assert {name: (array.dtype.name, array.shape) for name, array in named.items()} == {
        "a": ("int16", (1, 2)),
        "b": ("float64", (3,)),
    }
