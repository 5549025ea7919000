"""Disks that are full, read-only, someone else's, or full of traps: on real file systems."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import disk
from darwin_runtime.storage.cache import Cache
from tests.conftest import ROOT, Finished, absent, program, run_role
from tests.roles.test_cleanup import clean
from tests.storage import test_transfer
from tests.support import users
from tests.support.apiserver import ApiServer
from tests.support.storage import publish
from tests.support.users import let_others_look

KEY, OTHER = "a" * 64, "b" * 64
NOBODY = 65534


@contextmanager
def mounted(where: Path, *options: str) -> Iterator[Path]:
    """A file system of the test's own."""
    if os.geteuid():
        absent("only root may mount file systems")
    where.mkdir(exist_ok=True)
    done = subprocess.run([program("mount", "mount"), *options, where], capture_output=True, text=True, check=False)
    if done.returncode:
        absent(f"mount {' '.join(options)} does not work here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


def tmpfs(tmp_path: Path, options: str) -> Iterator[Path]:
    with mounted(tmp_path / "volume", "-t", "tmpfs", "-o", options, "tmpfs") as volume:
        yield volume


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A volume of 8 MiB."""
    if request.param == "tmpfs":
        yield from tmpfs(tmp_path, "size=8m")
        return
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run([program("mkfs.ext4", "e2fsprogs"), "-q", image], check=True)
    with mounted(tmp_path / "volume", "-o", "loop", str(image)) as volume:
        yield volume


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[Path]:
    """A volume with room for bytes, but not for files: what no look at the free space can foresee."""
    yield from tmpfs(tmp_path, "size=100m,nr_inodes=40")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a model"
    path.mkdir()
    (path / "MLmodel").write_text("flavors: {}")
    for number in range(60):
        (path / f"file-{number}").write_bytes(b"x" * 1000)
    return path


def cached(model: Path, cache: Path, output: Path, **settings: object) -> Finished:
    fixed = {"MODEL_URI": model, "CACHE_PATH": cache, "OUTPUT_PATH": output, "STORAGE_STRATEGY": "pvc"}
    return run_role("download.py", **{**fixed, **settings})


def fill(volume: Path) -> None:
    with (volume / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 9, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass


def test_a_part_for_which_there_is_no_room_twice_is_begun_anew(tmp_path: Path) -> None:
    for volume in tmpfs(tmp_path, "size=1200k"):
        with test_transfer.left_by_another_run(volume, size=768 << 10) as (served, _):
            test_transfer.brought(served, volume, shared=True)
        assert served.offsets == [0, 0]


@pytest.mark.parametrize("strategy", ["pvc", "emptydir"])
def test_a_volume_that_fills_up(strategy: str, few_files: Path, model: Path, tmp_path: Path) -> None:
    models = few_files / "models" if strategy == "emptydir" else tmp_path / "models"
    done = cached(model, few_files / "cache", models, STORAGE_STRATEGY=strategy)
    assert done.code == 1
    assert f"no inodes are left at {few_files}: all 40 are in use" in done.last
    assert "enlarge" not in done.last, "there is room enough"
    assert "trying again" not in done.err, "which would not make room"
    assert not (models / "MLmodel").exists()
    for cache in few_files.glob("cache"):
        assert not list((cache / ".staging").iterdir()), "others need the room"
        assert not [name for name in os.listdir(cache) if cache_module.is_key(name)]

    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", few_files], check=True)
    done = cached(model, few_files / "cache", models, STORAGE_STRATEGY=strategy)
    assert done.code == 0, done.err
    assert (models / "file-59").stat().st_size == 1000


def test_a_full_volume_can_be_cleaned(small: Path, api: ApiServer) -> None:
    cache = Cache.prepare(small / "cache")
    for key in (KEY, OTHER):
        publish(cache, key, os.urandom(1_000_000), last_used=0)
    fill(small)
    with pytest.raises(OSError, match="No space left"):
        (small / "cache" / "something").write_bytes(b"x" * 10_000)
    (small / "cache" / "something").unlink(missing_ok=True)
    done = clean(cache.root, api, TTL_DAYS=1)
    assert done.code == 0, done.err
    assert not cache.has(KEY)
    assert shutil.disk_usage(small).free > 1_500_000


@pytest.mark.parametrize("pod", ["web-7c5ddbdf54-first", "web-7c5ddbdf54-second"])
@pytest.mark.parametrize(
    ("before", "rollout"),
    [("", ""), ("", "7c5ddbdf54"), ("6b9f9c7d8f", "7c5ddbdf54"), ("7c5ddbdf54", "7c5ddbdf54")],
    ids=["no rollout", "the first rollout", "a new rollout", "the same rollout"],
)
def test_a_pod_starts_from_a_full_cache(
    before: str, rollout: str, pod: str, small: Path, model: Path, tmp_path: Path
) -> None:
    first = pod.replace("second", "first")
    settings = {"DEPLOYMENT_NAME": "web", "POD_TEMPLATE_HASH": before}
    assert (
        cached(model, small / "cache", tmp_path / "models", POD_NAME=first.replace(rollout, before), **settings).code
        == 0
    )
    fill(small)
    settings["POD_TEMPLATE_HASH"] = rollout
    done = cached(model, small / "cache", tmp_path / "models-2", POD_NAME=pod, **settings)
    assert done.code == 0, done.err
    assert "0 bytes transferred" in done.err or "0 requests to MLflow" in done.err
    assert ("this rollout is not pinned: the volume is full" in done.err) is (rollout != before)
    assert pod in {lease.pod for lease in Cache(small / "cache").leases()}


def test_a_copy_that_does_not_fit_leaves_nothing(small: Path, model: Path, tmp_path: Path) -> None:
    (model / "large").write_bytes(bytes(9_000_000))
    done = cached(model, tmp_path / "cache", small / "models", LINK_MODE="copy")
    assert done.code == 1
    assert re.search(rf"the volume is full \(.* of .* free at {small}\).*No space left on device: '{small}", done.last)
    assert os.listdir(small / "models") == []


def test_what_can_not_be_removed_keeps_nothing_else_from_it(tmp_path: Path, api: ApiServer) -> None:
    cache = Cache.prepare(tmp_path / "cache")
    publish(cache, KEY, os.urandom(1000), last_used=0)
    doomed = cache.root / ".trash" / "0123456789abcdef.doomed"
    doomed.mkdir()
    with mounted(doomed / "busy", "-t", "tmpfs", "tmpfs"):
        done = clean(cache.root, api, TTL_DAYS=1)
    assert done.code == 1
    assert "busy" in done.err
    assert "1 things in " in done.last
    assert json.loads(done.out)["removed"] == 1
    assert not cache.has(KEY)


def test_a_read_only_volume_is_told(small: Path, model: Path, api: ApiServer, tmp_path: Path) -> None:
    cache = Cache.prepare(small / "cache")
    publish(cache, KEY, os.urandom(1000), last_used=0)
    with mounted(tmp_path / "read-only", "--bind", "-o", "ro", str(small)) as volume:
        done = cached(model, volume / "cache", tmp_path / "models")
        assert done.code == 1
        assert "mounted read-only" in done.last
        cleaned = clean(volume / "cache", api, TTL_DAYS=1)
        assert cleaned.code == 1
        assert "mounted read-only" in cleaned.last
        assert cache.has(KEY)
        listed = subprocess.run(
            [sys.executable, "-m", "darwin_runtime", "cache", "--cache", volume / "cache", "list"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert KEY[:12] in listed.stdout


def test_a_volume_of_another_user_is_told(tmp_path: Path, model: Path, api: ApiServer) -> None:
    let_others_look(tmp_path)
    cache = Cache.prepare(tmp_path / "cache")
    publish(cache, KEY, os.urandom(1000), last_used=0)
    (tmp_path / "models").mkdir()
    settings: dict[str, Any] = {"MODEL_URI": model, "OUTPUT_PATH": tmp_path / "models", "STORAGE_STRATEGY": "pvc"}
    done = users.download_as(NOBODY, [NOBODY], CACHE_PATH=cache.root, **settings)
    assert done.code == 1, done.err
    assert f"user {NOBODY}" in done.last
    cleaned = users.clean_as(NOBODY, [NOBODY], api, CACHE_PATH=cache.root, TTL_DAYS=0)
    assert cleaned.code == 1, cleaned.err
    assert f"user {NOBODY}" in cleaned.last
    assert cache.has(KEY)


def test_nothing_outside_is_touched(tmp_path: Path, model: Path, api: ApiServer) -> None:
    """Links planted wherever something is written, renamed or deleted."""
    outside = tmp_path / "outside"
    (outside / "model").mkdir(parents=True)
    for name in ("MLmodel", "model/MLmodel", "manifest.json", "last_used", "lock"):
        (outside / name).write_text("not yours")

    def seen() -> dict[str, tuple[float, bytes]]:
        files = [path for path in outside.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime, path.read_bytes()) for path in files}

    before = seen()
    cache = Cache.prepare(tmp_path / "cache")
    done = cached(model, cache.root, tmp_path / "models")
    assert done.code == 0, done.err
    [key] = [name for name in os.listdir(cache.root) if cache_module.is_key(name)]
    cache.delete_tree(cache.root / key)

    (cache.root / OTHER).symlink_to(outside)
    (cache.root / "notes").symlink_to(outside)
    (cache.root / ".staging" / f"{key}.0a").symlink_to(outside)
    (cache.root / ".trash" / f"{key}.0a").symlink_to(outside)
    (cache.root / ".trash" / "0a.doomed").symlink_to(outside)
    (cache.root / ".locks" / OTHER).symlink_to(outside / "lock")
    (cache.root / ".locks" / key).write_text('{"owner": "x", "released": true}')
    publish(cache, KEY, os.urandom(1000), last_used=0)
    (cache.root / KEY / "model" / "link").symlink_to(outside)
    (tmp_path / "models" / "file-0").unlink()
    (tmp_path / "models" / "file-0").symlink_to(outside / "MLmodel")

    done = cached(model, cache.root, tmp_path / "models")
    assert done.code == 0, done.err
    for lease in (cache.root / ".leases").iterdir():
        os.utime(lease, (0, 0))
    for _ in range(2):
        cleaned = clean(cache.root, api, TTL_DAYS=0)
        assert cleaned.code == 0, cleaned.err
    assert not cache.has(KEY)
    assert not cache.has(key)
    assert seen() == before


def test_many_files_are_deleted_in_little_memory(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for directory in range(10):
        inside = tree / str(directory)
        inside.mkdir(parents=True)
        for number in range(10_000):
            os.close(os.open(inside / f"file-{number:0100}", os.O_CREAT))
    script = (
        "import resource, sys; from pathlib import Path; from darwin_runtime.storage import disk; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; disk.remove_tree(Path(sys.argv[1])); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, tree], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30_000, "KiB"
    assert not tree.exists()


def test_two_delete_the_same(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for directory in range(50):
        (tree / str(directory)).mkdir(parents=True)
        for number in range(100):
            (tree / str(directory) / str(number)).touch()
    script = "import sys, pathlib; from darwin_runtime.storage import disk; disk.remove_tree(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tree)]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for one in both:
        _, err = one.communicate(timeout=60)
        assert one.returncode == 0, err
    assert not tree.exists()


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        (errno.ENOSPC, "/model-cache/x", "free at /); enlarge it"),
        (errno.ENOSPC, None, "the volume is full; enlarge it"),
        (errno.EDQUOT, "/model-cache/x", "the quota of its user, group or directory is used up"),
        (errno.EROFS, "/model-cache/x", "mount a volume there"),
        (errno.EROFS, 7, "mount it writable"),
        (errno.EACCES, "/model-cache/x", f"user {os.getuid()} of group"),
        (errno.EPERM, None, "set runAsUser"),
        (errno.ENOTDIR, "/model-cache/x", "set another path"),
        (errno.EIO, "/model-cache/x", "the events of the pod"),
        (errno.EMFILE, "/model-cache/x", "'/model-cache/x'"),
    ],
)
def test_an_error_says_what_to_do(code: int, name: object, words: str) -> None:
    error = OSError(code, os.strerror(code), name)
    explained = disk.explain(error)
    assert explained == str(error) if code == errno.EMFILE else explained.endswith(f" ({error})")
    assert words in explained


def use_up(volume: Path, content: bytes) -> None:
    for number in range(1000):
        (volume / f"file-{number}").write_bytes(content)


def test_a_full_volume_is_described_before_it_is_emptied(few_files: Path) -> None:
    """A discard makes room for others, which the error must not report."""
    emptied = disk.discard_when_full(few_files, lambda: shutil.rmtree(few_files / "files"))
    (few_files / "files").mkdir()
    with pytest.raises(OSError, match="No space left") as raised, emptied:
        use_up(few_files / "files", b"")
    assert f"no inodes are left at {few_files}: all 40 are in use" in disk.explain(raised.value)
    assert list(few_files.iterdir()) == []


def test_a_write_for_which_there_is_no_room_names_its_volume(small: Path) -> None:
    """The error of a write has no path of its own."""
    needing = disk.discard_when_full(small, lambda: None, lambda: 5000)
    with pytest.raises(OSError, match="No space left") as raised, needing:
        use_up(small, bytes(100_000))
    line = re.escape(f"at {small}, 4.9 KiB more needed); enlarge it")
    assert re.search(rf"the volume is full \(.* of .* free {line}.*'{small}'\)$", disk.explain(raised.value))


def test_the_directory_that_refuses_a_rename_is_named(tmp_path: Path) -> None:
    """Of the two in the error, either can be the one."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    let_others_look(tmp_path)
    script = f"""
for names in (("open/x", "closed/x"), ("closed/x", "open/x"), ("open/x/y", "closed")):
    old, new = (os.path.join({str(tmp_path)!r}, name) for name in names)
    print(disk.explain(PermissionError(13, "denied", old, None, new)))
"""
    done = users.run_as(script, NOBODY, [NOBODY])
    assert done.code == 0, done.err
    explained = done.out.splitlines()
    assert len(explained) == 3
    assert [line for line in explained if f": {tmp_path / 'closed'} belongs to user 0, " not in line] == []
