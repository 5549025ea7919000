"""The HTTP application: the model behind the routes of every protocol."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import darwin_model
import darwin_protocols as protocols
from darwin_batching import Batcher, Gone, InferenceThread, Limits, Overloaded, TooSlow
from darwin_cells import InputError
from darwin_model import Model, Refused
from darwin_plan import ParamPlan, Plan
from darwin_protocols import Malformed, NotReady, Reply, Unsupported
from darwin_startup import example_rows

# A larger body is not parsed on the event loop, which must go on answering probes.
PARSE_ASIDE_BYTES = 64 * 1024

logger = logging.getLogger("darwin.serve")


class Service:
    """The model behind the routes: absent until it has loaded and answered its own input example."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.inference = InferenceThread()
        self.draining = False
        self.schema = Reply(503, b"")
        self._model: Model | None = None
        self._batcher: Batcher | None = None

    def use(self, model: Model, *, batching: bool = False, on_hang: Callable[[], None] = lambda: None) -> None:
        """From now on, answer with `model`; `on_hang` is the `Batcher`'s."""
        # Once, for the input example can be large.
        self.schema = protocols.schema(model.plan, model.outputs, example_rows(model))
        self._batcher = Batcher(model.predict, self.inference, self.limits, batching=batching, on_hang=on_hang)
        self._model = model

    @property
    def keep_alive(self) -> bool:
        """Whether connections may stay open: not when another server is about to take over."""
        return self.loaded and not self.draining

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> Model:
        """Raises `NotReady` until there is one."""
        if self._model is None:
            raise NotReady("the model is still loading")
        return self._model

    @property
    def batcher(self) -> Batcher:
        """Raises `NotReady` until there is a model."""
        if self._batcher is None:
            raise NotReady("the model is still loading")
        return self._batcher

    def check_loaded(self) -> None:
        """Raise `NotReady` until there is a model."""
        _ = self.batcher

    def check_ready(self) -> None:
        """Raise `NotReady` unless a request that comes now would be answered."""
        if self.draining:
            raise NotReady("the server is shutting down")
        if stuck := self.batcher.stuck:
            raise NotReady(f"the model has been computing one answer for {stuck:.0f} s, longer than a request may take")


# Routes

# What went wrong was the client's or the model's doing, and has been told to the client.
EXPECTED = (InputError, Malformed, Unsupported, Refused, NotReady, Overloaded)

Handler = Callable[[HttpRequest], Awaitable[Response]]
Read = Callable[[bytes, str | None, Plan, ParamPlan], protocols.Request]


def make_app(service: Service, root_path: str = "") -> ASGIApp:
    """The HTTP application. It works behind a proxy that strips `root_path` and behind one that doesn't."""

    async def predict(request: HttpRequest) -> Response:
        return await answer(request, protocols.read_predict, protocols.write_scores)

    async def invocations(request: HttpRequest) -> Response:
        return await answer(request, protocols.read_invocations, protocols.write_predictions)

    async def answer(request: HttpRequest, read: Read, write: Callable[[Any], bytes]) -> Response:
        body, model = await request.body(), service.model
        parse = partial(read, body, request.headers.get("content-type"), model.plan, model.params)
        size, gone = len(body), request.is_disconnected
        if size > PARSE_ASIDE_BYTES:
            done = await service.batcher.parse_and_predict(parse, write, size, gone)
        else:
            done = await service.batcher.predict(*parse(), write, size, gone)
        return Response(done, media_type=protocols.JSON)

    async def schema(_: HttpRequest) -> Response:
        service.check_loaded()
        return _response(service.schema)

    async def livez(_: HttpRequest) -> Response:
        return _json({"status": "alive"})

    async def ready(_: HttpRequest) -> Response:
        service.check_ready()
        return _json({"status": "ready", "model_loaded": True})

    async def healthcheck(_: HttpRequest) -> Response:
        service.check_loaded()
        return _json({"status": "SUCCESS", "message": "OK"})

    async def ping(_: HttpRequest) -> Response:
        service.check_loaded()
        return Response("\n", media_type=protocols.JSON)

    async def version(_: HttpRequest) -> Response:
        return Response(darwin_model.mlflow_version(), media_type=protocols.TEXT)

    def darwin_failure(error: Exception) -> Reply:
        inputs = () if isinstance(error, NotReady) else service.model.plan.inputs
        return protocols.darwin_failure(error, inputs)

    routes: list[tuple[str, str, Handler, Callable[[Exception], Reply]]] = [
        ("POST", "/predict", predict, darwin_failure),
        ("POST", "/invocations", invocations, protocols.mlflow_failure),
        ("GET", "/schema", schema, darwin_failure),
        ("GET", "/livez", livez, darwin_failure),
        ("GET", "/ready", ready, darwin_failure),
        ("GET", "/healthcheck", healthcheck, darwin_failure),
        ("GET", "/health", healthcheck, darwin_failure),
        ("GET", "/ping", ping, protocols.mlflow_failure),
        ("GET", "/version", version, protocols.mlflow_failure),
    ]
    endpoints = {(verb, path): Speaking(handler, word) for verb, path, handler, word in routes}
    app = Starlette(
        routes=[Route(path, endpoint, methods=[verb]) for (verb, path), endpoint in endpoints.items()],
        exception_handlers={HTTPException: _http_error},
    )
    # Where that leads depends on what proxies do.
    app.router.redirect_slashes = False

    async def rooted(scope: Scope, receive: Receive, send: Send) -> None:
        if not service.keep_alive:
            send = _closing(send)
        # Searching the routes, and layers for what our endpoints never raise, take Starlette as long as a prediction.
        direct = endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if direct:
            await direct(scope, receive, send)
        else:
            await app({**scope, "root_path": root_path} if root_path else scope, receive, send)

    return rooted


def _closing(send: Send) -> Send:
    """`send`, ending the connection, so that the client opens its next one to a server that stays."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return closing


@dataclass(frozen=True)
class Speaking:
    """The ASGI application of one route: `handler`, with every exception put in its protocol's words by `word`."""

    handler: Handler
    word: Callable[[Exception], Reply]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HttpRequest(scope, receive)
        try:
            response = await self.handler(request)
        except (ClientDisconnect, Gone):
            response = Response(status_code=400)  # nobody reads it
        except Exception as error:
            if isinstance(error, TooSlow):
                logger.warning("%s: %s", request.url.path, error)
            elif not isinstance(error, EXPECTED):
                logger.error("%s failed: %s", request.url.path, error, exc_info=error)
            response = _response(self.word(error))
        await response(scope, receive, send)


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = protocols.dump({"detail": error.detail})
    return Response(body, error.status_code, error.headers, protocols.JSON)


def _json(body: Mapping[str, Any]) -> Response:
    return Response(protocols.dump(body), media_type=protocols.JSON)


def _response(reply: Reply) -> Response:
    headers = {"Retry-After": str(reply.retry_after)} if reply.retry_after else None
    return Response(reply.body, reply.status, headers, reply.media_type)
