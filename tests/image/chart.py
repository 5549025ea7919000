"""What Darwin's Helm chart makes of a deployment: commands, environment, mounts and probes of its pods.

Facts of the chart `darwin-fastapi-serve`, of which nothing else matters to a container. The chart runs scripts of its
own, mounted over `/scripts`, with the image's Python and MLflow; `SCRIPTS` do what those do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tests.image.containers import Manifest

CACHE = "/model-cache"
DEPLOYMENT = "serve-iris"

_DOWNLOAD = """
import os
import mlflow

mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
mlflow.artifacts.download_artifacts(artifact_uri=os.environ["MODEL_URI"], dst_path={to})
"""
SCRIPTS = {
    "download_model_emptydir.py": _DOWNLOAD.format(to='os.environ["OUTPUT_PATH"]'),
    "download_model.py": _DOWNLOAD.format(to=f'"{CACHE}/" + os.environ["CACHE_KEY"]'),
}


def write_scripts(directory: Path) -> Path:
    """The chart's ConfigMap."""
    directory.mkdir()
    for name, text in SCRIPTS.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return directory


def key(uri: str) -> str:
    """The directory in the cache where the chart looks for the model of its deployment."""
    return hashlib.sha256(f"{DEPLOYMENT}:{uri}".encode()).hexdigest()


def _variables(**values: str) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _tracking(uri: str) -> dict[str, str]:
    # Empty credentials are what the chart renders when there are none.
    login = {"MLFLOW_TRACKING_USERNAME": "", "MLFLOW_TRACKING_PASSWORD": ""}
    return {"MODEL_URI": uri, "MLFLOW_TRACKING_URI": "http://mlflow:5000", **login}


def deployment(image: str, uri: str, strategy: str, *, init: Manifest | None) -> Manifest:
    """The pod template of the model at `uri`."""
    emptydir = strategy == "emptydir"
    volume = "model-storage" if emptydir else "model-cache"
    path = f"{CACHE}/model" if emptydir else f"{CACHE}/{key(uri)}/model"
    probe = {
        "initialDelaySeconds": 20,
        "periodSeconds": 5,
        "timeoutSeconds": 1,
        "successThreshold": 1,
        "failureThreshold": 5,
        "httpGet": {"path": "/healthcheck", "port": 8000},
    }
    main = {
        "name": DEPLOYMENT,
        "image": image,
        "command": None,
        "env": _variables(
            ENV="uat",
            SERVICE_NAME=DEPLOYMENT,
            MODEL_LOCAL_PATH=path,
            DEPLOYMENT_NAME=DEPLOYMENT,
            MODEL_URI=uri,
            PLATFORM="k8s",
            DD_RUNTIME_METRICS_ENABLED="true",
            DD_TAGS="TEAM_SUFFIX:,VPC_SUFFIX:",
        ),
        "ports": [{"name": "app-port", "containerPort": 8000, "protocol": "TCP"}],
        "livenessProbe": probe,
        "readinessProbe": probe,
        "resources": {"limits": {"cpu": 2, "memory": "4Gi"}, "requests": {"cpu": 2, "memory": "4Gi"}},
        "volumeMounts": [{"name": volume, "mountPath": CACHE, "readOnly": True}],
    }
    scripts = {"name": "scripts", "configMap": {"name": "model-downloader"}}
    source: dict[str, Any] = {"emptyDir": {}} if emptydir else {"persistentVolumeClaim": {"claimName": "model-cache"}}
    return {
        "metadata": {},
        "spec": {
            "initContainers": [init] if init else [],
            "containers": [main],
            "volumes": [scripts, {"name": volume, **source}],
            "terminationGracePeriodSeconds": 30,
        },
    }


def emptydir_downloader(image: str, uri: str, command: list[str]) -> Manifest:
    """The init container of the strategy `emptydir`."""
    own = any("emptydir" in part for part in command)
    mounts = [{"name": "model-storage", "mountPath": CACHE}]
    return {
        "name": "model-downloader",
        "image": image,
        "command": command,
        "env": _variables(OUTPUT_PATH=CACHE, MAX_RETRIES="5", BACKOFF_SECONDS="10", **_tracking(uri)),
        "volumeMounts": [*([{"name": "scripts", "mountPath": "/scripts", "readOnly": True}] if own else []), *mounts],
    }


def pvc_job(image: str, uri: str, *, own_scripts: bool) -> Manifest:
    """The pod template of the job that runs before a deployment of the strategy `pvc`."""
    scripts = [{"name": "scripts", "mountPath": "/scripts", "readOnly": True}] if own_scripts else []
    more = {"CACHE_KEY": key(uri)} if own_scripts else {"STORAGE_STRATEGY": "pvc"}
    container = {
        "name": "download",
        "image": image,
        "command": ["python", "/scripts/download_model.py"],
        "env": _variables(CACHE_PATH=CACHE, DEPLOYMENT_NAME=DEPLOYMENT, **more, **_tracking(uri)),
        "volumeMounts": [*scripts, {"name": "model-cache", "mountPath": CACHE}],
    }
    volumes = [
        {"name": "scripts", "configMap": {"name": "model-downloader"}},
        {"name": "model-cache", "persistentVolumeClaim": {"claimName": "model-cache"}},
    ]
    return {"metadata": {}, "spec": {"containers": [container], "volumes": volumes, "restartPolicy": "Never"}}


def wait_for_model(image: str, uri: str) -> Manifest:
    """The init container of the strategy `pvc`, which waits for the file that the job is to leave."""
    path = f"{CACHE}/{key(uri)}/model/MLmodel"
    return {
        "name": "wait-for-model",
        "image": image,
        "command": ["sh", "-c", f"test -f {path} && echo found"],
        "env": [],
        "volumeMounts": [{"name": "model-cache", "mountPath": CACHE, "readOnly": True}],
    }
