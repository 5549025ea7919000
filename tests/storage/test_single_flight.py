"""Pods that start at once on one cache: one downloads, the others wait; and what happens when it dies."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from darwin_runtime.storage.cache import Cache
from tests.conftest import Tracking, wait_until
from tests.roles.test_download import keys
from tests.storage.test_crash import assert_whole
from tests.support import killing, proxy
from tests.support.killing import KILLED, Ended, Run
from tests.support.proxy import Proxy, proxying
from tests.support.registry import log_files

FILES = {"MLmodel": 300, "weights": 3_000_000, "conda.yaml": 100, "empty": 0, "deep/er/vocabulary": 5000}

PODS = 8


@pytest.fixture(scope="module")
def uri(open_server: Tracking) -> str:
    files = {name: random.Random(name).randbytes(size) for name, size in FILES.items()}
    return log_files(open_server, "single-flight", files)


@pytest.fixture
def through_proxy(open_server: Tracking) -> Iterator[Proxy]:
    with proxying(open_server.uri) as started:
        yield started


def starting(uri: str, through: Proxy, tmp_path: Path, number: int, patch: str, **when: float) -> Run:
    environ = {
        "MODEL_URI": uri,
        "MLFLOW_TRACKING_URI": through.uri,
        "STORAGE_STRATEGY": "pvc",
        "OUTPUT_PATH": tmp_path / f"models-{number}",
        "CACHE_PATH": tmp_path / "cache",
        "POD_NAME": f"pod-{number}",
        "BACKOFF_SECONDS": "0.01",
    }
    return Run("download", {name: str(value) for name, value in environ.items()}, patch=patch, **when)  # type: ignore[arg-type]


def check(ends: list[Ended], tmp_path: Path) -> None:
    for ended in ends:
        assert ended.code == 0, ended.err
    cache = Cache(tmp_path / "cache")
    [key] = keys(cache.root)
    assert_whole(cache.model(key), cache.manifest(key))
    for number in range(len(ends)):
        assert (tmp_path / f"models-{number}" / "MLmodel").resolve() == cache.model(key) / "MLmodel"
    assert {lease.pod for lease in cache.leases()} >= {f"pod-{number}" for number in range(len(ends))}
    assert not list((cache.root / ".staging").iterdir())


def test_one_transfers_and_the_others_wait(uri: str, through_proxy: Proxy, tmp_path: Path) -> None:
    ends = killing.run(*(starting(uri, through_proxy, tmp_path, number, "") for number in range(PODS)))
    check(ends, tmp_path)
    assert sorted(path.rpartition("/")[2] for path in through_proxy.downloads()) == sorted(
        name.rpartition("/")[2] for name in FILES
    )
    assert sum("published as" in ended.err for ended in ends) == 1
    assert any("waiting for pod-" in ended.err for ended in ends)


def test_without_locks_it_is_right_all_the_same(uri: str, through_proxy: Proxy, tmp_path: Path) -> None:
    ends = killing.run(*(starting(uri, through_proxy, tmp_path, number, "no_locks") for number in range(PODS)))
    check(ends, tmp_path)
    assert len(through_proxy.downloads()) > len(FILES), "several did transfer, or this shows nothing"
    assert sum("published as" in ended.err for ended in ends) == 1


def test_when_it_dies_another_goes_on_where_it_was(uri: str, through_proxy: Proxy, tmp_path: Path) -> None:
    """The first hangs in the middle of a file; it is killed, and of those who wait, one takes over."""
    through_proxy.faults = [("weights", proxy.stalled)]
    killed = threading.Event()
    ends: list[Ended] = []

    def first() -> None:
        ends.extend(killing.run(starting(uri, through_proxy, tmp_path, 0, "quick_heartbeat", after=3.0)))
        killed.set()

    thread = threading.Thread(target=first)
    thread.start()
    wait_until(lambda: list(tmp_path.glob("cache/.staging/*/model/conda.yaml")), "the first to be under way")
    others = killing.run(
        *(starting(uri, through_proxy, tmp_path, number, "quick_heartbeat") for number in range(1, PODS))
    )
    thread.join()
    assert [ended.code for ended in ends] == [KILLED]
    assert all("waiting for pod-0" in ended.err for ended in others)
    assert sum("published as" in ended.err for ended in others) == 1
    fetched = [path.rpartition("/")[2] for path in through_proxy.downloads()]
    assert {name: fetched.count(name) for name in set(fetched)} == {
        **{name.rpartition("/")[2]: 1 for name in FILES},
        "weights": 2,
    }
    [rest] = through_proxy.ranges
    assert rest == f"bytes={FILES['weights'] // 2}-"
    again = killing.run(starting(uri, through_proxy, tmp_path, 0, ""))
    check([*again, *others], tmp_path)
