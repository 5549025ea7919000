"""Accepting connections where several processes share a port, so that each serves its part of them.

The system wakes all who listen, and whoever is first may take all that wait: of clients that keep their connections, as
gateways do, one process could then serve all, and the others none. So who has more than another leaves it a moment to
take the next.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

# How long another process with fewer connections has to take one that waits: it may be busy, or gone.
PRECEDENCE_SECONDS = 0.001

# What is left to others is offered again at once while it waits; after so long it was another that is offered now.
ANOTHER_SECONDS = 0.05

# How long to wait when the system has no files or memory for one more.
RETRY_SECONDS = 0.1


class Acceptor:
    """Takes connections from `listener` one by one, and has `join` serve each, until it is closed.

    `ahead` says whether another process should have the next.
    """

    def __init__(
        self,
        listener: socket.socket,
        join: Callable[[socket.socket], Coroutine[Any, Any, object]],
        ahead: Callable[[], bool],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._join = join
        self._ahead = ahead
        self._joining: set[asyncio.Task[object]] = set()
        self._left_since = self._left_at = 0.0
        self._retry: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accept no more; those that are being joined are not affected."""
        if self._retry:
            self._retry.cancel()
        self._loop.remove_reader(self._listener)

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._wanted)

    def _wanted(self) -> None:
        """Called again and again while a connection waits."""
        if not (self._ahead() and self._leave()):
            self._take()

    def _leave(self) -> bool:
        """Whether others may still take what waits."""
        # No timer: it would be too coarse, and who has less to do meanwhile would not notice.
        now = time.monotonic()
        if now - self._left_at > ANOTHER_SECONDS:
            self._left_since = now
        self._left_at = now
        os.sched_yield()  # to them, where they share this CPU
        return now - self._left_since < PRECEDENCE_SECONDS

    def _take(self) -> None:
        self._left_at = 0.0
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another has it, or it is gone
        except OSError:
            self._loop.remove_reader(self._listener)
            self._retry = self._loop.call_later(RETRY_SECONDS, self._listen)
            return
        joining = self._loop.create_task(self._join(client))
        self._joining.add(joining)
        joining.add_done_callback(self._joined)

    def _joined(self, task: asyncio.Task[object]) -> None:
        self._joining.discard(task)
        if not task.cancelled():
            task.exception()  # a client that did not get through the handshake is not worth a word
