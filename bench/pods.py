"""Many pods of one ReplicaSet that start at once: what they ask MLflow for, and what they cost together."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import ROOT, envs, processes
from bench.outcome import Outcome, Row
from bench.processes import Failed

PODS = 100
REQUESTS = 20
CPU_TIMES = 105

TITLE = f"{PODS} pods of one ReplicaSet that start at once"

_ALONE = 5
# A line of the server's access log.
_REQUEST = b' HTTP/1.1" '


@dataclass(frozen=True)
class Cost:
    requests: int
    cpu_seconds: float


def run(uri: str, model_uri: str, place: Path) -> Outcome:
    """`model_uri` is an alias of a model that the server at `uri` has; nothing else may ask that server meanwhile."""

    def start(rollout: str, names: Sequence[str]) -> Cost:
        return _start(uri, model_uri, place, rollout, names)

    several = [f"pod-{number}" for number in range(PODS)]
    cold = start("cold", several)
    alone = [start(f"alone{number}", ["pod"]) for number in range(_ALONE)]
    warm = start("warm", several)
    added = start("warm", ["added"])
    shutil.rmtree(place / "cache")
    one = statistics.median(cost.cpu_seconds for cost in alone)
    times = warm.cpu_seconds / one
    return Outcome(
        TITLE,
        [
            _asked("cold cache", cold, REQUESTS),
            _asked("a new rollout on a warm cache", warm, REQUESTS),
            _asked("a pod added to a rollout", added, 0),
            Row(
                f"a new rollout on a warm cache, CPU; one such start alone takes {one:.2f} s",
                *(f"{warm.cpu_seconds:.1f} s", "", times, f"≤ {CPU_TIMES} ×", times <= CPU_TIMES),
            ),
        ],
    )


def _asked(title: str, cost: Cost, most: int) -> Row:
    figure = f"{cost.requests} requests, {cost.cpu_seconds:.1f} s of CPU"
    return Row(title, figure, "", None, f"≤ {most} requests", cost.requests <= most)


def _start(uri: str, model_uri: str, place: Path, rollout: str, names: Sequence[str]) -> Cost:
    """Start `download.py` for all pods, and wait until each has its model. Raises `Failed`."""
    sys.stderr.write(f"{len(names)} pods of the rollout {rollout}\n")
    python, before = envs.python(envs.OURS), _asked_for()
    (place / "pods").mkdir()
    running = []
    for name in names:
        environ = {
            "MLFLOW_TRACKING_URI": uri,
            "MODEL_URI": model_uri,
            "STORAGE_STRATEGY": "pvc",
            "CACHE_PATH": str(place / "cache"),
            "OUTPUT_PATH": str(place / "pods" / name),
            "POD_NAME": f"model-{rollout}-{name.replace('-', '')}",
            "POD_TEMPLATE_HASH": rollout,
        }
        with (place / "pods" / f"{name}.log").open("wb") as log:
            command = [python, ROOT / "download.py"]
            running.append(subprocess.Popen(command, env=processes.environ(python, environ), stdout=log, stderr=log))
    # Of each process on its own, with what it started.
    ended = [os.wait4(process.pid, 0) for process in running]
    for name, (_, status, _) in zip(names, ended, strict=True):
        if status or not (place / "pods" / name / "MLmodel").exists():
            text = (place / "pods" / f"{name}.log").read_text(errors="replace").splitlines()
            raise Failed(f"{name} ended with {os.waitstatus_to_exitcode(status)}: {text[-1] if text else 'no word'}")
    shutil.rmtree(place / "pods")
    return Cost(_asked_for() - before, sum(usage.ru_utime + usage.ru_stime for _, _, usage in ended))


def _asked_for() -> int:
    return processes.log_file("mlflow-server").read_bytes().count(_REQUEST)
