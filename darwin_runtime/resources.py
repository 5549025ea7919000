"""Resources of the process: CPUs of its cgroups, number of its threads, the C library's allocator, UID of its pod."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path

# Without a limit, a process for each CPU of a large node would be many.
UNLIMITED_WORKERS = 4

# The pools of OpenMP (LightGBM, XGBoost, scikit-learn) and of the two BLAS that numpy may come with.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# Of glibc's malloc.h. With another C library nothing changes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

KEPT_BYTES = 32 * 1024 * 1024

_POD = re.compile(r"/pods/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/")


def cpu_limit(root: Path = Path("/")) -> int:
    """How many CPUs this process may use, rounded up: its container's limit, or else those it may run on.

    `root` is where /proc and /sys are. `os.cpu_count` gives the node's, whatever the limit.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([usable, *(math.ceil(quota) for quota in _quotas(root))]))


def default_workers(root: Path = Path("/")) -> int:
    """As many as `cpu_limit` says, but at most `UNLIMITED_WORKERS` where nothing limits the container."""
    cpus = cpu_limit(root)
    return cpus if any(True for _ in _quotas(root)) else min(cpus, UNLIMITED_WORKERS)


def _quotas(root: Path) -> Iterator[float]:
    """The limits, in CPUs, of this process's cgroups and of those around them, as far as they are to be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            for place in (*_upwards(mounts, path), *_upwards(mounts / "unified", path)):
                yield from _quota(place / "cpu.max")
        elif "cpu" in controllers.split(","):
            for place in (*_upwards(mounts / controllers, path), *_upwards(mounts / "cpu", path)):
                yield from _quota(place / "cpu.cfs_quota_us", place / "cpu.cfs_period_us")


def _upwards(mount: Path, path: str) -> list[Path]:
    """`path` in `mount` and all above it. A container may be told its path on the node, of which it sees the end."""
    inside = Path(path.lstrip("/"))
    return [mount / part for part in (inside, *inside.parents) if ".." not in part.parts]


def _quota(*files: Path) -> Iterator[float]:
    # -1 (or "max") is no limit.
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int(number) for file in files for number in file.read_text().split())
        if quota > 0 and period > 0:
            yield quota / period


def share_cpus(workers: int, cpus: int, environ: MutableMapping[str, str]) -> None:
    """Have numerical libraries start no more threads than there are CPUs, unless the user said how many.

    Call it before they are imported. With several workers each gets one thread: a pool of threads that loading made
    would not be there in a fork, and LightGBM and XGBoost wait for it forever.
    """
    if not environ.get(THREADS[0]):  # the others follow this one
        for name in THREADS:
            environ[name] = environ.get(name) or str(cpus if workers == 1 else 1)


def return_free_memory() -> None:
    """Return what is free to the system: after a forest of trees was read, that is half of the process's memory."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_buffers() -> None:
    """Keep up to `KEPT_BYTES`, a thread, for the next large body: mapping it anew takes longer than reading it."""
    with contextlib.suppress(AttributeError):
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, KEPT_BYTES)


def pod_uid(mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The UID of the pod this runs in, read from the paths that the kubelet mounts into it; empty elsewhere."""
    try:
        found = _POD.search(mountinfo.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return found[1] if found else ""
