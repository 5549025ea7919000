"""A client's side of one HTTP/1.1 connection, for those who count what goes wrong: nothing is retried or hidden."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import httptools


class Answer(NamedTuple):
    """Header names are in lower case."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


class Broken(Exception):
    """There was no answer. The message says what there was instead."""


def request(verb: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a request."""
    lines = {"Host": "server", "Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{verb} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def json_request(path: str, body: Any) -> bytes:
    return request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})


class Connection(asyncio.Protocol):
    """One request at a time. `free` is called when it can take another, `lost` when it never will."""

    def __init__(
        self,
        free: Callable[[Connection], None] = lambda _: None,
        lost: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        self._free, self._lost = free, lost
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[Answer] | None = None
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._answers = 0
        self.transport: asyncio.Transport

    @classmethod
    async def open(cls, port: int, *callbacks: Callable[[Connection], None], source: str | None = None) -> Connection:
        """A connection to this machine's `port`. Raises `Broken`."""
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(
                lambda: cls(*callbacks), "127.0.0.1", port, local_addr=(source, 0) if source else None
            )
        except OSError as error:
            raise Broken(f"no connection: {error}") from error
        return made

    def ask(self, data: bytes) -> asyncio.Future[Answer]:
        """Send a whole request, or its beginning; its answer. Raises `Broken`."""
        assert self._answer is None
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self._answer

    def close(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"{error or 'closed'}, after {self._answers} answers and {len(b''.join(self._body))} bytes of body")
        self._lost(self)

    def _fail(self, why: str) -> None:
        answer, self._answer = self._answer, None
        if answer and not answer.done():
            answer.set_exception(Broken(why))

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._headers, self._body = {}, []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        found = Answer(self._parser.get_status_code(), self._headers, b"".join(self._body))
        answer, self._answer = self._answer, None
        self._answers += 1
        stays = answer is not None and self._parser.should_keep_alive()
        if answer and not answer.done():
            answer.set_result(found)
        if not stays:
            self.transport.close()
        elif not self.transport.is_closing():
            self._free(self)
