"""The init container, run as a process against a real MLflow server."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import locks, output
from darwin_runtime.storage import manifest as manifest_module
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.entry_check import Claim, EntryCheck
from darwin_runtime.storage.manifest import Manifest
from tests.conftest import ROOT, Finished, Tracking, clean_environ, free_port, run_role, wait_until
from tests.support import prepared, proxy
from tests.support.proxy import Proxy, proxying
from tests.support.registry import NAME, Logged, client_of, log_model


@pytest.fixture(scope="module")
def versions(mlflow_server: Tracking) -> list[Logged]:
    """Versions 1 and 2 of a registered model: 1 is @champion, 2 is in stage Production."""
    logged = [log_model(mlflow_server, factor) for factor in (1.0, 2.0)]
    with client_of(mlflow_server) as client:
        client.set_registered_model_alias(NAME, "champion", logged[0].version)
        client.transition_model_version_stage(NAME, logged[1].version, "Production")
    return logged


@pytest.fixture
def through_proxy(mlflow_server: Tracking) -> Iterator[Proxy]:
    with proxying(mlflow_server.uri) as running:
        yield running


def download(tmp_path: Path, uri: str, tracking: Tracking | None = None, /, **settings: object) -> Finished:
    defaults = {"MODEL_URI": uri, "OUTPUT_PATH": tmp_path / "models", "CACHE_PATH": tmp_path / "cache"}
    access: dict[str, Any] = tracking.environ if tracking else {}
    return run_role("download.py", **{**defaults, "BACKOFF_SECONDS": "0.01", **access, **settings})


def keys(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if cache_module.is_key(path.name) and not path.is_symlink())


def whole(model: Path, manifest: Manifest) -> bool:
    """Every file there with the size and the bytes that the manifest says, and no other."""
    digests = {file.path: file.sha256 for file in manifest.files}
    there = {
        path.relative_to(model).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in model.rglob("*")
        if path.is_file()
    }
    return there == digests and not manifest.damage(model)


def coefficient(model: Path) -> float:
    import mlflow

    # MLflow refuses links that lead out of the model's directory; the server, too, loads from where they lead.
    return round(float(mlflow.sklearn.load_model(str((model / "MLmodel").resolve().parent)).coef_[0]), 6)


@pytest.mark.parametrize(
    ("uri", "factor"),
    [
        (f"models:/{NAME}/1", 1),
        (f"models:/{NAME}/2", 2),
        (f"models:/{NAME}@champion", 1),
        (f"models:/{NAME}/Production", 2),
        (f"models:/{NAME}/latest", 2),
        ("models:/{model_id}", 1),
        ("runs:/{run}/model", 1),
        ("mlflow-artifacts:/0/models/{model_id}/artifacts", 1),
    ],
)
def test_every_uri_lands_at_the_root(
    uri: str, factor: float, versions: list[Logged], mlflow_server: Tracking, tmp_path: Path
) -> None:
    asked = uri.format(**vars(versions[0]))
    done = download(tmp_path, asked, mlflow_server)
    assert done.code == 0, done.err
    assert coefficient(tmp_path / "models") == factor
    assert (tmp_path / "models" / "model" / "MLmodel").is_file(), "charts that serve <dir>/model"
    again = download(tmp_path, asked, mlflow_server)
    assert again.code == 0
    assert "0 bytes transferred" in again.err


@pytest.fixture(scope="module")
def local_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlflow import sklearn
    from sklearn.linear_model import LinearRegression

    path = tmp_path_factory.mktemp("local") / "a model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sklearn.save_model(LinearRegression().fit([[0.0], [1.0]], [0.0, 3.0]), str(path), pip_requirements=[])
    (path / "extra" / "deep").mkdir(parents=True)
    (path / "extra" / "deep" / "empty").touch()
    (path / "extra" / "big").write_bytes(random.Random(1).randbytes(3_000_000))
    (path / "extra" / "big").chmod(0o600)
    return path


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_local_paths(scheme: str, local_model: Path, tmp_path: Path) -> None:
    done = download(tmp_path, f"{scheme}{local_model}")
    assert done.code == 0, done.err
    assert coefficient(tmp_path / "models") == 3
    big = tmp_path / "models" / "extra" / "big"
    assert big.read_bytes() == (local_model / "extra" / "big").read_bytes()
    assert big.stat().st_mode & 0o444 == 0o444, "readable for the main container's user"
    assert (tmp_path / "models" / "extra" / "deep" / "empty").stat().st_size == 0


def test_s3(local_model: Path, tmp_path: Path) -> None:
    port = free_port()
    access = {
        "AWS_ACCESS_KEY_ID": "an-access-key-id",
        "AWS_SECRET_ACCESS_KEY": "a-very-secret-access-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=clean_environ(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _answers(port), "moto's S3 server")
        subprocess.run(
            [sys.executable, "-c", _UPLOAD, local_model], env=clean_environ(**access), check=True, timeout=60
        )
        done = download(tmp_path, "s3://bucket/some/model", STORAGE_STRATEGY="pvc", LOG_LEVEL="DEBUG", **access)
        assert done.code == 0, done.err
        assert coefficient(tmp_path / "models") == 3
        assert "a-very-secret-access-key" not in done.err
        missing = download(tmp_path, "s3://bucket/other", **access)
        assert missing.code == 1
        assert "no MLflow model at s3://bucket/other" in missing.last
        nowhere = download(tmp_path, "s3://other-bucket/model", **access)
        assert nowhere.code == 1
        assert "404" in nowhere.last
    finally:
        process.terminate()
        process.wait(timeout=30)


_UPLOAD = """
import os, sys, boto3
s3 = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
s3.create_bucket(Bucket="bucket")
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(folder, name)
        s3.upload_file(path, "bucket", "some/model/" + os.path.relpath(path, sys.argv[1]))
"""


def _answers(port: int) -> bool:
    import requests

    try:
        return requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code < 500
    except requests.ConnectionError:
        return False


# Through the shared cache


def test_the_second_pod_transfers_nothing(
    versions: list[Logged], through_proxy: Proxy, mlflow_server: Tracking, tmp_path: Path
) -> None:
    pvc = {"STORAGE_STRATEGY": "pvc", "MLFLOW_TRACKING_URI": through_proxy.uri, "DEPLOYMENT_NAME": "shop"}
    uri = f"models:/{NAME}@champion"
    first = download(tmp_path, uri, mlflow_server, **pvc, POD_NAME="pod-1")
    assert first.code == 0, first.err
    files = len(through_proxy.downloads())
    assert files > 3

    second = download(tmp_path, uri, mlflow_server, **pvc, POD_NAME="pod-2", OUTPUT_PATH=tmp_path / "models-2")
    assert second.code == 0
    assert "0 bytes transferred" in second.err
    assert len(through_proxy.downloads()) == files

    cache = Cache(tmp_path / "cache")
    [key] = keys(cache.root)
    assert whole(cache.model(key), cache.manifest(key))
    assert (tmp_path / "models-2" / "MLmodel").resolve() == cache.model(key) / "MLmodel"
    assert coefficient(tmp_path / "models-2") == 1
    assert {(lease.pod, lease.key) for lease in cache.leases()} == {("pod-1", key), ("pod-2", key)}
    alias = hashlib.sha256(f"shop:{uri}".encode()).hexdigest()
    assert coefficient(cache.root / alias / "model") == 1, "where Darwin's chart looks"


def test_a_moved_alias_is_a_new_entry(versions: list[Logged], mlflow_server: Tracking, tmp_path: Path) -> None:
    pvc = {"STORAGE_STRATEGY": "pvc", "POD_NAME": "pod", "DEPLOYMENT_NAME": "shop"}
    uri = f"models:/{NAME}@moving"
    with client_of(mlflow_server) as client:
        client.set_registered_model_alias(NAME, "moving", versions[0].version)
        assert download(tmp_path, uri, mlflow_server, **pvc).code == 0
        [old] = keys(tmp_path / "cache")
        client.set_registered_model_alias(NAME, "moving", versions[1].version)
        assert download(tmp_path, uri, mlflow_server, **pvc).code == 0
    cache = Cache(tmp_path / "cache")
    assert len(keys(cache.root)) == 2
    assert coefficient(tmp_path / "models") == 2
    [lease] = cache.leases()
    assert lease.key != old, "moving to a new model released the old one"
    # The same version under another name is the same entry.
    assert download(tmp_path, f"models:/{NAME}/1", mlflow_server, **pvc).code == 0
    assert len(keys(cache.root)) == 2


def test_copies_for_pods_that_do_not_mount_the_cache(local_model: Path, tmp_path: Path) -> None:
    done = download(tmp_path, str(local_model), STORAGE_STRATEGY="pvc", LINK_MODE="copy")
    assert done.code == 0, done.err
    models = tmp_path / "models"
    assert not [path for path in models.rglob("*") if path.is_symlink() and path.name != "model"]
    assert coefficient(models) == 3


def test_a_job_that_only_fills_the_cache(local_model: Path, tmp_path: Path) -> None:
    settings = {"MODEL_URI": local_model, "CACHE_PATH": tmp_path / "cache", "STORAGE_STRATEGY": "pvc"}
    if Path("/models").exists():
        pytest.fail("this test needs a machine without /models")
    # A user who can't make /models, as in the image.
    done = prepared.run("-c", _AS_NOBODY, ROOT, env=clean_environ(**settings))
    assert done.returncode == 0, done.stderr
    assert "the model is in the cache only" in done.stderr
    [key] = keys(tmp_path / "cache")
    assert Cache(tmp_path / "cache").damage(key) == []


# Root may write anywhere, so what is tested is that /models can't be made.
_AS_NOBODY = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
make = pathlib.Path.mkdir
def mkdir(path, *args, **kwargs):
    if str(path) == "/models":
        raise PermissionError(13, "Permission denied", str(path))
    return make(path, *args, **kwargs)
pathlib.Path.mkdir = mkdir
import download
sys.exit(download.main())
"""


# What goes wrong


def test_all_bad_settings_at_once(tmp_path: Path) -> None:
    done = run_role("download.py", STORAGE_STRATEGY="nfs", MAX_RETRIES="many", BACKOFF_SECONDS="-1", LINK_MODE="hard")
    assert done.code == 2
    for name in ("MODEL_URI", "STORAGE_STRATEGY", "MAX_RETRIES", "BACKOFF_SECONDS", "LINK_MODE"):
        assert f"bad configuration: {name}" in done.err


@pytest.mark.parametrize(
    "uri", ["models:/", "models:/iris", "models:/iris/", "models:/iris@", "models:/iris/1/2", "runs:/", "runs:/abc"]
)
def test_a_malformed_uri_is_a_bad_setting(uri: str, tmp_path: Path) -> None:
    done = download(tmp_path, uri, MLFLOW_TRACKING_URI="http://127.0.0.1:1")
    assert done.code == 2
    assert done.last.count("MODEL_URI=") == 2, "the value given, and an example"


def test_no_tracking_uri(tmp_path: Path) -> None:
    done = download(tmp_path, "models:/iris/1")
    assert done.code == 2
    assert "MLFLOW_TRACKING_URI" in done.last


@pytest.mark.parametrize(
    ("uri", "settings", "words"),
    [
        (f"models:/{NAME}/1", {"MLFLOW_TRACKING_PASSWORD": "wrong-password"}, ["401", "MLFLOW_TRACKING_PASSWORD"]),
        (f"models:/{NAME}/99", {}, ["404", "check the name"]),
        ("models:/nothing/1", {}, ["404", "check the name"]),
        (f"models:/{NAME}@nobody", {}, ["404", "nobody", "not found"]),
        (f"models:/{NAME}/Archived", {}, ["404", "Archived"]),
        ("runs:/0123456789abcdef0123456789abcdef/model", {}, ["404", "0123456789abcdef"]),
        ("runs:/{run}/no-such-path", {}, ["no MLflow model"]),
        ("mlflow-artifacts:/0/models", {}, ["no MLflow model", "ask for mlflow-artifacts:/0/models/m-"]),
    ],
)
def test_what_can_not_be_had_fails_at_once(
    uri: str,
    settings: dict[str, str],
    words: list[str],
    versions: list[Logged],
    mlflow_server: Tracking,
    tmp_path: Path,
) -> None:
    done = download(tmp_path, uri.format(**vars(versions[0])), mlflow_server, **settings)
    assert done.code == 1
    for word in words:
        assert word in done.last
    assert "trying again" not in done.err
    assert "wrong-password" not in done.err
    assert "Traceback" not in done.err


def test_a_user_without_permission(versions: list[Logged], mlflow_server: Tracking, tmp_path: Path) -> None:
    import requests

    user = {"username": "mallory", "password": "mallorys-password-12"}
    made = requests.post(
        f"{mlflow_server.uri}/api/2.0/mlflow/users/create",
        json=user,
        auth=(mlflow_server.username, mlflow_server.password),
        timeout=30,
    )
    assert made.ok, made.text
    done = download(
        tmp_path,
        f"models:/{NAME}/1",
        mlflow_server,
        MLFLOW_TRACKING_USERNAME=user["username"],
        MLFLOW_TRACKING_PASSWORD=user["password"],
    )
    assert done.code == 1
    assert "403" in done.last
    assert "READ permission" in done.last
    assert "trying again" not in done.err


def test_it_ends_at_once_when_asked_to(tmp_path: Path) -> None:
    """Also as a container's first process, which ignores what it does not handle."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, ROOT / "download.py"],
            env=clean_environ(MODEL_URI="models:/m/1", OUTPUT_PATH=tmp_path / "models", MLFLOW_TRACKING_URI=uri),
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err.endswith("stopped by SIGTERM\n")


@pytest.mark.parametrize(
    "fault",
    [
        *(proxy.status(500), proxy.status(503), proxy.status(429), proxy.cut_short, proxy.cut_short_of_its_length),
        *(proxy.dropped, proxy.flipped_bit, proxy.stalled, proxy.signed_out),
    ],
    ids=lambda fault: fault.__name__,
)
@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
def test_a_spoiled_file_is_fetched_again(
    fault: proxy.Fault,
    strategy: str,
    versions: list[Logged],
    through_proxy: Proxy,
    mlflow_server: Tracking,
    tmp_path: Path,
) -> None:
    through_proxy.faults = [("artifacts/model.skops", fault)] * 2
    done = download(
        tmp_path,
        f"models:/{NAME}/1",
        mlflow_server,
        MLFLOW_TRACKING_URI=through_proxy.uri,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        MLFLOW_HTTP_REQUEST_TIMEOUT="2",
        STORAGE_STRATEGY=strategy,
    )
    assert done.code == 0, done.err
    assert done.err.count("trying again") == 2
    assert coefficient(tmp_path / "models") == 1
    fetched = through_proxy.downloads()
    assert sum("model.skops" in path for path in fetched) == 3
    assert sum("MLmodel" in path for path in fetched) == 1, "what had arrived is kept between attempts"
    if fault in (proxy.cut_short, proxy.cut_short_of_its_length, proxy.stalled):
        assert [int(part.strip("bytes=-")) > 0 for part in through_proxy.ranges] == [True, True]


def test_always_short_is_never_used(
    versions: list[Logged], through_proxy: Proxy, mlflow_server: Tracking, tmp_path: Path
) -> None:
    through_proxy.faults = [("artifacts/model.skops", proxy.cut_short)] * 3
    done = download(
        tmp_path,
        f"models:/{NAME}/1",
        mlflow_server,
        MLFLOW_TRACKING_URI=through_proxy.uri,
        STORAGE_STRATEGY="pvc",
        MAX_RETRIES="2",
    )
    assert done.code == 1
    assert "model.skops" in done.last
    assert "listed" in done.last
    assert keys(tmp_path / "cache") == []
    assert not (tmp_path / "models" / "MLmodel").exists()
    [left] = (tmp_path / "cache" / ".staging").iterdir()
    assert (left / "model" / "MLmodel").exists(), "what has arrived is kept"

    pvc = {"STORAGE_STRATEGY": "pvc", "MLFLOW_TRACKING_URI": through_proxy.uri}
    again = download(tmp_path, f"models:/{NAME}/1", mlflow_server, **pvc, POD_NAME="another")
    assert again.code == 0, again.err
    assert "already here" in again.err
    assert not list((tmp_path / "cache" / ".staging").iterdir())


def test_a_store_that_ignores_ranges(
    versions: list[Logged], through_proxy: Proxy, mlflow_server: Tracking, tmp_path: Path
) -> None:
    through_proxy.faults = [("artifacts/model.skops", proxy.cut_short), ("artifacts/model.skops", proxy.range_ignored)]
    done = download(tmp_path, f"models:/{NAME}/1", mlflow_server, MLFLOW_TRACKING_URI=through_proxy.uri)
    assert done.code == 0, done.err
    assert len(through_proxy.ranges) == 1
    assert coefficient(tmp_path / "models") == 1


def test_redirects_are_followed(
    versions: list[Logged], through_proxy: Proxy, mlflow_server: Tracking, tmp_path: Path
) -> None:
    through_proxy.faults = [("artifacts/model.skops", proxy.redirected)] * 2
    done = download(tmp_path, f"models:/{NAME}/1", mlflow_server, MLFLOW_TRACKING_URI=through_proxy.uri)
    assert done.code == 0, done.err
    assert "trying again" not in done.err
    assert coefficient(tmp_path / "models") == 1


def test_time_is_bounded(through_proxy: Proxy, versions: list[Logged], mlflow_server: Tracking, tmp_path: Path) -> None:
    through_proxy.faults = [("artifacts/model.skops", proxy.status(503))] * 1000
    done = download(
        tmp_path,
        f"models:/{NAME}/1",
        mlflow_server,
        MLFLOW_TRACKING_URI=through_proxy.uri,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        MAX_RETRIES="900",
        DOWNLOAD_TIMEOUT_SECONDS="8",
    )
    assert done.code == 1
    assert "901 attempts at most for each file, 8 s in all" in done.err
    assert "not done within DOWNLOAD_TIMEOUT_SECONDS=8" in done.last


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
def test_a_tracking_server_that_never_answers(
    strategy: str, through_proxy: Proxy, mlflow_server: Tracking, versions: list[Logged], tmp_path: Path
) -> None:
    settings = {"STORAGE_STRATEGY": strategy, "MLFLOW_TRACKING_URI": through_proxy.uri}
    uri = f"models:/{NAME}/1"
    through_proxy.faults = [("", proxy.stalled)] * 1000
    done = download(tmp_path, uri, mlflow_server, DOWNLOAD_TIMEOUT_SECONDS="2", **settings)
    assert done.code == 1
    assert f"cannot resolve {uri} by the tracking server {settings['MLFLOW_TRACKING_URI']} within 2 s: " in done.last
    through_proxy.faults = []
    assert download(tmp_path, uri, mlflow_server, **settings).code == 0
    through_proxy.faults = [("", proxy.stalled)] * 1000
    done = download(tmp_path, uri, mlflow_server, DOWNLOAD_TIMEOUT_SECONDS="2", **settings)
    assert done.code == 0, done.err
    assert "no answer in time. FALLING BACK" in done.err
    assert coefficient(tmp_path / "models") == 1


@pytest.mark.parametrize(
    "uri", ["models:/{name}/1", "models:/{name}@champion", "models:/{model_id}", "runs:/{run}/model"]
)
def test_a_hit_asks_little_of_mlflow(
    uri: str, versions: list[Logged], through_proxy: Proxy, mlflow_server: Tracking, tmp_path: Path
) -> None:
    asked = uri.format(name=NAME, **vars(versions[0]))
    pvc = {"STORAGE_STRATEGY": "pvc", "MLFLOW_TRACKING_URI": through_proxy.uri}
    assert download(tmp_path, asked, mlflow_server, **pvc).code == 0
    through_proxy.paths.clear()
    hit = download(tmp_path, asked, mlflow_server, **pvc)
    assert "0 bytes transferred" in hit.err
    assert 0 < len(through_proxy.paths) <= 4, through_proxy.paths


def test_mlflow_down_falls_back_loudly(versions: list[Logged], mlflow_server: Tracking, tmp_path: Path) -> None:
    uri = f"models:/{NAME}@champion"
    pvc = {"STORAGE_STRATEGY": "pvc", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with proxying(mlflow_server.uri) as up:
        address = up.uri
        assert download(tmp_path, uri, mlflow_server, MLFLOW_TRACKING_URI=address, **pvc).code == 0
    done = download(tmp_path, uri, mlflow_server, MLFLOW_TRACKING_URI=address, MAX_RETRIES="1", **pvc)
    assert done.code == 0, done.err
    assert done.err.count("trying again") == 1
    assert "FALLING BACK" in done.err
    assert "version=1" in done.err
    assert coefficient(tmp_path / "models") == 1

    never = download(tmp_path, f"models:/{NAME}/2", mlflow_server, MLFLOW_TRACKING_URI=address, MAX_RETRIES="0", **pvc)
    assert never.code == 1
    assert "Connection refused" in never.last
    assert "never held" in never.last

    # A refusal is an answer: no falling back on it.
    refused = download(tmp_path, uri, mlflow_server, MLFLOW_TRACKING_PASSWORD="wrong-password", **pvc)
    assert refused.code == 1


@pytest.mark.parametrize("status", [500, 520])
def test_a_pod_s_own_copy_is_a_fallback(
    status: int, through_proxy: Proxy, versions: list[Logged], mlflow_server: Tracking, tmp_path: Path
) -> None:
    """A node that starts again runs its pods' init containers again, on volumes that are still filled."""
    uri, settings = f"models:/{NAME}/1", {"MLFLOW_TRACKING_URI": through_proxy.uri, "MAX_RETRIES": "0"}
    settings["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    assert download(tmp_path, uri, mlflow_server, **settings).code == 0
    through_proxy.faults = [("", proxy.status(status))] * 1000
    done = download(tmp_path, uri, mlflow_server, **settings)
    assert done.code == 0, done.err
    assert "FALLING BACK" in done.err
    assert "version=1" in done.err
    assert download(tmp_path, f"models:/{NAME}/2", mlflow_server, **settings).code == 1
    os.truncate(tmp_path / "models" / "model.skops", 1)
    assert download(tmp_path, uri, mlflow_server, **settings).code == 1


def test_a_damaged_entry_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who wait for the new one would keep each other from it."""
    cache, key = Cache.prepare(tmp_path / "cache"), "a" * 64

    def publish() -> None:
        staging = locks.stage(cache, key)
        (cache_module.model_of(staging) / "MLmodel").write_text("flavors: {}")
        file = manifest_module.File("MLmodel", 11, hashlib.sha256(b"flavors: {}").hexdigest())
        locks.publish(cache, staging, key, Manifest("models:/m/1", {}, [file]), "sha256")

    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(manifest_module, "digest", digest)
    look = EntryCheck(cache, key, Claim("pod", "", tmp_path, "sha256", ""))
    assert not look()
    publish()
    (cache.model(key) / "MLmodel").write_text("flavours: ")
    os.truncate(cache.model(key) / "MLmodel", 11)
    read.clear()
    assert [look() for _ in range(5)] == [False] * 5
    assert len(read) == 1
    publish()
    assert look()


def test_a_damaged_entry_is_replaced(local_model: Path, tmp_path: Path) -> None:
    assert download(tmp_path, str(local_model), STORAGE_STRATEGY="pvc").code == 0
    cache = Cache(tmp_path / "cache")
    [key] = keys(cache.root)
    os.truncate(cache.model(key) / "extra" / "big", 1000)
    done = download(tmp_path, str(local_model), STORAGE_STRATEGY="pvc")
    assert done.code == 0, done.err
    assert "extra/big: 1000 bytes instead of 3000000" in done.err
    assert whole(cache.model(key), cache.manifest(key))


def test_other_bytes_are_found_and_replaced_on_demand(local_model: Path, tmp_path: Path) -> None:
    assert download(tmp_path, str(local_model), STORAGE_STRATEGY="pvc").code == 0
    cache = Cache(tmp_path / "cache")
    [key] = keys(cache.root)
    big = cache.model(key) / "extra" / "big"
    big.write_bytes(bytes(big.stat().st_size))
    assert "0 bytes transferred" in download(tmp_path, str(local_model), STORAGE_STRATEGY="pvc").err
    done = download(tmp_path, str(local_model), STORAGE_STRATEGY="pvc", VERIFY="sha256")
    assert done.code == 0, done.err
    assert "extra/big: not the bytes that were downloaded" in done.err
    assert whole(cache.model(key), cache.manifest(key))


def test_a_damaged_entry_is_no_fallback(versions: list[Logged], mlflow_server: Tracking, tmp_path: Path) -> None:
    pvc = {"STORAGE_STRATEGY": "pvc", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MAX_RETRIES": "0"}
    with proxying(mlflow_server.uri) as up:
        pvc["MLFLOW_TRACKING_URI"] = up.uri
        assert download(tmp_path, f"models:/{NAME}/1", mlflow_server, **pvc).code == 0
    cache = Cache(tmp_path / "cache")
    [key] = keys(cache.root)
    os.truncate(cache.model(key) / "model.skops", 1)
    done = download(tmp_path, f"models:/{NAME}/1", mlflow_server, **pvc)
    assert done.code == 1
    assert "is not there whole" in done.last
    assert keys(cache.root) == [key], "it stays until it can be replaced"


@pytest.mark.parametrize("code", [401, 403, 404])
def test_an_answer_is_no_reason_to_fall_back(
    code: int, versions: list[Logged], through_proxy: Proxy, mlflow_server: Tracking, tmp_path: Path
) -> None:
    pvc = {"STORAGE_STRATEGY": "pvc", "MLFLOW_TRACKING_URI": through_proxy.uri}
    assert download(tmp_path, f"models:/{NAME}/1", mlflow_server, **pvc).code == 0
    through_proxy.faults = [("model-versions/get", proxy.status(code))]
    done = download(tmp_path, f"models:/{NAME}/1", mlflow_server, **pvc)
    assert done.code == 1
    assert str(code) in done.last
    assert "FALLING BACK" not in done.err


def test_a_half_filled_output_converges(local_model: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "extra").mkdir(parents=True)
    (models / "extra" / "big").write_bytes(b"half")
    (models / "lost+found").mkdir()
    (models / output.STAGING).mkdir()
    (models / output.STAGING / "model").mkdir()
    (models / output.STAGING / "model" / "model.skops").write_bytes(b"half")
    assert download(tmp_path, str(local_model)).code == 0
    assert coefficient(models) == 3
    assert (models / "extra" / "big").stat().st_size == 3_000_000
    assert (models / "lost+found").exists(), "what is not ours stays"
    assert not (models / output.STAGING).exists()


def test_another_model_leaves_nothing_of_the_first(
    local_model: Path, versions: list[Logged], mlflow_server: Tracking, tmp_path: Path
) -> None:
    assert download(tmp_path, str(local_model)).code == 0
    (tmp_path / "models" / "notes.txt").write_text("a user's own")
    assert download(tmp_path, f"models:/{NAME}/1", mlflow_server).code == 0
    assert not (tmp_path / "models" / "extra").exists()
    assert (tmp_path / "models" / "notes.txt").exists()
    assert download(tmp_path, str(local_model), STORAGE_STRATEGY="pvc").code == 0
    assert (tmp_path / "models" / "extra").is_symlink()
    assert coefficient(tmp_path / "models") == 3


def test_no_room(local_model: Path, tmp_path: Path) -> None:
    """A listing larger than the disk: a sparse file, which costs nothing to make."""
    huge = tmp_path / "huge"
    huge.mkdir()
    (huge / "MLmodel").write_text("flavors: {}")
    with (huge / "weights").open("wb") as file:
        file.truncate(2**43)
    done = download(tmp_path, str(huge))
    assert done.code == 1
    assert "has 8.0 TiB in 2 files, of which 0 B are here, but only" in done.last
    assert "the volume is full" in done.last
    assert not (tmp_path / "models" / ".darwin-staging").exists()


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
def test_no_place(strategy: str, local_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = {"OUTPUT_PATH": tmp_path / "file" / "models", "CACHE_PATH": tmp_path / "file" / "cache"}
    done = download(tmp_path, str(local_model), STORAGE_STRATEGY=strategy, **path)
    assert done.code == 1
    assert ("CACHE_PATH" if strategy == "pvc" else "OUTPUT_PATH") in done.last
    assert "a file is where a directory belongs; remove it, or set another path" in done.last
    assert "Traceback" not in done.err


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
@pytest.mark.parametrize("embedded", [False, True])
def test_no_secret_at_debug(
    embedded: bool, strategy: str, versions: list[Logged], mlflow_server: Tracking, tmp_path: Path
) -> None:
    access = mlflow_server.environ
    if embedded:
        login = f"{mlflow_server.username}:{mlflow_server.password}@"
        access = {"MLFLOW_TRACKING_URI": mlflow_server.uri.replace("//", f"//{login}")}
    done = download(tmp_path, f"models:/{NAME}/1", LOG_LEVEL="DEBUG", STORAGE_STRATEGY=strategy, **access)
    assert done.code == 0, done.err
    assert "***" in done.err
    assert mlflow_server.password not in done.err + done.out
    missing = download(tmp_path, f"models:/{NAME}/99", LOG_LEVEL="DEBUG", **access)
    assert missing.code == 1
    assert mlflow_server.password not in missing.err + missing.out
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 5
    assert not [path for path in left if mlflow_server.password.encode() in path.read_bytes()]
