"""Models that are put into a cache, by the cache's own functions or by the init container."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from darwin_runtime.storage import locks
from darwin_runtime.storage.cache import Cache, model_of
from darwin_runtime.storage.manifest import File, Manifest
from tests.conftest import Finished, run_role


def publish(
    cache: Cache,
    key: str,
    content: bytes = b"weights",
    *,
    uri: str = "models:/m/1",
    verify: str = "size",
    last_used: float | None = None,
) -> bool:
    """Publish a model of one file; returns whether this one came first. `last_used` is in seconds since the epoch."""
    staging = locks.stage(cache, key)
    (model_of(staging) / "MLmodel").write_bytes(content)
    file = File("MLmodel", len(content), hashlib.sha256(content).hexdigest())
    first = locks.publish(cache, staging, key, Manifest(uri, {"version": "1"}, [file]), verify)
    if last_used is not None:
        os.utime(cache.root / key / "last_used", (last_used, last_used))
    return first


def download(home: Path, **settings: object) -> Finished:
    """Run the init container, with its output and its cache below `home`."""
    paths = {"OUTPUT_PATH": home / "models", "CACHE_PATH": home / "cache"}
    return run_role("download.py", **{**paths, **settings})
