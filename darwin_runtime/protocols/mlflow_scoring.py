"""The protocol of MLflow's scoring server: `/invocations`. Pure functions.

Source: MLflow 3.17, mlflow.pyfunc.scoring_server
(https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/#inference-server-specification). The module's name
is not `mlflow`, so that an import can't mean the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from darwin_runtime.errors import (
    BadRequest,
    InputError,
    InvalidInput,
    NotAcceptable,
    Problem,
    UnsupportedMediaType,
    as_request_error,
)
from darwin_runtime.protocols.base import (
    CSV,
    JSON,
    PARQUET,
    TENSORS,
    TEXT,
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
from darwin_runtime.protocols.encoding import dump
from darwin_runtime.protocols.parquet import read_parquet
from darwin_runtime.schema.checks import MAX_NESTING, nested_too_deep, require_finite
from darwin_runtime.schema.model_spec import InputSchema, ModelSpec
from darwin_runtime.schema.rows import Rows

SHAPES = ("dataframe_split", "dataframe_records", *TENSORS)

# Where MLflow sees one of these beside the rest, the body is the model's own business.
CHAT = ("messages", "prompt", "input")

# The form of an answer with nothing around it, which chat models give.
UNWRAPPED = "unwrapped"


def read(body: bytes, headers: Headers, contract: ModelSpec, *, exact: bool = True) -> Request:
    """JSON with one of the four shapes or with what chat models take, CSV, or Parquet."""
    kind = media_type_of(headers.get(b"content-type", b""), (JSON, CSV, PARQUET))
    if kind != JSON:
        rows = read_parquet(body, contract.input_schema) if kind == PARQUET else _csv(body, contract.input_schema)
        return Request(rows, {}, contract, "", _form(headers))
    given = read_object(body, exact=exact, contract=contract)
    shapes = [key for key in SHAPES if key in given]
    if not shapes and any(key in given for key in CHAT):
        return _chat(given, contract)
    if len(shapes) != 1:
        named = ", ".join(map(repr, list(given)[:20]))[:200] or "nothing"
        raise BadRequest(f"the body must have exactly one of {', '.join(SHAPES)} (given: {named})")
    value = given[shapes[0]]
    schema = contract.input_schema
    if shapes[0] == "dataframe_split":
        rows = _split(value, schema)
    elif shapes[0] == "dataframe_records":
        rows = schema.records(value)
    else:
        rows = (schema.instances if shapes[0] == "instances" else schema.inputs_as_sent)(value)
    params, method = parse_params(given.get("params"), contract)
    return Request(rows, params, contract, method, _form(headers))


def _form(headers: Headers) -> str:
    """JSON where nothing in Accept will do: MLflow's server does not look at it."""
    try:
        return preferred_form(headers)
    except NotAcceptable:
        return JSON


def _csv(body: bytes, plan: InputSchema) -> Rows:
    try:
        return plan.csv(body)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error}") from None


def _split(value: Any, plan: InputSchema) -> Rows:
    if not isinstance(value, dict) or "data" not in value:
        raise BadRequest("dataframe_split must be an object with data and, usually, columns")
    unknown = value.keys() - {"columns", "index", "data"}
    if unknown:
        shown = ", ".join(sorted(unknown)[:20])[:200]
        raise BadRequest(f"dataframe_split has only columns, index and data, not {shown}")
    try:
        return plan.split(value.get("columns"), value["data"], value.get("index"))
    except InputError as error:
        # MLflow puts names and values together, with BAD_REQUEST, before it looks for columns.
        if value.get("columns") is not None and all(problem.error_type != "missing" for problem in error.problems):
            raise BadRequest(str(error)) from None
        raise


def _chat(given: dict[str, Any], contract: ModelSpec) -> Request:
    """The body goes to the model as it is, but for what the signature calls params."""
    declared = {spec["name"] for spec in contract.params.specs}
    params = contract.params.parse({key: value for key, value in given.items() if key in declared})
    rest = {key: value for key, value in given.items() if key not in declared}
    if nested_too_deep(rest):
        raise BadRequest(f"the body is nested more than {MAX_NESTING} deep")
    require_finite(rest)
    stream = given.get("stream") is True
    if stream and not contract.streams:
        raise BadRequest("this model cannot answer piece by piece: leave out stream")
    rows = Rows(rest, 1, unvalidated=True, passthrough=True)
    return Request(rows, params, contract, form=UNWRAPPED, stream=stream)


def write(output: Any, request: Request) -> Reply:
    """`{"predictions": ...}`, CSV, or the bare answer of a chat model. Raises `EncodingError`."""
    if request.form == JSON:
        return write_predictions(output)
    return Reply(200, dump(output)) if request.form == UNWRAPPED else write_csv(output, request)


def write_predictions(output: Any) -> Reply:
    """`{"predictions": ...}`; a Series becomes records, like a DataFrame. Raises `EncodingError`."""
    return Reply(200, dump({"predictions": output.to_frame() if isinstance(output, pd.Series) else output}))


def render_error(error: Exception) -> Reply:
    """The answer to a request that failed with `error`."""
    known = as_request_error(error)
    if isinstance(known, UnsupportedMediaType):
        return Reply(known.status, str(known).encode(), TEXT)
    kind = (
        "Invalid input: " if isinstance(known, InvalidInput) else "Prediction failed: " if known.status == 500 else ""
    )
    code = _code(known.problems) if type(known) is InputError else known.code
    return reply(known.status, {"error_code": code, "message": f"{kind}{known}"}, known.headers)


def _code(problems: Sequence[Problem]) -> str:
    """MLflow converts values first, with one code, and then enforces names, counts and shapes, with the other."""
    converted = all(_is_of_shape(problem) or problem.actual in _NUMBERS for problem in problems)
    return "INVALID_PARAMETER_VALUE" if converted and any(map(_is_of_shape, problems)) else "BAD_REQUEST"


_NUMBERS = ("boolean", "integer", "number")

# numpy converts no lists of several lengths.
_RAGGED = re.compile(r"lengths along axis \d+: \d+,")


def _is_of_shape(problem: Problem) -> bool:
    """Whether the problem is a missing column, a count or a shape, and not a value."""
    if problem.error_type == "missing":
        return "." not in problem.field  # a property of an object is a part of a value
    if problem.actual == "object":
        return "each column" in problem.expected
    whole = problem.row is None or not problem.field or "not a list at depth" in problem.message
    whole = whole or (problem.field.startswith("[") and problem.actual == "array")
    return whole and problem.actual not in ("string", "null") and not _RAGGED.search(problem.message)
