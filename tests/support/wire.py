"""A connection to a server, of which each byte is the test's."""

from __future__ import annotations

import contextlib
import re
import select
import socket
from typing import NamedTuple

DEADLINE = 60.0

# What an answer may have at its top, and no more.
HEADERS = {
    *("date", "content-type", "content-length", "connection", "x-request-id", "traceparent", "allow", "retry-after"),
    *("inference-header-content-length", "x-content-type-options", "cache-control", "transfer-encoding"),
}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """A connection to the server at `url`; a small `receive_buffer`, in bytes, makes a client that reads little."""

    def __init__(self, url: str, receive_buffer: int = 0) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(DEADLINE)
        self.socket.connect((host, int(port)))
        self.buffer = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.socket.sendall(part)

    def send_apart(self, *segments: bytes) -> None:
        """Send each segment once the server has read the one before: it has answered, or has nothing to answer."""
        for index, segment in enumerate(segments):
            if index:
                select.select([self.socket], [], [], 0.5)
            with contextlib.suppress(OSError):  # the server may have closed the connection
                self.socket.sendall(segment)

    def rest(self) -> bytes:
        """All that comes until the other end closes."""
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while part := self.socket.recv(65536):
                got += part
        return got

    def until(self, end: bytes) -> bytes:
        got = b""
        while end not in got:
            part = self.socket.recv(65536)
            assert part, got
            got += part
        return got

    def _more(self) -> bool:
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            data = b""
        self.buffer += data
        return bool(data)

    def answer(self) -> Answer | None:
        """The next answer; None once the server has closed the connection."""
        while b"\r\n\r\n" not in self.buffer:
            if not self._more():
                assert not self.buffer, self.buffer[:1000]
                return None
        head, _, rest = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        assert re.fullmatch(r"HTTP/1\.1 \d{3} [\w -]*", first), first
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert headers.keys() <= HEADERS, head
        length = int(headers.get("content-length", 0))
        self.buffer = rest
        while len(self.buffer) < length:
            assert self._more(), "an answer was cut short"
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return Answer(int(first.split()[1]), headers, body)

    def answers(self) -> list[int]:
        """The statuses of all answers that come until the server closes the connection."""
        found = []
        while answer := self.answer():
            found.append(answer.status)
        return found
