"""The HTTP application: the model behind the routes of every protocol."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from darwin_runtime.engine.batching import Batcher, BatchLimits, InferenceThread, PredictionRequest
from darwin_runtime.errors import (
    BadRequest,
    ClientDisconnected,
    DeadlineExceeded,
    FeatureStoreError,
    Forbidden,
    InputError,
    InputRejected,
    NotAcceptable,
    NotFound,
    NotReady,
    Overloaded,
    TooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from darwin_runtime.http import metrics as metrics_module
from darwin_runtime.http import streaming
from darwin_runtime.http.auth import AuthPolicy, Guard
from darwin_runtime.http.bodies import Bodies
from darwin_runtime.http.docs import Documents
from darwin_runtime.http.metrics import SharedMetrics, WorkerMetrics
from darwin_runtime.http.request_log import AccessLog, Line
from darwin_runtime.http.tracing import Trace, Tracer
from darwin_runtime.model.about import About
from darwin_runtime.model.diagnose import mlflow_version
from darwin_runtime.model.model import Model
from darwin_runtime.model.self_test import example_rows
from darwin_runtime.protocols import base as protocols
from darwin_runtime.protocols import open_inference
from darwin_runtime.protocols.base import TEXT, Headers, Read, Reply
from darwin_runtime.protocols.encoding import dump
from darwin_runtime.protocols.feature_store import FeatureStore
from darwin_runtime.schema.model_spec import ModelSpec

VERSION = "0.1.0"

# A larger body is not parsed on the event loop, which must go on answering probes.
PARSE_ASIDE_BYTES = 64 * 1024

# A larger answer is sent in pieces of this size, as its client takes them. While large ones occupy so much, no others
# are begun.
PIECE_BYTES = 256 * 1024
MOST_UNSENT_BYTES = 256 * 1024 * 1024

# How many bodies are decompressed at the same time.
INFLATING = 2

logger = logging.getLogger("darwin.serve")


class Loaded(NamedTuple):
    """The model that answers, and what there is to know of it."""

    model: Model
    contract: ModelSpec
    batcher: Batcher
    about: About
    documents: Documents


class RequestLimits(NamedTuple):
    """What one request may bring, and how long its client may take to read a piece of the answer."""

    body_bytes: int = 64 * 1024 * 1024
    rows: int = 1_000_000
    send_seconds: float = 60


class Service:
    """The model behind the routes: absent until it has loaded and answered its own input example.

    `name` is what protocols with names call the model, `store` where features can be looked up, if anywhere, and
    `guard` says who may ask, if not everybody.
    """

    def __init__(
        self,
        limits: BatchLimits,
        name: str = "model",
        store: FeatureStore | None = None,
        meter: WorkerMetrics | None = None,
        most: RequestLimits = RequestLimits(),  # noqa: B008 - it does not change
        guard: Guard | None = None,
    ) -> None:
        self.limits = limits
        self.bodies = Bodies(most.body_bytes)
        self.most = most
        # Of answers that are being sent, all of those that are large.
        self.unsent = 0
        self.name = name
        self.store = store
        self.meter = meter or WorkerMetrics(SharedMetrics(1), 0)
        self.guard = guard
        self.access = AccessLog()
        self.inference = InferenceThread()
        self.streams = streaming.Streams()
        self.draining = False
        self._loaded: Loaded | None = None

    def use(
        self,
        model: Model,
        about: About | None = None,
        *,
        batching: bool = False,
        on_hang: Callable[[], None] = lambda: None,
    ) -> None:
        """From now on, answer with `model`; `on_hang` is the `Batcher`'s."""
        self.streams.on_hang = on_hang
        about = about or About()
        contract = model.contract(self.name, about.version)
        # Once, for the input example can be large.
        documents = Documents.of(
            contract,
            example_rows(model),
            about,
            VERSION,
            features=self.store is not None,
            needs=self.guard.needs if self.guard else AuthPolicy(),
        )
        batcher = Batcher(
            model.predict, self.inference, self.limits, batching=batching, on_hang=on_hang, watcher=self.meter
        )
        self._loaded = Loaded(model, contract, batcher, about, documents)

    @property
    def keep_alive(self) -> bool:
        """Whether connections may stay open: not when another server is about to take over."""
        return self._loaded is not None and not self.draining

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def loaded(self) -> Loaded:
        """Raises `NotReady` until there is a model."""
        if self._loaded is None:
            raise NotReady("the model is still loading")
        return self._loaded

    def check_loaded(self) -> None:
        """Raise `NotReady` until there is a model."""
        _ = self.loaded

    def check_ready(self) -> None:
        """Raise `NotReady` unless a request that comes now would be answered."""
        if self.draining:
            raise NotReady("the server is shutting down")
        if stuck := self.loaded.batcher.stuck:
            raise NotReady(f"the model has been computing one answer for {stuck:.0f} s, longer than a request may take")

    def check_name(self, name: str) -> None:
        """Raise `NotFound` unless that is what the model is called here."""
        if name != self.name:
            raise NotFound(f"there is no model {name[:100]!r} here: it is called {self.name!r} (MODEL_NAME)")


class RequestContext:
    """One request over HTTP. `rows` is how many rows it asked about, once that is known.

    With `closing`, its connection is no good for another.
    """

    __slots__ = ("closing", "headers", "receive", "rows", "scope", "trace")

    def __init__(self, scope: Scope, receive: Receive, headers: Headers, trace: Trace) -> None:
        self.scope = scope
        self.receive = receive
        self.headers = headers
        self.trace = trace
        self.rows = 0
        self.closing = False

    async def gone(self) -> bool:
        """Whether the client has left."""
        return await HttpRequest(self.scope, self.receive).is_disconnected()

    def path(self, name: str) -> str:
        """The part of the path that the route calls `name`."""
        return str(self.scope["path_params"][name])


class StreamingReply(NamedTuple):
    """An answer in pieces."""

    pieces: AsyncGenerator[bytes, None]
    media_type: str = streaming.MEDIA_TYPE
    status: int = 200


Handler = Callable[[RequestContext], Awaitable[Reply | StreamingReply]]


class Endpoint(NamedTuple):
    """What answers a route: `handler`, with every exception put in its protocol's words by `word`.

    Of a `quiet` one, which machines ask all day, there is no log line and no count.
    """

    handler: Handler
    protocol: str
    word: Callable[[Exception], Reply]
    quiet: bool = False


# What went wrong was the client's or the model's doing, and has been told to the client.
EXPECTED = (
    *(InputError, BadRequest, InputRejected, NotReady, Overloaded, NotFound),
    *(Unauthorized, Forbidden, UnsupportedMediaType, NotAcceptable, TooLarge, FeatureStoreError),
)


def make_app(service: Service, root_path: str = "") -> ASGIApp:
    """The HTTP application. It works behind a proxy that strips `root_path` and behind one that doesn't."""
    tracer = Tracer()
    # Each takes a thread, and perhaps a hundred times the memory of what arrived.
    inflating = asyncio.Semaphore(INFLATING)
    meter, access, guard = service.meter, service.access, service.guard

    async def answer(ask: RequestContext, read: Read, store: FeatureStore | None = None) -> Reply | StreamingReply:
        """What the model says to what `read` makes of the body, which may name features that are in `store`."""
        model, contract, batcher, _, _ = service.loaded
        try:
            body = await service.bodies.read(ask.receive, ask.headers)
        except (TooLarge, Overloaded):
            ask.closing = True  # there may be more of it
            raise
        if service.unsent > MOST_UNSENT_BYTES:
            raise Overloaded(1)
        if not contract.streams:
            # At ten times the load, parsing what is then refused would take a tenth of the core from who is let in.
            batcher.check(1, len(body))
        encoding = ask.headers.get(b"content-encoding")
        if encoding is not None:
            async with inflating:
                body = await asyncio.to_thread(protocols.decoded, body, encoding, service.bodies.most)

        def parse(**more: Any) -> PredictionRequest:
            request = read(body, ask.headers, contract, **more)
            if request.rows.count > service.most.rows:
                raise TooLarge(f"{request.rows.count} rows are more than {service.most.rows} (MAX_ROWS)")
            return request

        large = len(body) > PARSE_ASIDE_BYTES or protocols.inflates(ask.headers)
        if store is not None and b"feature_group" in body:
            lookup = partial(store.features, trace=ask.trace.headers)
            request = await store.run(partial(parse, lookup=lookup), service.limits.timeout)
        elif large and not contract.streams:
            request = None
            answered = await batcher.parse_and_predict(parse, len(body), ask.gone)
        else:
            request = await asyncio.to_thread(parse) if large else parse()
        if request is not None and request.stream:
            return await stream(ask, model, request)
        if request is not None:
            answered = await batcher.predict(request, len(body), ask.gone)
        ask.rows = answered.rows
        meter.stages(answered.queued, answered.computed, answered.written)
        reply: Reply = answered.reply
        return reply

    async def stream(ask: RequestContext, model: Model, request: PredictionRequest) -> StreamingReply:
        """The answer piece by piece. Raises what keeps the first from being made, for then it can still be told."""
        pieces = service.streams.pieces(lambda: model.stream(request.rows, request.params), service.limits.timeout)
        nothing = object()
        first = await anext(pieces, nothing)
        ask.rows = 1

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                if first is not nothing:
                    yield streaming.event(dump(first))
                async for piece in pieces:
                    yield streaming.event(dump(piece))
                yield streaming.DONE
            except Exception as error:  # the status has been sent; this is how the rest can be told
                _log(ask, error)
                yield streaming.event(protocols.mlflow_failure(error).body, "error")
            finally:
                await pieces.aclose()

        return StreamingReply(events())

    async def predict(ask: RequestContext) -> Reply | StreamingReply:
        return await answer(ask, protocols.read_predict, service.store)

    async def invocations(ask: RequestContext) -> Reply | StreamingReply:
        return await answer(ask, protocols.read_invocations)

    async def v1_predict(ask: RequestContext) -> Reply | StreamingReply:
        service.check_name(ask.path("name"))
        return await answer(ask, protocols.read_v1)

    async def v2_infer(ask: RequestContext) -> Reply | StreamingReply:
        check_model(ask)
        return await answer(ask, open_inference.read_infer)

    def check_model(ask: RequestContext) -> None:
        service.check_name(ask.path("name"))
        version, known = ask.scope["path_params"].get("version"), service.loaded.contract.version
        if version is not None and version != known:
            raise NotFound(
                f"there is no version {version[:100]!r} here: {f'it is {known!r}' if known else 'it has none'}"
            )

    async def v1_models(_: RequestContext) -> Reply:
        return protocols.reply(200, {"models": [service.name]})

    async def v1_model(ask: RequestContext) -> Reply:
        if ask.path("name").endswith(":predict"):
            raise HTTPException(405, headers={"Allow": "POST"})
        service.check_name(ask.path("name"))
        return protocols.reply(200, {"name": service.name, "ready": service.is_loaded and not service.draining})

    async def v2_server(_: RequestContext) -> Reply:
        return open_inference.server_metadata(VERSION)

    async def v2_live(_: RequestContext) -> Reply:
        return protocols.reply(200, {"live": True})

    async def v2_ready(_: RequestContext) -> Reply:
        service.check_ready()
        return protocols.reply(200, {"ready": True})

    async def v2_model_ready(ask: RequestContext) -> Reply:
        check_model(ask)
        service.check_ready()
        return protocols.reply(200, {"name": service.name, "ready": True})

    async def v2_model(ask: RequestContext) -> Reply:
        check_model(ask)
        return service.loaded.documents.v2

    async def schema(_: RequestContext) -> Reply:
        return service.loaded.documents.schema

    async def openapi(_: RequestContext) -> Reply:
        return service.loaded.documents.openapi(root_path)

    async def page(_: RequestContext) -> Reply:
        return service.loaded.documents.page

    async def root(ask: RequestContext) -> Reply:
        # What KServe's V1 clients take for liveness.
        return await (page if b"text/html" in ask.headers.get(b"accept", b"") else livez)(ask)

    async def metrics(ask: RequestContext) -> Reply:
        known = service.loaded if service.is_loaded else None
        names = {"name": service.name, "version": "", "flavor": ""}
        if known:
            names |= {"version": known.contract.version, "flavor": ",".join(known.model.flavors)}
        seconds = known.about.load_seconds if known else None
        accept = ask.headers.get(b"accept", b"").decode("latin-1")
        body, media_type = await asyncio.to_thread(metrics_module.exposition, meter.board, names, seconds, accept)
        return Reply(200, body, media_type)

    async def livez(_: RequestContext) -> Reply:
        return protocols.reply(200, {"status": "alive"})

    async def ready(_: RequestContext) -> Reply:
        service.check_ready()
        return protocols.reply(200, {"status": "ready", "model_loaded": True})

    async def healthcheck(_: RequestContext) -> Reply:
        service.check_loaded()
        return protocols.reply(200, {"status": "SUCCESS", "message": "OK"})

    async def ping(_: RequestContext) -> Reply:
        service.check_loaded()
        return Reply(200, b"\n")

    async def version(_: RequestContext) -> Reply:
        return Reply(200, mlflow_version().encode(), TEXT)

    def darwin_failure(error: Exception) -> Reply:
        inputs = service.loaded.contract.input_schema.inputs if service.is_loaded else ()
        return protocols.darwin_failure(error, inputs)

    darwin = partial(Endpoint, protocol="darwin", word=darwin_failure)
    mlflow = partial(Endpoint, protocol="mlflow", word=protocols.mlflow_failure)
    v1 = partial(Endpoint, protocol="kserve_v1", word=protocols.kserve_failure)
    v2 = partial(Endpoint, protocol="kserve_v2", word=protocols.kserve_failure)
    other = partial(Endpoint, protocol="other", word=darwin_failure)
    model, versioned = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
    endpoints = {
        ("POST", "/predict"): darwin(predict),
        ("POST", "/invocations"): mlflow(invocations),
        ("POST", "/v1/models/{name}:predict"): v1(v1_predict),
        ("POST", f"{model}/infer"): v2(v2_infer),
        ("POST", f"{versioned}/infer"): v2(v2_infer),
        ("GET", "/schema"): darwin(schema),
        ("GET", "/version"): mlflow(version),
        ("GET", "/v1/models"): v1(v1_models),
        ("GET", "/v1/models/{name}"): v1(v1_model),
        ("GET", "/v2"): v2(v2_server),
        ("GET", model): v2(v2_model),
        ("GET", versioned): v2(v2_model),
        ("GET", "/"): other(root),
        ("GET", "/docs"): other(page),
        ("GET", "/openapi.json"): other(openapi),
        ("GET", "/livez"): darwin(livez, quiet=True),
        ("GET", "/ready"): darwin(ready, quiet=True),
        ("GET", "/healthcheck"): darwin(healthcheck, quiet=True),
        ("GET", "/health"): darwin(healthcheck, quiet=True),
        ("GET", "/ping"): mlflow(ping, quiet=True),
        ("GET", "/v2/health/live"): v2(v2_live, quiet=True),
        ("GET", "/v2/health/ready"): v2(v2_ready, quiet=True),
        ("GET", f"{model}/ready"): v2(v2_model_ready, quiet=True),
        ("GET", f"{versioned}/ready"): v2(v2_model_ready, quiet=True),
        ("GET", "/metrics"): other(metrics, quiet=True),
    }
    # The first that fits is taken, so those with fewer variable parts come first.
    routes = [
        (Route(path, endpoint.handler, methods=[verb]), endpoint)
        for (verb, path), endpoint in sorted(endpoints.items(), key=lambda item: item[0][1].count("{"))
    ]
    # Searching the routes takes as long as a prediction.
    direct: dict[tuple[str, str], tuple[Endpoint, Mapping[str, Any]]]
    direct = {key: (endpoint, {}) for key, endpoint in endpoints.items() if "{" not in key[1]}
    named = {"name": service.name}
    direct["POST", f"/v2/models/{service.name}/infer"] = endpoints["POST", f"{model}/infer"], named
    direct["POST", f"/v1/models/{service.name}:predict"] = endpoints["POST", "/v1/models/{name}:predict"], named

    def find(scope: Scope, path: str) -> tuple[Endpoint, Mapping[str, Any]]:
        allowed: list[str] = []
        # A line break at the end would be overlooked.
        for route, endpoint in routes if path.isprintable() else ():
            match, child = route.matches({**scope, "path": path, "root_path": ""})
            if match == Match.FULL:
                return endpoint, child["path_params"]
            if match == Match.PARTIAL:
                allowed += sorted(route.methods or ())
        return nowhere(path, allowed), {}

    def nowhere(path: str, allowed: list[str]) -> Endpoint:
        """What answers where there is no route, or none for the verb, in the words of its neighbours."""

        error = HTTPException(405 if allowed else 404, headers={"Allow": ", ".join(allowed)} if allowed else None)
        kinds = {"v1": v1, "v2": v2}
        return kinds.get(path[1:].partition("/")[0], other)(partial(_refuse, error))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        began = perf_counter()
        verb, path = scope["method"], scope["path"]
        if root_path and (path == root_path or path.startswith(f"{root_path}/")):
            path = path[len(root_path) :] or "/"
        endpoint, params = direct.get((verb, path)) or find(scope, path)
        scope["path_params"] = params
        headers = dict(scope["headers"])
        trace = tracer.trace(headers)
        ask = RequestContext(scope, receive, headers, trace)
        if "crowded" in scope:  # see `connections`
            ask.closing = True
            endpoint = endpoint if endpoint.quiet else endpoint._replace(handler=partial(_refuse, Overloaded(1)))
        # Before anything of the body is read, and in the words of the protocol, also where there is no route.
        if guard is not None and (error := guard.refusal(scope, headers, path)) is not None:
            endpoint = endpoint._replace(handler=partial(_refuse, error))
        if endpoint.quiet:
            reply = await _reply(endpoint, ask, meter)
            await _send(send, ask, reply, service, closing=ask.closing or not service.keep_alive)
            return
        meter.began()
        status = 500
        try:
            reply = await _reply(endpoint, ask, meter)
            status = reply.status
            await _send(send, ask, reply, service, closing=ask.closing or not service.keep_alive)
        finally:
            seconds = perf_counter() - began
            meter.ended(endpoint.protocol, status, seconds)
            shown = path if (verb, path) in direct else quote(path[:200])
            access.note(Line(time.time(), verb, shown, status, endpoint.protocol, ask.rows, seconds, trace))

    return app


async def _reply(endpoint: Endpoint, ask: RequestContext, meter: WorkerMetrics) -> Reply | StreamingReply:
    try:
        return await endpoint.handler(ask)
    except (ClientDisconnect, ClientDisconnected):
        return Reply(400, b"")  # nobody reads it
    except HTTPException as error:
        key = "error" if endpoint.protocol.startswith("kserve") else "detail"
        return Reply(error.status_code, dump({key: error.detail}), headers=tuple((error.headers or {}).items()))
    except Exception as error:
        if isinstance(error, Overloaded):
            meter.rejected()
        _log(ask, error)
        reply = endpoint.word(error)
        return reply._replace(headers=error.headers) if isinstance(error, Unauthorized) else reply


async def _refuse(error: Exception, _: RequestContext) -> Reply:
    raise error


def _log(ask: RequestContext, error: Exception) -> None:
    path, request_id = quote(ask.scope["path"][:200]), ask.trace.request_id
    if isinstance(error, DeadlineExceeded) or (isinstance(error, FeatureStoreError) and error.status != 404):
        logger.warning("%s: %s, id=%s", path, error, request_id)
    elif not isinstance(error, EXPECTED):
        logger.error("%s failed: %s, id=%s", path, error, request_id, exc_info=error)


def _head(
    media_type: str, headers: tuple[tuple[str, str], ...], trace: Trace, *, closing: bool
) -> list[tuple[bytes, bytes]]:
    """An answer's headers. If `closing`, the client is to open its next connection, to a server that stays."""
    head = [(b"content-type", media_type.encode()), (b"x-request-id", trace.request_id.encode())]
    if trace.parent:
        head.append((b"traceparent", trace.parent.encode()))
    if closing:
        head.append((b"connection", b"close"))
    head += [(name.lower().encode(), value.encode()) for name, value in headers]
    return head


async def _send(
    send: Send, ask: RequestContext, reply: Reply | StreamingReply, service: Service, *, closing: bool
) -> None:
    if isinstance(reply, StreamingReply):
        await _pour(send, ask, reply, service.most.send_seconds, closing=closing)
        return
    status, body, media_type, headers = reply
    head = _head(media_type, headers, ask.trace, closing=closing)
    head.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": head})
    if len(body) > PIECE_BYTES:
        await _send_large(send, body, service)
    else:
        await send({"type": "http.response.body", "body": body})


async def _send_large(send: Send, body: bytes, service: Service) -> None:
    """Send `body` as the client takes it: what a connection has been given, nothing bounds any more."""
    service.unsent += len(body)
    try:
        for at in range(0, len(body), PIECE_BYTES):
            piece, more = body[at : at + PIECE_BYTES], at + PIECE_BYTES < len(body)
            message = {"type": "http.response.body", "body": piece, "more_body": more}
            await asyncio.wait_for(send(message), service.most.send_seconds)
    except (TimeoutError, asyncio.TimeoutError):
        return  # uvicorn ends the connection of an answer that was not finished
    finally:
        service.unsent -= len(body)


async def _pour(send: Send, ask: RequestContext, flow: StreamingReply, seconds: float, *, closing: bool) -> None:
    """Send the pieces of `flow` as they come, until the client leaves or takes more than `seconds` to read one."""
    head = _head(flow.media_type, (), ask.trace, closing=closing)
    await send({"type": "http.response.start", "status": flow.status, "headers": head})
    left = asyncio.ensure_future(ask.receive())
    pieces = aiter(flow.pieces)
    try:
        while True:
            piece = asyncio.ensure_future(anext(pieces))
            await asyncio.wait({piece, left}, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                piece.cancel()
                await asyncio.wait({piece})
                return
            try:
                part = piece.result()
            except StopAsyncIteration:
                break
            await asyncio.wait_for(send({"type": "http.response.body", "body": part, "more_body": True}), seconds)
        await send({"type": "http.response.body", "body": b""})
    except (TimeoutError, asyncio.TimeoutError):
        return  # uvicorn ends the connection of an answer that was not finished
    finally:
        left.cancel()
        await flow.pieces.aclose()
