"""`python -m darwin_runtime cache`, for the engineer in `kubectl exec`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from darwin_runtime import __main__ as command
from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import locks, references
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.manifest import File, Manifest
from tests.conftest import Finished, clean_environ
from tests.support import prepared
from tests.support.apiserver import ApiServer, pod

A, B = "a" * 64, "b" * 64


def look(cache: Path, *arguments: str) -> Finished:
    done = prepared.run("-m", "darwin_runtime", "cache", *arguments, env=clean_environ(CACHE_PATH=cache))
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = Cache.prepare(tmp_path / "cache")
    for key in (A, B):
        staging = locks.stage(made, key)
        (cache_module.model_of(staging) / "MLmodel").write_bytes(key.encode())
        file = File("MLmodel", 64, hashlib.sha256(key.encode()).hexdigest())
        locks.publish(made, staging, key, Manifest(f"models:/{key[0]}@live", {"name": key[0], "version": "7"}, [file]))
    made.lease("web-1", "/models", A)
    made.lease("web-2", "/models", A)
    references.set_alias(made, "c" * 64, A)
    (made.root / "notes").mkdir()
    return made


def test_list(cache: Cache) -> None:
    done = look(cache.root, "list")
    assert done.code == 0, done.err
    lines = {line.split()[0]: line for line in done.out.splitlines()}
    assert "64 B" in lines["a" * 12]
    assert "web-1, web-2" in lines["a" * 12]
    assert "models:/a@live, alias cccccccccccc" in lines["a" * 12]
    assert lines["a" * 12].split()[5] == "7"
    assert " - " in lines["b" * 12]
    assert "users may be gone: the pods cannot be listed (KUBERNETES_SERVICE_HOST is not set" in done.out
    assert "notes is not an entry" in lines["notes"]
    assert done.out.splitlines()[-1] == "2 entries, 128 B, 0 in the trash"


def test_users_that_are_gone_are_marked(
    cache: Cache, api: ApiServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (cache.root / ".leases").iterdir():
        os.utime(path, (0, 0))
    for name, value in api.environ.items():
        monkeypatch.setenv(name, value)
    api.pods = [pod("web-1")]
    assert command.main(["cache", "--cache", str(cache.root), "list"], api.directory) == 0
    told = capsys.readouterr().out
    assert "web-1, web-2 (gone)" in told
    assert "may be gone" not in told


def test_a_service_account_that_may_not_list_pods(
    cache: Cache, api: ApiServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in api.environ.items():
        monkeypatch.setenv(name, value)
    (api.directory / "token").write_text("another-token")
    assert command.main(["cache", "--cache", str(cache.root), "list"], api.directory) == 0
    told = capsys.readouterr().out
    assert "web-1, web-2 " in told
    assert "users may be gone: the pods cannot be listed (Kubernetes API: 40" in told


def test_verify(cache: Cache) -> None:
    assert look(cache.root, "verify", "a").out == f"{A}: whole (sha256)\n"
    assert look(cache.root, "verify", "c" * 64).out == f"{A}: whole (sha256)\n", "by its alias"
    (cache.model(B) / "MLmodel").write_bytes(b"x" * 64)
    assert look(cache.root, "verify", "--all", "--how", "size").code == 0
    done = look(cache.root, "verify", "--all")
    assert done.code == 1
    assert f"{A}: whole (sha256)" in done.out
    assert f"{B}: {cache.model(B)}/MLmodel: not the bytes" in done.out
    assert "VERIFY=sha256" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "e"], "no entry e"),
        (["verify"], "Name an entry"),
        (["--cache", "/absent", "list"], "/absent is not a directory"),
        (["forget"], "invalid choice"),
    ],
)
def test_what_is_not_there(arguments: list[str], words: str, cache: Cache) -> None:
    done = look(cache.root, *arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err


def test_ambiguous(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["cache", "--cache", str(cache.root), "verify", ""]) == 2
    assert "2 entries' names begin with" in capsys.readouterr().err


def test_an_empty_directory(tmp_path: Path) -> None:
    done = look(tmp_path, "list")
    assert done.code == 2
    assert "is empty" in done.err


def test_it_changes_nothing(cache: Cache) -> None:
    def seen() -> set[tuple[str, float]]:
        tag = cache_module.TAG_NAME  # by which the file server is asked for the time
        return {(str(path), path.lstat().st_mtime) for path in cache.root.rglob("*") if path.name != tag}

    for path in cache.root.rglob("*"):
        os.utime(path, (9, 9), follow_symlinks=False)
    before = seen()
    look(cache.root, "list")
    look(cache.root, "verify", "--all")
    assert seen() == before
