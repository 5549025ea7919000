"""Files that change under a running process, at the moments when that goes wrong."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest

from darwin_runtime.errors import UnusableFile
from darwin_runtime.http import reloading
from darwin_runtime.http.reloading import ReloadingFile
from tests.support.mounts import Mount


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "LOOK_SECONDS", 0.0)


def test_what_could_not_be_loaded_is_tried_again_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Although the files are no others by then: they may have been read in the middle of a change."""
    mount = Mount(tmp_path / "secret", a="1")
    fails = 0
    renewed: list[str] = []

    def load() -> str:
        nonlocal fails
        if fails:
            fails -= 1
            raise UnusableFile("not now")
        return (mount / "a").read_text()

    mounted = ReloadingFile([mount / "a"], load, renewed.append)
    mount.put(a="2")
    fails = 3
    with caplog.at_level(logging.INFO):
        assert [mounted.value for _ in range(5)] == ["1", "1", "1", "2", "2"]
        assert renewed == ["2"]
        mount.put(a="3")
        fails = 1
        assert [mounted.value for _ in range(2)] == ["2", "3"]
    assert [record.message for record in caplog.records] == ["not now. What was read before stays in use"] * 2


def test_a_change_while_it_is_read_is_seen_at_the_next_look(tmp_path: Path) -> None:
    mount = Mount(tmp_path / "secret", a="1")
    changes = [lambda: mount.put(a="3"), lambda: mount.put(a="2")]

    def load() -> str:
        found = (mount / "a").read_text()
        if changes:
            changes.pop()()
        return found

    mounted = ReloadingFile([mount / "a"], load, lambda _: None)
    assert [mounted.value for _ in range(4)] == ["2", "3", "3", "3"]


def test_it_is_read_only_when_it_has_changed(tmp_path: Path) -> None:
    mount = Mount(tmp_path / "secret", a="1", b="1")
    loads = itertools.count(1)
    mounted = ReloadingFile([mount / "a", mount / "b"], lambda: next(loads), lambda _: None)
    assert [mounted.value for _ in range(3)] == [1, 1, 1]
    # In place, too, as those do it who are not the kubelet.
    (mount / "b").write_text("22")
    assert [mounted.value for _ in range(3)] == [2, 2, 2]
