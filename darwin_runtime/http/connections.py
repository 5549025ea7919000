"""Connections, and what each may take of the server: bytes, time, and a place among the others.

An HTTP server that waits politely for whoever speaks slowly, or does not listen, is ended by a few of them. uvicorn
bounds neither heads nor how long they, and the answers, may take; this is its protocol with such bounds, and with
answers that take one packet where uvicorn's take two.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import socket
import struct
import sys
import termios
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from darwin_runtime.http import tls
from darwin_runtime.http.auth import CERTIFIED
from darwin_runtime.http.settings import ConnectionLimits

# What of a request's head comes besides names and values: separators, the verb, the version.
HEADER_OVERHEAD = 4

# Between chunks: sizes, line breaks, and short extensions.
CHUNK_OVERHEAD = 32

# What of a request's head is between this connection and another protocol that it offers.
HOP_BY_HOP = (b"connection", b"upgrade", b"http2-settings")

# Requests that one connection may send before the first is answered. Beyond, they are for filling the memory.
MAX_PIPELINED = 64

# What answers that nobody reads may occupy, of all connections together.
MAX_UNREAD_BYTES = 128 * 1024 * 1024

SWEEP_SECONDS = 1.0


class RequestRefused(Exception):
    """A request that is not even handed to the application; why is the message."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class ConnectionLimiter:
    """All connections of one process.

    `refused` hears the status of each answer that the application had no part in, `counted` how many connections there
    are whenever that changes.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        refused: Callable[[int], None] = lambda _: None,
        counted: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.limits = limits
        self.refused = refused
        self._counted = counted
        self.connections: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def protocol(self) -> type[asyncio.Protocol]:
        """What uvicorn makes a connection with."""
        return cast(type[asyncio.Protocol], partial(Connection, self))

    def enter(self, connection: Connection) -> None:
        self.connections.add(connection)
        count, max_count = len(self.connections), self.limits.max_connections
        self._counted(count)
        if count > max_count:
            idle = min((other for other in self.connections if other.idle), key=Connection.since, default=None)
            if idle and idle is not connection:
                idle.leave()
            elif count > 2 * max_count:
                connection.transport.abort()
            else:
                connection.over_limit = True
        if self._timer is None:
            self._watch(connection.loop)

    def leave(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._counted(len(self.connections))

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        # As exact as it has to be where bounds are short.
        shortest = min(self.limits.receive_seconds, self.limits.send_seconds)
        self._timer = loop.call_later(min(SWEEP_SECONDS, shortest / 4), self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """End connections whose other end is too slow."""
        now = loop.time()
        unread: list[Connection] = []
        for connection in tuple(self.connections):
            if connection.is_unread(now):
                unread.append(connection)
            elif not connection.transport.is_closing() and connection.is_late(now):
                connection.time_out()
        # Those that have waited longest go first.
        unread.sort(key=lambda connection: connection.unread_since)
        held = sum(connection.transport.get_write_buffer_size() for connection in unread)
        for connection in unread:
            if held > MAX_UNREAD_BYTES or now - connection.unread_since > self.limits.send_seconds:
                held -= connection.transport.get_write_buffer_size()
                connection.reset()
        self._timer = None
        if self.connections:
            self._watch(loop)


class Cycle(RequestResponseCycle):
    """uvicorn's request and answer, which goes out in one piece if it is known whole: two are two packets."""

    _start: Any = None

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and not self.response_started:
            self._start = message  # goes with what follows
            return
        start, self._start = self._start, None
        if start is not None:
            if not message.get("more_body") and self._sent_whole(start, message["body"]):
                return
            await super().send(start)
        await super().send(message)

    def _sent_whole(self, start: Mapping[str, Any], body: bytes) -> bool:
        """Send all of an answer if it is a plain one, as the application makes it, on a connection that stays open."""
        given = start["headers"]
        plain = given and given[-1] == (b"content-length", b"%d" % len(body)) and self.scope["method"] != "HEAD"
        if not plain or not self.keep_alive or self.disconnected or self.flow.write_paused:
            return False
        headers = (*self.default_headers, *given)
        lines = b"".join([b"%s: %s\r\n" % header for header in headers])
        if b"\nconnection: " in lines or not lines.count(b"\n") == lines.count(b"\r") == len(headers):
            return False
        self.transport.write(b"%s%s\r\n%s" % (STATUS_LINE[start["status"]], lines, body))
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.message_event.set()
        self.on_response()
        return True


class Connection(HttpToolsProtocol):
    """uvicorn's connection, bounded by `limiter`.

    The application finds `over_limit` in the scope of requests on connections beyond the limit.
    """

    def __init__(self, limiter: ConnectionLimiter, **given: Any) -> None:
        super().__init__(**given)
        self.limiter = limiter
        self.over_limit = False
        self.unread_since = math.inf
        # Since when a request is awaited or arriving.
        self._awaited = 0.0
        self._in_head = True
        # How much has come of a head; or, after that, of what is no body.
        self._beside = 0
        self._deaf = False

    @property
    def idle(self) -> bool:
        """Whether nothing is arriving, nor being answered, nor left to be read."""
        busy = self._beside or self.transport.is_closing() or self.transport.get_write_buffer_size()
        return not busy and (self.cycle is None or self.cycle.response_complete)

    def since(self) -> float:
        """The event loop's time since when the next request has been awaited, or the newest is arriving."""
        timer = self.timeout_keep_alive_task
        return timer.when() - self.timeout_keep_alive if timer else self._awaited

    def is_late(self, now: float) -> bool:
        """Whether a request has been arriving for too long."""
        if self.flow.read_paused:
            self._awaited = now  # it is we who do not read
        between = self._in_head and not self._beside and self.cycle is not None
        if between or (self._in_head and self.cycle is not None and not self.cycle.response_complete):
            return False  # uvicorn's to time, or the model's
        return now - self._awaited > self.limiter.limits.receive_seconds

    def is_unread(self, now: float) -> bool:
        """Whether there is something left of a whole answer that the client has not read yet."""
        answering = self.cycle is not None and not (self.cycle.response_complete or self.transport.is_closing())
        # Of an answer in pieces, each has its time, and the application takes it.
        if answering or not self.transport.get_write_buffer_size():
            self.unread_since = math.inf
            return False
        self.unread_since = min(self.unread_since, now)
        return True

    def time_out(self) -> None:
        if self._beside or not self._in_head:
            self.refuse(RequestRefused(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive."))
        else:
            self.transport.close()

    def leave(self) -> None:
        """Close without waiting for a client's last word, which over TLS many never say."""
        if self.scheme == "https" and not self._held_by_system():
            self.transport.abort()
        else:
            self.transport.close()

    def _held_by_system(self) -> int:
        """How many bytes have been sent that the client's side has not taken yet, where the system tells."""
        ours = self.transport.get_extra_info("socket")
        try:
            return int.from_bytes(fcntl.ioctl(ours.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    def shutdown(self) -> None:
        """Called by uvicorn when the server ends."""
        if self.idle:
            self.leave()
        else:
            super().shutdown()

    def reset(self) -> None:
        """End the connection at once, with what the system holds for the client, who may never take it."""
        ours = self.transport.get_extra_info("socket")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.scheme == "https":
            # Of this connection alone: uvicorn gives a copy to each of its requests.
            self.app_state = {**self.app_state, CERTIFIED: tls.peer_has_certificate(transport)}
        self._awaited = self.loop.time()
        self.limiter.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.limiter.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._deaf:
            return
        if self._in_head and not self._beside:
            self._awaited = self.loop.time()
        self._beside += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            refused = error.__context__
            if not isinstance(refused, RequestRefused):
                refused = RequestRefused(HTTPStatus.BAD_REQUEST, "This is not a valid HTTP request.")
            self.refuse(refused)
        else:
            if self._beside > self.limiter.limits.head_bytes:
                why = "There is more beside the chunks of the body than in them."
                self.refuse(self._too_large() if self._in_head else RequestRefused(HTTPStatus.BAD_REQUEST, why))

    def _decline(self, rest: bytes) -> None:
        """Take a request that offers another protocol as one that doesn't, as RFC 9110, 7.8 has it.

        The parser takes its body for something in that protocol, so that what is in there would be the next request.
        Java's own client offers HTTP/2 with the first request of each connection.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.refuse(RequestRefused(HTTPStatus.BAD_REQUEST, "This is no proxy."))
            return
        kept = [b"%s: %s\r\n" % (name, value) for name, value in self.headers if name not in HOP_BY_HOP]
        closing = b"" if self.parser.should_keep_alive() else b"connection: close\r\n"
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"%s %s HTTP/%s\r\n%s%s\r\n%s" % (method, self.url, version, b"".join(kept), closing, rest))

    def on_body(self, body: bytes) -> None:
        self._beside -= len(body)
        super().on_body(body)

    def on_chunk_header(self) -> None:
        self._beside -= CHUNK_OVERHEAD

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if self._beside > self.limiter.limits.head_bytes:
            # Much of it may have been body.
            size = len(self.url) + sum(len(name) + len(value) + HEADER_OVERHEAD for name, value in self.headers)
            if size > self.limiter.limits.head_bytes:
                raise self._too_large()
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "This server speaks HTTP/1.1.")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise RequestRefused(HTTPStatus.TOO_MANY_REQUESTS, "Too many requests before the first was answered.")
        if self.over_limit and len(self.limiter.connections) > self.limiter.limits.max_connections:
            self.scope["over_limit"] = True  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()
        self.cycle.__class__ = Cycle  # uvicorn, who made it, has no place to say so
        self._in_head = False
        self._beside = 0
        # What a proxy checked or took out of a head must not come back after the body: trailers are not for the scope.
        self.headers = []

    def on_message_complete(self) -> None:
        if self._in_head:  # one that offers another protocol: see `_decline`
            return
        self._in_head = True
        self._beside = 0
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            # It was answered before it had arrived, and its arrival has stopped uvicorn's timer.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _too_large(self) -> RequestRefused:
        why = f"The request's head is larger than {self.limiter.limits.head_bytes} bytes (MAX_HEADER_KB)."
        return RequestRefused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, why)

    def refuse(self, refused: RequestRefused) -> None:
        """Read no more, and end the connection, after what was asked before has been answered."""
        self._deaf = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and (self.pipeline or not cycle.more_body):
            cycle.keep_alive = False
            return
        if cycle is not None and not self._in_head and cycle.response_started:
            self.transport.close()  # it has its answer
            return
        self.limiter.refused(refused.status)
        body = f"{refused}\n".encode()
        usual = b"".join(b"%s: %s\r\n" % header for header in self.server_state.default_headers)
        self.transport.write(
            b"HTTP/1.1 %d %s\r\n%scontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s" % (refused.status, refused.status.phrase.encode(), usual, len(body), body)
        )
        self.transport.close()
