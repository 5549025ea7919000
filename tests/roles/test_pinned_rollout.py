"""A rollout is a version: all pods of one ReplicaSet serve what its first pod found, whatever happens to the alias."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from darwin_runtime.storage import pins
from darwin_runtime.storage.cache import Cache
from tests.conftest import ROOT, Finished, clean_environ
from tests.support.storage import download
from tests.support.stores import API, MLMODEL, Handler, mlflow

OLD, NEW = "7c5ddbdf54", "6b9f9c7d8f"


@dataclass
class Registry:
    """A registry of the model `m`: its alias `champion`, and the versions that exist; `asked` counts the requests."""

    url: str = ""
    alias: str = "1"
    versions: set[str] = field(default_factory=lambda: {"1", "2"})
    created: int = 1
    is_down: bool = False
    asked: int = 0

    def answer(self, handler: Handler, at: str, query: Mapping[str, str]) -> object:
        self.asked += 1
        if self.is_down:
            return handler.answer(503, b"down for now")
        if at.startswith(API):
            return None
        version = query.get("version", self.alias)
        if at.endswith("/get-download-uri") and version in self.versions:
            return handler.answer(200, {"artifact_uri": f"mlflow-artifacts:/{version}"})
        if at.endswith(("/registered-models/alias", "/model-versions/get")) and version in self.versions:
            found: dict[str, object] = {"name": "m", "version": version, "creation_timestamp": self.created}
            found["source"] = f"mlflow-artifacts:/{version}"
            return handler.answer(200, {"model_version": found})
        if at.endswith("/registered-models/get"):
            return handler.answer(200, {"registered_model": {"name": "m"}})
        return None


@pytest.fixture
def registry() -> Iterator[Registry]:
    running = Registry()
    files = {f"{one}/{name}": body for one in "12" for name, body in (("MLmodel", MLMODEL), ("version", one.encode()))}
    with mlflow(files, running.answer) as running.url:
        yield running


@dataclass
class Cluster:
    home: Path
    registry: Registry

    def settings(self, pod: str, rollout: str) -> dict[str, object]:
        return {
            "MODEL_URI": "models:/m@champion",
            "MLFLOW_TRACKING_URI": self.registry.url,
            "STORAGE_STRATEGY": "pvc",
            "CACHE_PATH": self.home / "cache",
            "OUTPUT_PATH": self.home / pod / "models",
            "POD_NAME": f"iris-{rollout}-{pod}" if rollout else f"iris-{pod}",
            "POD_TEMPLATE_HASH": rollout,
            "MAX_RETRIES": 0,
            "BACKOFF_SECONDS": 0,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 0,
        }

    def start(self, pod: str, rollout: str, **settings: object) -> Finished:
        """Run the init container of a new pod."""
        return download(self.home / pod, **{**self.settings(pod, rollout), **settings})

    def serves(self, pod: str, rollout: str, **settings: object) -> str:
        """The version that a new pod serves."""
        done = self.start(pod, rollout, **settings)
        assert done.code == 0, done.err
        return (self.home / pod / "models" / "version").read_text()

    def clean_entries(self) -> None:
        """Remove all entries, as a cleanup does where no pod uses them."""
        import shutil

        for path in (self.home / "cache").iterdir():
            if len(path.name) == 64:
                shutil.rmtree(path)


@pytest.fixture
def cluster(registry: Registry, tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, registry)


def test_a_pod_that_is_added_serves_what_its_siblings_serve(cluster: Cluster) -> None:
    assert cluster.serves("a", OLD) == "1"
    cluster.registry.alias = "2"
    asked = cluster.registry.asked
    assert cluster.serves("b", OLD) == "1"
    assert cluster.registry.asked == asked, "MLflow is not asked for it"
    assert cluster.serves("a", OLD) == "1", "nor when a pod starts again"


def test_a_restart_promotes_and_an_undo_brings_the_older_version_back(cluster: Cluster) -> None:
    assert cluster.serves("a", OLD) == "1"
    cluster.registry.alias = "2"
    assert cluster.serves("b", NEW) == "2", "kubectl rollout restart makes a new ReplicaSet"
    assert cluster.serves("c", OLD) == "1", "kubectl rollout undo takes the ReplicaSet of before"


def test_mlflow_is_down(cluster: Cluster) -> None:
    assert cluster.serves("a", OLD) == "1"
    cluster.registry.alias = "2"
    cluster.registry.is_down = True
    assert cluster.serves("b", OLD) == "1"
    fell_back = cluster.start("c", NEW)
    assert "FALLING BACK" in fell_back.err
    cluster.registry.is_down = False
    assert cluster.serves("d", NEW) == "1", "as its sibling that started meanwhile"


def test_the_entry_was_cleaned(cluster: Cluster) -> None:
    assert cluster.serves("a", OLD) == "1"
    cluster.registry.alias = "2"
    cluster.clean_entries()
    assert cluster.serves("b", OLD) == "1", "downloaded again"


def test_a_pinned_version_that_comes_back_is_no_fall_back(cluster: Cluster) -> None:
    """A URI falls back to what it last resolved to, not to what an older rollout downloads again."""
    assert cluster.serves("a", OLD) == "1"
    cluster.clean_entries()
    cluster.registry.alias = "2"
    assert cluster.serves("b", NEW) == "2"
    assert cluster.serves("c", OLD) == "1"
    cluster.registry.is_down = True
    assert cluster.serves("d", "5d8f7c6b9f") == "2"


def test_a_pin_ages_from_the_end_of_its_pods(cluster: Cluster) -> None:
    """A rollout that ran for longer than the TTL comes back with its version."""
    assert cluster.serves("a", OLD) == "1"
    known = pins.find(Cache(cluster.home / "cache"))
    assert known
    [stamp] = known.root.glob("*/last_used")
    day = 86400.0
    os.utime(stamp, (0, 0))
    assert pins.drop_unused(known, day, lambda: ({OLD}, known.now() - 2), lambda: None) == 0
    assert pins.drop_unused(known, day, lambda: (set(), known.now() - 2), lambda: None) == 0
    os.utime(stamp, (0, 0))
    assert pins.drop_unused(known, day, lambda: (set(), known.now() - 2), lambda: None) == 1


def test_a_first_pod_that_died_early_stops_no_cleanup(tmp_path: Path) -> None:
    cache = Cache.prepare(tmp_path / "cache")
    (cache.root / ".pins" / ".CACHEDIR.TAG.x.tmp").touch()
    assert pins.find(cache) is None


def test_the_version_was_deleted(cluster: Cluster) -> None:
    assert cluster.serves("a", OLD) == "1"
    cluster.registry.alias, cluster.registry.versions = "2", {"2"}
    assert cluster.serves("b", OLD) == "1", "from the cache"
    cluster.clean_entries()
    done = cluster.start("c", OLD)
    assert done.code == 1
    assert "this rollout is pinned to m version 1, which the cache does not hold any more" in done.last
    assert "HTTP 404" in done.last
    assert "`kubectl rollout restart` pins what models:/m@champion means now" in done.last
    assert not (cluster.home / "c" / "models" / "MLmodel").exists()
    assert cluster.serves("d", NEW) == "2"


def test_the_entry_was_cleaned_and_mlflow_is_down(cluster: Cluster) -> None:
    """No other version stands in, though one is at hand."""
    assert cluster.serves("a", OLD) == "1"
    cluster.clean_entries()
    cluster.registry.alias = "2"
    assert cluster.serves("b", NEW) == "2"
    cluster.registry.is_down = True
    done = cluster.start("c", OLD)
    assert done.code == 1
    assert "this rollout is pinned to m version 1" in done.last
    assert "no usable answer from the tracking server" in done.last


def test_a_version_that_was_registered_again_is_another_model(cluster: Cluster) -> None:
    assert cluster.serves("a", OLD) == "1"
    cluster.clean_entries()
    cluster.registry.created = 2
    done = cluster.start("b", OLD)
    assert done.code == 1
    assert "models:/m/1 is another model now. `kubectl rollout restart` pins what" in done.last
    assert cluster.serves("c", NEW) == "1"


@pytest.mark.parametrize(
    ("rollout", "pod", "why"),
    [
        ("v1.2.3/../x", "", "is no hash of a pod template"),
        ("x" * 100, "", "is no hash of a pod template"),
        ("ÄÖ", "", "is no hash of a pod template"),
        (OLD, "other-6b9f9c7d8f-x2v4z", "is not in the name of the pod, other-6b9f9c7d8f-x2v4z"),
    ],
)
def test_what_is_no_hash_of_this_pod_is_left_out(rollout: str, pod: str, why: str, cluster: Cluster) -> None:
    named = {"POD_NAME": pod} if pod else {}
    done = cluster.start("a", rollout, **named)
    assert done.code == 0, done.err
    assert done.err.count(f"{why}, so this pod belongs to no rollout") == 1
    assert not [path for path in (cluster.home / "cache" / ".pins").rglob("*") if "pin.json" in path.name]
    cluster.registry.alias = "2"
    assert cluster.serves("b", rollout, **named) == "2", "as without"


def test_without_a_hash_all_is_as_ever(cluster: Cluster) -> None:
    assert cluster.serves("a", "") == "1"
    cluster.registry.alias = "2"
    assert cluster.serves("b", "") == "2"
    assert not (cluster.home / "cache" / ".pins" / "CACHEDIR.TAG").exists()


def test_a_pin_that_cannot_be_read_is_named(cluster: Cluster) -> None:
    assert cluster.serves("a", OLD) == "1"
    [pin] = (cluster.home / "cache" / ".pins").glob("*/pin.json")
    pin.write_text("{}")
    done = cluster.start("b", OLD)
    assert done.code == 1
    assert f"the pin {pin} of this rollout cannot be read (it is no pin); delete its directory" in done.last


@contextlib.contextmanager
def _processes(cluster: Cluster, rollout: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    running = [
        subprocess.Popen(
            [sys.executable, ROOT / "download.py"],
            env=clean_environ(**cluster.settings(f"p{number}", rollout)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_one_pod_of_many_asks_mlflow(warm: bool, cluster: Cluster) -> None:
    if warm:
        assert cluster.serves("a", OLD) == "1"
    before = cluster.registry.asked
    with _processes(cluster, NEW, 12) as running:
        for process in running:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    assert cluster.registry.asked - before <= 20
    assert {(cluster.home / f"p{number}" / "models" / "version").read_text() for number in range(12)} == {"1"}


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_pod_that_is_stopped_gives_its_locks_up_at_once(style: str, cluster: Cluster) -> None:
    """Its successor need not wait until it counts as dead, and its last line is like the others."""
    begun, go_on = threading.Event(), threading.Event()
    answer = cluster.registry.answer

    def slow(handler: Handler, at: str, query: Mapping[str, str]) -> object:
        if at.endswith("/1/version"):
            begun.set()
            go_on.wait(60)
        return answer(handler, at, query)

    with mlflow({"1/MLmodel": MLMODEL, "1/version": b"1"}, slow) as cluster.registry.url:
        process = subprocess.Popen(
            [sys.executable, ROOT / "download.py"],
            env=clean_environ(**cluster.settings("a", OLD), LOG_FORMAT=style),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert begun.wait(60)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        go_on.set()
        assert process.returncode == 143
        last = err.splitlines()[-1]
        assert (json.loads(last)["message"] if style == "json" else last).endswith("stopped by SIGTERM")
        locks = [path for path in (cluster.home / "cache").rglob(".locks/*") if path.is_file()]
        assert len(locks) == 2, "of the download, and of the rollout"
        assert all(json.loads(path.read_text())["released"] for path in locks)
        done = cluster.start("b", OLD)
    assert done.code == 0, done.err
    assert "waiting for" not in done.err
