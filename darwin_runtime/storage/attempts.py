"""Attempts at something that may fail or hang: retries with backoff, deadlines and timeouts."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

from darwin_runtime.errors import DamagedDownload, RoleError, StoreUnreachable

T = TypeVar("T")

MAX_BACKOFF_SECONDS = 60.0

# How often a log line says that an answer is waited for.
WAITING_SECONDS = 10.0

logger = logging.getLogger("darwin.fetch")


@dataclass(frozen=True)
class RetryPolicy:
    """How often to try again after a failure worth retrying, and how long to wait before the first time, in seconds."""

    retries: int = 3
    backoff_seconds: float = 5.0

    def delays(self) -> Iterator[float]:
        """Seconds to wait before each further attempt: doubling, at most 60, less up to a half at random."""
        for attempt in range(self.retries):
            yield min(MAX_BACKOFF_SECONDS, self.backoff_seconds * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.0)  # noqa: S311


def retry(action: Callable[[], T], policy: RetryPolicy, wait: Callable[[float], object] = time.sleep) -> T:
    """Run `action`, and again after each failure worth retrying; raises the last one's error."""
    delays = policy.delays()
    while True:
        try:
            return action()
        except (StoreUnreachable, DamagedDownload) as error:
            delay = next(delays, None)
            if delay is None:
                raise
            logger.warning("%s; trying again in %.1f s", error, delay)
            wait(delay)


class Deadline:
    """When all has to be over: `seconds` after this was made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(
        self, what: str, kept: str = "what has arrived is kept for the next attempt, which goes on from there"
    ) -> None:
        """Raise `RoleError`, with what is `kept`, once it has passed."""
        if self.left() < 0:
            raise RoleError(f"{what}: not done within DOWNLOAD_TIMEOUT_SECONDS={self.seconds:g}; {kept}")

    def left(self) -> float:
        """Seconds; below zero once it has passed."""
        return self._end - time.monotonic()


def run_with_timeout(seconds: float, action: Callable[[], T], what: str) -> T:
    """Run an `action` that knows no time limit, and leave it alone once it has taken so long.

    Raises what it raises, and `StoreUnreachable` when it has not ended in time. A log line says now and then that it is
    waited for; `what` completes it.
    """
    ended: Future[T] = Future()
    began = time.monotonic()
    if seconds > 0:
        threading.Thread(target=settle, args=(ended, action), name="timeout", daemon=True).start()
    while not wait([ended], max(0.0, min(WAITING_SECONDS, began + seconds - time.monotonic()))).done:
        waited = time.monotonic() - began
        if waited >= seconds:
            raise StoreUnreachable(f"cannot {what} within {seconds:.0f} s: no answer in time")
        logger.info("waiting to %s: %.0f s of %.0f", what, waited, seconds)
    return ended.result()


def settle(future: Future[T], action: Callable[[], T]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:  # to be raised by who waits
        future.set_exception(error)
