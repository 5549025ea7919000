"""Downloads and the shared cache: against parallel curl and MLflow's own command, from a real MLflow server.

The server and who downloads share all cores, as nothing else is at work; files land on one disk.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import BUILD, ROOT, envs, pods, processes
from bench.outcome import Outcome, Row, or_void, void_text
from bench.processes import Failed

CURL_AT_ONCE = 8

_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/models"


@dataclass(frozen=True)
class Load:
    """A model of so many files of so many bytes; `curl` and `mlflow` are the bars for rates against theirs."""

    name: str
    title: str
    files: int
    size: int
    curl: float
    mlflow: float


LOADS = (
    Load("download-large", "download of 1 GB in 8 files", 8, 125_000_000, curl=0.9, mlflow=1.6),
    Load("download-small", "download of 2,000 files of 10 kB", 2000, 10_000, curl=0.8, mlflow=1.0),
)

# Beyond an interpreter that has imported MLflow, in MiB; of files this large.
MEMORY = "download-memory"
MEMORY_AT_MOST = 80
MEMORY_SIZES = (125_000_000, 500_000_000)

HIT = "cache-hit"
HIT_REQUESTS = 4
HIT_SECONDS = 0.3

PLAN = "cleanup-plan"
PLAN_SECONDS = 3.0
PLAN_ENTRIES = (1_000, 10_000)

_PAGES = b"\1" * (1 << 20)

# Its bars are in `pods`.
ROLLOUT = "rollout"

NAMES = (*(load.name for load in LOADS), MEMORY, HIT, ROLLOUT, PLAN)


def run(names: Sequence[str], rounds: int) -> list[Outcome]:
    """`rounds`: how often everything is measured; figures are medians."""
    asked = set(names)
    outcomes: list[Outcome] = []
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        place = Path(directory)
        with _server(place / "artifacts") as uri:
            for load in LOADS:
                if load.name in asked:
                    outcomes += [or_void(load.title, partial(_rates, load, uri, place, rounds))]
            if MEMORY in asked:
                outcomes.append(or_void("peak memory of a download", lambda: _memory(uri, place)))
            if HIT in asked:
                outcomes.append(or_void("a start on a warm cache", lambda: _hit(uri, place, rounds)))
            if ROLLOUT in asked:
                outcomes.append(or_void(pods.TITLE, lambda: pods.run(uri, _small(uri, place), place)))
    if PLAN in asked:
        outcomes.append(or_void("planning a cleanup", lambda: _plan(rounds)))
    return outcomes


@contextlib.contextmanager
def _server(artifacts: Path) -> Iterator[str]:
    """`mlflow server` as it comes, storing files in a directory; no authentication."""
    python, port = envs.python("mlflow"), processes.free_port()
    artifacts.mkdir(parents=True)
    command = [
        *(str(python.with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{artifacts.parent}/mlflow.db"),
        *("--serve-artifacts", "--artifacts-destination", str(artifacts)),
    ]
    log = processes.log_file("mlflow-server")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=processes.environ(python, {}), cwd=BUILD, stdout=output, stderr=output, start_new_session=True
        )
    try:
        processes.wait_ready(process, port, "/health", "mlflow-server")
        yield f"http://127.0.0.1:{port}"
    finally:
        processes.end(process)


def _rates(load: Load, uri: str, place: Path, rounds: int) -> Outcome:
    model = _made(place, load.name, load.files, load.size)
    seconds: dict[str, list[float]] = {"transfer": [], "curl": [], "process": [], "mlflow": []}
    for number in range(rounds + 1):  # the first is not counted: it reads files that later ones find in memory
        sys.stderr.write(f"round {number} of {rounds}: {load.title}\n")
        for who in seconds if number % 2 else reversed(seconds):
            target = place / f"target-{load.name}-{number}-{who}"
            _own_memory(3 * load.files * load.size)
            seconds[who].append(_download(who, uri, model, target))
            sys.stderr.write(f"  {who} {seconds[who][-1]:.2f} s\n")
            _check(target, load)
            _empty(target)
            os.sync()
    for target in place.glob(f"target-{load.name}-*"):
        shutil.rmtree(target)
    took = {who: statistics.median(times[1:]) for who, times in seconds.items()}
    total = load.files * load.size / 1e6

    def compared(ours: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[ours][1:], seconds[other][1:], strict=True))

    def row(who: str, title: str, ours: str = "", least: float = 0) -> Row:
        figure = f"{took[who]:.2f} s, {total / took[who]:,.0f} MB/s"
        if not ours:
            return Row(title, figure)
        ratio = compared(ours, who)
        return Row(title, figure, "", ratio, f"≥ {least:g} ×", ratio >= least)

    return Outcome(
        load.title,
        [
            row("transfer", "the transfer, hashed and on disk"),
            row("curl", f"{CURL_AT_ONCE} curl transfers at once", "transfer", load.curl),
            row("process", "`python download.py`"),
            row("mlflow", "`mlflow artifacts download`", "process", load.mlflow),
        ],
    )


def _own_memory(size: int) -> None:
    """Have the machine own so many bytes that nothing uses.

    A virtual one may have to ask its host for each page that was free for some seconds, at up to 3 s a gigabyte, and
    all that is written needs pages: whose turn it was would decide.
    """
    with mmap.mmap(-1, size) as pages:
        pages.madvise(mmap.MADV_HUGEPAGE)  # files of some size are given their pages in large pieces, too
        for start in range(0, size, len(_PAGES)):
            pages[start : start + len(_PAGES)] = _PAGES[: size - start]


def _empty(target: Path) -> None:
    """Free the files' space, but keep the files: to make one takes ext4 the longer the more were removed lately."""
    for path in target.rglob("file-*"):
        os.truncate(path, 0)


def _made(place: Path, name: str, files: int, size: int) -> Path:
    """A model's directory in the server's store: MLmodel, and so many files."""
    model = place / "artifacts" / "models" / name
    if not model.exists():
        model.mkdir(parents=True)
        (model / "MLmodel").write_text("flavors: {}\n")
        for number in range(files):
            with (model / f"file-{number:04}").open("wb") as file:
                left = size
                while left:
                    left -= file.write(os.urandom(min(left, 1 << 20)))
    return model


def _registered(uri: str, model: Path) -> str:
    """A registered version of the model, by the alias that most deployments use."""
    port, name = int(uri.rpartition(":")[2]), model.name
    run = _ask(port, "runs/create", {"experiment_id": "0", "start_time": 0})["run"]["info"]
    stored = model.parents[1] / str(run["artifact_uri"]).removeprefix("mlflow-artifacts:/")
    stored.mkdir(parents=True)
    model.rename(stored / "model")
    _ask(port, "registered-models/create", {"name": name})
    version = {"name": name, "source": f"{run['artifact_uri']}/model", "run_id": run["run_id"]}
    _ask(port, "model-versions/create", version)
    _ask(port, "registered-models/alias", {"name": name, "alias": "champion", "version": "1"})
    return f"models:/{name}@champion"


def _ask(port: int, path: str, body: dict[str, object]) -> Any:
    content = {"Content-Type": "application/json"}
    status, answer = processes.request(port, "POST", f"/api/2.0/mlflow/{path}", json.dumps(body).encode(), content)
    if status != 200:
        raise Failed(f"{path}: HTTP {status}: {answer[:200]!r}")
    return json.loads(answer)


def _download(who: str, uri: str, model: Path, target: Path) -> float:
    """Seconds it took; raises `Failed`."""
    target.mkdir()
    asked = f"mlflow-artifacts:/models/{model.name}"
    if who == "transfer":
        return _probe({"MLFLOW_TRACKING_URI": uri}, "transfer", asked, str(target))["seconds"]
    python = envs.python("mlflow" if who == "mlflow" else envs.OURS)
    environ = processes.environ(python, {"MLFLOW_TRACKING_URI": uri})
    if who == "curl":
        config = target.with_name("curl.config")
        names = sorted(path.name for path in model.iterdir())
        lines = [
            f'url = "{uri}{_ARTIFACTS}/{model.name}/{urllib.parse.quote(name)}"\noutput = "{name}"' for name in names
        ]
        config.write_text("\n".join(lines))
        command = ["curl", "--silent", "--fail", "--parallel", "--parallel-max", str(CURL_AT_ONCE)]
        command += ["--config", str(config)]
    elif who == "process":
        command = [str(python), str(ROOT / "download.py")]
        environ |= {"MODEL_URI": asked, "OUTPUT_PATH": str(target)}
    else:
        command = [str(python.with_name("mlflow")), "artifacts", "download"]
        command += ["--artifact-uri", asked, "--dst-path", str(target)]
    began = time.monotonic()
    done = subprocess.run(command, env=environ, cwd=target, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        raise Failed(f"{who} ended with {done.returncode}: {void_text(done.stderr)}")
    return seconds


def _check(target: Path, load: Load) -> None:
    sizes = [path.stat().st_size for path in target.rglob("file-*") if not path.is_symlink()]
    if sizes != [load.size] * load.files:
        raise Failed(f"{len(sizes)} files with {sum(sizes)} bytes arrived of {load.title}")


def _memory(uri: str, place: Path) -> Outcome:
    bare = _probe({}, "imported")["peak"]
    rows = []
    for size in MEMORY_SIZES:
        sys.stderr.write(f"memory: 8 files of {size / 1e6:.0f} MB\n")
        model = _made(place, f"memory-{size}", 8, size)
        target = place / "target"
        target.mkdir()
        found = _probe({"MLFLOW_TRACKING_URI": uri}, "transfer", f"mlflow-artifacts:/models/{model.name}", str(target))
        shutil.rmtree(target)
        shutil.rmtree(model)
        more = found["peak"] - bare
        title = f"8 files of {size / 1e6:.0f} MB"
        rows.append(Row(title, f"{more:.0f} MiB more", "", None, f"≤ {MEMORY_AT_MOST} MiB", more <= MEMORY_AT_MOST))
    return Outcome(
        "peak memory of a download", [*rows, Row("an interpreter that has imported MLflow", f"{bare:.0f} MiB")]
    )


def _hit(uri: str, place: Path, rounds: int) -> Outcome:
    rows = []
    for load in LOADS:
        model = _made(place, load.name, load.files, load.size)
        environ = {
            "MLFLOW_TRACKING_URI": uri,
            "MODEL_URI": _registered(uri, model),
            "STORAGE_STRATEGY": "pvc",
            "CACHE_PATH": str(place / "cache"),
            "OUTPUT_PATH": str(place / f"output-{load.name}"),
            "POD_NAME": "pod",
        }
        found = [_probe(environ, "hit") for _ in range(rounds + 1)][1:]
        own = statistics.median(one["seconds"] - one["waiting"] for one in found)
        most = max(one["requests"] for one in found)
        met = own < HIT_SECONDS and most <= HIT_REQUESTS and not any(one["code"] for one in found)
        figure = f"{own:.3f} s, {most:.0f} requests"
        bar = f"< {HIT_SECONDS:g} s, ≤ {HIT_REQUESTS} requests"
        rows.append(
            Row(f"{load.title.removeprefix('download of ')}, beside MLflow's answers", figure, "", None, bar, met)
        )
    shutil.rmtree(place / "cache")
    return Outcome("a start on a warm cache", rows)


def _small(uri: str, place: Path) -> str:
    return _registered(uri, _made(place, "small", 8, 10_000))


def _plan(rounds: int) -> Outcome:
    rows = []
    for count in PLAN_ENTRIES:
        seconds = statistics.median(_probe({}, "plan", str(count))["seconds"] for _ in range(rounds))
        bar, met = (f"≤ {PLAN_SECONDS:g} s", seconds <= PLAN_SECONDS) if count == max(PLAN_ENTRIES) else ("", None)
        rows.append(Row(f"{count:,} entries, a tenth of them leased", f"{seconds:.2f} s", "", None, bar, met))
    return Outcome("planning a cleanup", rows)


def _probe(environ: dict[str, str], *arguments: str) -> dict[str, float]:
    python = envs.python(envs.OURS)
    done = subprocess.run(
        [python, "-m", "bench.download_probe", *arguments],
        env=processes.environ(python, environ),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Failed(f"{' '.join(arguments)} ended with {done.returncode}: {void_text(done.stderr)}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
