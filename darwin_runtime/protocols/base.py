"""The parts that all protocols share: requests and replies, content negotiation, and JSON objects.

Pure functions. A module for each protocol has `read`, `write` and `render_error`.
"""

from __future__ import annotations

import codecs
import functools
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson

from darwin_runtime.errors import (
    BadRequest,
    InvalidInput,
    NotAcceptable,
    ParamsError,
    TooLarge,
    UnsupportedMediaType,
)
from darwin_runtime.protocols.encoding import dump, dump_csv
from darwin_runtime.schema.checks import require_finite
from darwin_runtime.schema.json_text import read_json
from darwin_runtime.schema.model_spec import ModelSpec
from darwin_runtime.schema.report import refuse
from darwin_runtime.schema.rows import Rows

JSON = "application/json"
CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"
TEXT = "text/plain; charset=utf-8"

TENSORS = ("instances", "inputs")

# The param that chooses one of the model's methods.
METHOD = "predict_method"

# No data compresses better than this, beyond the first megabyte.
INFLATION = 100

# Each takes at least 56 bytes of memory, and two of the body.
MAX_CONTAINERS = 4_000_000

# As a request has them: names in lower case.
Headers = Mapping[bytes, bytes]


class Request(NamedTuple):
    """A request that was read by the model's `contract`. `method` is the model's, if not its usual one.

    With several `methods`, the output is a dict of what each answers; "" is the usual one.
    `form` is the answer's form that the client wants: each protocol has its own. With `stream`, the client wants the
    answer piece by piece.
    """

    rows: Rows
    params: Mapping[str, Any]
    contract: ModelSpec
    method: str = ""
    form: Any = JSON
    stream: bool = False
    methods: tuple[str, ...] = ()


class Reply(NamedTuple):
    """An answer as the protocol words it; `status` is HTTP's."""

    status: int
    body: bytes
    media_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class WireProtocol(Protocol):
    """A protocol's module."""

    def read(self, body: bytes, headers: Headers, contract: ModelSpec, *, exact: bool = True) -> Request:
        """The request in `body`; unless `exact`, floats may stand for integers of more than 64 bits.

        Raises `BadRequest`, `InputError`, `TooLarge`, `UnsupportedMediaType` or `NotAcceptable`.
        """

    def write(self, output: Any, request: Request) -> Reply:
        """The model's `output` as the answer to `request`. Raises `EncodingError`."""


def reply(status: int, body: Any, headers: tuple[tuple[str, str], ...] = ()) -> Reply:
    return Reply(status, dump(body), headers=headers)


# Content negotiation


def decoded(body: bytes, encoding: bytes, most: int) -> bytes:
    """`body` without its Content-Encoding, of at most `most` bytes.

    Raises `UnsupportedMediaType`, `BadRequest` or `TooLarge`.
    """
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return body
    if name not in (b"gzip", b"x-gzip", b"deflate"):
        shown = repr(encoding[:100].decode(errors="replace"))
        raise UnsupportedMediaType(f"Content-Encoding {shown} is not supported: send gzip, deflate, or none")
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


@functools.lru_cache(maxsize=64)
def media_type_of(content_type: bytes, known: tuple[str, ...]) -> str:
    """The body's media type, one of `known`; without a header, the first of them. Raises `UnsupportedMediaType`."""
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


def preferred_form(headers: Headers) -> str:
    """JSON or CSV, as the client prefers; JSON if it does not care. Raises `NotAcceptable` if neither will do."""
    accept = headers.get(b"accept", b"*/*")
    return JSON if accept == b"*/*" else _preferred_form(accept)


@functools.lru_cache(maxsize=64)
def _preferred_form(accept: bytes) -> str:
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


def write_csv(output: Any, request: Request) -> Reply:
    """A table. Its column without a name is called as the signature's only output, or as the method that was asked for.

    Raises `EncodingError`.
    """
    names = [spec.get("name") for spec in request.contract.outputs]
    method = request.method
    name = names[0] if len(names) == 1 and names[0] and not method else method or "prediction"
    return Reply(200, dump_csv(output, name), f"{CSV}; charset=utf-8")


# Reading

# Every digit looks like 0, all else but a point like a space: finding this takes a tenth of what a pattern takes.
_DIGITS = "".join("0" if c in "0123456789" else c if c == "." else " " for c in map(chr, range(256))).encode()
_LONG_INTEGER = b" " + b"0" * 19

# In a larger body, even that takes as long as half of the parsing.
_LARGE_BYTES = 16 * 1024


def read_request(protocol: WireProtocol, body: bytes, headers: Headers, contract: ModelSpec, **more: Any) -> Request:
    """The same as `protocol.read`, in less time for a large body of floats. Raises what that does.

    Such a body is read without the search for long integers, and again with it if there may be any.
    """
    if len(body) > _LARGE_BYTES and contract.input_schema.all_floats and body.startswith(b"{"):
        try:
            request = protocol.read(body, headers, contract, exact=False, **more)
        except InvalidInput:
            pass  # its message has to show integers as they were sent
        else:
            if _is_exact(request):
                return request
    return protocol.read(body, headers, contract, **more)


def _is_exact(request: Request) -> bool:
    """Whether no float in `request` is so large that it may stand for an integer of more than 64 bits."""
    rows = request.rows
    if not rows.table or rows.index is not None:
        return False
    columns = rows.value.values() if type(rows.value) is dict else [rows.value]
    # With fmax, null is not the largest.
    if not all(column.dtype.kind == "f" and np.fmax.reduce(np.abs(column), axis=None) < 2**63 for column in columns):
        return False
    values = request.params.values()
    return all(type(v) in (bool, int, str) or (type(v) is float and abs(v) < 2**63) for v in values)


def read_object(body: bytes, *, exact: bool, contract: ModelSpec | None = None) -> dict[str, Any]:
    """The object in `body`; unless `exact`, floats stand for integers of more than 64 bits.

    Raises `BadRequest` or `TooLarge`, and `InputError` for an Infinity that the schema in `contract` would not refuse.
    """
    if len(body) > MAX_CONTAINERS and body.count(b"{") + body.count(b"[") > MAX_CONTAINERS:
        raise TooLarge(f"the body has more than {MAX_CONTAINERS} arrays and objects")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = _read_lenient(body, contract)
    if exact and _LONG_INTEGER in body.translate(_DIGITS):
        value = _loaded(json.loads, body)
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {'an array' if isinstance(value, list) else 'a value'}")
    return value


def _read_lenient(body: bytes, contract: ModelSpec | None) -> Any:
    """The value in a `body` that is no strict JSON: with a byte order mark, or with NaN or Infinity."""
    value = _loaded(read_json, body.removeprefix(codecs.BOM_UTF8))
    if contract is not None and not contract.input_schema.checked:
        require_finite(value)
    return value


def _loaded(load: Callable[[bytes], Any], body: bytes) -> Any:
    try:
        return load(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None


def parse_params(given: Any, contract: ModelSpec) -> tuple[dict[str, Any], str]:
    """The params, and the method if it is not the usual one, that a request asks for. Raises `ParamsError`."""
    params = contract.params.parse(given)
    method = given.get(METHOD) if type(given) is dict and METHOD not in params else None
    if method is None or method == contract.method:
        return params, ""
    if method not in contract.methods:
        raise ParamsError(refuse(f"params.{METHOD}: one of {', '.join(contract.methods)}", method).problems)
    return params, method
