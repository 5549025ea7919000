"""The on-disk contract, on a real directory."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from darwin_runtime.errors import NotACache, RoleError
from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import disk, locks, references
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.manifest import File, Manifest
from tests.support.storage import publish

KEY, OTHER = "a" * 64, "b" * 64


def test_published_is_whole(cache: Cache) -> None:
    assert publish(cache, KEY)
    assert cache.has(KEY)
    assert cache.damage(KEY) == []
    assert not list((cache.root / ".staging").iterdir())
    [entry], strange = cache.entries(cache.now())
    assert (entry.key, entry.bytes, entry.model_uri, strange) == (KEY, 7, "models:/m/1", [])


def test_the_first_publisher_wins(cache: Cache) -> None:
    assert publish(cache, KEY, b"first")
    assert not publish(cache, KEY, b"second")
    assert (cache.model(KEY) / "MLmodel").read_bytes() == b"first"
    assert not list((cache.root / ".staging").iterdir())


def test_what_the_manifest_denies_is_not_published(cache: Cache) -> None:
    staging = locks.stage(cache, KEY)
    (staging / "model" / "MLmodel").write_bytes(b"half")
    with pytest.raises(RoleError, match="4 bytes instead of 8"):
        locks.publish(cache, staging, KEY, Manifest("models:/m/1", {}, [File("MLmodel", 8, "0" * 64)]))
    assert not cache.has(KEY)


def test_other_bytes_are_replaced_where_they_are_looked_for(cache: Cache) -> None:
    publish(cache, KEY, b"weights")
    (cache.model(KEY) / "MLmodel").write_bytes(b"weighty")
    assert cache.damage(KEY) == []
    assert "sha256" in cache.damage(KEY, "sha256")[0]
    assert cache.damage(KEY, "off") == []
    assert not publish(cache, KEY, b"weights")
    assert publish(cache, KEY, b"weights", verify="sha256")
    assert cache.damage(KEY, "sha256") == []


def test_a_damaged_winner_is_replaced(cache: Cache) -> None:
    publish(cache, KEY, b"first")
    os.truncate(cache.model(KEY) / "MLmodel", 2)
    assert publish(cache, KEY, b"second")
    assert (cache.model(KEY) / "MLmodel").read_bytes() == b"second"
    assert cache.damage(KEY) == []


def test_a_directory_without_a_manifest_is_a_damaged_entry(cache: Cache) -> None:
    (cache.root / KEY / "model").mkdir(parents=True)
    assert cache.has(KEY)
    assert cache.damage(KEY)
    assert publish(cache, KEY)


def test_what_may_not_be_looked_at_is_not_damaged(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(cache, KEY)

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    # Root, who runs the tests in CI, may look at everything.
    monkeypatch.setattr(disk, "open_regular", denied)
    with pytest.raises(PermissionError):
        cache.damage(KEY)


def set_aside(cache: Cache, key: str) -> Path:
    """The entry in the trash, as a cleanup leaves it."""
    removal = cache.announce(key)
    assert cache.commit(removal)
    cache.cancel(removal)
    return removal.trash


def test_nothing_damaged_comes_back(cache: Cache) -> None:
    publish(cache, KEY)
    trash = set_aside(cache, KEY)
    (trash / "model" / "MLmodel").unlink()
    assert not cache.restore(trash, KEY)
    assert not cache.has(KEY)


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest"])
def test_damage_is_named(harm: str, cache: Cache) -> None:
    publish(cache, KEY)
    file = cache.model(KEY) / "MLmodel"
    if harm == "truncate":
        os.truncate(file, 3)
    elif harm == "remove":
        file.unlink()
    else:
        file = cache.root / KEY / "manifest.json"
        file.write_text("{}")
    [damage] = cache.damage(KEY)
    assert str(file) in damage


def test_other_users_may_read(cache: Cache) -> None:
    publish(cache, KEY)
    for path in (cache.root / KEY, cache.model(KEY), cache.model(KEY) / "MLmodel"):
        assert path.stat().st_mode & 0o044 == 0o044


def test_a_lease_moves_with_its_output(cache: Cache) -> None:
    cache.lease("pod", "/models", KEY)
    cache.lease("pod", "/other", KEY)
    cache.lease("pod", "/models", OTHER)
    assert {(lease.pod, lease.key) for lease in cache.leases()} == {("pod", OTHER), ("pod", KEY)}
    assert len(cache.leases()) == 2
    for lease in cache.leases():
        cache.drop_lease(lease)
    assert cache.leases() == []


def test_a_lease_written_anew_is_not_dropped(cache: Cache) -> None:
    cache.lease("pod", "/models", KEY)
    [old] = cache.leases()
    cache.lease("pod", "/models", KEY)
    cache.drop_lease(old)
    assert [lease.key for lease in cache.leases()] == [KEY]


# Removing against using


def found(cache: Cache, key: str) -> tuple[int, int]:
    there = cache.fingerprint(key)
    assert there
    return there


def test_an_entry_that_is_kept_is_not_removed(cache: Cache) -> None:
    publish(cache, KEY)
    removal = cache.announce(KEY)
    assert cache.veto_removals(KEY, found(cache, KEY))
    assert not cache.commit(removal)
    assert cache.damage(KEY) == []
    cache.cancel(removal)
    assert not list((cache.root / ".trash").iterdir())


def test_keeping_another_entry_vetoes_nothing(cache: Cache) -> None:
    publish(cache, KEY)
    removal = cache.announce(KEY)
    publish(cache, OTHER)
    assert cache.veto_removals(OTHER, found(cache, OTHER))
    assert cache.commit(removal)


@pytest.mark.parametrize("again", [False, True])
def test_who_comes_too_late_to_keep_an_entry_is_told(again: bool, cache: Cache) -> None:
    publish(cache, KEY)
    there = found(cache, KEY)
    removal = cache.announce(KEY)
    assert cache.commit(removal)
    if again:
        publish(cache, KEY)
    assert not cache.veto_removals(KEY, there)
    assert (removal.trash / "manifest.json").exists()
    cache.cancel(removal)
    assert [path.name for path in (cache.root / ".trash").iterdir()] == [removal.trash.name]


def test_an_announced_entry_s_trash_is_its_announcer_s(cache: Cache) -> None:
    publish(cache, KEY)
    removal = cache.announce(KEY)
    cache.commit(removal)
    assert cache.trash() == []
    cache.cancel(removal)
    assert [key for _, key in cache.trash()] == [KEY]


def test_a_withdrawn_announcement_removes_nothing(cache: Cache) -> None:
    publish(cache, KEY)
    removal = cache.announce(KEY)
    cache.cancel(removal)
    assert not cache.commit(removal)
    assert cache.has(KEY)


# What it holds


@pytest.mark.parametrize("name", ["pod.0.json", f"pod.-.{'0' * 16}.key.{'0' * 16}"])
def test_an_unreadable_lease_is_not_ignored(name: str, cache: Cache) -> None:
    (cache.root / ".leases" / name).touch()
    with pytest.raises(ValueError, match=f"{name} is not a lease"):
        cache.leases()


def test_leases_that_can_not_be_listed_are_not_none(cache: Cache) -> None:
    (cache.root / ".leases").rmdir()
    (cache.root / ".leases").touch()
    with pytest.raises(NotADirectoryError):
        cache.leases()


def test_what_can_not_be_listed_in_a_tree_is_not_overlooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    real = os.scandir

    def stale(path: Path) -> object:
        if Path(path).name == "deeper":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(OSError, match="Stale"):
        list(disk.below(tmp_path))


UID = "01234567-89ab-cdef-0123-456789abcdef"


def test_pods_with_the_same_name_or_start_have_leases_of_their_own(cache: Cache) -> None:
    cache.lease("a.b", "/models", KEY)
    cache.lease("x" * 252 + "1", "/models", KEY)
    cache.lease("x" * 252 + "2", "/models", KEY)
    cache.lease("a.b", "/models", KEY, UID)
    found = [(lease.pod, lease.uid) for lease in cache.leases()]
    assert sorted(found) == [("a.b", ""), ("a.b", UID), ("x" * 63, ""), ("x" * 63, "")]


def test_nothing_is_written_through_a_planted_link(cache: Cache, tmp_path: Path) -> None:
    publish(cache, KEY)
    outside = tmp_path / "outside"
    (cache.root / KEY / "last_used").unlink()
    (cache.root / KEY / "last_used").symlink_to(outside)
    with pytest.raises(OSError, match="last_used"):
        cache.touch(KEY)
    outside.write_text(f"{cache_module.TAG_SIGNATURE}\n")
    os.utime(outside, (0, 0))
    (cache.root / cache_module.TAG_NAME).unlink()
    (cache.root / cache_module.TAG_NAME).symlink_to(outside)
    with pytest.raises(NotACache):
        Cache.find(cache.root)
    assert outside.stat().st_mtime == 0


def test_what_only_looks_like_ours_is_left_alone(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "ABANDONED_SECONDS", -1)
    for name in (".backup.tmp", "notes.tmp"):
        (cache.root / name).touch()
    assert list(cache.leftovers()) == []
    assert cache.entries(cache.now())[1] == [".backup.tmp", "notes.tmp"]


@pytest.mark.parametrize("text", ['{"format": 1, "files": [{"path": "a", "size": 1e999, "sha256": ""}]}', "[" * 10**5])
def test_a_manifest_that_overflows_is_no_manifest(text: str, cache: Cache) -> None:
    publish(cache, KEY)
    (cache.root / KEY / "manifest.json").write_text(text)
    assert cache.entries(cache.now()) == ([], [KEY])
    assert cache.damage(KEY) != []


def test_refs(cache: Cache) -> None:
    assert references.find_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/m@a") is None
    references.set_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/m@a", KEY)
    found = references.find_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/m@a")
    assert found is not None
    assert found[0] == KEY
    assert references.find_ref(cache, {"MLFLOW_TRACKING_URI": "http://elsewhere"}, "models:/m@a") is None
    references.drop_dangling(cache, 3600)
    assert references.find_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/m@a") is not None
    references.drop_dangling(cache, -1)
    assert references.find_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/m@a") is None


def test_trash_and_back(cache: Cache) -> None:
    publish(cache, KEY)
    trash = set_aside(cache, KEY)
    assert not cache.has(KEY)
    assert [key for _, key in cache.trash()] == [KEY]
    assert KEY in references.all_names(cache), "still asked for by that name"
    assert not cache.commit(cache.announce(KEY))
    assert cache.restore(trash, KEY)
    assert cache.damage(KEY) == []
    assert not cache.restore(trash, KEY), "another cleanup was first"


def test_a_new_download_keeps_its_place(cache: Cache) -> None:
    publish(cache, KEY, b"old")
    trash = set_aside(cache, KEY)
    publish(cache, KEY, b"new")
    assert not cache.restore(trash, KEY)
    assert (cache.model(KEY) / "MLmodel").read_bytes() == b"new"


def test_aliases(cache: Cache) -> None:
    alias = references.make_alias("shop", "models:/m/1")
    assert alias == hashlib.sha256(b"shop:models:/m/1").hexdigest()
    publish(cache, KEY)
    references.set_alias(cache, alias, OTHER)
    references.set_alias(cache, alias, KEY)
    assert references.aliases(cache) == {alias: KEY}
    assert (cache.root / alias / "model" / "MLmodel").is_file()
    assert references.all_names(cache) == {alias: KEY, KEY: KEY}


def test_only_old_links_to_nothing_are_dropped(cache: Cache) -> None:
    publish(cache, KEY)
    for alias, key in {"c" * 64: KEY, "d" * 64: OTHER}.items():
        references.set_alias(cache, alias, key)
    references.drop_dangling(cache, 3600)
    assert len(references.aliases(cache)) == 2
    references.drop_dangling(cache, -1)
    assert references.aliases(cache) == {"c" * 64: KEY}
    assert cache.has(KEY)


def test_an_alias_taken_by_a_directory_stays(cache: Cache) -> None:
    (cache.root / OTHER).mkdir()
    with pytest.raises(OSError, match=OTHER):
        references.set_alias(cache, OTHER, KEY)
    assert (cache.root / OTHER).is_dir()
    assert not list(cache.root.glob(".b*"))


def test_a_planted_link_is_neither_entry_nor_alias(cache: Cache, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (cache.root / KEY).symlink_to(outside)
    assert references.aliases(cache) == {}
    assert cache.entries(cache.now()) == ([], [])
    with pytest.raises(NotACache, match="symbolic link where an entry belongs; remove it by hand"):
        publish(cache, KEY)
    (cache.root / KEY).unlink()
    (cache.root / KEY).touch()
    with pytest.raises(NotACache, match="file where an entry belongs; remove it by hand"):
        publish(cache, KEY)
    assert list(outside.iterdir()) == []


def test_strangers_are_told_apart(cache: Cache) -> None:
    (cache.root / "notes").mkdir()
    (cache.root / KEY / "model").mkdir(parents=True)
    (cache.root / "lost+found").mkdir()
    assert cache.entries(cache.now()) == ([], [KEY, "notes"])


def test_keys_depend_on_identity_and_listing() -> None:
    identity, listing = {"name": "m", "version": "1"}, [("MLmodel", 3), ("data", None)]
    key = cache_module.make_key(identity, listing)
    assert cache_module.is_key(key)
    assert key == cache_module.make_key(dict(reversed(identity.items())), listing[::-1])
    assert key != cache_module.make_key({**identity, "version": "2"}, listing)
    assert key != cache_module.make_key(identity, [("MLmodel", 4), ("data", None)])


@pytest.mark.parametrize("prepare", [False, True])
def test_find_takes_a_cache_or_nothing(prepare: bool, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    (root / "lost+found").mkdir()
    if prepare:
        Cache.prepare(root)
    found = Cache.find(root)
    assert (found is not None) is prepare


def test_find_refuses(tmp_path: Path) -> None:
    Cache.prepare(tmp_path / "cache")
    (tmp_path / "link").symlink_to("cache")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    (tmp_path / "liar").mkdir()
    (tmp_path / "liar" / "CACHEDIR.TAG").write_text("not the signature")
    for path, why in {
        tmp_path / "link": "symbolic link",
        tmp_path / "home": "not a cache",
        tmp_path / "liar": "not a cache",
        tmp_path / "absent": "not a directory",
        Path("/"): "root of the file system",
    }.items():
        with pytest.raises(NotACache, match=why):
            Cache.find(path)


@pytest.mark.parametrize("name", [".staging", ".trash", ".leases", ".refs", ".locks"])
def test_a_planted_link_inside_is_refused(name: str, tmp_path: Path) -> None:
    root, outside = tmp_path / "cache", tmp_path / "outside"
    Cache.prepare(root)
    outside.mkdir()
    (root / name).rmdir()
    (root / name).symlink_to(outside)
    for use in (Cache.find, Cache.prepare):
        with pytest.raises(NotACache, match=name):
            use(root)


def test_a_stranger_is_nobody_s_leftover(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.root / ".staging" / "thesis").mkdir()
    (cache.root / ".trash" / "thesis").mkdir()
    monkeypatch.setattr(cache_module, "ABANDONED_SECONDS", -1)
    assert list(cache.leftovers()) == []


def test_preparing_twice_changes_nothing(cache: Cache) -> None:
    publish(cache, KEY)
    before = (cache.root / cache_module.TAG_NAME).stat().st_mtime_ns
    Cache.prepare(cache.root)
    assert (cache.root / cache_module.TAG_NAME).stat().st_mtime_ns == before
    assert cache.has(KEY)


def test_left_over_by_what_happened_last(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = locks.stage(cache, KEY)
    # A local store's copy keeps its source's times, which say nothing about the download.
    old = staging / "model" / "MLmodel"
    old.touch()
    os.utime(old, (0, 0))
    os.utime(staging, (0, 0))
    assert list(cache.leftovers()) == []
    monkeypatch.setattr(cache_module, "ABANDONED_SECONDS", -1)
    assert list(cache.leftovers()) == [staging]


def test_everything_of_the_dead_is_left_over_at_last(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(cache, KEY)
    locks.try_lock(cache, OTHER, "one")
    locks.stage(cache, OTHER)
    cache.announce(OTHER)
    for directory in (cache.root, cache.root / ".leases", cache.root / ".trash"):
        disk.temporary(directory / "x").touch()
    doomed = cache.root / ".trash" / "0.doomed"
    (doomed / "model").mkdir(parents=True)
    assert list(cache.leftovers()) == [doomed], "which nobody may want back"
    monkeypatch.setattr(cache_module, "ABANDONED_SECONDS", -1)
    for path in list(cache.leftovers()):
        cache.delete_tree(path)
    assert sorted(path.name for path in cache.root.iterdir()) == sorted(
        [cache_module.TAG_NAME, KEY, *cache_module.INNER]
    )
    assert not [
        path for inner in (".leases", ".locks", ".staging", ".trash") for path in (cache.root / inner).iterdir()
    ]


def test_an_interrupted_write_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    disk.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        disk.write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_removing_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    disk.remove_tree(inside)
    disk.remove_tree(tmp_path / "inside")
    assert (outside / "file").exists()
