"""The machine: which cores serve and which ask, what is needed of it, and what to say of it in a report."""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import sys
from pathlib import Path

_CORES = sorted(os.sched_getaffinity(0))

SERVER_CORE = _CORES[0]
LOAD_CORE = _CORES[-1]


def problems() -> list[str]:
    """What is missing here, each with what to do about it."""
    found = []
    if SERVER_CORE == LOAD_CORE:
        found.append("two cores are needed: one for the server, one for the load generator")
    for command, package in (("wrk", "wrk"), ("taskset", "util-linux")):
        if not shutil.which(command):
            found.append(f"{command} is missing: apt-get install {package}")
    if not ctypes.util.find_library("gomp"):
        found.append("the OpenMP library that LightGBM's wheel counts on is missing: apt-get install libgomp1")
    return found


def stay_on_load_core() -> None:
    """Keep this process, and what it starts from now on, off the core that serves."""
    os.sched_setaffinity(0, {LOAD_CORE})


def describe() -> dict[str, str]:
    """What a reader needs to know to compare figures with those of another machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": f"{_cpu_model()}, {len(_CORES)} cores",
        "memory": f"{memory:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": sys.version.split()[0],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
