"""Images built without a network, a registry, and an MLflow server where the manifests look for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from image import build
from tests.conftest import Tracking, mlflow_serving, program, wait_until
from tests.support.registry import log_model

IMAGE = "localhost:5000/serve-md-runtime:0.1.0"
TAG = IMAGE.rpartition(":")[2]

# What the manifests in deploy/ call the MLflow server; its address is not the registry's, for the port is the same.
MLFLOW = {"mlflow": "127.0.0.2"}


@pytest.fixture(scope="session", autouse=True)
def _loopback_only() -> None:
    """These tests say that no network is needed, so there must be none."""
    for name in ("buildah", "podman", "runc"):
        program(name, name)
    assert os.geteuid() == 0, "containers are run as root here"
    routes = Path("/proc/net/route").read_text().splitlines()[1:]
    assert not routes, "run these with `make test-image`, which takes the network away"
    with tarfile.open(build.BASE) as base:
        python = f"./usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
        assert python in base.getnames(), "models are pickled here and loaded there, so both need the same Python"


@pytest.fixture(scope="session")
def image() -> str:
    """The default image."""
    build.build("localhost/darwin-test:default")
    return "localhost/darwin-test:default"


@pytest.fixture(scope="session")
def sklearn_image() -> str:
    build.build("localhost/darwin-test:sklearn", FLAVORS="sklearn")
    return "localhost/darwin-test:sklearn"


@pytest.fixture(scope="session")
def pulled(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The default image by the README's name, which it lost and got back from a registry."""
    home = tmp_path_factory.mktemp("registry")
    config = home / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {home}/blobs}}}}\nhttp: {{addr: 'localhost:5000'}}\n"
    )
    command = [program("docker-registry", "docker-registry"), "serve", str(config)]
    with (home / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as registry:

        def answers() -> bool:
            assert registry.poll() is None, (home / "log").read_text()
            try:
                return requests.get("http://localhost:5000/v2/", timeout=5).ok
            except requests.ConnectionError:
                return False

        wait_until(answers, "the registry answers")
        podman("tag", image, IMAGE)
        podman("push", "--tls-verify=false", IMAGE)
        podman("untag", IMAGE, IMAGE)
        podman("pull", "--tls-verify=false", IMAGE)
        yield IMAGE
        podman("untag", IMAGE, IMAGE)
        registry.terminate()


def podman(*arguments: str) -> str:
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """An MLflow server at the manifests' address, with the model that they deploy."""
    home = tmp_path_factory.mktemp("mlflow")
    address = MLFLOW["mlflow"]
    names = ("--allowed-hosts", f"mlflow:5000,{address}:5000")
    with mlflow_serving(home, *names, host=address, port=5000) as running:
        yield running


@pytest.fixture(scope="session")
def iris_run(tracking: Tracking) -> str:
    """The run of `models:/iris/1`, which answers with seven times what it is asked."""
    logged = log_model(tracking, 7.0)
    assert logged.version == "1"
    return logged.run


@pytest.fixture(scope="session")
def wine(tracking: Tracking) -> None:
    """`models:/wine/1`, which answers with five times what it is asked."""
    assert log_model(tracking, 5.0, "wine").version == "1"


def make_readable(path: Path) -> Path:
    """Let whoever runs in a container read what was written here."""
    for directory in (path, *path.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)
    for found in path.rglob("*"):
        found.chmod(0o755 if found.is_dir() else 0o644)
    return path
