"""One log line for each request, written some at a time, because writing each by itself costs as much as its answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import orjson

from darwin_runtime.http.tracing import Trace
from darwin_runtime.logs import JsonFormatter

# How long a line may wait for others.
FLUSH_SECONDS = 0.2

# What a pipe takes in one piece; all in lines is of one byte each.
PIPE_BYTES = select.PIPE_BUF

logger = logging.getLogger("darwin.access")


class Line(NamedTuple):
    """A request that was answered at `when`, in seconds since 1970, after `seconds`."""

    when: float
    verb: str
    path: str
    status: int
    protocol: str
    rows: int
    seconds: float
    trace: Trace


class AccessLog:
    """Lines at INFO, in the form that other log lines have. All methods belong to the event loop's thread."""

    def __init__(self) -> None:
        self._enabled = logger.isEnabledFor(logging.INFO)
        self._lines: list[Line] = []
        self._timer: asyncio.TimerHandle | None = None

    def note(self, line: Line) -> None:
        if not self._enabled:
            return
        self._lines.append(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Write what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        for handler in logging.getLogger().handlers if lines else ():
            if isinstance(handler, logging.StreamHandler):
                form = handler.formatter
                written = _as_json(lines, form.service) if isinstance(form, JsonFormatter) else _as_text(lines)
                with handler.lock, contextlib.suppress(OSError):  # type: ignore[union-attr]  # every handler has one
                    for piece in _pieces(written):
                        handler.stream.write(piece)
                        handler.flush()


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """Whole lines, so few at a time that a pipe, to which other processes write, too, takes them in one."""
    piece = ""
    for line in lines:
        if len(piece) + len(line) > PIPE_BYTES:
            yield piece
            piece = ""
        piece += line
    yield piece


def _stamped(lines: Iterable[Line]) -> Iterator[tuple[str, Line]]:
    second, stamp = -1, ""
    for line in lines:
        if int(line.when) != second:
            second = int(line.when)
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        yield f"{stamp}.{int(line.when % 1 * 1000):03d}Z", line


def _as_text(lines: Iterable[Line]) -> Iterator[str]:
    for stamp, (_, verb, path, status, protocol, rows, seconds, trace) in _stamped(lines):
        parent = f" trace={trace.trace_id}" if trace.parent else ""
        yield (
            f"{stamp} INFO darwin.access: {verb} {path} {status} protocol={protocol} rows={rows} "
            f"ms={seconds * 1000:.2f} id={trace.request_id}{parent}\n"
        )


def _as_json(lines: Iterable[Line], service: str) -> Iterator[str]:
    rest = {"service": service} if service else {}
    for stamp, (_, verb, path, status, protocol, rows, seconds, trace) in _stamped(lines):
        line = {
            "timestamp": stamp,
            "level": "INFO",
            "logger": logger.name,
            "message": f"{verb} {path} {status}",
            "request_id": trace.request_id,
            "protocol": protocol,
            "status": status,
            "rows": rows,
            "duration_ms": round(seconds * 1000, 3),
            **rest,
        }
        if trace.parent:
            line["trace_id"] = trace.trace_id
        yield orjson.dumps(line).decode() + "\n"
