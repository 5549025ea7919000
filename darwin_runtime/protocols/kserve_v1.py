"""KServe's V1 protocol: `/v1/models/{name}:predict`. Pure functions.

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol.
"""

from __future__ import annotations

from typing import Any

from darwin_runtime.errors import BadRequest, as_request_error
from darwin_runtime.protocols.base import (
    CSV,
    JSON,
    TENSORS,
    Headers,
    Reply,
    Request,
    media_type_of,
    parse_params,
    preferred_form,
    read_object,
    reply,
    write_csv,
)
from darwin_runtime.protocols.mlflow_scoring import write_predictions
from darwin_runtime.schema.model_spec import ModelSpec


def read(body: bytes, headers: Headers, contract: ModelSpec, *, exact: bool = True) -> Request:
    """`{"instances": […]}` or `{"inputs": …}`, and perhaps `parameters`."""
    media_type_of(headers.get(b"content-type", b""), (JSON,))
    given = read_object(body, exact=exact, contract=contract)
    shapes = [key for key in TENSORS if key in given]
    if len(shapes) != 1:
        raise BadRequest(f"the body must have exactly one of {', '.join(TENSORS)}")
    schema = contract.input_schema
    rows = (schema.instances if shapes[0] == "instances" else schema.inputs_as_sent)(given[shapes[0]])
    params, method = parse_params(given.get("parameters"), contract)
    return Request(rows, params, contract, method, preferred_form(headers))


def write(output: Any, request: Request) -> Reply:
    """`{"predictions": ...}`, or CSV. Raises `EncodingError`."""
    return write_csv(output, request) if request.form == CSV else write_predictions(output)


def render_error(error: Exception) -> Reply:
    """The answer to a request that failed with `error`."""
    known = as_request_error(error)
    kind = "Prediction failed: " if known.status == 500 else ""
    return reply(known.status, {"error": f"{kind}{known}"}, known.headers)
