"""Killed at every step on disk, and at any time: what is published is whole, the next run gets there, nothing leased
is removed."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import locks, references
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.manifest import File, Manifest
from tests.conftest import Tracking
from tests.roles.test_download import keys, whole
from tests.support import killing
from tests.support.apiserver import ApiServer, pod
from tests.support.killing import KILLED, Ended, Run
from tests.support.registry import log_files
from tests.support.share import SEED, SHARE, part_of

# One large file, some small ones, one further down.
FILES = {"MLmodel": 300, "weights": 3_000_000, "conda.yaml": 100, "empty": 0, "deep/er/vocabulary": 5000}

RANDOM_KILLS = 300


@pytest.fixture(scope="module")
def uri(open_server: Tracking) -> str:
    return log_files(open_server, "crash", {name: random.Random(name).randbytes(size) for name, size in FILES.items()})


def downloading(uri: str, tracking: Tracking, place: Path, strategy: str, /, **environ: object) -> Run:
    settings = {
        "MODEL_URI": uri,
        "STORAGE_STRATEGY": strategy,
        "OUTPUT_PATH": place / "models",
        "CACHE_PATH": place / "cache",
        "BACKOFF_SECONDS": "0.01",
        "POD_NAME": "pod",
        "DEPLOYMENT_NAME": "shop",
        **tracking.environ,
        **environ,
    }
    return Run("download", {name: str(value) for name, value in settings.items()}, within=(str(place),))


def killed(run: Run, **when: float) -> Run:
    return Run(**{**vars(run), **when})


def assert_whole(model: Path, manifest: Manifest) -> None:
    """Exactly the files of the manifest, byte for byte."""
    assert whole(model, manifest)
    assert FILES.keys() <= {file.path for file in manifest.files}


def check(place: Path) -> None:
    """Whatever happened: what has a name is whole, and so is an output that a server would take for a model."""
    cache = Cache(place / "cache")
    if cache.root.exists():
        for key in keys(cache.root):
            assert_whole(cache.model(key), cache.manifest(key))
    models = place / "models"
    if (models / "MLmodel").exists():
        assert {name: (models / name).stat().st_size for name in FILES} == FILES


def arrive(run: Run, place: Path, strategy: str) -> Ended:
    """The next run, which has to get there whatever the one before left."""
    [done] = killing.run(run)
    assert done.code == 0, done.err
    check(place)
    assert (place / "models" / "MLmodel").is_file()
    if strategy == "pvc":
        assert len(keys(place / "cache")) == 1
        assert not list((place / "cache" / ".staging").iterdir())
        # What was locked by who died after publishing is left to cleanup: nobody needs that lock any more.
        assert len(list((place / "cache" / ".leases").iterdir())) == 1
    else:
        assert not (place / "models" / ".darwin-staging").exists()
    return done


@pytest.mark.parametrize("strategy", ["pvc", "emptydir"])
@pytest.mark.parametrize("before", ["nothing", "damaged", "hit"])
def test_download_killed_at_every_step(
    before: str, strategy: str, uri: str, open_server: Tracking, tmp_path: Path
) -> None:
    if before == "damaged" and strategy == "emptydir":
        pytest.skip("an output is filled anew, whatever is in it")

    def prepared(name: str) -> Path:
        place = tmp_path / name
        if before != "nothing":
            assert killing.run(downloading(uri, open_server, place, strategy))[0].code == 0
        if before == "damaged":
            [key] = keys(place / "cache")
            os.truncate(place / "cache" / key / "model" / "weights", 1000)
        return place

    [whole] = killing.run(downloading(uri, open_server, prepared("whole"), strategy))
    assert whole.code == 0, whole.err
    steps = len(whole.changes)
    assert steps > {"nothing": 40, "damaged": 40, "hit": 3}[before] or strategy == "emptydir"
    for step in part_of(range(steps)):
        place = prepared(f"step-{step}")
        run = downloading(uri, open_server, place, strategy)
        [ended] = killing.run(killed(run, at=step))
        # Files come side by side, so one step more or less is done by the time the last is.
        assert ended.code == KILLED or step >= steps - 5, ended.err
        if before != "damaged":
            check(place)
        arrive(run, place, strategy)
        shutil.rmtree(place)


@pytest.mark.parametrize("strategy", ["pvc", "emptydir"])
def test_download_killed_at_any_time(strategy: str, uri: str, open_server: Tracking, tmp_path: Path) -> None:
    """One kill after another on the same disk."""
    chance = random.Random(SEED)
    run = downloading(uri, open_server, tmp_path, strategy)
    began = time.monotonic()
    arrive(run, tmp_path, strategy)
    usual = time.monotonic() - began
    kills = 0
    while kills < RANDOM_KILLS / 2 / SHARE:
        if chance.random() < 0.2:
            arrive(run, tmp_path, strategy)
            shutil.rmtree(tmp_path / "models")
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        [ended] = killing.run(killed(run, after=chance.uniform(0, usual)))
        kills += ended.code == KILLED
        check(tmp_path)
    arrive(run, tmp_path, strategy)


def test_a_killed_download_goes_on_where_it_was(uri: str, open_server: Tracking, tmp_path: Path) -> None:
    run = downloading(uri, open_server, tmp_path, "pvc")
    [whole] = killing.run(run)
    publishing = next(number for number, change in enumerate(whole.changes) if "manifest.json" in change)
    shutil.rmtree(tmp_path / "cache")
    assert killing.run(killed(run, at=publishing))[0].code == KILLED
    done = arrive(run, tmp_path, "pvc")
    assert "2.9 MiB of it already here" in done.err
    assert "downloaded 0 B in" in done.err


# Cleanup

LEASED, FREE, OTHER = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path / "serviceaccount", namespace="default") as running:
        running.pods = [pod("web", claim="models")]
        yield running


def filled(place: Path) -> Cache:
    """Three entries of which one is leased, one in the trash; something of every kind that the dead leave."""
    cache = Cache.prepare(place)
    for key in (LEASED, FREE, OTHER):
        staging = locks.stage(cache, key)
        content = key.encode()
        files = []
        for name in ("MLmodel", "deep/weights"):
            path = cache_module.model_of(staging) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            files.append(File(name, len(content), hashlib.sha256(content).hexdigest()))
        locks.publish(cache, staging, key, Manifest(f"models:/{key[0]}/1", {}, files))
        os.utime(cache.root / key / "last_used", (0, 0))
    removal = cache.announce(OTHER)
    cache.commit(removal)
    cache.cancel(removal)
    cache.lease("web", "/models", LEASED)
    cache.lease("gone", "/models", FREE)
    for path in (cache.root / ".leases").iterdir():
        os.utime(path, (0, 0))
    (cache.root / ".trash" / "0.doomed" / "model").mkdir(parents=True)
    references.set_alias(cache, "d" * 64, FREE)
    os.utime(cache.root / ("d" * 64), (0, 0), follow_symlinks=False)
    return cache


def cleaning(cache: Cache, api: ApiServer) -> Run:
    environ = {**api.environ, "CACHE_PATH": cache.root, "GRACE_SECONDS": 0, "POD_NAME": "cleanup-1"}
    return Run(
        "cleanup",
        {name: str(value) for name, value in environ.items()},
        within=(str(cache.root),),
        arguments=(str(api.directory),),
    )


def leased_is_whole(cache: Cache) -> None:
    assert cache.damage(LEASED, "sha256") == []
    assert [lease.pod for lease in cache.leases() if lease.key == LEASED] == ["web"]
    for key in keys(cache.root):
        assert cache.damage(key, "sha256") == []


def test_cleanup_killed_at_every_step(api: ApiServer, tmp_path: Path) -> None:
    [whole] = killing.run(cleaning(filled(tmp_path / "whole"), api))
    assert whole.code == 0, whole.err
    assert len(whole.changes) > 20
    for step in part_of(range(len(whole.changes))):
        cache = filled(tmp_path / f"step-{step}")
        run = cleaning(cache, api)
        [ended] = killing.run(killed(run, at=step))
        assert ended.code == KILLED, ended.err
        leased_is_whole(cache)
        # An announcement of the dead stands for a day, and keeps what it was about.
        for plan in (cache.root / ".trash").glob("*.planned"):
            plan.unlink()
        for _ in range(2):
            [done] = killing.run(run)
            assert done.code == 0, done.err
            leased_is_whole(cache)
            assert keys(cache.root) == [LEASED]
            assert not [path for path in (cache.root / ".trash").iterdir() if not path.name.startswith(".")]
        shutil.rmtree(cache.root)


def test_cleanups_at_once_and_killed_at_any_time(api: ApiServer, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for number in range(20):
        cache = filled(tmp_path / str(number))
        run = cleaning(cache, api)
        ends = killing.run(run, killed(run, after=chance.uniform(0, 0.2)), run)
        for ended in (ends[0], ends[2]):
            assert ended.code == 0, ended.err
        leased_is_whole(cache)
        shutil.rmtree(cache.root)
