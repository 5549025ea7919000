"""The requests that the server shows as samples. The reader of each protocol takes the one that is shown for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from darwin_runtime.errors import InvalidInput
from darwin_runtime.protocols import darwin, kserve_v1, mlflow_scoring, open_inference
from darwin_runtime.protocols.encoding import dump
from darwin_runtime.schema.tabular import TypeHintSchema

if TYPE_CHECKING:
    from darwin_runtime.protocols.base import WireProtocol
    from darwin_runtime.schema.model_spec import ModelSpec
    from darwin_runtime.schema.rows import Rows


@dataclass(frozen=True)
class Samples:
    """Bodies of requests, None where there is none; `features` are Darwin's, for one row."""

    features: Any = None
    predict: Any = None
    invocations: Any = None
    v1: Any = None
    v2: Any = None
    is_chat: bool = False

    @classmethod
    def of(cls, contract: ModelSpec, example: Rows | None, chat: Any) -> Samples:
        """From the model's `example`, else from its types; `chat` is a body that it takes as it is."""
        schema = contract.input_schema
        if not schema.inputs:
            return cls(invocations=chat, is_chat=chat is not None)
        # Types tell too little to make up what chat models take.
        made_up = {"features": schema.sample(None)}
        bodies = [{"features": each} for each in (chat, schema.sample(example)) if each is not None]
        features = (_readable(darwin, contract, bodies) or made_up)["features"]
        is_hinted = isinstance(schema, TypeHintSchema)
        # What models with type hints take is a list in any case.
        rows = features if is_hinted else [features]
        tables = [] if is_hinted or type(features) is not dict else [{"dataframe_records": rows}]
        tensors = [] if is_hinted else [{"inputs": open_inference.tensors(contract, features)}]
        return cls(
            features,
            {"features": features},
            _readable(mlflow_scoring, contract, [chat, *tables, {"inputs": rows}, {"inputs": features}]),
            _readable(kserve_v1, contract, [{"instances": rows}, {"inputs": features}]),
            _readable(open_inference, contract, tensors),
            chat is not None,
        )


def _readable(protocol: WireProtocol, contract: ModelSpec, bodies: Sequence[Any]) -> Any:
    """The first of `bodies` that `protocol` takes."""
    for body in filter(None, bodies):
        try:
            protocol.read(dump(body), {}, contract)
        except InvalidInput:
            continue
        return body
    return None
