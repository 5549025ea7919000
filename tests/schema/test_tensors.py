"""Tensors in every wire shape, and values that are none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from darwin_runtime.errors import InputError
from darwin_runtime.schema.model_spec import compile_schema
from tests.support.schemas import tensor_spec

TENSORS = [
    ("instances", tensor_spec("float64", -1, 2), [[1, 2.5], [3, None]], [[1, 2.5], [3, math.nan]]),
    ("features", tensor_spec("float64", -1, 2), [1, 2.5], [[1, 2.5]]),
    ("features", tensor_spec("float64", -1, 2), [[1, 2.5]], [[1, 2.5]]),
    ("instances", tensor_spec("int8", -1), [1, -128, 2.0], [1, -128, 2]),
    ("instances", tensor_spec("uint8", -1, -1), [[255], [0]], [[255], [0]]),
    ("instances", tensor_spec("float32", -1, 2, 1), [[[1], [2]]], [[[1], [2]]]),
    ("instances", tensor_spec("bool", 2), [True, False], [True, False]),
    ("instances", tensor_spec("str", -1), ["a", "bc"], ["a", "bc"]),
    ("instances", tensor_spec("bytes", -1), ["ä"], ["ä".encode()]),
    ("instances", tensor_spec("object", -1), ["a", 1], ["a", 1]),
    ("instances", tensor_spec("object", -1), ["a", math.nan], ["a", math.nan]),
    ("instances", tensor_spec("float32", -1), [math.nan, None], [math.nan, math.nan]),
    ("instances", tensor_spec("bytes", -1), [b"\0\xff"], [b"\0\xff"]),
    ("split", tensor_spec("float64", -1), [1, 2.5], [1, 2.5]),
    ("instances", tensor_spec("float64"), 2, 2.0),
    ("records", tensor_spec("float64", -1, 2), [{"x": 1, "y": 2}, {"x": 3, "y": 4}], [[1, 2], [3, 4]]),
    ("records", tensor_spec("float64", -1, 1), [{"x": 1}], [[1]]),
    ("records", tensor_spec("float64", -1, 2, 2), [{"x": [1, 2, 3, 4]}], [[[1, 2], [3, 4]]]),
    ("csv", tensor_spec("int64", -1, 2), b"x,y\n1,2\n3,4\n", [[1, 2], [3, 4]]),
    ("csv", tensor_spec("float32", -1), b"x\n1\n\n2.5\n", [1, 2.5]),
]


@pytest.mark.parametrize(("shape", "spec", "value", "expected"), TENSORS)
def test_tensors(shape: str, spec: dict[str, Any], value: Any, expected: Any) -> None:
    array = getattr(compile_schema([spec]), shape)(*([None, value] if shape == "split" else [value])).value
    assert array.dtype.kind == np.dtype(spec["tensor-spec"]["dtype"]).kind
    assert array.dtype.itemsize == np.dtype(spec["tensor-spec"]["dtype"]).itemsize or array.dtype.kind in "SU"
    np.testing.assert_equal(array.tolist(), expected)


BAD_TENSORS = [
    (tensor_spec("int64", -1, 2), [[1, 1.9]], r"row 0, '\[1\]': expected int64, got number 1.9"),
    (tensor_spec("int64", -1, 2), [[1, 2], [3]], "lengths along axis 1: 1, 2"),
    (tensor_spec("int64", -1, 2), [[1, 2, 3]], "axis 1: 3"),
    (tensor_spec("int64", -1, 2), [1, 2], "not a list at depth 2"),
    (tensor_spec("int64", -1, 2), [[[1], [2]]], "got array"),
    (tensor_spec("int64", -1, 2), [], "no rows"),
    (tensor_spec("int64", 2, 2), [[1, 2]], "axis 0: 1"),
    (tensor_spec("uint8", -1), [256, -1], "outside 0 to 255.*outside 0 to 255"),
    (tensor_spec("float32", -1), [1e39], "outside"),
    (tensor_spec("float32", -1), [True, "x", {}], "boolean.*string.*object"),
    (tensor_spec("str", -1), [1], "expected string"),
    (tensor_spec("bool", -1), [None], "got null"),
    (tensor_spec("bool", -1), [math.nan], "got number NaN"),
    (tensor_spec("int64", -1), [1, math.nan], "row 1: expected int64, got number NaN"),
    (tensor_spec("float64", -1, 2), [[1, math.inf]], r"row 0, '\[1\]': expected float64, got number Infinity"),
    (tensor_spec("str", -1), ["x", "x\0"], "row 1.*cut off the zeros"),
    (tensor_spec("bytes", -1), ["x", b"\xff\0"], "row 1.*cut off the zeros"),
    (tensor_spec("float64", -1, 2, 2), [[[1, 2], [3, 4]], [[1, 2], 3]], "row 1: .*not a list at depth 3"),
    (tensor_spec("float64", -1, 2, name="x"), [{"x": [1, 2]}, {}], r"row 1, 'x': missing, expected float64 of shape"),
    (tensor_spec("float64", -1, 2, name="x"), [[1, 2, 3]], "'x'"),
    (tensor_spec("float64", -1, 2, name="x"), {"y": [[1, 2]]}, "'x': missing"),
    (tensor_spec("float64", -1, 2, name="x"), "text", "'x'"),
]


@pytest.mark.parametrize(("spec", "value", "says"), BAD_TENSORS)
def test_bad_tensors(spec: dict[str, Any], value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        compile_schema([spec]).instances(value)


def test_named_tensors_in_every_shape() -> None:
    schema = compile_schema([tensor_spec("float32", -1, 2, 2, name="image"), tensor_spec("int64", -1, 1, name="n")])
    image, n = [[1, 2], [3, 4]], [7]
    for rows in (
        schema.instances([{"image": image, "n": n}]),
        schema.instances({"image": [image], "n": [n], "extra": 1}),
        schema.features({"image": image, "n": n}),
        schema.features({"image": [image], "n": [n]}),
        schema.features([{"image": image, "n": n}]),
        schema.records([{"image": [1, 2, 3, 4], "n": 7}]),
        schema.split(["n", "image"], [[7, image]]),
    ):
        assert rows.count == 1
        assert rows.value["image"].tolist() == [image]
        assert rows.value["n"].tolist() == [n]


def test_features_without_a_tensor_name_it() -> None:
    for shape in ([-1], [-1, 2]):
        with pytest.raises(InputError, match="'x': missing"):
            compile_schema([tensor_spec("float64", *shape, name="x")]).features({})


def test_a_tensor_called_0() -> None:
    spec = {**tensor_spec("float64", -1, 2), "name": 0}
    schema = compile_schema([spec])
    for rows in (schema.instances({"0": [[1, 2]]}), schema.split([0], [[[1, 2]]]), schema.features({"0": [1, 2]})):
        assert rows.value[0].tolist() == [[1.0, 2.0]]
        assert schema.sample(rows)["0"].tolist() == [1.0, 2.0]
    assert schema.inputs[0]["name"] == "0"


def test_where_a_bad_cell_is_is_told_in_a_tensor_of_strings() -> None:
    schema = compile_schema([{"type": "tensor", "tensor-spec": {"dtype": "str", "shape": [-1, 2]}}])
    with pytest.raises(InputError) as caught:
        schema.instances([["a", "b"], ["c", 4]])
    assert [(problem.row, problem.field) for problem in caught.value.problems] == [(1, "[1]")]
