"""A request on its way through the server, and the forms of its answer."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NamedTuple, TypeAlias
from urllib.parse import quote

from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope

from darwin_runtime.errors import DeadlineExceeded, FeatureStoreError, RequestError
from darwin_runtime.http.streaming import MEDIA_TYPE
from darwin_runtime.http.tracing import Trace
from darwin_runtime.protocols.base import Headers, Reply

logger = logging.getLogger("darwin.serve")


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

    def log(self, error: Exception) -> None:
        """Log `error`, unless it is the client's or the model's doing and the answer says all of it."""
        path, request_id = quote(self.scope["path"][:200]), self.trace.request_id
        if isinstance(error, DeadlineExceeded) or (isinstance(error, FeatureStoreError) and error.status != 404):
            logger.warning("%s: %s, id=%s", path, error, request_id)
        elif not isinstance(error, RequestError) or error.status == 500:
            logger.error("%s failed: %s, id=%s", path, error, request_id, exc_info=error)


class StreamingReply(NamedTuple):
    """An answer in pieces."""

    pieces: AsyncGenerator[bytes, None]
    media_type: str = MEDIA_TYPE
    status: int = 200


Answer: TypeAlias = "Reply | StreamingReply"
Handler = Callable[[RequestContext], Awaitable[Answer]]


class Endpoint(NamedTuple):
    """One route's `handler`, with the protocol whose form every error takes in `render_error`.

    Requests to a `quiet` one, which machines ask all day, are neither logged nor counted.
    """

    handler: Handler
    protocol: str
    render_error: Callable[[Exception], Reply]
    quiet: bool = False
