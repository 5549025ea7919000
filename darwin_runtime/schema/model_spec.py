"""The spec of a model: its signature, compiled, and the methods and labels that the signature does not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from darwin_runtime.schema.params import ParamSchema
from darwin_runtime.schema.signature import Spec
from darwin_runtime.schema.tabular import TabularSchema, TypeHintSchema
from darwin_runtime.schema.tensors import TensorSchema
from darwin_runtime.schema.untyped import UncheckedSchema

InputSchema = TabularSchema | TensorSchema | UncheckedSchema


def compile_schema(inputs: Sequence[Spec] | None, *, from_type_hint: bool = False) -> InputSchema:
    """The schema of a signature's `inputs`, which are in the JSON form of `MLmodel`; None stands for no signature."""
    if not inputs:
        return UncheckedSchema()
    if from_type_hint:
        return TypeHintSchema(inputs)
    return TensorSchema(inputs) if inputs[0]["type"] == "tensor" else TabularSchema(inputs)


@dataclass(frozen=True)
class ModelSpec:
    """The facts about a model that the protocols need to read requests and to write answers.

    `name` and `version` stand in URLs. A request may choose one of `methods`; `method` is the default. `classes` are
    the labels of the columns of probabilities, if they are known. A model that `streams` can answer piece by piece.
    """

    input_schema: InputSchema
    params: ParamSchema
    outputs: Sequence[Spec] = ()
    name: str = "model"
    version: str = ""
    methods: tuple[str, ...] = ("predict",)
    method: str = "predict"
    classes: Sequence[Any] | None = None
    streams: bool = False
