"""How large the image is, what is in it, and what a start costs, beside what others install: `make image-report`.

Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from image import build
from image.wheelhouse import Target
from tests.conftest import mlflow_serving
from tests.image.containers import LOCKED, TMP, run
from tests.support.registry import log_model

PEERS = Path(__file__).parent / "peers"

# How often each command is timed; medians count.
STARTS = 15

# The biggest packages of an image that are listed.
BIGGEST = 8


@dataclass(frozen=True)
class Figure:
    """Ours beside another's; `at_most` is the bar for ours divided by it."""

    what: str
    ours: float
    other: float
    unit: str
    at_most: float

    @property
    def ratio(self) -> float:
        return self.ours / self.other

    def __str__(self) -> str:
        met = "met" if self.ratio <= self.at_most else "MISSED"
        sides = f"{self.ours:.4g} against {self.other:.4g} {self.unit}"
        return f"{self.what}: {sides}, {self.ratio:.1%} (at most {self.at_most:.0%}: {met})"


def megabytes(image: str) -> float:
    """What the image's layers hold beyond the base image's."""
    return (int(build.inspect(image, "{{.Size}}")) - int(build.inspect(build.base(), "{{.Size}}"))) / 1e6


_PIP = """
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY peer.txt .
RUN python3 -m venv /tool && python3 -m venv --without-pip /venv && \
    /tool/bin/pip --python /venv/bin/python install --quiet --no-cache-dir --require-hashes --no-deps -r peer.txt && \
    rm -r /tool
"""


def peer(name: str) -> str:
    """An image with what the lock of a peer names, as pip leaves it, in as few layers as it takes."""
    tag = f"localhost/darwin-peer:{name}"
    with tempfile.TemporaryDirectory() as directory:
        context = Path(directory)
        (context / "Dockerfile").write_text(_PIP)
        shutil.copyfile(PEERS / f"{name}.txt", context / "peer.txt")
        build.build(tag, f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro", context=context)
    return tag


# Of this machine, which may be behind a proxy that has its own.
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def distributions(lock: Path, python: str) -> int:
    """How many packages a lock installs on this kind of machine for a minor version of Python."""
    with tempfile.TemporaryDirectory() as directory:
        pins = Target(python, platform.machine()).pins(Path(directory, "pins.txt"), [lock], "--no-deps")
        return len(re.findall(r"^[\w.-]+==", pins.read_text(), re.MULTILINE))


_LIST = """
import collections, importlib.metadata, importlib.util, json, os, platform
sizes = collections.Counter()
for one in importlib.metadata.distributions():
    for file in one.files or ():
        path = one.locate_file(file)
        for each in (path, importlib.util.cache_from_source(path) if file.suffix == ".py" else None):
            if each and os.path.exists(each):
                sizes[one.name] += os.path.getsize(each)
print(json.dumps([".".join(platform.python_version_tuple()[:2]), sizes.most_common()]))
"""

_TIME = """
import json, os, subprocess, sys, time
commands = {"import mlflow": ["python", "-c", "import mlflow"], "download.py": ["python", "/app/download.py"]}
seconds = {name: [] for name in commands}
for _ in range(int(sys.argv[1])):
    for name, command in commands.items():
        began = time.monotonic()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        seconds[name].append(time.monotonic() - began)
print(json.dumps(seconds))
"""


@contextmanager
def registered() -> Iterator[str]:
    """A real MLflow server without authentication that has a model; its URI."""
    with tempfile.TemporaryDirectory() as home, mlflow_serving(Path(home)) as tracking:
        log_model(tracking, 2.0)
        yield tracking.uri


def starts(image: str) -> dict[str, list[float]]:
    """Seconds from start to exit: of a bare interpreter that imports MLflow, and of an init container's cache hit."""
    with registered() as uri, tempfile.TemporaryDirectory() as cache:
        Path(cache).chmod(0o777)
        options = (*LOCKED, TMP, f"--volume={cache}:/model-cache", "--tmpfs=/models:mode=1777", "--cpus=2")
        command = ("sh", "-c", f"python /app/download.py && exec python -c '{_TIME}' {STARTS}")
        settings = {"MODEL_URI": "models:/iris/1", "MLFLOW_TRACKING_URI": uri, "STORAGE_STRATEGY": "pvc"}
        done = run(image, *command, options=options, **settings)
    assert done.code == 0, done.err
    found: dict[str, list[float]] = json.loads(done.out)
    return found


def main() -> int:
    default, sklearn = (
        build.build("localhost/darwin-report:default"),
        build.build("localhost/darwin-report:sklearn", FLAVORS="sklearn"),
    )
    listed = {image: json.loads(run(image, "python", "-c", _LIST).out) for image in (default, sklearn)}
    python = listed[sklearn][0]
    original = megabytes(peer("original"))
    seconds = {name: statistics.median(values) for name, values in starts(default).items()}
    figures = [
        Figure(
            "default image, layers over the base, against the original's requirements",
            megabytes(default),
            original,
            "MB",
            0.42,
        ),
        Figure("sklearn-only image, the same", megabytes(sklearn), original, "MB", 0.26),
        Figure(
            "packages for sklearn-only, against mlflow + fastapi",
            len(listed[sklearn][1]),
            distributions(PEERS / "mlflow.txt", python),
            "packages",
            0.62,
        ),
        Figure(
            "init container on a cache hit, start to exit, against a bare `import mlflow`",
            seconds["download.py"],
            seconds["import mlflow"],
            "s",
            1.3,
        ),
    ]
    print(*figures, sep="\n")
    for name, image in (("default", default), ("sklearn-only", sklearn)):
        biggest = ", ".join(f"{package} {size / 1e6:.0f}" for package, size in listed[image][1][:BIGGEST])
        print(f"biggest packages of the {name} image, in MB: {biggest}")
    return int(any(figure.ratio > figure.at_most for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
