"""All that reads requests, as functions of bytes: what properties are proven of, and what is fuzzed.

A `Target` is one decoder. Its input begins with a byte that chooses the contract, where it has a choice; of
`v2-binary` two more say how long the JSON is.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from darwin_runtime.errors import (
    BadRequest,
    EncodingError,
    FeatureStoreError,
    Forbidden,
    InputError,
    InputRejected,
    NotAcceptable,
    NotFound,
    NotReady,
    Overloaded,
    TooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from darwin_runtime.http.settings import default_limits
from darwin_runtime.protocols import base as protocols
from darwin_runtime.protocols import darwin, feature_store, kserve_v1, mlflow_scoring, open_inference, v2_tensors
from darwin_runtime.protocols.base import Headers, Request, WireProtocol
from darwin_runtime.schema.model_spec import ModelSpec, compile_schema
from darwin_runtime.schema.params import ParamSchema
from tests.support.tensors import binary

Spec = dict[str, Any]

# What went wrong was the client's or the model's doing, and has been told to the client.
EXPECTED = (
    *(InputError, BadRequest, InputRejected, NotReady, Overloaded, NotFound),
    *(Unauthorized, Forbidden, UnsupportedMediaType, NotAcceptable, TooLarge, FeatureStoreError),
)


def _columns(*types: Any, **options: Any) -> list[Spec]:
    specs = [kind if isinstance(kind, dict) else {"type": kind} for kind in types]
    return [{"name": "abcdefghij"[index], **spec, **options} for index, spec in enumerate(specs)]


def _tensor(dtype: str, shape: list[int], name: str | None = None) -> Spec:
    spec = {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}
    return spec if name is None else {**spec, "name": name}


SCALARS = ("boolean", "integer", "long", "float", "double", "string", "binary", "datetime")
ROW = {"a": True, "b": 7, "c": 2**53 + 1, "d": 0.5, "e": 1e300, "f": "grün", "g": "AP8=", "h": "2024-02-29T23:59:59.5"}

_OBJECT = {
    "type": "object",
    "properties": {"id": {"type": "long", "required": True}, "note": {"type": "string", "required": False}},
}
NESTED = (
    {"type": "array", "items": {"type": "double"}},
    {"type": "array", "items": {"type": "array", "items": {"type": "long"}}},
    _OBJECT,
    {"type": "map", "values": {"type": "map", "values": {"type": "float"}}},
    {"type": "any"},
)
NESTED_ROW = {"a": [1.5, 2], "b": [[1, 2], [3]], "c": {"id": 3, "note": "x"}, "d": {"k": {"l": 0.5}}, "e": [1, "two"]}

PARAMS: list[Spec] = [
    {"name": "factor", "type": "double", "default": 2.0, "shape": None},
    {"name": "since", "type": "datetime", "default": "2024-01-01", "shape": None},
    {"name": "weights", "type": "long", "default": [1], "shape": [-1]},
    {"name": "item", **_OBJECT, "default": {"id": 1}, "shape": None},
]


class Case(NamedTuple):
    """A signature, and a row that fits it as /predict has it."""

    inputs: list[Spec] | None
    row: Any
    hinted: bool = False

    @property
    def contract(self) -> ModelSpec:
        plan = compile_schema(self.inputs, from_type_hint=self.hinted)
        methods = ("predict", "predict_proba")
        return ModelSpec(plan, ParamSchema(PARAMS), _columns("double"), methods=methods, streams=self.inputs is None)


CASES = {
    "doubles": Case(_columns("double", "double", "double"), {"a": 1.5, "b": 2, "c": -3.5}),
    "longs": Case(_columns("long", "long"), {"a": 1, "b": 2}),
    "floats": Case(_columns("float", "float"), {"a": 1.5, "b": 2}),
    "scalars": Case(_columns(*SCALARS), ROW),
    "optional": Case([*_columns("double"), *_columns(*SCALARS, required=False)[1:]], {"a": 1.5, "c": 3}),
    "nested": Case(_columns(*NESTED), NESTED_ROW),
    "one": Case(_columns("string"), {"a": "text"}),
    "unnamed": Case([{"type": "long"}, {"type": "string"}], {"0": 1, "1": "x"}),
    "tensor": Case([_tensor("float32", [-1, 2])], [1.5, 2]),
    "half": Case([_tensor("float16", [-1, -1])], [1.5, 2]),
    "texts": Case([_tensor("str", [-1, 2])], ["x", "y"]),
    "bytes": Case([_tensor("bytes", [-1])], "x"),
    "tensors": Case(
        [_tensor("uint8", [-1, 2, 2], "image"), _tensor("int64", [-1, 1], "weight")],
        {"image": [[1, 2], [3, 4]], "weight": [3]},
    ),
    "objects": Case([_tensor("object", [-1, 1])], ["x"]),
    "anything": Case(None, {"a": 1.5, "b": "x"}),
    "hinted": Case([{"type": "map", "values": {"type": "long"}}], {"a": 1}, hinted=True),
}
NAMES = tuple(CASES)
CONTRACTS = {name: case.contract for name, case in CASES.items()}


def requests(name: str) -> dict[str, dict[str, Any]]:
    """A valid request of each JSON protocol, of two rows."""
    row, contract = CASES[name].row, CONTRACTS[name]
    params = {"factor": 1.5, "since": "2024-02-29", "weights": [1, 2], "item": {"id": 1}}
    rows = row if name == "hinted" else [row, row]
    if name == "tensors":
        rows = {key: [value, value] for key, value in row.items()}
    asked = {"params": params} if name != "hinted" else {}
    found: dict[str, dict[str, Any]] = {
        "predict": {"features": rows, **asked},
        "invocations": {"inputs": rows, **asked},
        "v1": {"instances": rows, "parameters": {**params, "predict_method": "predict_proba"}},
    }
    tensors = open_inference.tensors(contract, row) or [
        {"name": "a", "shape": [1, 1], "datatype": "FP32", "data": [1.5]}
    ]
    if name != "hinted":
        found["v2"] = {"id": "x", "inputs": tensors, "outputs": [{"name": "a", "parameters": {"binary_data": True}}]}
    return found


def table(name: str) -> bytes:
    """The same as CSV, where the rows are objects or lists of scalars."""
    row = CASES[name].row
    given = row if isinstance(row, dict) else {str(index): value for index, value in enumerate(row)}
    text = io.StringIO()
    values = [value if isinstance(value, str) else json.dumps(value) for value in given.values()]
    csv.writer(text).writerows([list(given), values, values])
    return text.getvalue().encode()


def answered(request: Request, protocol: WireProtocol) -> None:
    """Do with `request` what is done with each: show it to a model, put it with others, write an answer to it."""
    rows = request.rows
    assert rows.count or rows.batch_key is None
    rows.for_model()
    rows.matrix()
    hash(rows.batch_key)
    repr(sorted(request.params.items()))
    try:
        output = np.zeros((rows.count, 2)) if request.method else np.zeros(rows.count)
        protocol.write(output, request)
    except EncodingError as error:
        raise AssertionError("zeros can be written") from error


def ask(protocol: WireProtocol, body: bytes, headers: Headers, contract: ModelSpec, **more: Any) -> Request | None:
    """What `protocol` reads in it, used as it will be; None if that raised one of the exceptions that are expected."""
    try:
        request = protocols.read_request(protocol, body, headers, contract, **more)
        answered(request, protocol)
    except EXPECTED:
        return None
    return request


def _contract(choice: int) -> ModelSpec:
    return CONTRACTS[NAMES[choice % len(NAMES)]]


def _chosen(protocol: WireProtocol, headers: Headers, data: bytes) -> None:
    if data:
        ask(protocol, data[1:], headers, _contract(data[0]))


def _binary(data: bytes) -> None:
    if len(data) > 3:
        length = b"%d" % int.from_bytes(data[1:3], "little")
        ask(open_inference, data[3:], {open_inference.LENGTH.lower().encode(): length}, _contract(data[0]))


def _encoded(data: bytes) -> None:
    try:
        encoding = (b"gzip", b"deflate", b"x-gzip ", b"br")[data[0] % 4] if data else b""
        body = protocols.decoded(data[1:], encoding, default_limits().request.body_bytes)
    except EXPECTED:
        return
    assert len(body) <= protocols.INFLATION * len(data) + 1024 * 1024


def _headers(data: bytes) -> None:
    content_type, _, accept = data.partition(b"\n")
    body = b'{"inputs": [[1, 2, 3]]}'
    headers = {b"content-type": content_type, b"accept": accept, b"inference-header-content-length": accept}
    for protocol in (mlflow_scoring, kserve_v1, open_inference):
        ask(protocol, body, headers, CONTRACTS["doubles"])


class _Store(feature_store.FeatureStore):
    """A feature store that answers with what it is given, as often as it is asked."""

    answer: Any = None

    def _ask(self, url: str, what: str, trace: Any, **options: Any) -> Any:
        json.dumps(options.get("json"))
        return self.answer


def _features(data: bytes) -> None:
    """JSON: the answer of a feature store, and the request that asks it."""
    store = _Store("http://store", "http://store")
    try:
        store.answer, body = json.loads(data)
    except (TypeError, ValueError, RecursionError):
        return
    lookup = partial(store.features, trace={})
    try:
        ask(darwin, json.dumps(body).encode(), {}, CONTRACTS["doubles"], lookup=lookup)
    finally:
        store.close()


class Target(NamedTuple):
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]


def _json_seeds(kind: str) -> Iterator[bytes]:
    for index, name in enumerate(NAMES):
        if kind in requests(name):
            yield bytes([index]) + json.dumps(requests(name)[kind]).encode()


def _invocations_seeds() -> Iterator[bytes]:
    yield from _json_seeds("invocations")
    for index, name in enumerate(NAMES):
        row = CASES[name].row
        if isinstance(row, dict):
            yield bytes([index]) + json.dumps({"dataframe_records": [row]}).encode()
            split = {"columns": list(row), "data": [list(row.values())], "index": ["x"]}
            yield bytes([index]) + json.dumps({"dataframe_split": split}).encode()
    yield bytes([NAMES.index("anything")]) + b'{"messages": [{"role": "user", "content": "x"}], "stream": true}'


def _binary_seeds() -> Iterator[bytes]:
    for index, name in enumerate(NAMES):
        if "v2" in requests(name):
            body, headers = binary(requests(name)["v2"])
            yield bytes([index]) + int(headers[open_inference.LENGTH]).to_bytes(2, "little") + body


def _csv_seeds() -> Iterator[bytes]:
    for index, name in enumerate(NAMES):
        yield bytes([index]) + table(name)
    yield bytes([0]) + b"a,b,c\n1,2.5,-3e5\n4,5,6\n"
    yield bytes([1]) + b"b,a,extra\r\n1,2,x\r\n"


def _parquet_seeds() -> Iterator[bytes]:
    import pandas as pd

    for name in ("doubles", "longs", "nested", "anything"):
        file = io.BytesIO()
        pd.DataFrame([CASES[name].row] * 2).drop(columns="e", errors="ignore").to_parquet(file)
        yield bytes([NAMES.index(name)]) + file.getvalue()


def _encoded_seeds() -> Iterator[bytes]:
    for body in (b"{}", b"x" * 1000, b" " * 10**6):
        yield b"\0" + gzip.compress(body, mtime=0)
        yield b"\1" + zlib.compress(body)


def _header_seeds() -> Iterator[bytes]:
    yield b"application/json; charset=utf-8\napplication/json;q=0.5, text/csv"
    yield b"text/csv\n*/*;q=0.1, text/*"
    yield b'application/vnd.apache.parquet;charset="UTF8"\n12'


def _feature_seeds() -> Iterator[bytes]:
    answer = {
        "data": {
            "schema": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
            "successfulKeys": [{"features": [1.5, 2]}],
        }
    }
    body = {"feature_group": "users", "ofs_keys": {"a": 42}}
    yield json.dumps([answer, body]).encode()


CSV = {b"content-type": b"text/csv"}
PARQUET = {b"content-type": protocols.PARQUET.encode()}

TARGETS = {
    "v2-binary": Target(_binary, _binary_seeds),
    "v2-json": Target(partial(_chosen, open_inference, {}), partial(_json_seeds, "v2")),
    "predict": Target(partial(_chosen, darwin, {}), partial(_json_seeds, "predict")),
    "invocations": Target(partial(_chosen, mlflow_scoring, {}), _invocations_seeds),
    "v1": Target(partial(_chosen, kserve_v1, {}), partial(_json_seeds, "v1")),
    "csv": Target(partial(_chosen, mlflow_scoring, CSV), _csv_seeds),
    "parquet": Target(partial(_chosen, mlflow_scoring, PARQUET), _parquet_seeds),
    "encoded": Target(_encoded, _encoded_seeds),
    "headers": Target(_headers, _header_seeds),
    "features": Target(_features, _feature_seeds),
}


def _self_test(data: bytes) -> None:
    assert b"datatype" not in data, "found"


# What the fuzzer must find, to show that it would.
SELF_TEST = {"self-test": Target(_self_test, lambda: iter([b"data"]))}

# What the decoders compare with, and what others stumbled over.
TOKENS = (
    *("features", "params", "parameters", "feature_group", "ofs_keys", "predict_method", "predict_proba"),
    *("dataframe_split", "dataframe_records", "instances", "inputs", "columns", "index", "data", "messages", "stream"),
    *("name", "shape", "datatype", "outputs", "id", "binary_data_size", "binary_data", "binary_data_output"),
    *(*v2_tensors.NUMBERS, v2_tensors.BYTES, "factor", "since", "weights", "item", "note", "image", "weight"),
    *("null", "true", "false", "NaN", "Infinity", "-0", "-0.0", "1e400", "1e-400", "1e308", "9223372036854775808"),
    *("18446744073709551616", "123456789012345678901234567890", "4611686018427387904", "-1", "0.1", "1.0"),
    *("2024-02-29", "2024-02-29T23:59:60Z", "2262-04-12", "0000-00-00", "AA==", "\\ud800", "\\u0000", "\ufeff"),
    *("[[[[", "]]]]", "{}", "[]", '""', "charset=", "q=", "*/*", "text/csv", "\r\n", '"""'),
)

# Values to put into JSON.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63) - 1,
        10**30,
        0.5,
        -0.0,
        1e308,
        1e39,
        70000.5,
        math.nan,
        math.inf,
        -math.inf,
    ),
    *("", "x", "\0", "é\n\u2028", "x" * 300, "1", "NaN", "2024-02-29", "AA=="),
    *([], {}, [[]], [1], [None], [[1, 2], [3]], {"a": 1}, [{"a": 1}], {"": {}}, [[[[[[[[1]]]]]]]]),
)
