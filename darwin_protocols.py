"""Wire formats to rows and back: Darwin's /predict and the MLflow scoring server's /invocations. Pure functions.

Sources: Darwin's runtime; MLflow 3.17, mlflow.pyfunc.scoring_server
(https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/#inference-server-specification).
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson
import pandas as pd

from darwin_batching import Overloaded, TooSlow
from darwin_cells import InputError, ParamsError, Spec
from darwin_model import PredictionFailed, Refused
from darwin_plan import ParamPlan, Plan, Rows, describe

JSON = "application/json"
CSV = "text/csv"
TEXT = "text/plain"

TABLES = ("dataframe_split", "dataframe_records")
TENSORS = ("instances", "inputs")
SHAPES = (*TABLES, *TENSORS)

STORE_KEYS = ("feature_group", "ofs_keys")


class Malformed(ValueError):
    """The body is not what the protocol says, whatever the model."""


class Unsupported(ValueError):
    """The Content-Type is none that can be read."""


class NotReady(Exception):
    """The model has not been loaded yet, or is being unloaded."""


class Unwritable(Exception):
    """The model's answer has no JSON form."""


class Request(NamedTuple):
    """What to predict, whichever protocol asked."""

    rows: Rows
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """An answer as the protocol words it; `status` is HTTP's, `retry_after` in seconds."""

    status: int
    body: bytes
    media_type: str = JSON
    retry_after: int = 0


# Every digit looks like 0, all else but a point like a space: finding this takes a tenth of what a pattern takes.
_DIGITS = "".join("0" if c in "0123456789" else c if c == "." else " " for c in map(chr, range(256))).encode()
_LONG_INTEGER = b" " + b"0" * 19

# In a larger body, even that takes as long as half of the parsing.
_LARGE_BYTES = 16 * 1024


def _read(body: bytes, plan: Plan, read: Callable[[dict[str, Any]], Request]) -> Request:
    """What `read` makes of the object in `body`, with exact integers. Raises `Malformed` and what `read` does."""
    try:
        value = orjson.loads(body)
        if len(body) > _LARGE_BYTES and plan.all_floats and (request := _if_of_small_floats(value, read)):
            return request
        if _LONG_INTEGER in body.translate(_DIGITS):
            value = json.loads(body)  # exact, where orjson makes floats of integers beyond 64 bits
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the body is not valid JSON: {error}") from None
    return read(_need_object(value))


def _if_of_small_floats(value: Any, read: Callable[[dict[str, Any]], Request]) -> Request | None:
    """What `read` makes of `value`, if that is all floats, none of them so large that it may have been an integer."""
    try:
        request = read(_need_object(value))
    except (InputError, Malformed):  # to be worded with exact integers
        return None
    rows = request.rows
    floats = rows.names is not None and rows.index is None and not request.params and rows.value.dtype.kind == "f"
    return request if floats and np.abs(rows.value).max() < 2**63 else None


def _need_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"the body must be a JSON object, not {'an array' if isinstance(value, list) else 'a value'}")
    return value


# Darwin


def read_predict(body: bytes, _: str | None, plan: Plan, params: ParamPlan) -> Request:
    """`{"features": {…} or [{…}, …], "params"?: {…}}`. Raises `Malformed` or `InputError`."""
    return _read(body, plan, lambda request: _predict(request, plan, params))


def _predict(request: dict[str, Any], plan: Plan, params: ParamPlan) -> Request:
    stored = [key for key in STORE_KEYS if request.get(key) is not None]
    if ("features" in request) == bool(stored) or len(stored) == 1:
        given = ", ".join(key for key in ("features", *STORE_KEYS) if request.get(key) is not None) or "neither"
        raise Malformed(f"give either features, or both feature_group and ofs_keys (given: {given})")
    if stored:
        raise Malformed("this server has no feature store: give the values themselves, as features")
    return Request(plan.features(request["features"]), params.parse(request.get("params")))


def write_scores(output: Any) -> bytes:
    """`{"scores": [...]}`. Raises `Unwritable`."""
    try:
        plain = _plain(output)
    except (TypeError, ValueError):
        plain = [output]
    return dump({"scores": plain if isinstance(plain, (list, tuple)) else [plain]})


def darwin_failure(error: Exception, inputs: Sequence[Spec]) -> Reply:
    """How /predict words `error`, given the signature's inputs."""
    if isinstance(error, InputError):
        detail: dict[str, Any] = {
            "message": "Input does not match the model's signature",
            "errors": [_darwin_problem(problem) for problem in error.problems],
            "error_count": error.total,
            "expected_schema": inputs,
            "hint": "GET /schema shows the names and types, and a request that works",
        }
        return _reply(422, {"detail": detail})
    if isinstance(error, Malformed):
        hint = 'send {"features": {"name": value, ...}}; GET /schema shows a request that works'
        return _reply(422, {"detail": {"message": str(error), "errors": [], "hint": hint}})
    if isinstance(error, Refused):
        hint = "GET /schema shows the names and types" if inputs else "the model has no signature to check the input by"
        return _reply(400, {"detail": {"message": "The model refused the input", "error": str(error), "hint": hint}})
    if isinstance(error, NotReady):
        return not_ready(error)
    if isinstance(error, TooSlow):
        return _reply(504, {"detail": {"message": "Prediction timed out", "error": str(error)}})
    if isinstance(error, Overloaded):
        return _busy({"detail": {"message": "The server is overloaded", "error": str(error)}}, error)
    hint = "the server's log has the details"
    return _reply(500, {"detail": {"message": "Prediction failed", "error": _cause(error), "hint": hint}})


def _darwin_problem(problem: Any) -> dict[str, Any]:
    shown = {
        "field": problem.field,
        "row": problem.row,
        "error_type": problem.error_type,
        "message": problem.message,
        "expected_type": problem.expected,
        "actual_type": problem.actual,
    }
    return {key: value for key, value in shown.items() if value is not None}


def not_ready(error: NotReady) -> Reply:
    """How Darwin's probes and /predict say that they can't serve now."""
    return _reply(503, {"detail": {"status": "not_ready", "message": str(error)}})


def schema(plan: Plan, outputs: Sequence[Spec], example: Rows | None) -> Reply:
    """The answer to `GET /schema`; `example` is where the sample request comes from, if there is one."""
    if not plan.inputs:
        detail = {
            "message": "The model has no signature",
            "reasons": ["it was logged without signature= and without input_example="],
            "hint": "log it again with mlflow.models.infer_signature(...) as its signature",
        }
        return _reply(404, {"detail": detail})
    body = {
        "inputs": plan.inputs,
        "outputs": describe(outputs),
        "sample_request": {"features": plan.sample(example)},
        "json_schema": plan.json_schema(),
    }
    return _reply(200, body)


# MLflow


def read_invocations(body: bytes, content_type: str | None, plan: Plan, params: ParamPlan) -> Request:
    """JSON with one of the four shapes, or CSV. Raises `Malformed`, `InputError` or `Unsupported`."""
    if _media_type(content_type) == CSV:
        try:
            return Request(plan.csv(body), {})
        except UnicodeDecodeError as error:
            raise Malformed(f"the body is not UTF-8: {error}") from None
    return _read(body, plan, lambda request: _invocations(request, plan, params))


def _invocations(request: dict[str, Any], plan: Plan, params: ParamPlan) -> Request:
    shapes = [key for key in SHAPES if key in request]
    if len(shapes) != 1:
        given = ", ".join(map(repr, list(request)[:20])) or "nothing"
        raise Malformed(f"the body must have exactly one of {', '.join(SHAPES)} (given: {given})")
    value = request[shapes[0]]
    if shapes[0] == "dataframe_split":
        rows = _read_split(value, plan)
    else:
        rows = plan.records(value) if shapes[0] == "dataframe_records" else plan.instances(value)
    return Request(rows, params.parse(request.get("params")))


def _read_split(value: Any, plan: Plan) -> Rows:
    if not isinstance(value, dict) or "data" not in value:
        raise Malformed("dataframe_split must be an object with data and, usually, columns")
    unknown = value.keys() - {"columns", "index", "data"}
    if unknown:
        raise Malformed(f"dataframe_split has only columns, index and data, not {', '.join(sorted(unknown)[:20])}")
    return plan.split(value.get("columns"), value["data"], value.get("index"))


@functools.lru_cache(maxsize=16)
def _media_type(content_type: str | None) -> str:
    if not content_type:
        return JSON
    media_type, *parameters = (part.strip() for part in content_type.split(";"))
    for parameter in filter(None, parameters):
        key, _, value = parameter.partition("=")
        if key.strip().lower() != "charset":
            raise Unsupported(f"Content-Type parameter {key.strip()[:100]!r} is not supported: only charset is")
        if value.strip(" \"'").lower() not in ("utf-8", "utf8"):
            raise Unsupported("only UTF-8 is supported")
    if media_type.lower() not in (JSON, CSV):
        raise Unsupported(f"Content-Type {media_type[:100]!r} is not supported: send {JSON} or {CSV}")
    return media_type.lower()


def write_predictions(output: Any) -> bytes:
    """`{"predictions": ...}`; a Series becomes records, like a DataFrame. Raises `Unwritable`."""
    return dump({"predictions": output.to_frame() if isinstance(output, pd.Series) else output})


def mlflow_failure(error: Exception) -> Reply:
    """How /invocations words `error`."""
    if isinstance(error, Unsupported):
        return Reply(415, str(error).encode(), TEXT)
    if isinstance(error, InputError):
        by_schema = isinstance(error, ParamsError) or any(p.error_type == "missing" for p in error.problems)
        return _mlflow(400, "INVALID_PARAMETER_VALUE" if by_schema else "BAD_REQUEST", f"Invalid input: {error}")
    if isinstance(error, Malformed):
        return _mlflow(400, "BAD_REQUEST", f"Invalid input: {error}")
    if isinstance(error, Refused):
        return _mlflow(400, "INVALID_PARAMETER_VALUE" if error.by_schema else "BAD_REQUEST", str(error))
    if isinstance(error, NotReady):
        return _mlflow(503, "TEMPORARILY_UNAVAILABLE", str(error))
    if isinstance(error, TooSlow):
        return _mlflow(504, "DEADLINE_EXCEEDED", str(error))
    if isinstance(error, Overloaded):
        return _busy({"error_code": "RESOURCE_EXHAUSTED", "message": str(error)}, error)
    return _mlflow(500, "INTERNAL_ERROR", f"Prediction failed: {_cause(error)}")


def _mlflow(status: int, code: str, message: str) -> Reply:
    return _reply(status, {"error_code": code, "message": message})


# JSON


def _cause(error: Exception) -> str:
    # Only what the model said: anything else is about this server's inside.
    return str(error) if isinstance(error, (PredictionFailed, Unwritable)) else "internal error"


def _reply(status: int, body: Any) -> Reply:
    return Reply(status, dump(body))


def _busy(body: Any, error: Overloaded) -> Reply:
    return Reply(503, dump(body), retry_after=error.retry_after)


_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATETIME


def dump(value: Any) -> bytes:
    """`value` as JSON: NaN and infinities as null, digits as Python writes them. Raises `Unwritable`."""
    try:
        return orjson.dumps(value, default=_plain, option=_OPTIONS)
    except TypeError:
        # Integers of more than 64 bits, lone surrogates, deep nesting: rare, but other servers write them.
        pass
    try:
        return json.dumps(_finite(value), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Unwritable(f"the model's output cannot be written as JSON: {error}") from error


def _plain(value: Any) -> Any:
    """A value of numpy, pandas, datetime, pydantic or bytes, as lists, dicts and scalars that JSON has."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "mM":
            return [_plain(part) for part in value] if value.ndim else _plain(value[()])
        return value.tolist()
    if isinstance(value, pd.DataFrame):
        return value.to_dict(orient="records")
    if isinstance(value, (pd.Series, pd.Index, pd.api.extensions.ExtensionArray)):
        return list(value)
    if value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else str(np.datetime_as_string(value))
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (pd.Timedelta, datetime.timedelta)):
        return pd.Timedelta(value).isoformat()
    if isinstance(value, np.timedelta64):
        return None if np.isnat(value) else pd.Timedelta(value).isoformat()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if hasattr(value, "toarray"):
        return value.toarray().tolist()
    if isinstance(value, (bool, int, float, str, list, tuple, dict, type(None))):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else dump(key).decode(): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, (str, int, type(None))):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _finite(dataclasses.asdict(value))
    return _finite(_plain(value))
