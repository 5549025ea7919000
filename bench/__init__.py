"""Benchmarks: this server beside its peers and its limits, on one machine, in one run. `python -m bench --help`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"
