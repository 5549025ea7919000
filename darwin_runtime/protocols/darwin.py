"""Darwin's protocol: `/predict`, and `/schema`. Pure functions. Source: Darwin's runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from darwin_runtime.errors import (
    BadRequest,
    DeadlineExceeded,
    EncodingError,
    FeatureStoreError,
    InputError,
    InputRejected,
    InvalidInput,
    NotReady,
    Overloaded,
    PredictionFailed,
    Problem,
    as_request_error,
)
from darwin_runtime.protocols.base import (
    CSV,
    Headers,
    Reply,
    Request,
    parse_params,
    preferred_form,
    read_object,
    reply,
    write_csv,
)
from darwin_runtime.protocols.encoding import dump, plain
from darwin_runtime.schema.model_spec import ModelSpec
from darwin_runtime.schema.signature import Spec, describe

STORE_KEYS = ("feature_group", "ofs_keys")

# The values of a feature group for keys.
Lookup = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


def read(
    body: bytes, headers: Headers, contract: ModelSpec, *, exact: bool = True, lookup: Lookup | None = None
) -> Request:
    """`{"features": {…} or [{…}, …], "params"?: {…}}`, or `{"feature_group", "ofs_keys"}`, which `lookup` finds."""
    given = read_object(body, exact=exact, contract=contract)
    stored = [key for key in STORE_KEYS if given.get(key) is not None]
    # Beside keys, null is how clients with optional fields leave features out.
    if ("features" in given and not (stored and given["features"] is None)) == bool(stored) or len(stored) == 1:
        named = ", ".join(key for key in ("features", *STORE_KEYS) if given.get(key) is not None) or "neither"
        raise BadRequest(f"give either features, or both feature_group and ofs_keys (given: {named})")
    features = _stored(given, lookup) if stored else given["features"]
    params, method = parse_params(given.get("params"), contract)
    return Request(contract.input_schema.features(features), params, contract, method, preferred_form(headers))


def _stored(given: dict[str, Any], lookup: Lookup | None) -> Mapping[str, Any]:
    group, keys = (given[key] for key in STORE_KEYS)
    if lookup is None:
        raise BadRequest(
            "this server has no feature store: set FEATURE_STORE_URL and OFS_ADMIN_URL, or give the values, as features"
        )
    if not isinstance(group, str) or not group:
        raise BadRequest("feature_group must be the name of a feature group")
    if not isinstance(keys, dict) or not keys or {list, dict} & set(map(type, keys.values())):
        raise BadRequest('ofs_keys must be an object of primary keys, such as {"user_id": 42}')
    if odd := [key for key, value in keys.items() if type(value) is float and not math.isfinite(value)]:
        raise BadRequest(f"ofs_keys has NaN or Infinity for {odd[0][:100]!r}, which is no key")
    return lookup(group, keys)


def write(output: Any, request: Request) -> Reply:
    """`{"scores": [...]}`, or CSV. Raises `EncodingError`."""
    if request.form == CSV:
        return write_csv(output, request)
    contract = request.contract
    return write_scores(output, contract.classes, request.method or contract.method)


def write_scores(output: Any, classes: Sequence[Any] | None = None, method: str = "predict") -> Reply:
    """`{"scores": [...]}`; of probabilities also the most probable class of each row. Raises `EncodingError`."""
    try:
        scores = plain(output)
    except EncodingError:  # dump() raises it again, with the place
        scores = [output]
    answer: dict[str, Any] = {"scores": scores if isinstance(scores, list) else [scores]}
    if method == "predict_proba":
        answer["probabilities"] = answer["scores"]
        if classes is not None and isinstance(output, np.ndarray) and output.shape[1:] == (len(classes),):
            answer["predicted_class"] = [classes[index] for index in output.argmax(axis=1)]
    return Reply(200, dump(answer))


# Errors whose own text is the detail below this message.
_MESSAGES: dict[type[Exception], str] = {
    InputRejected: "The model refused the input",
    Overloaded: "The server is overloaded",
    DeadlineExceeded: "Prediction timed out",
    FeatureStoreError: "No features from the feature store",
    PredictionFailed: "Prediction failed",
    EncodingError: "Prediction failed",
}


def render_error(error: Exception, inputs: Sequence[Spec]) -> Reply:
    """The answer to a request that failed with `error`, given the signature's inputs."""
    known = as_request_error(error)
    if isinstance(known, InvalidInput):
        return reply(422, {"detail": _invalid(known, inputs)})
    message = _MESSAGES.get(type(known))
    detail = {"message": message, "error": str(known)} if message else {"message": str(known)}
    if isinstance(known, InputRejected):
        checked = "GET /schema shows the names and types"
        detail["hint"] = checked if inputs else "the model has no signature to check the input by"
    elif isinstance(known, NotReady):
        detail = {"status": "not_ready", **detail}
    elif known.status == 500:
        detail["hint"] = "the server's log has the details"
    return reply(known.status, {"detail": detail}, known.headers)


def _invalid(error: InvalidInput, inputs: Sequence[Spec]) -> dict[str, Any]:
    if not isinstance(error, InputError):
        hint = 'send {"features": {"name": value, ...}}; GET /schema shows a sample request'
        return {"message": str(error), "errors": [], "hint": hint}
    return {
        "message": "Input does not match the model's signature",
        "errors": [_problem(problem) for problem in error.problems],
        "error_count": error.total,
        "expected_schema": inputs,
        "hint": "GET /schema shows the names and types, and a sample request",
    }


def _problem(problem: Problem) -> dict[str, Any]:
    shown = {
        "field": problem.field,
        "row": problem.row,
        "error_type": problem.error_type,
        "message": problem.message,
        "expected_type": problem.expected,
        "actual_type": problem.actual,
    }
    return {key: value for key, value in shown.items() if value is not None}


def schema(contract: ModelSpec, features: Any) -> Reply:
    """The answer to `GET /schema`; `features` are those of the sample request."""
    plan = contract.input_schema
    if not plan.inputs:
        detail = {
            "message": "The model has no signature",
            "reasons": ["it was logged without signature= and without input_example="],
            "hint": "log it again with mlflow.models.infer_signature(...) as its signature",
        }
        return reply(404, {"detail": detail})
    body = {
        "inputs": plan.inputs,
        "outputs": describe(contract.outputs),
        "sample_request": {"features": features},
        "json_schema": plan.json_schema(),
    }
    return reply(200, body)
