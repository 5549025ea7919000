"""What only the downloading process itself can tell, as a line of JSON. Run in this server's environment.

transfer <uri> <directory>   the transfer alone: seconds, bytes; and the process's peak memory in MiB
imported                     the peak memory of an interpreter that has imported MLflow, in MiB
hit                          a start on a warm cache, settings as download.py's: seconds, of which in requests; requests
plan <entries>               what cleanup.py does before it removes anything, on a cache of so many: seconds
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

import cleanup
import download
from darwin_runtime import mlflow_import
from darwin_runtime.settings import Reader
from darwin_runtime.storage import references, resolve, usage
from darwin_runtime.storage.attempts import Deadline, RetryPolicy
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.manifest import File, Manifest
from darwin_runtime.storage.transfer import Transfer


def peak() -> float:
    # Not getrusage(): that counts what started this process, too.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def transfer(uri: str, directory: str) -> dict[str, float]:
    mlflow_import.prepare(tables=False)
    source = resolve.resolve(uri)
    place = Path(directory)
    began = time.monotonic()
    files = Transfer(source, place / "model", place / "parts", RetryPolicy(), Deadline(3600)).run()
    seconds = time.monotonic() - began
    return {"seconds": seconds, "bytes": sum(file.size for file in files), "peak": peak()}


def imported() -> dict[str, float]:
    mlflow_import.prepare(tables=False)
    from mlflow import MlflowClient  # noqa: F401 - a client is what a downloader cannot do without
    from mlflow.store.artifact import models_artifact_repo  # noqa: F401

    return {"peak": peak()}


def hit() -> dict[str, float]:
    mlflow_import.prepare(tables=False)
    from mlflow import MlflowClient  # noqa: F401 - its import is no work of ours
    from mlflow.store.artifact import models_artifact_repo  # noqa: F401

    waited = []
    send = requests.Session.send

    def timed(*args: Any, **options: Any) -> Any:
        began = time.monotonic()
        try:
            return send(*args, **options)
        finally:
            waited.append(time.monotonic() - began)

    requests.Session.send = timed  # type: ignore[method-assign]
    began = time.monotonic()
    code = download.main(os.environ)
    seconds = time.monotonic() - began
    return {"code": code, "seconds": seconds, "waiting": sum(waited), "requests": len(waited)}


def plan(count: str) -> dict[str, float]:
    """Every tenth entry is leased by a pod of its own."""
    with tempfile.TemporaryDirectory() as directory:
        cache = Cache.prepare(Path(directory, "cache"))
        manifest = Manifest("models:/m/1", {"name": "m"}, [File(f"file-{n}", 1000, "0" * 64) for n in range(10)]).dump()
        for number in range(int(count)):
            entry = cache.root / f"{number:064x}"
            (entry / "model").mkdir(parents=True)
            (entry / "manifest.json").write_text(manifest)
            (entry / "last_used").touch()
        pods = []
        for number in range(0, int(count), 10):
            cache.lease(f"pod-{number}", "/models", f"{number:064x}")
            pods.append({"metadata": {"name": f"pod-{number}"}, "spec": {}, "status": {"phase": "Running"}})
        settings = cleanup.Settings.from_env(Reader({"CACHE_PATH": directory, "NAMESPACE": "n", "TTL_DAYS": "0"}))
        began = time.monotonic()
        leases = cache.leases()
        used = usage.in_use(pods, leases, references.all_names(cache), cache.now(), settings.pod, settings.cache)
        entries, _ = cache.entries(cache.now())
        decisions = cleanup.plan(entries, used, settings)
        lines = list(cleanup.report(decisions, []))
        seconds = time.monotonic() - began
    assert len(lines) == int(count) + 1
    assert sum(decision.remove for decision in decisions) == int(count) - len(pods)
    return {"seconds": seconds}


if __name__ == "__main__":
    asked: dict[str, Callable[..., dict[str, float]]] = {
        "transfer": transfer,
        "imported": imported,
        "hit": hit,
        "plan": plan,
    }
    sys.stdout.write(json.dumps(asked[sys.argv[1]](*sys.argv[2:])) + "\n")
