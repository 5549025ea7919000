"""What is measured, and the bars: how this server has to compare."""

from __future__ import annotations

from bench.overload import Bars
from bench.throughput import BARE, BARE_BATCHES, Throughput

# Batching makes a lonely request wait for company, so peers do it only where there is some. BentoML adapts itself.
_ONE_BY_ONE = ("mlflow", "mlserver", "litserve", "bentoml")
_MANY_AT_ONCE = ("mlflow", "mlserver-batching", "litserve", "litserve-batching", "bentoml")

THROUGHPUT = (
    Throughput(
        "logistic-1",
        "logistic regression, 1 row, 1 connection",
        "logistic",
        connections=1,
        others=(*_ONE_BY_ONE, "echo", BARE),
        rates={"mlflow": 3},
        latency=1.3,
    ),
    Throughput(
        "logistic-32",
        "logistic regression, 1 row, 32 connections",
        "logistic",
        connections=32,
        others=("ours-quiet", *_MANY_AT_ONCE, "echo", BARE_BATCHES),
        rates={"mlflow": 18, "litserve-batching": 7, "echo": 0.45},
    ),
    Throughput(
        "forest-1",
        "forest of 100 trees, 1 row, 1 connection",
        "forest",
        connections=1,
        others=(*_ONE_BY_ONE, BARE),
        rates={BARE: 0.95},
    ),
    Throughput(
        "forest-32",
        "forest of 100 trees, 1 row, 32 connections",
        "forest",
        connections=32,
        others=(*_MANY_AT_ONCE, BARE_BATCHES),
        rates={"mlflow": 30, "litserve-batching": 4, BARE_BATCHES: 0.65},
    ),
    Throughput(
        "wide",
        "600 columns, 1 row, 1 connection",
        "wide",
        connections=1,
        others=_ONE_BY_ONE,
        rates={"mlflow": 25},
    ),
    Throughput(
        "batch-json",
        "10,000 × 10 values in one JSON body, 1 connection",
        "batch",
        connections=1,
        rows=10_000,
        others=("mlflow", "mlserver"),
        rates={"mlflow": 6},
    ),
    Throughput(
        "batch-csv",
        "10,000 × 10 values as CSV, 1 connection",
        "batch",
        connections=1,
        rows=10_000,
        content="csv",
        others=("mlflow",),
        rates={"mlflow": 2},
    ),
    Throughput(
        "lightgbm",
        "LightGBM, 100 trees, 1 row, 32 connections",
        "lightgbm",
        connections=32,
        others=("mlflow", "litserve-batching", "bentoml", BARE_BATCHES),
        rates={"mlflow": 8},
    ),
    Throughput(
        "xgboost",
        "XGBoost, 100 trees, 1 row, 32 connections",
        "xgboost",
        connections=32,
        others=("mlflow", "litserve-batching", "bentoml", BARE_BATCHES),
        rates={"mlflow": 8},
    ),
)

# Time to ready, as a multiple of loading the model in a bare interpreter.
START = "start"
START_AT_MOST = 1.15

# Memory with so many workers, as a multiple of that with one.
MEMORY = "memory"
MEMORY_WORKERS = 4
MEMORY_AT_MOST = 1.25

# The 99th percentile of the wait for a liveness probe.
LIVENESS = "liveness"
LIVENESS_AT_MOST_MS = 50

# What is left of a server's peak under ten times the load, and how it treats the rest.
OVERLOAD = "overload"
OVERLOAD_BARS = Bars(share=0.85, refusal_ms=50, growth_mib=64, recovery_seconds=1)

# Requests that fail while one server replaces another, or when a worker dies.
SHUTDOWN = "shutdown"

NAMES = (*(case.name for case in THROUGHPUT), START, MEMORY, LIVENESS)

# Those have a part of their own in the results.
TROUBLES = (OVERLOAD, SHUTDOWN)
