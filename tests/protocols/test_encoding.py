"""The encoder: whatever a model answers, each format is valid or an error of ours, and all formats agree."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from darwin_runtime.errors import EncodingError
from darwin_runtime.protocols import open_inference
from darwin_runtime.protocols.base import Request
from darwin_runtime.protocols.encoding import dump, dump_csv
from darwin_runtime.protocols.open_inference import Form
from darwin_runtime.schema.model_spec import ModelSpec, compile_schema
from darwin_runtime.schema.params import ParamSchema
from tests.support.answers import BIG, Color, Item, Loud, Odd, Pair, Point, Word

MORE = int(os.environ.get("EXAMPLES", 0))
bounded = settings(
    max_examples=MORE or 400,
    derandomize=not MORE,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

CONTRACT = ModelSpec(compile_schema([{"type": "double", "name": "x"}]), ParamSchema(None))
ROWS = CONTRACT.input_schema.records([{"x": 1.0}])

TEXTS = st.text(max_size=4) | st.sampled_from(["nan", "\ud800", "a\rb", '"', "null", ""])
HASHABLE = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**53, BIG, 2**63, 2**64, -(2**63) - 1, 10**30])
    | st.floats()
    | TEXTS
    | st.binary(max_size=4)
    | st.decimals().filter(lambda number: not number.is_snan())
    | st.uuids()
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(datetime.timezone.utc))
    | st.timedeltas()
    | st.times()
    | st.fractions()
    | st.complex_numbers()
    | st.sampled_from([Color.RED, Color.NONE, Word.YES, Loud("x"), pd.NA, pd.NaT, pd.Timestamp(0), Pair(1, 0.5), len])
    | arrays.scalar_dtypes().flatmap(lambda dtype: arrays.from_dtype(dtype))
)
ARRAYS = arrays.arrays(
    arrays.scalar_dtypes() | arrays.unicode_string_dtypes() | arrays.byte_string_dtypes() | arrays.array_dtypes(),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
ODD = st.sampled_from(
    [object(), {1, 2}, Point(0.5), Item(name="n", price=Decimal("1.5")), range(2), np.ma.masked, int]
) | st.none().map(lambda _: Odd())
LEAVES = HASHABLE | ARRAYS | ODD


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, max_size=4)
    return (
        lists
        | lists.map(tuple)
        | st.lists(HASHABLE, max_size=4)
        | st.dictionaries(HASHABLE | TEXTS, inner, max_size=4)
        | st.lists(st.dictionaries(st.sampled_from("ab"), inner, max_size=2), max_size=3)
        | lists.map(lambda values: pd.Series(values, dtype=object))
        | st.lists(st.tuples(inner, inner), max_size=3).map(
            lambda rows: pd.DataFrame(rows, columns=[0, "b"], dtype=object)
        )
        | st.builds(Point, inner)
    )


VALUES = st.recursive(LEAVES, containers, max_leaves=12)


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def loads(data: bytes) -> Any:
    return json.loads(data, parse_constant=no_constant)


def infer(output: Any, *, binary: bool) -> tuple[Any, bytes]:
    """The JSON of an answer in V2, and what follows it."""
    reply = open_inference.write(output, Request(ROWS, {}, CONTRACT, "", Form(None, (), None, binary)))
    length = int(dict(reply.headers).get(open_inference.LENGTH, len(reply.body)))
    return loads(reply.body[:length]), reply.body[length:]


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What `call` returns, or the message of its error."""
    try:
        return call(), ""
    except EncodingError as error:
        return None, str(error)


@bounded
@given(VALUES)
@example([np.timedelta64(1, "Y")])
@example([np.timedelta64(5)])
@example([np.datetime64(2**62, "D")])
def test_every_format_is_valid_or_an_error_of_ours(value: Any) -> None:
    body, why = attempt(lambda: dump({"predictions": value}))
    if why:
        assert "cannot be written as JSON" in why
    else:
        loads(body)
    # JSON has an escape for lone surrogates, the other formats have none.
    escaped = why or rb"\ud" in body
    for binary in (False, True):
        answer, error = attempt(lambda: infer(value, binary=binary))  # noqa: B023 - it is called at once
        assert bool(error) <= bool(escaped), error
        if answer:
            head, tail = answer
            sizes = [output.get("parameters", {}).get("binary_data_size", 0) for output in head["outputs"]]
            assert len(tail) == sum(sizes)
            for output in head["outputs"]:
                assert "data" not in output or len(output["data"]) == math.prod(output["shape"])
    text, error = attempt(lambda: dump_csv(value, "y"))
    assert bool(error) <= bool(escaped), error
    if text:
        header, *rows = csv.reader(io.StringIO(text.decode(), newline=""))
        assert {len(row) for row in rows} <= {len(header)}


@bounded
@given(st.lists(HASHABLE, max_size=6))
def test_the_elements_of_a_tensor_are_those_of_the_list(values: list[Any]) -> None:
    try:
        expected = loads(dump(values))
    except EncodingError:
        return
    [output] = infer(values, binary=False)[0]["outputs"]
    if len(output["shape"]) > 1:
        expected = [part for each in expected for part in each]
    for found, wanted in zip(output["data"], expected, strict=True):
        if output["datatype"] == "BYTES" and not isinstance(wanted, str) and wanted is not None:
            found = loads(found.encode())
        assert (found, isinstance(found, bool)) == (wanted, isinstance(wanted, bool))


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (np.ma.array([0.5, 1.5], mask=[False, True], dtype="f4"), ("FP32", [2], [0.5, None])),
        (np.ma.array([1, 2], mask=[False, True]), ("FP64", [2], [1.0, None])),
        (np.ma.array([1, BIG], mask=[True, False]), ("BYTES", [2], [None, str(BIG)])),
        ([1, None], ("FP64", [2], [1.0, None])),
        ([BIG, None], ("BYTES", [2], [str(BIG), None])),
        ([2**53, None], ("FP64", [2], [2.0**53, None])),
        ([True, None], ("BYTES", [2], ["true", None])),
        ([True, 1], ("BYTES", [2], ["true", "1"])),
        ([1, 2**64 - 1], ("UINT64", [2], [1, 2**64 - 1])),
        ([-1, 2**63], ("BYTES", [2], ["-1", str(2**63)])),
        ([np.float32(0.5), np.float32(1.5)], ("FP32", [2], [0.5, 1.5])),
        ([np.float32(0.5), 1], ("FP64", [2], [0.5, 1.0])),
        (pd.Series([0.5, None], dtype="Float32"), ("FP32", [2, 1], [0.5, None])),
        (pd.Series([1, 2], dtype="Int8"), ("INT8", [2, 1], [1, 2])),
        (pd.array([True, False], dtype="boolean"), ("BOOL", [2], [True, False])),
        ([None, None], ("BYTES", [2], [None, None])),
        ([float("nan"), None], ("FP64", [2], [None, None])),
        ([], ("FP64", [0], [])),
        (np.array([], dtype=str), ("BYTES", [0], [])),
        (np.array([0.5], dtype=np.longdouble), ("FP64", [1], [0.5])),
        ([[0.5, None], [1.5, 2.5]], ("FP64", [2, 2], [0.5, None, 1.5, 2.5])),
        ([Color.RED, Word.YES], ("BYTES", [2], ["red", "yes"])),
        ([Pair(1, 0.5)], ("FP64", [1, 2], [1.0, 0.5])),
    ],
)
def test_a_datatype_holds_every_value_exactly(output: Any, told: tuple[str, list[int], list[Any]]) -> None:
    [tensor] = infer(output, binary=False)[0]["outputs"]
    assert (tensor["datatype"], tensor["shape"], tensor["data"]) == told


def test_a_null_among_texts_is_in_json_where_binary_was_asked_for() -> None:
    head, tail = infer({"text": ["a", None], "other": ["", "b"], "number": [0.5, None]}, binary=True)
    text, other, number = head["outputs"]
    assert text == {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a", None]}
    assert other["parameters"] == {"binary_data_size": 9}
    assert number["parameters"] == {"binary_data_size": 16}
    assert tail[:9] == b"\0\0\0\0\1\0\0\0b"
    assert np.isnan(np.frombuffer(tail[9:])[1])
    assert infer(["a", None], binary=True) == infer(["a", None], binary=False)
