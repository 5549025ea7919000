"""The whole job: logged to a real MLflow server, downloaded, served, and its cache kept in order.

Here the roles are started as a container starts them, until nothing new would be seen by it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import references
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.digest import digest_of
from tests.conftest import ROOT, Tracking, clean_environ, free_port, run_fresh, run_role
from tests.support.apiserver import ApiServer, pod
from tests.support.registry import Logged, client_of, log_model
from tests.support.servers import Served, serving

NAME = "journey"
URI = f"models:/{NAME}@champion"


@pytest.fixture(scope="module")
def versions(mlflow_server: Tracking) -> list[Logged]:
    return [log_model(mlflow_server, factor, NAME) for factor in (1.0, 2.0)]


def promote(tracking: Tracking, version: Logged) -> None:
    with client_of(tracking) as client:
        client.set_registered_model_alias(NAME, "champion", version.version)


def info(server: Served) -> dict[str, str]:
    """The labels of `darwin_model_info`."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    [sample] = [one for family in families if family.name == "darwin_model_info" for one in family.samples]
    return dict(sample.labels)


def test_from_the_registry_to_an_answer_and_away(
    versions: list[Logged], mlflow_server: Tracking, tmp_path: Path
) -> None:
    cache, old, new = tmp_path / "cache", tmp_path / "pod-1", tmp_path / "pod-2"
    pvc: dict[str, Any] = {"MODEL_URI": URI, "STORAGE_STRATEGY": "pvc", "CACHE_PATH": cache, **mlflow_server.environ}

    promote(mlflow_server, versions[0])
    assert run_fresh("download.py", POD_NAME="pod-1", OUTPUT_PATH=old, **pvc).code == 0
    with serving(old, fresh=True, LOG_LEVEL="DEBUG", MODEL_VERSION_HEADER="true", **mlflow_server.environ) as server:
        answer = server.post("/invocations", {"inputs": [[10.0], [20.0]]})
        assert answer.json() == {"predictions": pytest.approx([10.0, 20.0])}
        assert answer.headers["X-Model-Version"] == versions[0].version
        assert "X-Model-Version" not in server.get("/ready").headers
        assert "X-Model-Version" not in server.post("/invocations", {"inputs": "no"}).headers
        digest = digest_of(Cache(cache).manifest(Cache(cache).entries(0)[0][0].key))
        served = {"version": versions[0].version, "digest": digest, "fallback": "false"}
        assert info(server).items() >= served.items()
        assert server.post("/predict", {"features": [10.0]}).json() == {"scores": pytest.approx([10.0])}

        # A rollout while the old pod still serves.
        promote(mlflow_server, versions[1])
        again = run_fresh("download.py", POD_NAME="pod-2", OUTPUT_PATH=new, **pvc)
        assert again.code == 0, again.err
        with serving(new, fresh=True) as successor:
            assert "X-Model-Version" not in successor.post("/predict", {"features": [10.0]}).headers
            assert successor.post("/predict", {"features": [10.0]}).json() == {"scores": pytest.approx([20.0])}
        assert server.post("/predict", {"features": [10.0]}).json() == {"scores": pytest.approx([10.0])}
        assert mlflow_server.password not in server.log

    # The old pod is gone, and nobody needed its model for a while.
    entries = Cache(cache).entries(0)[0]
    assert len(entries) == 2
    for entry in entries:
        os.utime(cache / entry.key / "last_used", (0, 0))
    for lease in (cache / ".leases").iterdir():
        os.utime(lease, (0, 0))
    with ApiServer(tmp_path / "serviceaccount", namespace="default") as api:
        api.pods = [pod("pod-2", claim="models"), pod("pod-1", phase="Succeeded", claim="models")]
        subprocess.run(
            [sys.executable, "-c", _CLEAN, ROOT, api.directory],
            env=clean_environ(CACHE_PATH=cache, GRACE_SECONDS=0, **api.environ),
            check=True,
            timeout=60,
        )
    [kept] = [path.name for path in cache.iterdir() if cache_module.is_key(path.name)]
    assert (new / "MLmodel").resolve().is_relative_to(cache / kept)
    with serving(new, fresh=True) as survivor:
        assert survivor.post("/predict", {"features": [10.0]}).json() == {"scores": pytest.approx([20.0])}


def test_a_fall_back_is_seen(versions: list[Logged], mlflow_server: Tracking, tmp_path: Path) -> None:
    """By `kubectl describe pod`, in the log, and as a metric; and no longer, once MLflow has answered."""
    promote(mlflow_server, versions[0])
    message = tmp_path / "termination-log"
    message.touch()
    settings = {"MODEL_URI": URI, "STORAGE_STRATEGY": "pvc", "CACHE_PATH": tmp_path / "cache", "MAX_RETRIES": 0}
    settings |= {"OUTPUT_PATH": tmp_path / "models", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 0, **mlflow_server.environ}
    proxy = {"HTTP_PROXY": f"http://127.0.0.1:{free_port()}", "NO_PROXY": ""}
    seen = []
    for more in ({}, proxy, {}):
        done = subprocess.run(
            [sys.executable, "-c", _DOWNLOAD, ROOT, message],
            env=clean_environ(**settings, **more),
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        with serving(tmp_path / "models") as server:
            seen.append((message.read_text(), info(server)["fallback"]))
    for text, fallback in seen:
        assert text.startswith(f"{NAME} version {versions[0].version}, sha256 ")
        assert "from the cache entry" in text
        assert ("; FALL-BACK, as MLflow did not answer" in text) is (fallback == "true")
    assert [fallback for _, fallback in seen] == ["false", "true", "false"]


_DOWNLOAD = "import pathlib, sys; sys.path.insert(0, sys.argv[1]); from darwin_runtime import role; import download; "
_DOWNLOAD += "role.TERMINATION_LOG = pathlib.Path(sys.argv[2]); sys.exit(download.main())"

_CLEAN = "import os, pathlib, sys; sys.path.insert(0, sys.argv[1]); import cleanup; "
_CLEAN += "sys.exit(cleanup.main(os.environ, pathlib.Path(sys.argv[2])))"


def test_straight_from_the_registry(versions: list[Logged], mlflow_server: Tracking) -> None:
    with serving(None, fresh=True, MLFLOW_MODEL_URI=f"models:/{NAME}/2", **mlflow_server.environ) as server:
        assert server.post("/predict", {"features": [10.0]}).json() == {"scores": pytest.approx([20.0])}
        assert mlflow_server.password not in server.log


def test_straight_from_a_registry_that_says_no(versions: list[Logged], mlflow_server: Tracking) -> None:
    environ = {**mlflow_server.environ, "MLFLOW_TRACKING_PASSWORD": "wrong-password"}
    done = run_fresh("darwin_serve.py", MLFLOW_MODEL_URI=f"models:/{NAME}/2", PORT=0, HOST="127.0.0.1", **environ)
    assert done.code == 1
    assert "401" in done.last
    assert "wrong-password" not in done.err


@pytest.mark.parametrize("form", ["model", ".", "{alias}/model", "{linked}"])
def test_darwin_s_chart_finds_it(form: str, versions: list[Logged], mlflow_server: Tracking, tmp_path: Path) -> None:
    """The places where charts look: `<dir>/model`, `<cache>/<alias>/model`."""
    alias = references.make_alias("shop", f"models:/{NAME}/1")
    strategy: dict[str, Any] = {"STORAGE_STRATEGY": "pvc" if "{" in form else "emptydir", "DEPLOYMENT_NAME": "shop"}
    done = run_role(
        "download.py",
        MODEL_URI=f"models:/{NAME}/1",
        OUTPUT_PATH=tmp_path / "models",
        CACHE_PATH=tmp_path / "cache",
        **strategy,
        **mlflow_server.environ,
    )
    assert done.code == 0, done.err
    base = tmp_path / ("cache" if "{alias}" in form else "models")
    with serving(base / form.format(alias=alias, linked="model")) as server:
        assert server.post("/predict", {"features": [10.0]}).json() == {"scores": pytest.approx([10.0])}


def test_a_cache_that_is_not_mounted_is_explained(
    versions: list[Logged], mlflow_server: Tracking, tmp_path: Path
) -> None:
    pvc: dict[str, Any] = {
        "STORAGE_STRATEGY": "pvc",
        "CACHE_PATH": tmp_path / "cache",
        "OUTPUT_PATH": tmp_path / "models",
    }
    assert run_role("download.py", MODEL_URI=f"models:/{NAME}/1", **pvc, **mlflow_server.environ).code == 0
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    done = run_role("darwin_serve.py", MODEL_LOCAL_PATH=tmp_path / "models", PORT=0, HOST="127.0.0.1")
    assert done.code == 1
    assert "is a link to" in done.last
    assert "not mounted at the same path" in done.last


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
def test_a_file_with_other_bytes_is_named_when_loading_fails(
    strategy: str, versions: list[Logged], mlflow_server: Tracking, tmp_path: Path
) -> None:
    places: dict[str, Any] = {"CACHE_PATH": tmp_path / "cache", "OUTPUT_PATH": tmp_path / "models"}
    settings = {"MODEL_URI": f"models:/{NAME}/1", "STORAGE_STRATEGY": strategy, **mlflow_server.environ}
    assert run_role("download.py", **places, **settings).code == 0
    file = tmp_path / "models" / "model.skops"
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes(len(content) - 200) + content[-100:])
    done = run_role("darwin_serve.py", MODEL_LOCAL_PATH=tmp_path / "models", PORT=0, HOST="127.0.0.1")
    assert done.code == 1
    assert "model.skops: not the bytes that were downloaded" in done.last
    assert "requirements.txt is not" not in done.last


def test_a_uri_the_server_can_not_resolve_is_a_bad_setting() -> None:
    for uri, name in {"models:/m/1": "MLFLOW_TRACKING_URI", "models:/m": "MLFLOW_MODEL_URI"}.items():
        done = run_role("darwin_serve.py", MLFLOW_MODEL_URI=uri, PORT=0)
        assert done.code == 2
        assert f"bad configuration: {name}" in done.err


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
def test_a_file_cut_short_after_the_download_is_named(
    strategy: str, versions: list[Logged], mlflow_server: Tracking, tmp_path: Path
) -> None:
    places: dict[str, Any] = {
        "CACHE_PATH": tmp_path / "cache",
        "OUTPUT_PATH": tmp_path / "models",
        "STORAGE_STRATEGY": strategy,
    }
    assert run_role("download.py", MODEL_URI=f"models:/{NAME}/1", **places, **mlflow_server.environ).code == 0
    # Still something that unpacks up to a point: only the size tells.
    os.truncate(tmp_path / "models" / "model.skops", (tmp_path / "models" / "model.skops").stat().st_size - 1)
    done = run_role("darwin_serve.py", MODEL_LOCAL_PATH=tmp_path / "models", PORT=0, HOST="127.0.0.1")
    assert done.code == 1
    assert "model.skops: " in done.last
    assert "bytes instead of" in done.last


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
def test_bytes_are_compared_and_healed_on_demand(
    strategy: str, versions: list[Logged], mlflow_server: Tracking, tmp_path: Path
) -> None:
    places: dict[str, Any] = {"CACHE_PATH": tmp_path / "cache", "OUTPUT_PATH": tmp_path / "models"}
    settings = {"MODEL_URI": f"models:/{NAME}/1", "STORAGE_STRATEGY": strategy, **mlflow_server.environ, **places}
    assert run_role("download.py", **settings).code == 0
    file = tmp_path / "models" / "conda.yaml"
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    done = run_role("darwin_serve.py", MODEL_LOCAL_PATH=tmp_path / "models", PORT=0, HOST="127.0.0.1", VERIFY="sha256")
    assert done.code == 1
    assert "conda.yaml: not the bytes that were downloaded" in done.last
    assert "Run download.py again with VERIFY=sha256" in done.last
    assert run_role("download.py", **settings, VERIFY="sha256").code == 0
    assert file.read_bytes() == content
