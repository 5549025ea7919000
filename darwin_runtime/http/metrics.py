"""What operators see at /metrics, added up over all worker processes.

The figures of each process lie in a row of its own of one block of shared memory, so that counting costs nothing but an
addition, whoever is asked can tell for all, and the counts of a worker that died stay. What is exposed, and in which
format, is prometheus-client's business. Names: https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

PROTOCOLS = ("darwin", "mlflow", "kserve_v1", "kserve_v2", "other")
STATUSES = (200, 400, 404, 405, 406, 408, 413, 415, 422, 431, 500, 502, 503, 504)
STAGES = ("queue", "inference", "encode")

# Seconds, and rows.
TIMES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)

PAGE = 4096
_FLOAT = 8

Row: TypeAlias = "memoryview[float]"


class _Histogram:
    """Counts by bucket and the sum of what was observed, from `at` on in a row."""

    def __init__(self, at: int, bounds: Sequence[float]) -> None:
        self.at = at
        self.bounds = bounds
        self.end = at + len(bounds) + 2

    def observe(self, row: Row, value: float) -> None:
        row[self.at + bisect_left(self.bounds, value)] += 1
        row[self.end - 1] += value

    def read(self, totals: Sequence[float]) -> tuple[list[tuple[str, float]], float]:
        counts = itertools.accumulate(totals[self.at : self.end - 1])
        names = [*(f"{bound:g}" if isinstance(bound, int) else str(bound) for bound in self.bounds), "+Inf"]
        return list(zip(names, counts, strict=True)), totals[self.end - 1]


# The layout of a row.
_PID, _STARTS, _IN_PROGRESS, _QUEUED, _CONNECTIONS, _REJECTED, _REQUESTS = range(7)
_STATUS = {status: index for index, status in enumerate(STATUSES)}
_OTHER = len(STATUSES)
_PROTOCOL = {name: _REQUESTS + index * (len(STATUSES) + 1) for index, name in enumerate(PROTOCOLS)}
_AFTER_REQUESTS = _REQUESTS + len(PROTOCOLS) * (len(STATUSES) + 1)
_BATCH = _Histogram(_AFTER_REQUESTS, SIZES)
_STAGE: dict[str, _Histogram] = {}
_TOTAL: dict[str, _Histogram] = {}
_end = _BATCH.end
for _name in STAGES:
    _STAGE[_name] = _Histogram(_end, TIMES)
    _end = _STAGE[_name].end
for _name in PROTOCOLS:
    _TOTAL[_name] = _Histogram(_end, TIMES)
    _end = _TOTAL[_name].end
ROW = _end


class SharedMetrics:
    """The memory of all processes, of `rows` rows. `file` is its file descriptor, for processes that are not forked."""

    def __init__(self, rows: int, file: int | None = None) -> None:
        size = rows * ROW * _FLOAT
        self.file = os.memfd_create("darwin-metrics") if file is None else file
        if file is None:
            os.truncate(self.file, size)
        self.rows = rows
        self._all = memoryview(mmap.mmap(self.file, size)).cast("d")

    def row(self, number: int) -> Row:
        return self._all[number * ROW : (number + 1) * ROW]

    def totals(self) -> list[float]:
        """The rows added up."""
        return [sum(column) for column in zip(*(self.row(number).tolist() for number in range(self.rows)), strict=True)]

    def processes(self) -> dict[str, int]:
        """The process id of each worker that is there, by its number."""
        found = {str(number): int(self.row(number)[_PID]) for number in range(self.rows)}
        return {number: pid for number, pid in found.items() if pid and Path("/proc", str(pid)).exists()}


class WorkerMetrics:
    """What one process counts: it is number `number` on `shared`. All methods belong to the event loop's thread."""

    def __init__(self, shared: SharedMetrics, number: int) -> None:
        self.shared = shared
        self._row = shared.row(number)
        self._row[_PID] = os.getpid()
        self._row[_STARTS] += 1
        # Whoever was here before took with it what it was doing.
        self._row[_IN_PROGRESS] = self._row[_QUEUED] = self._row[_CONNECTIONS] = 0
        # Without the first, which is the placeholder server's.
        self._others = [shared.row(other) for other in range(1, shared.rows) if other != number]

    def began(self) -> None:
        self._row[_IN_PROGRESS] += 1

    def ended(self, protocol: str, status: int, seconds: float) -> None:
        self._row[_IN_PROGRESS] -= 1
        self._row[_PROTOCOL[protocol] + _STATUS.get(status, _OTHER)] += 1
        _TOTAL[protocol].observe(self._row, seconds)

    def refused(self, status: int) -> None:
        """A request was so bad that no protocol saw it."""
        self._row[_PROTOCOL["other"] + _STATUS.get(status, _OTHER)] += 1

    def stages(self, queue: float, inference: float, encode: float) -> None:
        _STAGE["queue"].observe(self._row, queue)
        _STAGE["inference"].observe(self._row, inference)
        _STAGE["encode"].observe(self._row, encode)

    def batch(self, rows: int) -> None:
        if rows:
            _BATCH.observe(self._row, rows)

    def queued(self, rows: int) -> None:
        self._row[_QUEUED] = rows

    def connected(self, connections: int) -> None:
        self._row[_CONNECTIONS] = connections

    def has_more_connections(self) -> bool:
        """Whether another process has fewer connections than this one."""
        own = self._row[_CONNECTIONS]
        return any(row[_CONNECTIONS] < own for row in self._others if row[_PID])

    def rejected(self) -> None:
        self._row[_REJECTED] += 1


class _Figures(Collector):
    def __init__(self, shared: SharedMetrics, model: Mapping[str, str], load_seconds: float | None) -> None:
        self._shared = shared
        self._model = model
        self._load_seconds = load_seconds

    def collect(self) -> Iterator[Metric]:
        totals = self._shared.totals()
        requests = CounterMetricFamily("darwin_requests", "Requests answered.", labels=["protocol", "status"])
        for protocol, at in _PROTOCOL.items():
            for status, index in (*_STATUS.items(), ("other", _OTHER)):
                if count := totals[at + index]:
                    requests.add_metric([protocol, str(status)], count)
        yield requests
        rejected = CounterMetricFamily("darwin_requests_rejected", "Requests turned away because too many waited.")
        rejected.add_metric([], totals[_REJECTED])
        yield rejected
        yield GaugeMetricFamily("darwin_requests_in_progress", "Requests being answered.", totals[_IN_PROGRESS])
        yield GaugeMetricFamily("darwin_queued_rows", "Rows that wait for the model.", totals[_QUEUED])
        yield GaugeMetricFamily("darwin_connections", "Open connections.", totals[_CONNECTIONS])
        whole = "From a request's head to its answer's end."
        duration = HistogramMetricFamily("darwin_request_duration_seconds", whole, labels=["protocol"])
        for protocol, histogram in _TOTAL.items():
            duration.add_metric([protocol], *histogram.read(totals))
        yield duration
        part = "Of predictions: waiting for the model, computing (of the whole batch), and writing the answer."
        stages = HistogramMetricFamily("darwin_request_stage_duration_seconds", part, labels=["stage"])
        for stage, histogram in _STAGE.items():
            stages.add_metric([stage], *histogram.read(totals))
        yield stages
        batches = HistogramMetricFamily("darwin_batch_rows", "Rows that went to the model together.")
        batches.add_metric([], *_BATCH.read(totals))
        yield batches
        processes = self._shared.processes()
        yield GaugeMetricFamily("darwin_workers", "Processes that serve.", len(processes))
        starts = CounterMetricFamily("darwin_worker_starts", "Processes that began to serve, replacements included.")
        starts.add_metric([], totals[_STARTS])
        yield starts
        memory = "Memory in use, of pages that several share each its part."
        used = GaugeMetricFamily("darwin_worker_memory_bytes", memory, labels=["worker"])
        for number, pid in processes.items():
            if (size := _memory(pid)) is not None:
                used.add_metric([number], size)
        yield used
        info = GaugeMetricFamily("darwin_model_info", "The model that is served; always 1.", labels=list(self._model))
        info.add_metric(list(self._model.values()), 1)
        yield info
        if self._load_seconds is not None:
            help_text = "From the start of loading until the model was ready."
            yield GaugeMetricFamily("darwin_model_load_seconds", help_text, self._load_seconds)


def _memory(pid: int) -> int | None:
    """Proportional set size in bytes, or resident where the system tells no more; None if the process has ended."""
    process = Path("/proc", str(pid))
    try:
        for line in (process / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int((process / "statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return None


def exposition(
    shared: SharedMetrics, model: Mapping[str, str], load_seconds: float | None, accept: str
) -> tuple[bytes, str]:
    """The figures in the format that a scraper accepts, and its media type."""
    registry = CollectorRegistry()
    registry.register(_Figures(shared, model, load_seconds))
    for wanted in (accept, ""):
        with contextlib.suppress(ValueError, TypeError):  # for a version that is none
            encode, media_type = choose_encoder(wanted)
            return encode(registry), media_type
    raise AssertionError("unreachable: what everybody gets can be encoded")
