"""Bodies of requests, read within bounds: of each, and of all that arrive at the same time."""

from __future__ import annotations

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from darwin_runtime.errors import Overloaded, TooLarge
from darwin_runtime.protocols.base import Headers

# What is no longer than this counts for nothing: the connections it comes through are counted.
SMALL_BYTES = 64 * 1024

# How many of the largest may arrive at the same time.
MAX_LARGE_AT_ONCE = 2


class Bodies:
    """Reads bodies of at most `max_bytes`; `arriving` is what those that are large and not complete occupy."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.arriving = 0

    async def read(self, receive: Receive, headers: Headers) -> bytes:
        """A whole body. Raises `TooLarge`, `Overloaded`, and `ClientDisconnect` also of one who was too slow.

        After the first two the connection has to be closed.
        """
        declared = headers.get(b"content-length", b"")
        if len(declared) > 15 or int(declared or 0) > self.max_bytes:
            if b"expect" not in headers:
                await self._discard(receive, int(declared[:15]))
            raise self._too_large()
        message = await receive()
        if message["type"] == "http.request" and not message["more_body"] and len(message["body"]) <= self.max_bytes:
            only: bytes = message["body"]
            return only
        parts: list[bytes] = []
        size = held = 0
        try:
            while True:
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message["body"])
                size += len(message["body"])
                if size > SMALL_BYTES:
                    self.arriving += size - held
                    held = size
                over_limit = self.arriving > MAX_LARGE_AT_ONCE * self.max_bytes
                if size > self.max_bytes or over_limit:
                    parts.clear()
                    self.arriving -= held
                    held = 0
                    if message["more_body"]:
                        await self._discard(receive, size)
                    raise Overloaded(1) if over_limit else self._too_large()
                if not message["more_body"]:
                    return b"".join(parts)
                message = await receive()
        finally:
            self.arriving -= held

    async def _discard(self, receive: Receive, size: int) -> None:
        """Have the client send the rest, if it is not too much more: many listen for an answer only then."""
        while size <= 2 * self.max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            size += len(message["body"])
            if not message["more_body"]:
                return

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self.max_bytes} bytes (MAX_BODY_MB)")
