"""The HTTP application: finds the endpoint of each request, has it answer, and sends the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from darwin_runtime.errors import ClientDisconnected, Overloaded
from darwin_runtime.http import cors
from darwin_runtime.http.context import Answer, Endpoint, RequestContext, StreamingReply
from darwin_runtime.http.endpoints import MLFLOW, OTHER, V1, V2, Endpoints
from darwin_runtime.http.request_log import AccessLog, Line
from darwin_runtime.http.service import Service
from darwin_runtime.http.tracing import Trace, Tracer
from darwin_runtime.protocols import base as protocols
from darwin_runtime.protocols.base import Reply

# The protocols whose paths may end with a slash.
SLASHED = (MLFLOW, V1, V2)

# A larger answer is sent in pieces of this size, as its client takes them.
PIECE_BYTES = 256 * 1024


class Router:
    """Finds what answers a request. `direct` has the endpoints of paths that are known whole."""

    def __init__(self, endpoints: Endpoints, name: str) -> None:
        self._endpoints = endpoints
        by_route = endpoints.by_route()
        # The first that fits is taken, so those with fewer variable parts come first.
        self._routes = [
            (Route(path, endpoint.handler, methods=[verb]), endpoint)
            for (verb, path), endpoint in sorted(by_route.items(), key=lambda item: item[0][1].count("{"))
        ]
        # Searching the routes takes as long as a prediction.
        self.direct: dict[tuple[str, str], tuple[Endpoint, Mapping[str, Any]]]
        self.direct = {key: (endpoint, {}) for key, endpoint in by_route.items() if "{" not in key[1]}
        for path in ("/v2/models/{name}/infer", "/v1/models/{name}:predict"):
            self.direct["POST", path.replace("{name}", name)] = by_route["POST", path], {"name": name}

    def find(self, scope: Scope, path: str) -> tuple[Endpoint, Mapping[str, Any]]:
        """What answers at `path`, and the variable parts of that."""
        allowed: list[str] = []
        # MLflow's clients may end a path with a slash, and KServe's server metadata is at `/v2/`, too.
        slash = path.endswith("/") and path != "/"
        routes = [(route, e) for route, e in self._routes if e.protocol in SLASHED] if slash else self._routes
        path = path[:-1] if slash else path
        # A line break at the end would be overlooked.
        for route, endpoint in routes if path.isprintable() else ():
            match, child = route.matches({**scope, "path": path, "root_path": ""})
            if match == Match.FULL:
                return endpoint, child["path_params"]
            if match == Match.PARTIAL:
                allowed += sorted(route.methods or ())
        return self._nowhere(path, allowed), {}

    def _nowhere(self, path: str, allowed: list[str]) -> Endpoint:
        """What answers where there is no route, or none for the verb, in the words of its neighbours."""
        error = HTTPException(405 if allowed else 404, headers={"Allow": ", ".join(allowed)} if allowed else None)
        protocol = {"v1": V1, "v2": V2}.get(path[1:].partition("/")[0], OTHER)
        return self._endpoints.endpoint(protocol, partial(_refuse, error))


def make_app(service: Service, root_path: str = "", origins: Sequence[str] = ()) -> ASGIApp:
    """The HTTP application, which pages of `origins` may ask.

    It works behind a proxy that strips `root_path` and behind one that doesn't.
    """
    router = Router(Endpoints(service, root_path), service.name)
    direct, find = router.direct, router.find
    tracer, access = Tracer(), AccessLog()
    service.on_close.append(access.flush)
    health, metrics, guard = service.health, service.metrics, service.guard

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
        context = RequestContext(scope, receive, headers, trace)
        if "over_limit" in scope:  # see `connections`
            context.closing = True
            endpoint = endpoint if endpoint.quiet else endpoint._replace(handler=partial(_refuse, Overloaded(1)))
        # Before anything of the body is read, and in the words of the protocol, also where there is no route.
        if guard is not None and (error := guard.refusal(scope, headers, path)) is not None:
            endpoint = endpoint._replace(handler=partial(_refuse, error))
        if endpoint.quiet:
            reply = await _reply(endpoint, context, service)
            await _send(send, context, reply, service, closing=context.closing or not health.keep_alive)
            return
        metrics.began()
        status = 500
        try:
            reply = await _reply(endpoint, context, service)
            status = reply.status
            await _send(send, context, reply, service, closing=context.closing or not health.keep_alive)
        finally:
            seconds = perf_counter() - began
            metrics.ended(endpoint.protocol, status, seconds)
            shown = path if (verb, path) in direct else quote(path[:200])
            access.note(Line(time.time(), verb, shown, status, endpoint.protocol, context.rows, seconds, trace))

    return cors.shared(app, origins) if origins else app


async def _reply(endpoint: Endpoint, context: RequestContext, service: Service) -> Answer:
    try:
        return await endpoint.handler(context)
    except (ClientDisconnect, ClientDisconnected):
        return Reply(400, b"")  # nobody reads it
    except HTTPException as error:
        key = "error" if endpoint.protocol.startswith("kserve") else "detail"
        reply = protocols.reply(error.status_code, {key: error.detail})
        return reply._replace(headers=tuple((error.headers or {}).items()))
    except Exception as error:
        if isinstance(error, Overloaded):
            service.metrics.rejected()
        context.log(error)
        return endpoint.render_error(error)


async def _refuse(error: Exception, _: RequestContext) -> Reply:
    raise error


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


async def _send(send: Send, context: RequestContext, reply: Answer, service: Service, *, closing: bool) -> None:
    if isinstance(reply, StreamingReply):
        await _pour(send, context, reply, service, closing=closing)
        return
    status, body, media_type, headers = reply
    head = _head(media_type, headers, context.trace, closing=closing)
    head.append((b"content-length", b"%d" % len(body)))
    if context.rows:
        head += service.model_headers
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
            await asyncio.wait_for(send(message), service.request_limits.send_seconds)
    except (TimeoutError, asyncio.TimeoutError):
        return  # uvicorn ends the connection of an answer that was not finished
    finally:
        service.unsent -= len(body)


async def _pour(send: Send, context: RequestContext, reply: StreamingReply, service: Service, *, closing: bool) -> None:
    """Send the pieces of `reply` as they come, until the client leaves or takes too long to read one."""
    seconds = service.request_limits.send_seconds
    head = [*_head(reply.media_type, (), context.trace, closing=closing), *service.model_headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": head})
    left = asyncio.ensure_future(context.receive())
    pieces = aiter(reply.pieces)
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
        await reply.pieces.aclose()
