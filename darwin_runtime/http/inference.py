"""The way of a prediction through the server, from the body of the request to the reply."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from typing import Any

from darwin_runtime.errors import EncodingError, Overloaded, TooLarge
from darwin_runtime.http import streaming
from darwin_runtime.http.bodies import Bodies
from darwin_runtime.http.context import Answer, RequestContext, StreamingReply
from darwin_runtime.http.service import Service
from darwin_runtime.protocols import base as protocols
from darwin_runtime.protocols import mlflow_scoring
from darwin_runtime.protocols.base import Reply, Request, WireProtocol
from darwin_runtime.protocols.encoding import dump
from darwin_runtime.protocols.feature_store import FeatureStore

# A larger body is not parsed on the event loop, which must go on answering probes.
PARSE_ASIDE_BYTES = 64 * 1024

# While large answers occupy so much, no others are begun.
MAX_UNSENT_BYTES = 256 * 1024 * 1024

# How many bodies are decompressed at the same time. Each takes a thread, and perhaps a hundred times the memory of the
# bytes that arrived.
MAX_INFLATING = 2


class Inference:
    """Answers predictions with the model of `service`. Its methods belong to the event loop's thread."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.health = service.health
        self.metrics = service.metrics
        self.limits = service.request_limits
        self.timeout = service.batch_limits.timeout
        self.bodies = Bodies(self.limits.body_bytes)
        self.streams = streaming.Streams(lambda: service.on_hang())
        self.inflating = asyncio.Semaphore(MAX_INFLATING)

    async def answer(
        self, context: RequestContext, protocol: WireProtocol, store: FeatureStore | None = None
    ) -> Answer:
        """The model's answer to what `protocol` reads in the body, which may name features that are in `store`."""
        model, contract, batcher, _, _ = self.health.loaded
        try:
            body = await self.bodies.read(context.receive, context.headers)
        except (TooLarge, Overloaded):
            context.closing = True  # there may be more of it
            raise
        if self.service.unsent > MAX_UNSENT_BYTES:
            raise Overloaded(1)
        if not contract.streams:
            # At ten times the load, parsing what is then refused would take a tenth of the core from who is let in.
            batcher.check(1, len(body))
        encoding = context.headers.get(b"content-encoding")
        if encoding is not None:
            async with self.inflating:
                body = await asyncio.to_thread(protocols.decoded, body, encoding, self.limits.body_bytes)

        def read(**more: Any) -> Request:
            request = protocols.read_request(protocol, body, context.headers, contract, **more)
            if request.rows.count > self.limits.rows:
                raise TooLarge(f"{request.rows.count} rows are more than {self.limits.rows} (MAX_ROWS)")
            return request

        # The event loop reads a small body. Another thread reads a large one, or one that waits for features. That is
        # the inference thread in its turn, so that the work that waits is bounded. A stream does not go through the
        # batcher, so a body that may ask for one is read before.
        large = len(body) > PARSE_ASIDE_BYTES or protocols.inflates(context.headers)
        request: Request | Callable[[], Request]
        if store is not None and b"feature_group" in body:
            lookup = partial(store.features, trace=context.trace.headers)
            request = await store.run(partial(read, lookup=lookup), self.timeout)
        elif not large:
            request = read()
        elif contract.streams:
            request = await asyncio.to_thread(read)
        else:
            request = read
        if isinstance(request, Request) and request.stream:
            return await self.stream(context, partial(model.stream, request.rows, request.params))
        answered = await batcher.predict(request, protocol.write, len(body), context.gone)
        context.rows = answered.rows
        self.metrics.stages(answered.queued, answered.computed, answered.written)
        reply: Reply = answered.reply
        return reply

    async def stream(self, context: RequestContext, start: Callable[[], Iterator[Any]]) -> StreamingReply:
        """The answer, piece by piece as `start` yields them. Raises what keeps the first from being made."""
        pieces = self.streams.pieces(start, self.timeout)
        nothing = object()
        first = await anext(pieces, nothing)
        try:
            # Before the status is sent, for the piece may have no form.
            begin = b"" if first is nothing else streaming.event(dump(first))
        except EncodingError:
            await pieces.aclose()
            raise
        context.rows = 1

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                if begin:
                    yield begin
                async for piece in pieces:
                    yield streaming.event(dump(piece))
                yield streaming.DONE
            except Exception as error:  # the status has been sent; this is how the rest can be told
                context.log(error)
                yield streaming.event(mlflow_scoring.render_error(error).body, "error")
            finally:
                await pieces.aclose()

        return StreamingReply(events())
