"""REQUIRE_SHA256: what may be loaded, whatever a registry, a volume or a manifest says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from darwin_runtime.errors import RoleError
from darwin_runtime.model.load import load_model
from darwin_runtime.model.mlmodel import find_model
from darwin_runtime.model.model import Model
from darwin_runtime.model.self_test import load_checked
from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import digest as digest_module
from darwin_runtime.storage import locks, output
from darwin_runtime.storage.cache import Cache
from tests.conftest import ROOT, Tracking, run_role, wait_until
from tests.support.models import BASE, REQUIREMENTS, model_path, save
from tests.support.registry import log_files
from tests.support.servers import serving
from tests.support.storage import download

OTHER = "0" * 64


def shell(model: Path) -> str:
    """What README's command prints for the model served from a directory."""
    [command] = re.findall(r"^(cd .*/models/MLmodel.*sha256sum)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace("/models/MLmodel", '"$1"/MLmodel'), "-", model],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()[0]


@pytest.fixture
def iris(tmp_path: Path) -> Path:
    return shutil.copytree(model_path("iris"), tmp_path / "iris")


@pytest.fixture(scope="module")
def digest() -> str:
    return shell(model_path("iris"))


def entries(tmp_path: Path) -> list[str]:
    return [name for name in os.listdir(tmp_path / "cache") if cache_module.is_key(name)]


# The digest


@pytest.mark.parametrize(
    "names",
    [
        ["MLmodel"],
        ["MLmodel", "a b", "a\nb", "a\\b", "\\", " ", "-x", "--", "*", "é", "'\"", "\x7f\x1b[0m"],
        ["MLmodel", "a/b", "a.b", "a0b", "a/b.c/d", "Z", "z", ".hidden", "code/.darwin-output.json", "code/model"],
        ["MLmodel", os.fsdecode(b"\xff\xfe"), "ü/ü"],
        ["MLmodel", "model/weights", *(f"{number}" for number in range(3000))],
    ],
)
def test_the_digest_is_what_the_shell_says(names: list[str], tmp_path: Path) -> None:
    for name in names:
        file = tmp_path / "m" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(name) * 3)
    (tmp_path / "m" / "empty").mkdir()
    seen = digest_module.look(tmp_path / "m").digest
    assert seen == shell(tmp_path / "m")
    for name in digest_module.APART:
        (tmp_path / "m" / name).write_text("says how it came")
    if "model/weights" not in names:
        (tmp_path / "m" / "model").symlink_to(".")
    assert digest_module.look(tmp_path / "m").digest == shell(tmp_path / "m") == seen
    (tmp_path / "m" / names[-1]).write_bytes(b"other")
    assert digest_module.look(tmp_path / "m").digest == shell(tmp_path / "m") != seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"STORAGE_STRATEGY": "pvc"},
        {"STORAGE_STRATEGY": "pvc", "LINK_MODE": "copy"},
    ],
)
def test_it_is_the_same_however_the_model_got_there(settings: dict[str, str], digest: str, tmp_path: Path) -> None:
    done = download(tmp_path, MODEL_URI=model_path("iris"), REQUIRE_SHA256=digest.upper(), **settings)
    assert done.code == 0, done.err
    assert f"has sha256 {digest}, which REQUIRE_SHA256 can ask for" in done.last
    assert shell(tmp_path / "models") == digest
    found = find_model(tmp_path / "models")
    assert digest_module.look(found).digest == digest
    again = download(tmp_path, MODEL_URI=model_path("iris"), REQUIRE_SHA256=digest, **settings)
    assert again.code == 0, again.err
    assert "0 bytes transferred" in again.err
    assert shell(tmp_path / "models") == digest


def test_where_a_model_was_registered_does_not_count(open_server: Tracking, tmp_path: Path) -> None:
    files = {"MLmodel": b"flavors: {}", "code/x.py": b"pass"}
    uris = [log_files(open_server, f"pinned-{number}", files) for number in range(2)]
    seen = set()
    for number, uri in enumerate(uris):
        done = download(tmp_path / str(number), MODEL_URI=uri, **open_server.environ)
        assert done.code == 0, done.err
        assert (tmp_path / str(number) / "models" / "registered_model_meta").is_file()
        seen.add(shell(tmp_path / str(number) / "models"))
    assert len(seen) == 1


def _link(path: Path) -> None:
    path.symlink_to("MLmodel")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def _null(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which has no end


ODD: list[Callable[[Path], object]] = [_link, os.mkfifo, _socket, _null]


@pytest.mark.parametrize("make", ODD)
def test_what_is_no_file_has_no_digest(make: Callable[[Path], object], iris: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(iris)
    make(iris / "odd")
    with pytest.raises(RoleError, match=r"odd is a link, pipe, socket or device"):
        digest_module.look(iris)


@pytest.mark.parametrize("script", ["darwin_serve.py", "download.py"])
@pytest.mark.parametrize("value", ["abc", OTHER + "0", "sha256:" + OTHER, "g" * 64])
def test_what_is_no_digest_is_a_bad_setting(value: str, script: str) -> None:
    done = run_role(script, REQUIRE_SHA256=value, MODEL_LOCAL_PATH="/nowhere", MODEL_URI="/nowhere")
    assert done.code == 2
    assert f"bad configuration: REQUIRE_SHA256={value!r}" in done.err
    assert re.search(r"for example REQUIRE_SHA256=[0-9a-f]{64}", done.err)


# The init container


@pytest.mark.parametrize(
    "settings", [{}, {"STORAGE_STRATEGY": "pvc"}, {"STORAGE_STRATEGY": "pvc", "LINK_MODE": "copy"}]
)
def test_another_model_is_not_given_out(settings: dict[str, str], iris: Path, digest: str, tmp_path: Path) -> None:
    (iris / "model.skops").write_bytes((iris / "model.skops").read_bytes() + b"!")
    seen = shell(iris)
    done = download(tmp_path, MODEL_URI=iris, REQUIRE_SHA256=digest, **settings)
    assert done.code == 1
    assert f"is not the model that REQUIRE_SHA256 asks for: expected {digest}, seen {seen}" in done.last
    assert f"set REQUIRE_SHA256={seen}" in done.last
    assert list((tmp_path / "models").iterdir() if (tmp_path / "models").exists() else []) == []
    if settings:
        assert entries(tmp_path) == []
        assert list((tmp_path / "cache" / ".staging").iterdir()) == []


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
def test_a_model_of_before_does_not_stay(strategy: str, iris: Path, tmp_path: Path) -> None:
    """Whatever keeps the required one from coming, what is there is not it."""
    assert download(tmp_path, MODEL_URI=iris, STORAGE_STRATEGY=strategy).code == 0
    (tmp_path / "models" / "notes").write_text("of somebody else")
    done = download(tmp_path, MODEL_URI=tmp_path / "nothing", STORAGE_STRATEGY=strategy, REQUIRE_SHA256=OTHER)
    assert done.code == 1
    assert os.listdir(tmp_path / "models") == ["notes"]
    assert len(entries(tmp_path)) == 1 if strategy == "pvc" else True, "others may use it"


@pytest.mark.parametrize("honest", [False, True])
def test_a_poisoned_entry_is_replaced(honest: bool, digest: str, tmp_path: Path) -> None:
    """Of somebody who can write to the cache: the bytes, and where `honest` the manifest, too."""
    settings = {"STORAGE_STRATEGY": "pvc", "REQUIRE_SHA256": digest}
    assert download(tmp_path, MODEL_URI=model_path("iris"), **settings).code == 0
    [key] = entries(tmp_path)
    entry = tmp_path / "cache" / key
    model = entry / "model" / "model.skops"
    poisoned = model.read_bytes()[::-1]
    model.write_bytes(poisoned)
    if honest:
        manifest = json.loads((entry / "manifest.json").read_text())
        for file in manifest["files"]:
            file["sha256"] = hashlib.sha256((entry / "model" / file["path"]).read_bytes()).hexdigest()
        (entry / "manifest.json").write_text(json.dumps(manifest))
    done = download(tmp_path, MODEL_URI=model_path("iris"), **settings)
    assert done.code == 0, done.err
    assert model.read_bytes() != poisoned
    assert shell(tmp_path / "models") == digest
    assert Cache(tmp_path / "cache").damage(key, "sha256") == []


def test_a_poisoned_download_half_way_is_not_gone_on_with_forever(digest: str, tmp_path: Path) -> None:
    settings = {"STORAGE_STRATEGY": "pvc", "REQUIRE_SHA256": digest}
    assert download(tmp_path, MODEL_URI=model_path("iris"), **settings).code == 0
    [key] = entries(tmp_path)
    cache = Cache(tmp_path / "cache")
    (tmp_path / "cache" / key).rename(tmp_path / "cache" / ".staging" / f"{key}.00")
    lock = locks.try_lock(cache, key, "somebody")
    assert isinstance(lock, locks.Lock)
    lock.release(done=False)
    model = tmp_path / "cache" / ".staging" / f"{key}.00" / "model" / "model.skops"
    model.write_bytes(model.read_bytes()[::-1])
    first = download(tmp_path, MODEL_URI=model_path("iris"), **settings)
    assert first.code == 1
    assert "REQUIRE_SHA256 asks for" in first.last
    assert entries(tmp_path) == []
    again = download(tmp_path, MODEL_URI=model_path("iris"), **settings)
    assert again.code == 0, again.err


def test_the_wrong_digest_leaves_others_entry_alone(iris: Path, tmp_path: Path) -> None:
    assert download(tmp_path, MODEL_URI=iris, STORAGE_STRATEGY="pvc").code == 0
    [key] = entries(tmp_path)
    inode = (tmp_path / "cache" / key).stat().st_ino
    settings = {"STORAGE_STRATEGY": "pvc", "CACHE_PATH": tmp_path / "cache", "REQUIRE_SHA256": OTHER}
    done = download(tmp_path / "other", MODEL_URI=iris, **settings)
    assert done.code == 1
    assert (tmp_path / "cache" / key).stat().st_ino == inode
    assert Cache(tmp_path / "cache").damage(key, "sha256") == []


# The main container


@pytest.mark.parametrize("workers", [1, 2])
def test_the_required_model_is_served(workers: int, digest: str) -> None:
    with serving(model_path("iris"), REQUIRE_SHA256=digest, WORKERS=workers) as served:
        assert served.get("/ready").status_code == 200
    assert f"has sha256 {digest}, as REQUIRE_SHA256 asks" in served.log


def _trapped(path: Path) -> Callable[[Path], None]:
    """A model that says that its code ran, by making a file as soon as it is unpickled."""

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (path,))

    def build(to: Path) -> None:
        model = type("Model", (BASE,), {"predict": lambda self, context, model_input: [1], "trap": None})()
        model.trap = Trap()
        mlflow.pyfunc.save_model(to, python_model=model, **REQUIREMENTS)

    return build


@pytest.mark.parametrize("workers", [1, 2])
def test_of_another_model_no_code_runs(workers: int, tmp_path: Path) -> None:
    model = save(_trapped(tmp_path / "ran"), tmp_path / "m")
    settings = {"MODEL_LOCAL_PATH": model, "PORT": 0, "HOST": "127.0.0.1", "WORKERS": workers}
    done = run_role("darwin_serve.py", REQUIRE_SHA256=OTHER, **settings)
    assert done.code == 1
    assert f"is not the model that REQUIRE_SHA256 asks for: expected {OTHER}, seen {shell(model)}" in done.err
    assert not (tmp_path / "ran").exists()
    load_checked(model, required=shell(model))
    assert (tmp_path / "ran").exists(), "the trap works"


def test_a_manifest_is_not_taken_for_the_bytes(digest: str, tmp_path: Path) -> None:
    assert download(tmp_path, MODEL_URI=model_path("iris")).code == 0
    model = tmp_path / "models" / "model.skops"
    model.write_bytes(model.read_bytes()[::-1])
    record = output.read(tmp_path / "models")
    assert record
    assert digest_module.digest_of(record.manifest) == digest
    with pytest.raises(RoleError, match=f"expected {digest}"):
        load_checked(tmp_path / "models", required=digest)


def test_from_a_uri(digest: str) -> None:
    uri = model_path("iris").as_uri()
    with serving(REQUIRE_SHA256=digest, MLFLOW_MODEL_URI=uri) as served:
        assert f"has sha256 {digest}, as REQUIRE_SHA256 asks" in served.log
    done = run_role("darwin_serve.py", REQUIRE_SHA256=OTHER, PORT=0, HOST="127.0.0.1", MLFLOW_MODEL_URI=uri)
    assert done.code == 1
    assert digest in done.err


def test_workers_that_load_by_themselves_look_for_themselves(tmp_path: Path) -> None:
    """Each loads from the disk as it is then. A thread can't be shared."""

    def load_context(self: Any, context: Any) -> None:
        import threading

        threading.Thread(target=threading.Event().wait, daemon=True).start()

    def build(path: Path) -> None:
        kind = type("Model", (BASE,), {"load_context": load_context, "predict": lambda self, context, data: [1]})
        mlflow.pyfunc.save_model(path, python_model=kind(), **REQUIREMENTS)

    model = save(build, tmp_path / "m")
    with serving(model, REQUIRE_SHA256=shell(model), WORKERS=2) as served:
        assert "each worker loads for itself" in served.log
        wait_until(lambda: served.log.count("as REQUIRE_SHA256 asks") == 3, "the parent and two workers")


def _write(model: Path) -> None:
    with (model / "python_env.yaml").open("a") as file:
        file.write("#")


def _write_back(model: Path) -> None:
    """With the same bytes, size and time in the end."""
    file = model / "python_env.yaml"
    before, content = file.stat(), file.read_bytes()
    file.write_bytes(content[::-1])
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(model: Path) -> None:
    new = model.with_name("new")
    shutil.copy2(model / "python_env.yaml", new)
    new.rename(model / "python_env.yaml")


def _add(model: Path) -> None:
    (model / "sitecustomize.py").touch()


def _remove(model: Path) -> None:
    (model / "python_env.yaml").unlink()


def _swap_and_back(model: Path) -> None:
    model.parent.rename(model.parent.with_name("aside"))
    model.parent.with_name("aside").rename(model.parent)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Path], None]]:
    """What to do with a model while it is loaded."""
    deeds: list[Callable[[Path], None]] = []
    real = load_model

    def load(directory: Path, *rest: Any) -> Model:
        found = real(directory, *rest)
        for deed in deeds:
            deed(directory)
        return found

    monkeypatch.setattr("darwin_runtime.model.self_test.load_model", load)
    return deeds


@pytest.mark.parametrize("deed", [_write, _write_back, _replace, _add, _remove, _swap_and_back])
def test_a_model_that_changes_while_it_is_loaded_is_not_served(
    deed: Callable[[Path], None], meanwhile: list[Callable[[Path], None]], digest: str, tmp_path: Path
) -> None:
    assert download(tmp_path, MODEL_URI=model_path("iris"), STORAGE_STRATEGY="pvc").code == 0
    load_checked(tmp_path / "models", required=digest)
    meanwhile.append(deed)
    with pytest.raises(RoleError, match="the model was changed while it was loaded"):
        load_checked(tmp_path / "models", required=digest)


@pytest.mark.parametrize("name", digest_module.APART)
def test_what_the_digest_leaves_out_is_not_loaded(name: str, iris: Path) -> None:
    (iris / name).write_bytes((iris / "model.skops").read_bytes())
    description = (iris / "MLmodel").read_text().replace("model.skops", name)
    (iris / "MLmodel").write_text(description)
    with pytest.raises(RoleError, match="which is no part of a model"):
        load_checked(iris, required=shell(iris))
