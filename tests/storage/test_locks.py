"""The lock on a download, and what passes on with it, on a real directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import disk, locks
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.locks import Lock, LockState

KEY, OTHER = "a" * 64, "b" * 64


def test_one_of_several_gets_the_lock(cache: Cache) -> None:
    lock = locks.try_lock(cache, KEY, "one")
    assert isinstance(lock, Lock)
    lock.beat(3, 10)
    holder = locks.try_lock(cache, KEY, "two")
    assert isinstance(holder, LockState)
    assert (holder.owner, holder.arrived, holder.total, holder.alive) == ("one", 3, 10, True)
    lock.release(done=True)
    assert isinstance(locks.try_lock(cache, KEY, "two"), Lock)


@pytest.mark.parametrize("end", ["silence", "release", "restart"])
def test_a_lock_passes_on_with_what_was_staged(end: str, cache: Cache) -> None:
    lock = locks.try_lock(cache, KEY, "one")
    assert isinstance(lock, Lock)
    first = locks.stage(cache, KEY, lock)
    (first / "model" / "MLmodel").write_bytes(b"whole")
    if end == "silence":
        os.utime(cache.root / ".locks" / KEY, (0, 0))
    elif end == "release":
        lock.release(done=False)
    heir = locks.try_lock(cache, KEY, "one" if end == "restart" else "two")
    assert isinstance(heir, Lock)
    staging = locks.stage(cache, KEY, heir)
    assert staging != first
    assert not first.exists(), "who is not dead after all finds nothing there"
    assert (staging / "model" / "MLmodel").read_bytes() == b"whole"
    assert [path.name for path in (cache.root / ".locks").iterdir()] == [KEY]


def test_who_has_lost_the_lock_does_not_release_it(cache: Cache) -> None:
    lock = locks.try_lock(cache, KEY, "one")
    assert isinstance(lock, Lock)
    os.utime(cache.root / ".locks" / KEY, (0, 0))
    assert isinstance(locks.try_lock(cache, KEY, "two"), Lock)
    lock.release(done=True)
    assert isinstance(locks.try_lock(cache, KEY, "three"), LockState)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"owner": 1}'])
def test_a_lock_that_is_being_written_is_held(text: str, cache: Cache) -> None:
    (cache.root / ".locks" / KEY).write_text(text)
    assert isinstance(locks.try_lock(cache, KEY, "two"), LockState)


def test_only_the_key_s_own_staging_is_inherited(cache: Cache) -> None:
    others = [f"{OTHER}.0a", "thesis"]
    for name in (*others, f"{KEY}.0a", f"{KEY}.0b"):
        (cache.root / ".staging" / name / "model" / "MLmodel").mkdir(parents=True)
    lock = locks.try_lock(cache, KEY, "one")
    assert isinstance(lock, Lock)
    assert list(cache_module.model_of(locks.stage(cache, KEY, lock)).iterdir()) == [], "of others that may live"
    heir = locks.try_lock(cache, KEY, "one")
    assert isinstance(heir, Lock)
    staging = locks.stage(cache, KEY, heir)
    assert sorted(path.name for path in (cache.root / ".staging").iterdir()) == sorted([*others, staging.name])


def test_what_nobody_shows_to_be_alive_is_inherited_by_whoever_comes(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those who take a lock over at the same time, one may find no lock at all."""
    (locks.stage(cache, KEY) / "model" / "MLmodel").touch()
    monkeypatch.setattr(locks, "SILENCE_SECONDS", -1)
    lock = locks.try_lock(cache, KEY, "one")
    assert isinstance(lock, Lock)
    assert not lock.inherited
    assert [path.name for path in (locks.stage(cache, KEY, lock) / "model").iterdir()] == ["MLmodel"]


def test_what_was_staged_is_inherited_from_one_that_died_inheriting(cache: Cache) -> None:
    lock = locks.try_lock(cache, KEY, "one")
    assert isinstance(lock, Lock)
    (cache_module.model_of(locks.stage(cache, KEY, lock)) / "MLmodel").touch()
    lock.path.rename(disk.temporary(lock.path))
    heir = locks.try_lock(cache, KEY, "two")
    assert isinstance(heir, Lock)
    assert [path.name for path in cache_module.model_of(locks.stage(cache, KEY, heir)).iterdir()] == ["MLmodel"]
    assert [path.name for path in (cache.root / ".locks").iterdir()] == [KEY]


def test_staging_with_a_planted_link_is_not_inherited(cache: Cache, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    lock = locks.try_lock(cache, KEY, "one")
    assert isinstance(lock, Lock)
    first = locks.stage(cache, KEY, lock)
    (first / "model" / "extra").symlink_to(outside)
    heir = locks.try_lock(cache, KEY, "one")
    assert isinstance(heir, Lock)
    assert list((locks.stage(cache, KEY, heir) / "model").iterdir()) == []
