"""The progress of a transfer, in a log line now and then."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from darwin_runtime.logs import format_bytes

PROGRESS_SECONDS = 5.0
TERMINAL_PROGRESS_SECONDS = 0.5

logger = logging.getLogger("darwin.transfer")


class Progress:
    """Reports a transfer's progress: a log line every few seconds, or one rewriting line on a terminal."""

    def __init__(self, arrived: Callable[[], int], total: int, count: int, here: int) -> None:
        """`arrived` returns the bytes on disk, of `total` in `count` files; `here` were there before."""
        self.arrived = arrived
        self.total = total
        self.count = count
        self.here = here
        self.started = time.monotonic()
        self.stop = threading.Event()
        self.terminal = sys.stderr.isatty()
        self.thread = threading.Thread(target=self._report, name="progress", daemon=True)

    def __enter__(self) -> None:
        already = f", {format_bytes(self.here)} of it already here" if self.here else ""
        logger.info("downloading %d files, %s%s", self.count, format_bytes(self.total), already)
        self.thread.start()

    def __exit__(self, failed: object, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
        if not failed:
            seconds = max(time.monotonic() - self.started, 1e-9)
            brought = self.arrived() - self.here
            logger.info("downloaded %s in %.1f s, %.1f MB/s", format_bytes(brought), seconds, brought / seconds / 1e6)

    def _report(self) -> None:
        while not self.stop.wait(TERMINAL_PROGRESS_SECONDS if self.terminal else PROGRESS_SECONDS):
            line = format_progress(self.arrived(), self.total, self.here, time.monotonic() - self.started)
            if self.terminal:
                sys.stderr.write(f"\r\033[K{line}")
                sys.stderr.flush()
            else:
                logger.info("%s", line)


def format_progress(arrived: int, total: int, here: int, seconds: float) -> str:
    """How far a transfer is, that began with `here` of `total` bytes `seconds` ago."""
    percent = 100 * arrived / total if total else 0.0
    rate = max(0, arrived - here) / seconds
    left = f"{max(0, total - arrived) / rate:.0f} s" if rate else "unknown"
    return f"{percent:.0f}% of {format_bytes(total)}, {rate / 1e6:.1f} MB/s, ETA {left}"
