"""The pods of `deploy/` and of Darwin's chart, run from their manifests, with the image that a registry gave back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.conftest import Finished
from tests.image import chart
from tests.image.conftest import IMAGE, MLFLOW, TAG, make_readable, podman
from tests.image.containers import Manifest, Node, Pod
from tests.support import kustomize
from tests.support.apiserver import ApiServer
from tests.test_deploy import CLEANUP, DEPLOY, KSERVE, PVC, TEMPLATES
from tests.test_deploy import template as pod_template

FOUR = {"inputs": [[4.0]]}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path / "serviceaccount", namespace="default") as running:
        make_readable(tmp_path / "serviceaccount")
        yield running


@pytest.fixture
def node(pulled: str, iris_run: str, api: ApiServer, tmp_path: Path) -> Node:
    for name in ("pods", "claim"):
        (tmp_path / name).mkdir()
    make_readable(tmp_path)
    (tmp_path / "claim").chmod(0o777)
    scripts = {"model-downloader": make_readable(chart.write_scripts(tmp_path / "scripts"))}
    return Node(tmp_path, claims={"model-cache": tmp_path / "claim"}, configmaps=scripts, hosts=MLFLOW, api=api)


def check_answers(node: Node, pod: Pod, factor: float = 7.0) -> None:
    assert [done.code for done in pod.init] == [0] * len(pod.init), pod.init[-1].err
    node.wait_ready(pod)
    answer = pod.server.post("/invocations", FOUR)
    assert answer.json() == {"predictions": [pytest.approx(4.0 * factor)]}


def test_the_registry_gives_back_what_was_pushed(image: str, pulled: str) -> None:
    tags = requests.get("http://localhost:5000/v2/serve-md-runtime/tags/list", timeout=10).json()
    assert tags == {"name": "serve-md-runtime", "tags": [TAG]}
    assert podman("image", "inspect", "--format={{.Id}}", pulled) == podman(
        "image", "inspect", "--format={{.Id}}", image
    )


# deploy/


def test_emptydir(node: Node) -> None:
    with node.pod(pod_template("emptydir.yaml"), "model-server-1") as pod:
        check_answers(node, pod)
        assert pod.server.post("/predict", {"features": {"x": "?"}}).status_code == 422
        pod.server.podman("kill", "--signal=TERM")
        assert pod.server.wait_end() == 0


def test_pvc_and_cleanup(node: Node) -> None:
    cache = node.claims["model-cache"]

    def clean(name: str) -> tuple[Finished, dict[str, Any]]:
        done = node.job(pod_template(CLEANUP), name)
        return done, json.loads(done.out)

    with node.pod(pod_template(PVC), "model-server-1") as first:
        check_answers(node, first)
        assert "published as" in first.init[0].err
        [key] = [path.name for path in cache.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]
        [lease] = os.listdir(cache / ".leases")
        assert lease.startswith(f"model-server-1.{first.uid}.")
        used = cache / key / "last_used"
        os.utime(used, (0, 0))
        done, result = clean("cleanup-1")
        assert (done.code, result["removed"]) == (0, 0), done.err
        assert (cache / key).is_dir()
    # Each served from what the first downloaded.
    with node.pod(pod_template(PVC), "model-server-2") as second:
        check_answers(node, second)
        assert "published as" not in second.init[0].err
    # Verbatim the removal would wait for two minutes.
    node.environ = {"GRACE_SECONDS": "0"}
    os.utime(used, (0, 0))
    done, result = clean("cleanup-2")
    assert (done.code, result["removed"]) == (0, 1), done.err
    assert not (cache / key).exists()


def deployed(model: str) -> Manifest:
    """The pod template that the overlay of a model makes."""
    [deployment] = [one for one in kustomize.render(DEPLOY / "models" / model) if one["kind"] == "Deployment"]
    return TEMPLATES["Deployment"](deployment["spec"])


@pytest.mark.usefixtures("wine")
def test_two_models_side_by_side(node: Node) -> None:
    """Each answers for itself, from one cache, of which one cleanup takes nothing from either."""
    iris, wine = deployed("iris"), deployed("wine")
    # The pods share the network of this machine.
    [server] = wine["spec"]["containers"]
    server["env"].append({"name": "PORT", "value": "8001"})
    server["ports"][0]["containerPort"] = 8001
    with node.pod(iris, "iris-model-server-1") as first, node.pod(wine, "wine-model-server-1") as second:
        check_answers(node, first, 7.0)
        check_answers(node, second, 5.0)
        cache = node.claims["model-cache"]
        entries = [path for path in cache.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]
        assert len(entries) == 2
        for entry in entries:
            os.utime(entry / "last_used", (0, 0))
        done = node.job(pod_template(CLEANUP), "cleanup-1")
        assert done.code == 0, done.err
        result = json.loads(done.out)
        assert (result["entries"], result["entries_in_use"], result["removed"]) == (2, 2, 0)


def test_what_stops_an_init_container_is_its_termination_message(node: Node) -> None:
    node.hosts = {"mlflow": "127.0.0.9"}
    node.environ = {"MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with node.pod(pod_template("emptydir.yaml"), "model-server-1") as pod:
        [done] = pod.init
        assert done.code == 1
        assert pod.main is None
        assert "no usable answer from the tracking server http://mlflow:5000" in pod.termination("download")
        assert pod.termination("download").strip() in done.last


def test_kserve(node: Node) -> None:
    """What KServe makes of the runtime: the name filled in, the model of its own init container mounted."""
    runtime, service = yaml.safe_load_all((DEPLOY / KSERVE).read_text())
    spec = json.loads(json.dumps(runtime["spec"]).replace("{{.Name}}", service["metadata"]["name"]))
    [container] = spec["containers"]
    container["volumeMounts"] = [
        *container["volumeMounts"],
        {"name": "model", "mountPath": "/mnt/models", "readOnly": True},
    ]
    template = pod_template("emptydir.yaml")
    # KServe's storage initializer leaves the files of the model in a volume.
    download = template["spec"]["initContainers"][0]
    download["volumeMounts"] = [{"name": "model", "mountPath": "/models"}, {"name": "tmp", "mountPath": "/tmp"}]
    download["securityContext"] |= {"runAsUser": 10001, "runAsGroup": 10001}
    spec["initContainers"] = [download]
    spec["volumes"] = [*spec["volumes"], {"name": "model", "emptyDir": {}}]
    with node.pod({"spec": spec}, "iris-predictor-1") as pod:
        check_answers(node, pod)
        assert pod.server.port == 8080
        answer = pod.server.post("/v1/models/iris:predict", {"instances": [[4.0]]})
        assert answer.json() == {"predictions": [pytest.approx(28.0)]}
        tensor = {"name": "input", "shape": [1, 1], "datatype": "FP64", "data": [4.0]}
        answer = pod.server.post("/v2/models/iris/infer", {"inputs": [tensor]})
        assert answer.json()["outputs"][0]["data"] == [pytest.approx(28.0)]


# Darwin's chart


@pytest.fixture(params=["models", "runs"])
def uri(request: pytest.FixtureRequest, iris_run: str) -> str:
    return "models:/iris/1" if request.param == "models" else f"runs:/{iris_run}/model"


@pytest.mark.parametrize("script", ["/scripts/download_model_emptydir.py", "/scripts/download_model.py"])
def test_chart_emptydir(node: Node, uri: str, script: str) -> None:
    """With the chart's script, mounted over the image's, and with the image's."""
    init = chart.emptydir_downloader(IMAGE, uri, ["python", script])
    with node.pod(chart.deployment(IMAGE, uri, "emptydir", init=init), "serve-iris-1") as pod:
        check_answers(node, pod)


def chart_logs_json(pod: Pod) -> list[Manifest]:
    return [json.loads(line) for line in pod.server.log().splitlines()]


@pytest.mark.parametrize("own_scripts", [True, False], ids=["its own scripts", "the image's"])
def test_chart_pvc(node: Node, uri: str, own_scripts: bool) -> None:
    done = node.job(chart.pvc_job(IMAGE, uri, own_scripts=own_scripts), "prewarm-1")
    assert done.code == 0, done.err
    # The chart's own script puts `models:/` a level above where its wait looks: it would wait for ever.
    waits = not (own_scripts and uri.startswith("models:"))
    init = chart.wait_for_model(IMAGE, uri) if waits else None
    with node.pod(chart.deployment(IMAGE, uri, "pvc", init=init), "serve-iris-1") as pod:
        check_answers(node, pod)
        assert {line["service"] for line in chart_logs_json(pod)} == {chart.DEPLOYMENT}


def test_chart_cleanup(node: Node) -> None:
    """Its CronJob, and a pod of its deployment, which names the model's key in its environment only."""
    uri = "models:/iris/1"
    done = node.job(chart.pvc_job(IMAGE, uri, own_scripts=False), "prewarm-1")
    assert done.code == 0, done.err
    template = pod_template(CLEANUP)
    [container] = template["spec"]["containers"]
    container["command"] = ["python", "/scripts/cleanup_cache.py"]
    container["env"] = [
        *({"name": name, "value": value} for name, value in (("CACHE_PATH", chart.CACHE), ("NAMESPACE", "default"))),
        *({"name": name, "value": value} for name, value in (("TTL_DAYS", "0"), ("MAX_SIZE_GB", "0"))),
        {"name": "DRY_RUN", "value": "true"},
    ]
    with node.pod(chart.deployment(IMAGE, uri, "pvc", init=None), "serve-iris-1") as pod:
        check_answers(node, pod)
        done = node.job(template, "cleanup-1")
        assert done.code == 0, done.err
        assert json.loads(done.out)["removed"] == 0
    done = node.job(template, "cleanup-2")
    assert json.loads(done.out)["removed"] == 1, done.err
