"""The init container and the CronJob on volumes of many kinds: shared by users, without links, mounted twice."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from darwin_runtime.storage import places, references
from darwin_runtime.storage.cache import DAY, Cache
from tests.conftest import Finished, absent, run_role
from tests.roles.test_cleanup import clean
from tests.roles.test_download import keys
from tests.storage.test_disk import mounted
from tests.support import fuse, users
from tests.support.apiserver import ApiServer
from tests.support.users import clean_as, download_as, let_others_look

FILES = {"MLmodel": b"flavors: {}", "data/weights": b"w" * 5000}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Not below pytest's own directory, which each run of pytest closes to other users."""
    with tempfile.TemporaryDirectory(prefix="darwin-volumes-") as directory:
        yield Path(directory)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def download(model: object, output: Path, cache: Path | None = None, **settings: object) -> Finished:
    through = {"STORAGE_STRATEGY": "pvc", "CACHE_PATH": cache} if cache else {}
    return run_role("download.py", MODEL_URI=model, OUTPUT_PATH=output, **through, **settings)


def holds(output: Path) -> bool:
    return {name: (output / name).read_bytes() for name in FILES} == FILES


def below(path: Path) -> dict[str, bytes | None]:
    return {str(one): one.read_bytes() if one.is_file() else None for one in path.rglob("*")}


# Places that overlap


@contextmanager
def bound(what: Path, where: Path) -> Iterator[None]:
    what.mkdir(parents=True, exist_ok=True)
    where.mkdir(parents=True, exist_ok=True)
    with mounted(where, "--bind", str(what)):
        yield


@pytest.mark.parametrize(
    ("output", "cache", "words"),
    [
        ("volume", "volume", "is the model cache"),
        ("volume/./", "other/../volume", "is the model cache"),
        ("volume/models", "volume", "is inside the model cache"),
        ("volume", "volume/cache", "contains the model cache"),
        ("new/models", "new", "is inside the model cache"),
        ("link", "volume", "is the model cache"),
        ("link/models", "volume", "is inside the model cache"),
        ("volume", "link/cache", "contains the model cache"),
    ],
)
def test_an_output_in_the_cache_is_a_bad_setting(
    output: str, cache: str, words: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    before = below(tmp_path)
    done = download(model, tmp_path / output, tmp_path / cache)
    assert done.code == 2, done.err
    assert f"OUTPUT_PATH={tmp_path / output} {words} CACHE_PATH={tmp_path / cache}" in done.last
    assert "give it a directory of its own, such as an emptyDir" in done.last
    assert below(tmp_path) == before, "nothing is written first"


@pytest.mark.parametrize(
    ("at_output", "output", "at_cache", "cache", "words"),
    [
        ("", "", "", "", "is"),
        ("", "models", "", "", "is inside"),
        ("", "models", "", "not/yet", None),
        ("", "", "", "cache", "contains"),
        ("models", "", "", "", "is inside"),
        ("cache/models", "deeper", "", "cache", "is inside"),
        ("cache", "", "", "cache", "is"),
        ("", "", "cache", "", "contains"),
        ("models", "", "cache", "", None),
        ("cache-2", "", "", "cache", None),
    ],
)
def test_a_volume_that_is_mounted_twice(
    at_output: str, output: str, at_cache: str, cache: str, words: str | None, model: Path, tmp_path: Path
) -> None:
    """As volumeMounts of one claim, with or without a subPath."""
    volume = tmp_path / "volume"
    with bound(volume / at_output, tmp_path / "models"), bound(volume / at_cache, tmp_path / "a cache"):
        done = download(model, tmp_path / "models" / output, tmp_path / "a cache" / cache)
    assert done.code == (2 if words else 0), done.err
    if words:
        assert f"{words} the model cache CACHE_PATH={tmp_path / 'a cache' / cache}" in done.last


def test_mounts_of_one_file_server_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two exports can have one device and one root, where a server's mounts share a superblock."""
    output, cache = tmp_path / "models", tmp_path / "cache"
    for path in (output, cache):
        path.mkdir()
    lines = [f"{number} 1 0:52 / {path} rw - nfs4 nas:/x rw\n" for number, path in enumerate((output, cache))]
    monkeypatch.setattr(places, "MOUNTS", tmp_path / "mountinfo")
    places.MOUNTS.write_text("".join(lines))
    assert places.conflict(output, cache, "models:/m/1") is None
    places.MOUNTS.unlink()
    assert places.conflict(output, cache, "models:/m/1") is None, "a system without that list"


@pytest.mark.parametrize(
    ("output", "words"), [("", "is the"), ("models", "is inside the"), ("{key}/model", "is inside the")]
)
def test_an_output_that_is_a_cache_is_a_bad_setting_with_any_strategy(
    output: str, words: str, model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert download(model, tmp_path / "models", cache).code == 0
    [key] = keys(cache)
    place = cache / output.format(key=key)
    before = below(cache)
    for done in (download(model, place), download(model, place, tmp_path / "another cache")):
        assert done.code == 2, done.err
        assert f"OUTPUT_PATH={place} {words} model cache {cache}, which has a CACHEDIR.TAG" in done.last
        assert below(cache) == before


def test_darwin_s_chart_has_its_output_where_the_cache_is_by_default(model: Path, tmp_path: Path) -> None:
    """With `emptydir` it mounts the pod's own volume at /model-cache, which is the default of CACHE_PATH."""
    for _ in range(2):
        assert download(model, tmp_path / "models", CACHE_PATH=tmp_path / "models").code == 0
    assert holds(tmp_path / "models")


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
@pytest.mark.parametrize(
    ("output", "words"), [("source", "is"), ("source/models", "is inside"), (".", "contains"), ("link", "is")]
)
def test_a_model_is_not_downloaded_onto_itself(
    output: str, words: str, strategy: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(model)
    before = below(tmp_path)
    settings: dict[str, Any] = {
        "STORAGE_STRATEGY": strategy,
        "CACHE_PATH": tmp_path.with_name(f"{tmp_path.name}-cache"),
    }
    for uri in (model, model.as_uri()):
        done = download(uri, tmp_path / output, REQUIRE_SHA256="0" * 64, **settings)
        assert done.code == 2, done.err
        assert f"OUTPUT_PATH={tmp_path / output} {words} the directory of MODEL_URI={uri}" in done.last
    assert below(tmp_path) == before


# Volumes that lack something

REFUSALS = ("EPERM", "EOPNOTSUPP", "ENOSYS", "EINVAL")


@pytest.fixture(params=REFUSALS)
def poor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A volume without symbolic links, modes, times that can be set, and flushes of directories."""
    refused = dict.fromkeys(("symlink", "chmod", "utime", "fsyncdir"), request.param)
    with fuse.mounted(tmp_path / "backing", tmp_path / "poor", **refused) as volume:
        yield volume


@pytest.mark.parametrize("mode", [None, "copy", "symlink"])
def test_an_output_without_links(mode: str | None, poor: Path, model: Path, tmp_path: Path) -> None:
    pvc: dict[str, Any] = {"cache": tmp_path / "cache", "LINK_MODE": mode} if mode else {}
    done = download(model, poor / "models", **pvc)
    assert done.code == 0, done.err
    assert holds(poor / "models")
    assert not os.path.lexists(poor / "models" / "model")
    [line] = [line for line in done.err.splitlines() if "MODEL_LOCAL_PATH" in line]
    assert f"the link {poor / 'models' / 'model'} for charts is not there (no symbolic links there" in line
    assert f"MODEL_LOCAL_PATH={poor / 'models'}" in line
    assert ("gets a copy, as with LINK_MODE=copy: no symbolic links there" in done.err) == (mode == "symlink")

    inode = (poor / "models" / "MLmodel").stat().st_ino
    again = download(model, poor / "models", **pvc)
    assert again.code == 0, again.err
    assert "already holds" in again.err
    assert "0 bytes transferred" in again.err
    assert (poor / "models" / "MLmodel").stat().st_ino == inode
    assert not (poor / "models" / ".darwin-staging").exists()


def test_a_copy_becomes_links_where_there_are_links(model: Path, tmp_path: Path) -> None:
    for mode in ("copy", "symlink", "symlink", "copy"):
        done = download(model, tmp_path / "models", tmp_path / "cache", LINK_MODE=mode)
        assert done.code == 0, done.err
        assert (tmp_path / "models" / "MLmodel").is_symlink() == (mode == "symlink")
        assert (tmp_path / "models" / "model" / "MLmodel").exists()
        assert holds(tmp_path / "models")
        assert not (tmp_path / "models" / ".darwin-staging").exists()


def test_a_cache_on_such_a_volume(poor: Path, model: Path, api: ApiServer, tmp_path: Path) -> None:
    """Ages stay right, as they decide what is removed."""
    for pod in ("a", "b", "b"):
        done = download(model, tmp_path / f"models-{pod}", poor / "cache", POD_NAME=pod, DEPLOYMENT_NAME="shop")
        assert done.code == 0, done.err
    assert "0 bytes transferred" in done.err
    cache = Cache(poor / "cache")
    [key] = keys(cache.root)
    alias = references.make_alias("shop", str(model))
    [line] = [line for line in done.err.splitlines() if alias in line]
    assert f"set MODEL_LOCAL_PATH={cache.model(key)} in the main container" in line
    assert not os.path.lexists(cache.root / alias)

    kept = tmp_path / "backing" / "cache"
    for path in [kept / "CACHEDIR.TAG", kept / key / "last_used", *(kept / ".leases").iterdir()]:
        os.utime(path, (0, 0))
    assert cache.now() == pytest.approx(time.time(), abs=60)
    cache.touch(key)
    cleaned = clean(cache.root, api, TTL_DAYS=1)
    assert cleaned.code == 0, cleaned.err
    assert keys(cache.root) == [key], "it was needed just now"
    os.utime(kept / key / "last_used", (time.time() - 2 * DAY,) * 2)
    cleaned = clean(cache.root, api, TTL_DAYS=1)
    assert cleaned.code == 0, cleaned.err
    assert keys(cache.root) == []


def test_a_server_that_refuses_root_is_named(model: Path, tmp_path: Path) -> None:
    """As an NFS export with root_squash."""
    with fuse.mounted(tmp_path / "backing", tmp_path / "poor", mkdir="EACCES") as volume:
        done = download(model, tmp_path / "models", volume / "cache")
    assert done.code == 1
    assert f"cannot write to CACHE_PATH {volume / 'cache'}: user 0 of group" in done.last
    assert f"([Errno {errno.EACCES}] " in done.last
    assert "(root_squash)" in done.last
    assert "set runAsUser" in done.last


# Volumes that users share

FIRST, SECOND, THIRD, GROUP = 10001, 10002, 10003, 5000


@pytest.fixture
def volume(model: Path, tmp_path: Path) -> Path:
    """As the kubelet leaves a volume for pods with `fsGroup`, with an output for each user."""
    if os.geteuid():
        absent("only root can become another user")
    path = tmp_path / "volume"
    path.mkdir()
    let_others_look(tmp_path)
    os.chown(path, 0, GROUP)
    path.chmod(0o2775)
    for user in (FIRST, SECOND, THIRD):
        (tmp_path / f"models-{user}").mkdir()
        os.chown(tmp_path / f"models-{user}", user, user)
    return path


def through(cache: Path, model: Path, user: int, /, **settings: object) -> dict[str, Any]:
    output = model.with_name(f"models-{user}")
    fixed = {"MODEL_URI": model, "OUTPUT_PATH": output, "CACHE_PATH": cache, "STORAGE_STRATEGY": "pvc"}
    return {**fixed, "POD_NAME": f"pod-{user}", "DEPLOYMENT_NAME": "shop", **settings}


@pytest.mark.parametrize("inside", ["", "cache"])
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_users_of_one_group_share_a_cache(
    umask: int, inside: str, volume: Path, model: Path, api: ApiServer, tmp_path: Path
) -> None:
    """One publishes, another uses, a third cleans up; each has a primary group of its own."""
    let_others_look(api.directory)
    cache = volume / inside
    for user in (FIRST, SECOND, FIRST):
        done = download_as(user, [user, GROUP], umask, **through(cache, model, user))
        assert done.code == 0, done.err
        assert "not remembered" not in done.err
        assert "WARNING" not in done.err
    assert "0 bytes transferred" in done.err
    [key] = keys(cache)
    assert (Cache(cache).model(key) / "MLmodel").stat().st_mode & 0o777 == 0o644, "nobody writes to a model"
    for path in [path for path in cache.rglob("*") if not path.is_symlink()]:
        assert path.stat().st_gid == GROUP
        assert path.stat().st_mode & 0o020 or path.is_relative_to(Cache(cache).model(key)), path
    for lease in (cache / ".leases").iterdir():
        os.utime(lease, (0, 0))
    (cache / ".staging").rmdir()  # the third makes it anew, for all
    cleaned = clean_as(THIRD, [THIRD, GROUP], api, umask, CACHE_PATH=cache, TTL_DAYS=0)
    assert cleaned.code == 0, cleaned.err
    assert keys(cache) == []
    assert not [*(cache / ".leases").iterdir(), *(cache / ".trash").iterdir()]
    done = download_as(SECOND, [SECOND, GROUP], umask, **through(cache, model, SECOND))
    assert done.code == 0, done.err


def test_a_download_is_taken_over_from_another_user(volume: Path, model: Path) -> None:
    settings = through(volume, model, FIRST)
    assert download_as(FIRST, [FIRST, GROUP], **settings).code == 0
    [key] = keys(volume)
    Cache(volume).delete_tree(volume / key)
    begun = f"""
root = cache.Cache.prepare(pathlib.Path({str(volume)!r}))
lock = locks.try_lock(root, {key!r}, "pod")
staging = locks.stage(root, {key!r}, lock)
(cache.model_of(staging) / "data").mkdir()
(cache.model_of(staging) / "data" / "weights").write_bytes(b"w" * 5000)
(cache.parts_of(staging) / "something").touch()
lock.release(done=False)
"""
    done = users.run_as(begun, FIRST, [FIRST, GROUP])
    assert done.code == 0, done.err
    done = download_as(SECOND, [SECOND, GROUP], **through(volume, model, SECOND))
    assert done.code == 0, done.err
    assert "4.9 KiB of it already here" in done.err
    assert keys(volume) == [key]
    assert not list((volume / ".staging").iterdir())


def test_a_volume_that_the_group_may_not_write_to_is_not_opened_to_it(volume: Path, model: Path) -> None:
    os.chown(volume, FIRST, GROUP)
    volume.chmod(0o2755)
    done = download_as(FIRST, [FIRST, GROUP], **through(volume, model, FIRST))
    assert done.code == 0, done.err
    assert not [path for path in volume.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]


@pytest.mark.parametrize(
    ("groups", "advice"),
    [
        ([SECOND, GROUP], f"its group may not write, since user {FIRST} made it"),
        ([SECOND], f"set fsGroup in the pod's securityContext, or runAsUser to {FIRST}"),
    ],
)
@pytest.mark.parametrize("spoiled", ["{key}", "{key}/last_used", ".leases", ".staging", ".locks"])
def test_what_keeps_a_user_out_is_named(
    spoiled: str, groups: list[int], advice: str, volume: Path, model: Path
) -> None:
    """The whole path, its owner and mode, who asked, and what helps."""
    assert download_as(FIRST, [FIRST, GROUP], **through(volume, model, FIRST)).code == 0
    [key] = keys(volume)
    path = volume / spoiled.format(key=key)
    if spoiled == "{key}":
        (path / "last_used").unlink()
    elif spoiled in (".staging", ".locks"):
        Cache(volume).delete_tree(volume / key)
    for one in [volume, *(one for one in volume.rglob("*") if not one.is_symlink())]:
        one.chmod(one.stat().st_mode | (0o777 if one.is_dir() else 0o666))
    path.chmod(0o644 if path.is_file() else 0o2755)
    done = download_as(SECOND, groups, **through(volume, model, SECOND))
    assert done.code == 1, done.err
    kind = "-rw-r--r--" if path.is_file() else "drwxr-sr-x"
    assert f"user {SECOND} of group {', '.join(map(str, sorted(groups)))} may not: {path} belongs to" in done.last
    assert f"user {FIRST}, group {GROUP}, mode {kind}; {advice}" in done.last


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
def test_an_output_that_can_not_be_made_is_explained(strategy: str, volume: Path, model: Path) -> None:
    closed = model.with_name(f"models-{FIRST}")
    settings = {"STORAGE_STRATEGY": strategy, "OUTPUT_PATH": closed / "deep"}
    done = download_as(SECOND, [SECOND, GROUP], **through(volume, model, SECOND, **settings))
    assert done.code == 1
    assert f"cannot create OUTPUT_PATH {closed / 'deep'}: user " in done.last
    assert f"([Errno {errno.EACCES}] Permission denied: '{closed / 'deep'}')" in done.last
    assert f"{closed} belongs to user {FIRST}" in done.last
    assert f"runAsUser to {FIRST}" in done.last

    settings["OUTPUT_PATH"] = closed
    done = download_as(SECOND, [SECOND, GROUP], **through(volume, model, SECOND, **settings))
    assert done.code == 1
    assert f"cannot write to OUTPUT_PATH {closed}: user " in done.last
    assert f"([Errno {errno.EACCES}] Permission denied: '{closed}')" in done.last
    assert f"runAsUser to {FIRST}" in done.last

    settings["OUTPUT_PATH"] = model.with_name("file")
    model.with_name("file").touch()
    done = download_as(SECOND, [SECOND, GROUP], **through(volume, model, SECOND, **settings))
    assert done.code == 1
    assert f"cannot create OUTPUT_PATH {model.with_name('file')}: a file is where a directory belongs" in done.last
    assert f"([Errno {errno.EEXIST}] File exists: " in done.last
    assert "a file is where a directory belongs; remove it, or set another path" in done.last
