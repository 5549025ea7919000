"""What holds for every request: only expected exceptions, memory in proportion; valid ones arrive as they were.

`EXAMPLES=5000`, or `make fuzz`, tries more, and others each time.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from darwin_runtime.errors import BadRequest, TooLarge
from darwin_runtime.http.settings import default_limits
from darwin_runtime.protocols import base as protocols
from darwin_runtime.protocols import darwin, kserve_v1, mlflow_scoring, open_inference
from darwin_runtime.protocols.base import WireProtocol
from darwin_runtime.schema.checks import is_missing
from darwin_runtime.schema.model_spec import ModelSpec, compile_schema
from darwin_runtime.schema.params import ParamSchema
from darwin_runtime.schema.rows import Rows
from tests.support.hostile import (
    CASES,
    CONTRACTS,
    CSV,
    EXPECTED,
    NAMES,
    PARQUET,
    TARGETS,
    TOKENS,
    VALUES,
    ask,
    requests,
    table,
)
from tests.support.tensors import binary

MORE = int(os.environ.get("EXAMPLES", 0))
bounded = settings(
    max_examples=MORE or 150,
    derandomize=not MORE,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

JSON_PROTOCOLS: dict[str, WireProtocol] = {
    "predict": darwin,
    "invocations": mlflow_scoring,
    "v1": kserve_v1,
    "v2": open_inference,
}

SCALAR = (
    st.sampled_from(VALUES) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
ANY_JSON = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(TOKENS) | st.sampled_from("abcdefgh") | st.text(max_size=3), inner, max_size=4
        )
    ),
    max_leaves=20,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each list or object in `value`, and a key of it."""
    parts = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    return [place for key, part in parts for place in [(value, key), *places(part)]]


@st.composite
def spoiled(draw: st.DrawFn, kind: str) -> tuple[str, Any]:
    """The name of a case, and a valid request to it of which up to three parts were replaced."""
    name = draw(st.sampled_from([name for name in NAMES if kind in requests(name)]))
    body = json.loads(json.dumps(requests(name)[kind]))
    for _ in range(draw(st.integers(0, 3))):
        where = places(body)
        if not where:
            break
        holder, key = draw(st.sampled_from(where))
        holder[key] = json.loads(json.dumps(draw(ANY_JSON)))
    return name, body


@pytest.mark.parametrize("kind", JSON_PROTOCOLS)
def test_of_json_nothing_but_what_is_expected_comes_out(kind: str) -> None:
    @bounded
    @given(spoiled(kind))
    def holds(given: tuple[str, Any]) -> None:
        name, body = given
        ask(JSON_PROTOCOLS[kind], json.dumps(body).encode(), {}, CONTRACTS[name])

    holds()


@pytest.mark.parametrize("target", TARGETS)
def test_of_bytes_nothing_but_what_is_expected_comes_out(target: str) -> None:
    seeds = list(TARGETS[target].seeds())

    @bounded
    @given(st.sampled_from(seeds), st.integers(0, 3000), st.binary(max_size=8), st.integers(0, 8))
    def holds(seed: bytes, at: int, put: bytes, instead_of: int) -> None:
        at %= len(seed)
        TARGETS[target].run(seed[:at] + put + seed[at + instead_of :])

    holds()


# What valid requests become


def cells(kind: str) -> st.SearchStrategy[Any]:
    """Values of a column's type, as JSON has them."""
    widths = {"integer": 32, "long": 64}
    if kind in widths:
        most = 2 ** (widths[kind] - 1)
        return st.integers(-most, most - 1)
    if kind in ("double", "float"):
        finite = st.floats(width=64 if kind == "double" else 32, allow_nan=False, allow_infinity=False)
        return finite | st.integers(-(2**20), 2**20) | st.none() | st.just(math.nan)
    if kind == "boolean":
        return st.booleans()
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def tables(draw: st.DrawFn, *, empty: bool = True) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """A signature of columns, and rows that fit it."""
    kinds = draw(
        st.lists(st.sampled_from(["boolean", "integer", "long", "double", "float", "string"]), min_size=1, max_size=5)
    )
    names = draw(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
            min_size=len(kinds),
            max_size=len(kinds),
            unique=True,
        )
    )
    columns = [{"name": name, "type": kind} for name, kind in zip(names, kinds, strict=True)]
    filled = [cells(kind) if empty else cells(kind).filter(lambda v: v not in ("", None) and v == v) for kind in kinds]
    row = st.tuples(*filled)
    return columns, [list(each) for each in draw(st.lists(row, min_size=1, max_size=5))]


def shown(rows: Rows) -> list[list[Any]]:
    """What the model sees, as JSON would have it."""
    frame = rows.for_model()
    found = [frame.iloc[:, index].tolist() for index in range(frame.shape[1])]
    return [[None if isinstance(v, float) and math.isnan(v) else v for v in row] for row in zip(*found, strict=True)]


def written(columns: list[dict[str, Any]], rows: list[list[Any]]) -> dict[str, Callable[[ModelSpec], Rows]]:
    """The same rows in each of the ways to ask for them."""
    names = [column["name"] for column in columns]
    records = [dict(zip(names, row, strict=True)) for row in rows]
    shuffled = [dict(reversed(record.items())) for record in records]
    by_column = {name: [record[name] for record in records] for name in names}

    def read(protocol: WireProtocol, body: Any, headers: Any = None) -> Callable[[ModelSpec], Rows]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return lambda contract: protocol.read(data, headers or {}, contract).rows

    lines = io.StringIO()
    csv.writer(lines, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    types = {"boolean": "BOOL", "integer": "INT32", "long": "INT64", "double": "FP64", "float": "FP32"}
    tensors: dict[str, Any] = {
        "inputs": [
            {
                "name": c["name"],
                "shape": [len(rows)],
                "datatype": types.get(c["type"], "BYTES"),
                "data": by_column[c["name"]],
            }
            for c in columns
        ]
    }
    ways: dict[str, Callable[[ModelSpec], Rows]] = {
        "features": read(darwin, {"features": records}),
        "records": read(mlflow_scoring, {"dataframe_records": shuffled}),
        "split": read(mlflow_scoring, {"dataframe_split": {"columns": names, "data": rows}}),
        "inputs": read(mlflow_scoring, {"inputs": by_column}),
        "instances": read(kserve_v1, {"instances": records}),
        "positional": read(kserve_v1, {"instances": rows}),
        "v2": read(open_inference, tensors),
        "csv": read(mlflow_scoring, lines.getvalue().encode(), CSV),
    }
    if all(value is not None for row in rows for value in row):
        packed, headers = binary(tensors)
        ways["v2-binary"] = read(open_inference, packed, {k.lower().encode(): v.encode() for k, v in headers.items()})
    return ways


@bounded
@given(tables())
def test_valid_rows_arrive_as_they_were_in_every_form(given: tuple[list[dict[str, Any]], list[list[Any]]]) -> None:
    columns, rows = given
    contract = ModelSpec(compile_schema(columns), ParamSchema(None))
    single = {column["name"] for column in columns if column["type"] == "float"}
    for way, read in written(columns, rows).items():
        values = [column["name"] for column in columns] + [value for row in rows for value in row]
        if way == "csv" and any(value is None or value == "" or "\0" in str(value) for value in values):
            continue  # CSV has no word for these
        if way == "positional" and len(columns) == 1:
            continue  # a list of values means the same there
        found = shown(read(contract))
        for row, seen in zip(rows, found, strict=True):
            for column, value, got in zip(columns, row, seen, strict=True):
                expected = float(np.float32(value)) if column["name"] in single and value is not None else value
                assert got == (None if is_missing(expected) else expected), (way, column)
                assert type(got) is not bool or type(value) is bool


@bounded
@given(tables())
def test_what_is_compressed_is_what_was_sent(given: tuple[list[dict[str, Any]], list[list[Any]]]) -> None:
    body = json.dumps(given[1]).encode() * 10
    packs: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}
    for name, pack in packs.items():
        assert protocols.decoded(pack(body), name.encode(), default_limits().request.body_bytes) == body


@bounded
@given(tables(empty=False))
def test_parquet_arrives_as_it_was(given: tuple[list[dict[str, Any]], list[list[Any]]]) -> None:
    pytest.importorskip("pyarrow")
    columns, rows = given
    names = [column["name"] for column in columns]
    types = {"boolean": "bool", "integer": "int32", "long": "int64", "double": "float64", "float": "float32"}
    frame = pd.DataFrame(
        {
            c["name"]: pd.Series([row[i] for row in rows], dtype=types.get(c["type"], "object"))
            for i, c in enumerate(columns)
        }
    )
    file = io.BytesIO()
    frame.to_parquet(file)
    contract = ModelSpec(compile_schema(columns), ParamSchema(None))
    found = shown(mlflow_scoring.read(file.getvalue(), PARQUET, contract).rows)
    assert found == frame[names].to_numpy(dtype=object).tolist()


# Memory


def _json(**body: Any) -> bytes:
    return json.dumps(body).encode()


# Each of these is made of `size` parts, and would be far more in memory if it were believed.
SWELLING: dict[str, Callable[[int], tuple[str, WireProtocol, bytes, Any]]] = {
    "texts, one of them long, without a signature": lambda n: (
        *("anything", kserve_v1, _json(instances=["x" * n] + ["y"] * n), {}),
    ),
    "texts in a tensor, one of them long": lambda n: (
        *("texts", kserve_v1, _json(instances=[["x" * n, "y"]] + [["y", "y"]] * n), {}),
    ),
    "bytes in a tensor, one of them long": lambda n: (
        *("bytes", kserve_v1, _json(instances=["x" * n] + ["y"] * n), {}),
    ),
    "rows with keys of their own, as records": lambda n: (
        *("anything", darwin, json.dumps({"features": [{f"k{i}": 1} for i in range(n)]}).encode(), {}),
    ),
    "rows with keys of their own, as instances": lambda n: (
        *("anything", kserve_v1, json.dumps({"instances": [{f"k{i}": 1} for i in range(n)]}).encode(), {}),
    ),
    "a first row of many keys, for a tensor": lambda n: (
        "tensor",
        mlflow_scoring,
        json.dumps({"dataframe_records": [{f"k{i}": 1 for i in range(n)}] + [{}] * n}).encode(),
        {},
    ),
    "a first row of many keys, for named tensors": lambda n: (
        "tensors",
        mlflow_scoring,
        json.dumps({"dataframe_records": [{f"k{i}": 1 for i in range(n)}] + [{}] * n}).encode(),
        {},
    ),
    "many problems below one long key": lambda n: (
        "nested",
        darwin,
        _json(features={**CASES["nested"].row, "d": {"k" * n * 10: dict.fromkeys(map(str, range(n)), "x")}}),
        {},
    ),
    "a long text where there should be none": lambda n: (
        *("doubles", mlflow_scoring, b"\xc3\xa9" * n * 10, CSV),
    ),
    "a shape that multiplies to anything": lambda n: (
        "doubles",
        open_inference,
        _json(inputs=[{"name": str(i), "shape": [2**62, 2**62], "datatype": "FP64", "data": [1]} for i in range(n)]),
        {},
    ),
    "empty objects": lambda n: ("doubles", darwin, _json(features=[{}] * n * 10), {}),
    "empty lists": lambda n: ("tensor", kserve_v1, _json(instances=[[]] * n * 10), {}),
    "missing values": lambda n: ("doubles", kserve_v1, _json(instances=[[math.nan] * 2] * n), {}),
    "infinities below long keys": lambda n: (
        *("anything", kserve_v1, _json(inputs=[{"k" * 300: {str(i): [math.inf]}} for i in range(n)]), {}),
    ),
    "objects, as they are sent": lambda n: ("anything", kserve_v1, _json(inputs=[{"a": 1, "b": []}] * n), {}),
    "a single value for many rows": lambda n: (
        *("doubles", kserve_v1, _json(instances={"a": [1.5] * n, "b": 2, "c": 3, "d": 4}), {}),
    ),
    "lines of one cell": lambda n: ("one", mlflow_scoring, b"a\n" + b"x\n" * n * 10, CSV),
}  # fmt: skip

# What Python itself takes: an empty object is 64 bytes of memory and two of a body, a line of CSV about 100.
PER_BYTE = 150


@pytest.mark.parametrize("what", SWELLING)
def test_memory_is_in_proportion_to_the_body(what: str) -> None:
    name, protocol, body, headers = SWELLING[what](20_000)
    tracemalloc.start()
    try:
        answer = ask_and_word(protocol, body, headers, CONTRACTS[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < PER_BYTE * len(body) + 10**6
    assert len(answer) < 10 * len(body) + 10**5


def ask_and_word(protocol: WireProtocol, body: bytes, headers: Any, contract: ModelSpec) -> bytes:
    try:
        protocol.read(body, headers, contract)
    except EXPECTED as error:
        return darwin.render_error(error, ()).body + mlflow_scoring.render_error(error).body
    return b""


@bounded
@given(st.binary(max_size=200), st.integers(0, 10**7), st.sampled_from([b"gzip", b"deflate"]))
def test_what_is_decompressed_is_in_proportion(data: bytes, zeros: int, encoding: bytes) -> None:
    packed = (gzip.compress if encoding == b"gzip" else zlib.compress)(data + bytes(zeros), 9)
    try:
        found = protocols.decoded(packed, encoding, default_limits().request.body_bytes)
    except TooLarge:
        assert len(data) + zeros > protocols.INFLATION * len(packed)
    else:
        assert found == data + bytes(zeros)


# Binary tensors


@bounded
@given(st.lists(st.binary(max_size=10), min_size=1, max_size=5), st.integers(-5, 5), st.integers(-5, 5))
def test_lengths_of_binary_data_have_to_be_true(values: list[bytes], size_off: int, length_off: int) -> None:
    data = b"".join(struct.pack("<I", len(value)) + value for value in values)
    tensor = {
        "name": "a",
        "shape": [len(values)],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(data) + size_off},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {open_inference.LENGTH.lower().encode(): b"%d" % (len(head) + length_off)}
    try:
        rows = open_inference.read(head + data, headers, CONTRACTS["one"]).rows
    except BadRequest:
        assert size_off or length_off or not all(map(_is_text, values))
    else:
        assert not size_off
        assert not length_off
        assert [value[0].encode() for value in shown(rows)] == values


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_valid_requests_are_taken(name: str) -> None:
    """Or the properties above would be of nothing."""
    for kind, body in requests(name).items():
        assert JSON_PROTOCOLS[kind].read(json.dumps(body).encode(), {}, CONTRACTS[name]).rows.count >= 1
    if name not in ("tensors", "hinted"):
        assert mlflow_scoring.read(table(name), CSV, CONTRACTS[name]).rows.count == 2
