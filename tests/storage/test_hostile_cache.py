"""A shared cache to which somebody else can write: what is planted there is told, and harms nobody outside of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from darwin_runtime import __main__ as command
from darwin_runtime.errors import FileChanged, RoleError
from darwin_runtime.model.integrity import check_whole
from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import disk, locks, output, references
from darwin_runtime.storage import manifest as manifest_module
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.manifest import File, Manifest
from darwin_runtime.storage.single_flight import Waiting
from tests.conftest import Finished
from tests.roles.test_cleanup import clean, lease, publish
from tests.support.apiserver import ApiServer, pod
from tests.support.models import model_path
from tests.support.storage import download

KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """What is not the cache's: it is the same afterwards, in content, times, mode and names."""
    directory = tmp_path / "outside"
    (directory / "model").mkdir(parents=True)
    for name in ("MLmodel", "model/MLmodel", "manifest.json", "last_used", "file"):
        (directory / name).write_text("not yours")
        (directory / name).chmod(0o600)

    def seen() -> dict[str, tuple[Any, ...]]:
        return {str(path): disk.identity(path.lstat()) for path in [directory, *disk.below(directory)]}

    before = seen()
    yield directory
    assert seen() == before


def fill(home: Path, **settings: object) -> Finished:
    return download(home, **{"MODEL_URI": model_path("iris"), "STORAGE_STRATEGY": "pvc", **settings})


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with what `fill` puts there."""
    home = tmp_path_factory.mktemp("downloaded")
    done = fill(home)
    assert done.code == 0, done.err
    return home / "cache"


@pytest.fixture(scope="module")
def key(downloaded: Path) -> str:
    [found] = [name for name in os.listdir(downloaded) if cache_module.is_key(name)]
    return found


def _device(path: Path) -> None:
    os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero, which has no end


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # a whole path may be too long


def _directory(path: Path) -> None:
    path.mkdir()


def _endless(path: Path) -> None:
    """More than anybody reads, and takes no room."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


Plant = Callable[[Path], object]
ODD: list[Plant] = [os.mkfifo, _device, _socket, _directory, _endless]


# Manifests


def entry(cache: Cache, files: dict[str, bytes], key: str = KEY) -> Path:
    staging = locks.stage(cache, key)
    for name, content in files.items():
        (staging / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / "model" / name).write_bytes(content)
    listed = [File(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()]
    locks.publish(cache, staging, key, Manifest("models:/m/1", {}, listed))
    return cache.root / key


WHOLE = {"MLmodel": b"flavors: {}", "code/x.py": b"pass"}


def lie(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def _set(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["files"][0].update({name: value})


def _list(file: dict[str, Any], manifest: dict[str, Any]) -> None:
    manifest["files"].append(file)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a size": _set("size", 12),
    "a negative size": _set("size", -1),
    "a size that is text": _set("size", "11"),
    "a size that is true": _set("size", True),
    "a size with a fraction": _set("size", 11.5),
    "no size": lambda manifest: manifest["files"][0].pop("size"),
    "a digest": _set("sha256", "0" * 64),
    "a digest that is none": _set("sha256", "abc"),
    "a digest that is a list": _set("sha256", ["0" * 64]),
    "a path that climbs": _set("path", "../../../outside/MLmodel"),
    "a path within that climbs": _set("path", "code/../MLmodel"),
    "an absolute path": _set("path", "/etc/passwd"),
    "no path": _set("path", ""),
    "a path with a backslash": _set("path", "a\\b"),
    "a path with a NUL": _set("path", "a\0b"),
    "a path that is no text": _set("path", 7),
    "a path that nothing can show": _set("path", "\ud800"),
    "a missing file": _set("path", "gone"),
    "no MLmodel": lambda manifest: manifest["files"].pop(0),
    "no files": lambda manifest: manifest.update(files=[]),
    "files that are none": lambda manifest: manifest.update(files=7),
    "files of text": lambda manifest: manifest.update(files=["MLmodel"]),
    "more than a file has": lambda manifest: manifest["files"][0].update(more=1),
    "a file twice": lambda manifest: manifest["files"].append(manifest["files"][0]),
    "a file that is a directory": lambda manifest: manifest["files"].append({**manifest["files"][0], "path": "code"}),
    "an identity of text": lambda manifest: manifest.update(resolved="abc"),
    "an identity of numbers": lambda manifest: manifest.update(resolved={"version": 7}),
    "a URI of objects": lambda manifest: manifest.update(model_uri={}),
    "a format": lambda manifest: manifest.update(format=2),
}
TEXTS = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "not UTF-8": b"\xff",
    "nested": b"[" * 100_000,
    "nested objects": b'{"files":' * 100_000,
    "keys twice": b'{"format": 1, "format": 2, "model_uri": "x", "resolved": {}, "files": []}',
    "a number without an end": b'{"format": 1, "files": [{"path": "MLmodel", "size": ' + b"9" * 10_000 + b"}]}",
    "infinity": b'{"format": 1, "files": [{"path": "MLmodel", "size": Infinity, "sha256": ""}]}',
}


@pytest.fixture
def cached(downloaded: Path, key: str, tmp_path: Path) -> Path:
    """An entry with the model that `download` brings."""
    shutil.copytree(downloaded, tmp_path / "cache", symlinks=True)
    return tmp_path / "cache" / key


@pytest.mark.parametrize("what", [*LIES, *TEXTS])
def test_an_entry_whose_manifest_lies_is_not_served(what: str, cache: Cache) -> None:
    path = entry(cache, WHOLE)
    assert cache.damage(KEY, "sha256") == []
    if what in LIES:
        lie(path, LIES[what])
    else:
        (path / "manifest.json").write_bytes(TEXTS[what])
    assert cache.damage(KEY, "sha256")
    assert bool(cache.damage(KEY, "size")) == (what != "a digest")
    with pytest.raises(RoleError, match="the model is damaged"):
        check_whole(path / "model", "sha256")
    known, strange = cache.entries(cache.now())
    assert [entry.key for entry in known] + strange == [KEY]


def test_an_entry_that_lost_its_manifest_is_not_served(cache: Cache) -> None:
    path = entry(cache, WHOLE)
    (path / "manifest.json").unlink()
    with pytest.raises(RoleError, match=r"the model is damaged: .*manifest\.json"):
        check_whole(path / "model")


def test_a_model_that_others_put_into_the_cache_is_served(cache: Cache) -> None:
    """The scripts of Darwin's chart name directories like keys, too, and leave no manifest."""
    model = cache.root / ("c" * 64) / "model"
    model.mkdir(parents=True)
    (model / "MLmodel").write_text("flavors: {}")
    check_whole(model, "sha256")


def test_what_the_manifest_does_not_have_is_damage_where_bytes_are_looked_at(cache: Cache) -> None:
    path = entry(cache, WHOLE)
    (path / "model" / "code" / "json.py").write_text("raise SystemExit")
    assert cache.damage(KEY, "size") == []
    assert cache.damage(KEY, "sha256") == [f"{path}/model/code/json.py: not in the manifest"]
    with pytest.raises(RoleError, match=r"json\.py: not in the manifest"):
        check_whole(path / "model", "sha256")


def test_a_lying_manifest_writes_nothing_elsewhere(cached: Path, outside: Path, tmp_path: Path) -> None:
    """`LINK_MODE=copy` goes by the manifest's paths."""
    content = hashlib.sha256(b"not yours").hexdigest()
    for target in ("../../../outside/new", "../../outside/model/new", str(outside / "new")):
        told = {"path": target, "size": 9, "sha256": content}
        lie(cached, partial(_list, told))
        done = fill(tmp_path, LINK_MODE="copy", VERIFY="off")
        assert "Traceback" not in done.err, done.err
        assert not list(tmp_path.rglob("new"))


@pytest.mark.parametrize("verify", ["size", "sha256"])
@pytest.mark.parametrize("plant", ODD)
def test_what_is_no_manifest_is_replaced(
    plant: Plant, verify: str, cached: Path, api: ApiServer, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(cached)
    (cached / "manifest.json").unlink()
    plant(cached / "manifest.json")
    cleaned = clean(tmp_path / "cache", api)
    assert cleaned.code == 0, cleaned.err
    assert "is not an entry made by download.py" in cleaned.err
    done = fill(tmp_path, VERIFY=verify)
    assert done.code == 0, done.err
    assert "is damaged" in done.err
    assert Cache(tmp_path / "cache").damage(cached.name, "sha256") == []


# Links, pipes and devices


def test_a_link_for_a_model_or_a_file_is_damage(cached: Path, tmp_path: Path) -> None:
    """With the very same bytes behind it, so that only the link tells."""
    elsewhere = shutil.copytree(cached / "model", tmp_path / "elsewhere")
    for place in ("model", "model/MLmodel", "model/model.skops"):
        planted = cached / place
        disk.remove_tree(planted)
        planted.symlink_to(elsewhere / Path(place).relative_to("model"))
        for verify in ("size", "sha256"):
            assert Cache(tmp_path / "cache").damage(cached.name, verify)
        done = fill(tmp_path)
        assert done.code == 0, done.err
        assert "is damaged" in done.err
        assert not [path for path in disk.below(cached) if path.is_symlink()]
    (cached / "model" / "code").symlink_to(elsewhere)
    assert Cache(tmp_path / "cache").damage(cached.name, "sha256")


def test_a_link_for_an_entry_is_told(key: str, outside: Path, api: ApiServer, tmp_path: Path) -> None:
    cache = Cache.prepare(tmp_path / "cache")
    (cache.root / key).symlink_to(outside)
    lease(cache, "somebody", key)
    for link_mode in ("symlink", "copy"):
        done = fill(tmp_path, LINK_MODE=link_mode)
        assert done.code == 1
        assert f"{key} is a symbolic link where an entry belongs; remove it by hand" in done.last
        assert not (tmp_path / "models" / "MLmodel").exists()
    # Its use would be noted inside.
    api.pods = [pod("somebody")]
    cleaned = clean(cache.root, api, TTL_DAYS=0)
    assert "Traceback" not in cleaned.err, cleaned.err


@pytest.mark.parametrize("plant", [os.mkfifo, _directory, _device, "link"])
@pytest.mark.parametrize("where", ["harmless", "lock", "lease", "entry", "tag"])
def test_nothing_planted_hangs_a_role_or_leads_it_astray(
    where: str, plant: Plant | str, key: str, outside: Path, api: ApiServer, tmp_path: Path
) -> None:
    """Both roles end by themselves, and say what is in the way, if it is."""
    cache = Cache.prepare(tmp_path / "cache")
    publish(cache, OTHER, days=30)
    root = cache.root
    places = {
        "harmless": [
            root / ".refs" / f"{'0' * 64}.json",
            root / OTHER / "last_used",
            root / ".staging" / f"{key}.00",
            root / ".trash" / f"{key}.00",
            root / ".trash" / f"{key}.01.planned",
        ],
        "lock": [root / ".locks" / key],
        "lease": [root / ".leases" / f"pod.-.{'0' * 16}.{key}.{'0' * 16}"],
        "entry": [root / key],
        "tag": [root / "CACHEDIR.TAG"],
    }
    for place in places[where]:
        place.unlink(missing_ok=True)
        if callable(plant):
            plant(place)
        else:
            place.symlink_to(outside)
    lease(cache, "somebody", OTHER)
    api.pods = [pod("somebody")]
    for done in (fill(tmp_path), clean(root, api)):
        assert done.code in (0, 1, 2)
        assert "Traceback" not in done.err, done.err
        if done.code:
            assert any(place.name[:12] in done.err for place in places[where]), done.err
    assert where != "harmless" or (tmp_path / "models" / "MLmodel").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"owner": 7, "arrived": "many", "total": [], "released": {}}',
        b'{"owner": "x\\u001b[2J\\ny", "arrived": 1e400, "total": -1}',
        b'{"arrived": ' + b"9" * 4000 + b', "total": 1}',
        b'{"owner": "' + b"x" * 1_000_000 + b'"}',
    ],
)
def test_whatever_is_in_a_lock_or_a_ref_is_survived(text: bytes, cache: Cache) -> None:
    (cache.root / ".locks" / KEY).write_bytes(text)
    holder = locks.try_lock(cache, KEY, "me")
    assert isinstance(holder, locks.LockState)
    assert holder.owner.isprintable()
    assert len(holder.owner) <= 500
    Waiting(KEY).log(holder)
    references.set_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/m/1", KEY)
    [ref] = (cache.root / ".refs").iterdir()
    ref.write_bytes(text)
    assert references.find_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/m/1") is None
    references.drop_dangling(cache, 0)


@contextlib.contextmanager
def bottomless(top: Path, depth: int) -> Iterator[None]:
    """A directory so deep, made step by step as its maker would; it is unmade likewise, for pytest could not."""
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        yield
    finally:
        while (top / "d").exists():
            (top / "d").rename(top / "above")
            if (top / "above" / "d").exists():
                (top / "above" / "d").rename(top / "d")
            (top / "above").rmdir()


def test_a_tree_without_a_bottom(cache: Cache, api: ApiServer) -> None:
    """Deeper than Python recurses, and than paths may be long."""
    publish(cache, OTHER, days=30)
    staging, doomed = cache.root / ".staging" / f"{KEY}.00", cache.root / ".trash" / "00.doomed"
    with bottomless(staging, 1200), bottomless(doomed, 3000):
        done = clean(cache.root, api)
    assert "Traceback" not in done.err, done.err
    assert done.code == 1
    assert "00.doomed" in done.err
    assert not cache.has(OTHER), "the rest is cleaned"


def test_a_part_is_not_written_through_a_link(outside: Path, tmp_path: Path) -> None:
    """Planted after the part's name is known, before it is opened."""
    from darwin_runtime.storage.parts import Part

    part = Part(tmp_path, "model.pkl")
    part.path.symlink_to(outside / "file")
    with pytest.raises(OSError, match="symbolic link"):
        part.open()
    part.path.unlink()
    part.path.symlink_to(outside / "new")
    with pytest.raises(OSError, match="symbolic link"):
        part.open()


# What changes while it is read


def change(path: Path, how: str) -> Callable[[Any], Any]:
    """Have `path` changed when the first piece of it has been read."""
    real = disk.open_regular

    def opened(file: Path) -> Any:
        found = real(file)
        if file == path:
            read = found.read

            def once(size: int) -> bytes:
                piece = read(size)
                found_.read = read
                with path.open("r+b") as other:
                    if how == "grows":
                        other.seek(0, 2)
                    other.write(b"!" * 10)
                    if how == "shrinks":
                        other.truncate(5)
                return bytes(piece)

            found_ = _Wrapped(found, once)
            return found_
        return found

    return opened


class _Wrapped:
    def __init__(self, file: Any, read: Callable[[int], bytes]) -> None:
        self.file = file
        self.read = read

    def fileno(self) -> int:
        return int(self.file.fileno())

    def __enter__(self) -> _Wrapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("how", ["grows", "shrinks", "other bytes"])
def test_a_file_that_changes_while_it_is_read_is_told(how: str, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "weights"
    for read in (manifest_module.digest, lambda path: manifest_module.copy(path, tmp_path / "copy")):
        file.write_bytes(bytes(3 << 20))
        with monkeypatch.context() as patch:
            patch.setattr(disk, "open_regular", change(file, how))
            with pytest.raises(FileChanged, match="changed while it was read"):
                read(file)


def test_a_copy_of_other_bytes_is_not_placed(cache: Cache, tmp_path: Path) -> None:
    """Between the look at the entry and the copy of it somebody wrote to it."""
    path = entry(cache, WHOLE)
    (path / "model" / "code" / "x.py").write_bytes(b"exit")
    (tmp_path / "models").mkdir()
    with pytest.raises(RoleError, match=r"not placed, .*x\.py: not the bytes that were downloaded"):
        output.copy(path / "model", tmp_path / "models", KEY, cache.manifest(KEY))
    assert not (tmp_path / "models" / "MLmodel").exists()


# For people


def test_a_terminal_is_shown_no_commands(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    path = entry(cache, WHOLE)
    lie(path, lambda manifest: manifest.update(model_uri="\x1b[2Jmodels:/x\n" + "y" * 10))
    (cache.root / "\x1b[2Jstrange").mkdir()
    assert command.main(["cache", "--cache", str(cache.root), "list"]) == 0
    assert "\x1b" not in capsys.readouterr().out


assert sys.getrecursionlimit() < 1200, "test_a_tree_without_a_bottom is to be deeper"
