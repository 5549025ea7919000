"""Answers that come piece by piece: computed on threads beside the event loop, sent as server-sent events.

A client that reads slowly holds its model up instead of filling the memory; one that leaves ends it at the next piece.
Source of the form: https://html.spec.whatwg.org/multipage/server-sent-events.html, ended by `[DONE]` as MLflow's agent
server and OpenAI's API do.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from darwin_runtime.errors import DeadlineExceeded, Overloaded

# Without a charset, Python's `requests` takes ISO-8859-1.
MEDIA_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"

# Each has a thread of its own.
MAX_STREAMS = 32
# Pieces that may wait to be sent.
AHEAD = 16

_END = object()


def event(data: bytes, name: str = "") -> bytes:
    """One event; `data` is in one line."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


class Streams:
    """All answers of this kind. Its methods belong to the event loop's thread.

    `on_hang` is called when a model is still silent twice as long as a piece may take.
    """

    def __init__(self, on_hang: Callable[[], None] = lambda: None) -> None:
        self.on_hang = on_hang
        self._under_way = 0

    async def pieces(self, start: Callable[[], Iterator[Any]], timeout: float) -> AsyncGenerator[Any, None]:
        """What `start` yields; it runs, and is closed, on a thread.

        Raises what that raises, `Overloaded` and `DeadlineExceeded`. `timeout` is for each piece, in seconds.
        """
        if self._under_way >= MAX_STREAMS:
            raise Overloaded(1)
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[Any] = asyncio.Queue()
        room = threading.Semaphore(AHEAD)
        left = threading.Event()

        def tell(piece: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended without waiting for us
                loop.call_soon_threadsafe(made.put_nowait, piece)

        def run() -> None:
            try:
                with contextlib.closing(start()) as pieces:  # type: ignore[type-var]  # it is a generator
                    for piece in pieces:
                        tell(piece)
                        room.acquire()
                        if left.is_set():
                            break
                tell(_END)
            except BaseException as error:  # whatever it is, the one waiting must hear of it
                tell(error)
            finally:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._ended)

        self._under_way += 1
        thread = threading.Thread(target=run, name="stream", daemon=True)
        thread.start()
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(made.get(), timeout)
                except (TimeoutError, asyncio.TimeoutError):
                    loop.call_later(timeout, lambda: thread.is_alive() and self.on_hang())
                    raise DeadlineExceeded(f"no piece of the answer within {timeout:g} seconds") from None
                if piece is _END:
                    return
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                room.release()
        finally:
            left.set()
            room.release()

    def _ended(self) -> None:
        self._under_way -= 1
