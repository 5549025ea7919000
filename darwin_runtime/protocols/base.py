"""Wire formats to rows and back: Darwin's /predict, the MLflow scoring server's /invocations, and KServe's V1.

Pure functions, and what all protocols have in common; the Open Inference Protocol (V2) has a module of its own.
Sources: Darwin's runtime; MLflow 3.17, mlflow.pyfunc.scoring_server
(https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/#inference-server-specification); KServe's V1
(https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol).
"""

from __future__ import annotations

import functools
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import orjson
import pandas as pd

from darwin_runtime.engine.batching import PredictionRequest
from darwin_runtime.errors import (
    BadRequest,
    DeadlineExceeded,
    EncodingError,
    FeatureStoreError,
    Forbidden,
    InputError,
    InputRejected,
    NotAcceptable,
    NotFound,
    NotReady,
    Overloaded,
    ParamsError,
    PredictionFailed,
    TooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from darwin_runtime.protocols.encoding import dump, plain
from darwin_runtime.schema.checks import MAX_CELLS, MAX_NESTING, nested_too_deep
from darwin_runtime.schema.model_spec import InputSchema, ModelSpec
from darwin_runtime.schema.report import refuse
from darwin_runtime.schema.rows import Rows
from darwin_runtime.schema.signature import Spec, describe

JSON = "application/json"
CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"
TEXT = "text/plain; charset=utf-8"

TABLES = ("dataframe_split", "dataframe_records")
TENSORS = ("instances", "inputs")
SHAPES = (*TABLES, *TENSORS)

# Where MLflow sees one of these beside the rest, the body is the model's own business.
CHAT = ("messages", "prompt", "input")

STORE_KEYS = ("feature_group", "ofs_keys")

# The param that chooses one of the model's methods.
METHOD = "predict_method"


# No data compresses better than this, beyond the first megabyte.
INFLATION = 100

# A Parquet file can hold any number of equal cells, of any length, in a few bytes: both are bounded.
MOST_PARQUET_BYTES = 64 * 1024 * 1024

# Each takes at least 56 bytes of memory, and two of the body.
MOST_CONTAINERS = 4_000_000


class Reply(NamedTuple):
    """An answer as the protocol words it; `status` is HTTP's."""

    status: int
    body: bytes
    media_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


# As a request has them: names in lower case.
Headers = Mapping[bytes, bytes]

# Raises `BadRequest`, `InputError`, `UnsupportedMediaType` or `NotAcceptable`.
Read = Callable[[bytes, Headers, ModelSpec], PredictionRequest]


# Every protocol


def decoded(body: bytes, encoding: bytes, most: int) -> bytes:
    """`body` without its Content-Encoding, of at most `most` bytes.

    Raises `UnsupportedMediaType`, `BadRequest` or `TooLarge`.
    """
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return body
    if name not in (b"gzip", b"x-gzip", b"deflate"):
        raise UnsupportedMediaType(f"Content-Encoding {_shown(encoding)} is not supported: send gzip, deflate, or none")
    unzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # which of both it is, the first bytes tell
    most = min(most, INFLATION * len(body) + 1024 * 1024)
    try:
        plain_body = unzip.decompress(body, most)
    except zlib.error as error:
        raise BadRequest(f"the body is not {name.decode()}: {error}") from None
    if unzip.unconsumed_tail:
        raise TooLarge(f"the body of {len(body)} bytes is larger than {most} bytes once it is decompressed")
    if not unzip.eof or unzip.unused_data:
        raise BadRequest(f"the body is not {name.decode()}: it is cut short, or more follows")
    return plain_body


def inflates(headers: Headers) -> bool:
    """Whether the body's length says little of what it takes to read it."""
    return headers.get(b"content-type", b"").strip().lower().startswith(PARQUET.encode())


def _shown(header: bytes) -> str:
    return repr(header[:100].decode(errors="replace"))


@functools.lru_cache(maxsize=64)
def _media_type(content_type: bytes, known: tuple[str, ...]) -> str:
    """What of `known` the body is; without a header, the first of them."""
    if not content_type.strip():
        return known[0]
    media_type, *parameters = (part.strip() for part in content_type.decode("latin-1").split(";"))
    for parameter in filter(None, parameters):
        key, _, value = parameter.partition("=")
        if key.strip().lower() != "charset":
            raise UnsupportedMediaType(
                f"Content-Type parameter {key.strip()[:100]!r} is not supported: only charset is"
            )
        if value.strip(" \"'").lower() not in ("utf-8", "utf8"):
            raise UnsupportedMediaType("only UTF-8 is supported")
    if media_type.lower() not in known:
        raise UnsupportedMediaType(f"Content-Type {media_type[:100]!r} is not supported: send {' or '.join(known)}")
    return media_type.lower()


@functools.lru_cache(maxsize=64)
def _wanted(accept: bytes) -> str:
    """Which of JSON and CSV a client prefers, JSON if it does not care. Raises `NotAcceptable` if neither will do."""
    if not accept.strip():
        return JSON
    given: dict[str, float] = {}
    for part in accept.decode("latin-1").lower().split(","):
        media_type, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        try:
            given[media_type] = float(quality)
        except ValueError:
            given[media_type] = 0.0
    anything = given.get("*/*", 0.0)
    json_quality = given.get(JSON, given.get("application/*", anything))
    csv_quality = given.get(CSV, given.get("text/*", anything))
    if max(json_quality, csv_quality) <= 0:
        raise NotAcceptable(f"nothing that Accept: {accept[:100].decode('latin-1')} allows: ask for {JSON} or {CSV}")
    return CSV if csv_quality > json_quality else JSON


# Every digit looks like 0, all else but a point like a space: finding this takes a tenth of what a pattern takes.
_DIGITS = "".join("0" if c in "0123456789" else c if c == "." else " " for c in map(chr, range(256))).encode()
_LONG_INTEGER = b" " + b"0" * 19

# In a larger body, even that takes as long as half of the parsing.
_LARGE_BYTES = 16 * 1024


def read_object(
    body: bytes, plan: InputSchema, read: Callable[[dict[str, Any]], PredictionRequest]
) -> PredictionRequest:
    """What `read` makes of the object in `body`, with exact integers. Raises `BadRequest` and what `read` does."""
    value = _loaded(orjson.loads, body)
    if len(body) > _LARGE_BYTES and plan.all_floats and (request := _if_of_small_floats(value, read)):
        return request
    if _LONG_INTEGER in body.translate(_DIGITS):
        value = _loaded(json.loads, body)  # exact, where orjson makes floats of integers beyond 64 bits
    return read(_need_object(value))


def _loaded(load: Callable[[bytes], Any], body: bytes) -> Any:
    if len(body) > MOST_CONTAINERS and body.count(b"{") + body.count(b"[") > MOST_CONTAINERS:
        raise TooLarge(f"the body has more than {MOST_CONTAINERS} arrays and objects")
    try:
        return load(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None


def _if_of_small_floats(value: Any, read: Callable[[dict[str, Any]], PredictionRequest]) -> PredictionRequest | None:
    """What `read` makes of `value`, if that is all floats, none of them so large that it may have been an integer."""
    try:
        request = read(_need_object(value))
    except (InputError, BadRequest):  # to be worded with exact integers
        return None
    rows = request.rows
    floats = rows.names is not None and rows.index is None and not request.params and rows.value.dtype.kind == "f"
    return request if floats and np.abs(rows.value).max() < 2**63 else None


def _need_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {'an array' if isinstance(value, list) else 'a value'}")
    return value


def parse_params(given: Any, contract: ModelSpec) -> tuple[dict[str, Any], str]:
    """The params, and the method if it is not the usual one, that a request asks for. Raises `ParamsError`."""
    params = contract.params.parse(given)
    method = given.get(METHOD) if type(given) is dict and METHOD not in params else None
    if method is None or method == contract.method:
        return params, ""
    if method not in contract.methods:
        raise ParamsError(refuse(f"params.{METHOD}: one of {', '.join(contract.methods)}", method).problems)
    return params, method


def write_csv(output: Any, name: str) -> Reply:
    """A header and a line for each row; `name` is that of a column that has none. Raises `EncodingError`."""
    try:
        table = _table(output, name)
        dump([table[column].tolist() for column in table if table[column].dtype == object])  # refuses what JSON does
        text = table.replace([np.inf, -np.inf], np.nan).to_csv(index=False)
    except (TypeError, ValueError) as error:
        raise EncodingError(f"the model's output is no table that could be written as CSV: {error}") from error
    return Reply(200, text.encode(), f"{CSV}; charset=utf-8")


def _table(output: Any, name: str) -> Any:
    if isinstance(output, pd.DataFrame):
        return output
    if isinstance(output, pd.Series):
        return pd.DataFrame({name if output.name is None else output.name: output})
    if isinstance(output, dict) or (isinstance(output, list) and output and isinstance(output[0], dict)):
        return pd.DataFrame(output)
    cells = np.atleast_1d(np.asarray(plain(output)))
    if cells.ndim == 1:
        return pd.DataFrame({name: cells})
    return pd.DataFrame(cells, columns=[f"{name}_{index}" for index in range(cells.shape[1])])


def _writer(
    headers: Headers, usual: Callable[[Any], Reply], contract: ModelSpec, method: str
) -> Callable[[Any], Reply]:
    """`usual`, unless the client prefers CSV."""
    accept = headers.get(b"accept", b"*/*")
    if accept == b"*/*" or _wanted(accept) == JSON:
        return usual
    names = [spec.get("name") for spec in contract.outputs]
    name = names[0] if len(names) == 1 and names[0] and not method else method or "prediction"
    return partial(write_csv, name=name)


# Darwin

Lookup = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


def read_predict(body: bytes, headers: Headers, contract: ModelSpec, lookup: Lookup | None = None) -> PredictionRequest:
    """`{"features": {…} or [{…}, …], "params"?: {…}}`, or `{"feature_group", "ofs_keys"}`, which `lookup` finds."""
    return read_object(body, contract.input_schema, lambda request: _predict(request, headers, contract, lookup))


def _predict(
    request: dict[str, Any], headers: Headers, contract: ModelSpec, lookup: Lookup | None
) -> PredictionRequest:
    stored = [key for key in STORE_KEYS if request.get(key) is not None]
    if ("features" in request) == bool(stored) or len(stored) == 1:
        given = ", ".join(key for key in ("features", *STORE_KEYS) if request.get(key) is not None) or "neither"
        raise BadRequest(f"give either features, or both feature_group and ofs_keys (given: {given})")
    features = _stored(request, lookup) if stored else request["features"]
    params, method = parse_params(request.get("params"), contract)
    usual = partial(write_scores, classes=contract.classes, method=method or contract.method)
    return PredictionRequest(
        contract.input_schema.features(features), params, _writer(headers, usual, contract, method), method
    )


def _stored(request: dict[str, Any], lookup: Lookup | None) -> Mapping[str, Any]:
    group, keys = (request[key] for key in STORE_KEYS)
    if lookup is None:
        raise BadRequest(
            "this server has no feature store: set FEATURE_STORE_URL and OFS_ADMIN_URL, or give the values, as features"
        )
    if not isinstance(group, str) or not group:
        raise BadRequest("feature_group must be the name of a feature group")
    if not isinstance(keys, dict) or not keys or {list, dict} & set(map(type, keys.values())):
        raise BadRequest('ofs_keys must be an object of primary keys, such as {"user_id": 42}')
    return lookup(group, keys)


def write_scores(output: Any, classes: Sequence[Any] | None = None, method: str = "predict") -> Reply:
    """`{"scores": [...]}`; of probabilities also the most probable class of each row. Raises `EncodingError`."""
    try:
        scores = plain(output)
    except (TypeError, ValueError):
        scores = [output]
    answer: dict[str, Any] = {"scores": scores if isinstance(scores, (list, tuple)) else [scores]}
    if method == "predict_proba":
        answer["probabilities"] = answer["scores"]
        if classes is not None and isinstance(output, np.ndarray) and output.shape[1:] == (len(classes),):
            answer["predicted_class"] = [classes[index] for index in output.argmax(axis=1)]
    return Reply(200, dump(answer))


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
        return reply(422, {"detail": detail})
    if isinstance(error, BadRequest):
        hint = 'send {"features": {"name": value, ...}}; GET /schema shows a request that works'
        return reply(422, {"detail": {"message": str(error), "errors": [], "hint": hint}})
    if isinstance(error, InputRejected):
        hint = "GET /schema shows the names and types" if inputs else "the model has no signature to check the input by"
        return reply(400, {"detail": {"message": "The model refused the input", "error": str(error), "hint": hint}})
    if isinstance(error, NotReady):
        return not_ready(error)
    if isinstance(error, DeadlineExceeded):
        return reply(504, {"detail": {"message": "Prediction timed out", "error": str(error)}})
    if isinstance(error, Overloaded):
        return busy({"detail": {"message": "The server is overloaded", "error": str(error)}}, error)
    if isinstance(error, FeatureStoreError):
        return reply(error.status, {"detail": {"message": "No features from the feature store", "error": str(error)}})
    if status := status_of(error):
        return reply(status, {"detail": {"message": str(error)}})
    hint = "the server's log has the details"
    return reply(500, {"detail": {"message": "Prediction failed", "error": cause(error), "hint": hint}})


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
    return reply(503, {"detail": {"status": "not_ready", "message": str(error)}})


def schema(contract: ModelSpec, example: Rows | None) -> Reply:
    """The answer to `GET /schema`; `example` is where the sample request comes from, if there is one."""
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
        "sample_request": {"features": plan.sample(example)},
        "json_schema": plan.json_schema(),
    }
    return reply(200, body)


# MLflow


def read_invocations(body: bytes, headers: Headers, contract: ModelSpec) -> PredictionRequest:
    """JSON with one of the four shapes or with what chat models take, CSV, or Parquet."""
    plan = contract.input_schema
    kind = _media_type(headers.get(b"content-type", b""), (JSON, CSV, PARQUET))
    if kind == JSON:
        return read_object(body, plan, lambda request: _invocations(request, headers, contract))
    rows = _read_csv(body, plan) if kind == CSV else _read_parquet(body, plan)
    return PredictionRequest(rows, {}, _writer(headers, write_predictions, contract, ""))


def _read_csv(body: bytes, plan: InputSchema) -> Rows:
    try:
        return plan.csv(body)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error}") from None


def _read_parquet(body: bytes, plan: InputSchema) -> Rows:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedMediaType(
            f"{PARQUET} needs the library pyarrow, which is not installed: send {JSON} or {CSV}"
        ) from None
    try:
        _check_parquet(pyarrow.parquet.ParquetFile(io.BytesIO(body)), body)
        table = pyarrow.parquet.ParquetFile(io.BytesIO(body)).read()
        if not plan.inputs and table.num_rows > 0:
            return Rows(table.to_pandas(), table.num_rows, unvalidated=True)
        rows = [list(map(_as_json, row.values())) for row in table.to_pylist()]
    except TooLarge:
        raise
    except Exception as error:  # of many kinds, all of them about the body
        raise BadRequest(f"the body is not Parquet: {error}") from None
    return plan.split(table.column_names, rows)


def _check_parquet(file: Any, body: bytes) -> None:
    """Raise `TooLarge` for what a few bytes make large: cells that are equal, or so many in a row, or long texts."""
    import pyarrow.parquet

    told, schema = file.metadata, file.schema
    if told.num_rows * told.num_columns > MAX_CELLS:
        raise TooLarge(f"the Parquet file has {told.num_rows * told.num_columns} cells, more than {MAX_CELLS}")
    # In a file that is not sound, pyarrow ends the process where it is asked for a column's metadata.
    file.scan_contents()
    groups = range(told.num_row_groups)
    values = sum(told.row_group(group).column(index).num_values for group in groups for index in range(len(schema)))
    if values > MAX_CELLS:
        raise TooLarge(f"the Parquet file has {values} values, more than {MAX_CELLS}")
    columns = map(schema.column, range(len(schema)))
    texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type != "DECIMAL"]
    packed = pyarrow.parquet.ParquetFile(io.BytesIO(body), read_dictionary=texts).read()
    size = sum(_unpacked_bytes(chunk) for column in packed.columns for chunk in column.chunks)
    if size > MOST_PARQUET_BYTES:
        raise TooLarge(f"the Parquet file has {size} bytes of data, more than {MOST_PARQUET_BYTES}")


def _unpacked_bytes(array: Any) -> int:
    """How large a pyarrow array is without dictionaries, in which equal texts are one."""
    import pyarrow.compute

    if hasattr(array, "dictionary"):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return int(pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)
    if hasattr(array, "keys"):  # a map
        return _unpacked_bytes(array.keys) + _unpacked_bytes(array.items)
    if not hasattr(array, "flatten") or not array.type.num_fields:
        return int(array.nbytes)
    parts = array.flatten()
    return sum(map(_unpacked_bytes, parts if isinstance(parts, list) else [parts]))


def _as_json(value: Any) -> Any:
    """`value` as JSON would have said it."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, list):
        return list(map(_as_json, value))
    return {key: _as_json(part) for key, part in value.items()} if isinstance(value, dict) else plain(value)


def _invocations(request: dict[str, Any], headers: Headers, contract: ModelSpec) -> PredictionRequest:
    shapes = [key for key in SHAPES if key in request]
    if not shapes and any(key in request for key in CHAT):
        return _chat(request, contract)
    if len(shapes) != 1:
        given = ", ".join(map(repr, list(request)[:20]))[:200] or "nothing"
        raise BadRequest(f"the body must have exactly one of {', '.join(SHAPES)} (given: {given})")
    value, plan = request[shapes[0]], contract.input_schema
    if shapes[0] == "dataframe_split":
        rows = _read_split(value, plan)
    else:
        rows = plan.records(value) if shapes[0] == "dataframe_records" else plan.instances(value)
    params, method = parse_params(request.get("params"), contract)
    return PredictionRequest(rows, params, _writer(headers, write_predictions, contract, method), method)


def _chat(request: dict[str, Any], contract: ModelSpec) -> PredictionRequest:
    """The body goes to the model as it is, but for what the signature calls params."""
    declared = {spec["name"] for spec in contract.params.specs}
    params = contract.params.parse({key: value for key, value in request.items() if key in declared})
    given = {key: value for key, value in request.items() if key not in declared}
    if nested_too_deep(given):
        raise BadRequest(f"the body is nested more than {MAX_NESTING} deep")
    if request.get("stream") is True and not contract.streams:
        raise BadRequest("this model cannot answer piece by piece: leave out stream")
    rows = Rows(given, 1, unvalidated=True, passthrough=True)
    return PredictionRequest(rows, params, write_unwrapped, stream=request.get("stream") is True)


def _read_split(value: Any, plan: InputSchema) -> Rows:
    if not isinstance(value, dict) or "data" not in value:
        raise BadRequest("dataframe_split must be an object with data and, usually, columns")
    unknown = value.keys() - {"columns", "index", "data"}
    if unknown:
        shown = ", ".join(sorted(unknown)[:20])[:200]
        raise BadRequest(f"dataframe_split has only columns, index and data, not {shown}")
    return plan.split(value.get("columns"), value["data"], value.get("index"))


def write_predictions(output: Any) -> Reply:
    """`{"predictions": ...}`; a Series becomes records, like a DataFrame. Raises `EncodingError`."""
    return Reply(200, dump({"predictions": output.to_frame() if isinstance(output, pd.Series) else output}))


def write_unwrapped(output: Any) -> Reply:
    """What the model answers, and nothing around it. Raises `EncodingError`."""
    return Reply(200, dump(output))


def mlflow_failure(error: Exception) -> Reply:
    """How /invocations words `error`."""
    if isinstance(error, UnsupportedMediaType):
        return Reply(415, str(error).encode(), TEXT)
    if isinstance(error, InputError):
        by_schema = isinstance(error, ParamsError) or any(p.error_type == "missing" for p in error.problems)
        return _mlflow(400, "INVALID_PARAMETER_VALUE" if by_schema else "BAD_REQUEST", f"Invalid input: {error}")
    if isinstance(error, BadRequest):
        return _mlflow(400, "BAD_REQUEST", f"Invalid input: {error}")
    if isinstance(error, InputRejected):
        return _mlflow(400, "INVALID_PARAMETER_VALUE" if error.by_schema else "BAD_REQUEST", str(error))
    if isinstance(error, NotReady):
        return _mlflow(503, "TEMPORARILY_UNAVAILABLE", str(error))
    if isinstance(error, DeadlineExceeded):
        return _mlflow(504, "DEADLINE_EXCEEDED", str(error))
    if isinstance(error, Overloaded):
        return busy({"error_code": "RESOURCE_EXHAUSTED", "message": str(error)}, error)
    if status := status_of(error):
        codes = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}
        return _mlflow(status, codes.get(status, "BAD_REQUEST"), str(error))
    return _mlflow(500, "INTERNAL_ERROR", f"Prediction failed: {cause(error)}")


def _mlflow(status: int, code: str, message: str) -> Reply:
    return reply(status, {"error_code": code, "message": message})


# KServe V1


def read_v1(body: bytes, headers: Headers, contract: ModelSpec) -> PredictionRequest:
    """`{"instances": […]}` or `{"inputs": …}`, and perhaps `parameters`."""
    _media_type(headers.get(b"content-type", b""), (JSON,))
    return read_object(body, contract.input_schema, lambda request: _v1(request, headers, contract))


def _v1(request: dict[str, Any], headers: Headers, contract: ModelSpec) -> PredictionRequest:
    shapes = [key for key in TENSORS if key in request]
    if len(shapes) != 1:
        raise BadRequest(f"the body must have exactly one of {', '.join(TENSORS)}")
    rows = contract.input_schema.instances(request[shapes[0]])
    params, method = parse_params(request.get("parameters"), contract)
    return PredictionRequest(rows, params, _writer(headers, write_predictions, contract, method), method)


def kserve_failure(error: Exception) -> Reply:
    """How KServe's V1 and the Open Inference Protocol word `error`."""
    if isinstance(error, Overloaded):
        return busy({"error": str(error)}, error)
    known = (InputError, BadRequest, InputRejected, NotReady, DeadlineExceeded)
    statuses = {NotReady: 503, DeadlineExceeded: 504}
    if isinstance(error, known):
        return reply(statuses.get(type(error), 400), {"error": str(error)})
    if status := status_of(error):
        return reply(status, {"error": str(error)})
    return reply(500, {"error": f"Prediction failed: {cause(error)}"})


# Replies


def status_of(error: Exception) -> int | None:
    """The status of an error that all protocols have in common."""
    kinds: dict[type[Exception], int]
    kinds = {
        Unauthorized: 401,
        Forbidden: 403,
        NotFound: 404,
        NotAcceptable: 406,
        TooLarge: 413,
        UnsupportedMediaType: 415,
    }
    return kinds.get(type(error))


def cause(error: Exception) -> str:
    # Only what the model said: anything else is about this server's inside.
    return str(error) if isinstance(error, (PredictionFailed, EncodingError)) else "internal error"


def reply(status: int, body: Any) -> Reply:
    return Reply(status, dump(body))


def busy(body: Any, error: Overloaded) -> Reply:
    return Reply(503, dump(body), headers=(("Retry-After", str(error.retry_after)),))
