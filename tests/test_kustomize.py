"""Several models in one namespace: the overlays of `deploy/models`, and files that were pasted twice, share no pod."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from darwin_runtime.http.settings import Settings
from darwin_runtime.settings import Reader
from tests.support import kustomize
from tests.support.kustomize import Manifest
from tests.support.settings import read_by
from tests.test_deploy import (
    DEPLOY,
    FILES,
    NEWEST,
    OLDEST,
    PVC,
    README,
    TEMPLATES,
    mounts,
    validate,
    values,
    violations,
    walk,
)

MODELS = ("iris", "wine")

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl, for the real kustomize")


def overlay(name: str, directory: Path = DEPLOY) -> list[Manifest]:
    return kustomize.render(directory / "models" / name)


def pasted(name: str, file: str = PVC) -> list[Manifest]:
    """The files of a model, as the README's command changes them for another one; `file` has its Deployment."""
    [command] = re.findall(r"^sed '(.+)' deploy/base/\*\.yaml \|", README, re.MULTILINE)
    files = [DEPLOY / file, *(DEPLOY / one for one in FILES if one.startswith("base/") and one != PVC)]
    done = subprocess.run(["sed", command.replace("wine", name), *files], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def shared() -> list[Manifest]:
    return kustomize.render(DEPLOY / "shared")


# Both ways to have two models.
PAIRS = {
    "overlays": lambda: (overlay("iris"), overlay("wine")),
    "pasted": lambda: (pasted("iris"), pasted("wine")),
    "pasted without a cache": lambda: (pasted("iris", "emptydir.yaml"), pasted("wine", "emptydir.yaml")),
    "the files as they are, and an overlay": lambda: (kustomize.render(DEPLOY / "base"), overlay("wine")),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[list[Manifest], list[Manifest]]:
    return PAIRS[request.param]()


def pods(documents: list[Manifest]) -> list[dict[str, str]]:
    """The labels of the pods that manifests make."""
    return [TEMPLATES[one["kind"]](one["spec"])["metadata"]["labels"] for one in documents if one["kind"] in TEMPLATES]


def selectors(documents: list[Manifest]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every selector of pods, with its kind and path. A HorizontalPodAutoscaler has that of its Deployment."""
    for document in documents:
        kind, spec = document["kind"], document.get("spec", {})
        for path, value in walk(spec):
            if path.endswith((".selector", ".podSelector", ".labelSelector")):
                assert kind == "Service" or value.keys() <= {"matchLabels"}, "the rest is evaluated nowhere here"
                yield f"{kind}{path}", value if kind == "Service" else value.get("matchLabels", {})
        if kind == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            [scaled] = [
                one
                for one in documents
                if (one["apiVersion"], one["kind"], one["metadata"]["name"])
                == (target["apiVersion"], target["kind"], target["name"])
            ]
            yield kind, scaled["spec"]["selector"]["matchLabels"]


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def taken(documents: list[Manifest], others: list[Manifest]) -> list[str]:
    """The selectors among `documents` that select pods of `others`."""
    return [path for path, selector in selectors(documents) for labels in pods(others) if selects(selector, labels)]


KINDS = ["Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget", "Service"]


def test_no_selector_of_a_model_selects_pods_of_another(pair: tuple[list[Manifest], list[Manifest]]) -> None:
    for one, other in itertools.permutations((*pair, shared()), 2):
        assert taken(one, other) == []
    for model in pair:
        found = list(selectors(model))
        assert sorted({path.partition(".")[0] for path, _ in found}) == KINDS
        assert "Deployment.template.spec.topologySpreadConstraints.0.labelSelector" in dict(found)
        [labels] = pods(model)
        assert [path for path, selector in found if not selects(selector, labels)] == []
        assert {value for path, value in walk(model) if path.endswith("app.kubernetes.io/instance")} == {
            labels["app.kubernetes.io/instance"]
        }


def test_no_two_objects_have_one_name(pair: tuple[list[Manifest], list[Manifest]]) -> None:
    documents = [one for documents in (*pair, shared()) for one in documents]
    names = [(one["kind"], one["metadata"]["name"]) for one in documents]
    assert len(names) == len(set(names))
    for model in pair:
        [name] = {one["metadata"]["name"] for one in model}
        [labels] = pods(model)
        assert name.startswith(labels["app.kubernetes.io/instance"])


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_takes_what_is_made(pair: tuple[list[Manifest], list[Manifest]], version: str) -> None:
    for model in pair:
        for document in model:
            validate(document, version)
            if document["kind"] in TEMPLATES:
                assert violations(TEMPLATES[document["kind"]](document["spec"])["spec"]) == set()


def test_the_models_share_the_cache_and_the_login() -> None:
    claims, secrets = [], []
    for document in (*shared(), *overlay("iris"), *overlay("wine")):
        found = list(walk(document))
        claims += [value for path, value in found if path.endswith(".claimName")]
        secrets += [value["name"] for path, value in found if path.endswith(".secretKeyRef")]
    [claim] = [one["metadata"]["name"] for one in shared() if one["kind"] == "PersistentVolumeClaim"]
    assert claims == [claim] * 3
    assert set(secrets) == {"mlflow"}


def differences(one: Any, other: Any) -> set[str]:
    first, second = dict(walk(one)), dict(walk(other))
    return {
        path
        for path in first.keys() | second.keys()
        if not isinstance(first.get(path, second.get(path)), dict | list) and first.get(path) != second.get(path)
    }


@pytest.mark.parametrize("name", MODELS)
def test_an_overlay_changes_what_it_says(name: str) -> None:
    made = {one["kind"]: one for one in overlay(name)}
    base = {one["kind"]: one for one in kustomize.render(DEPLOY / "base")}
    instance = re.compile(r"(^\.metadata\.name|\.scaleTargetRef\.name|\.app\.kubernetes\.io/instance)$")
    changed = {
        path
        for kind, document in made.items()
        for path in differences(base[kind], document)
        if not instance.search(path)
    }
    memory = {".spec.template.spec.containers.0.resources.limits.memory"} if name == "wine" else set()
    # The pasted files serve iris already.
    uri = {".spec.template.spec.initContainers.0.env.0.value"} if name == "wine" else set()
    assert changed == memory | uri
    [init] = made["Deployment"]["spec"]["template"]["spec"]["initContainers"]
    assert values(init)["MODEL_URI"] == f"models:/{name}/1"
    assert made["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == f"{name}-model-server"


def test_an_overlay_has_at_most_ten_lines() -> None:
    overlays = sorted((DEPLOY / "models").glob("*/kustomization.yaml"))
    assert [path.parent.name for path in overlays] == [*MODELS]
    for path in overlays:
        assert len(path.read_text().splitlines()) <= 10
    listed = yaml.safe_load((DEPLOY / "models" / "kustomization.yaml").read_text())["resources"]
    assert listed == ["../shared", *MODELS]
    assert len(kustomize.render(DEPLOY / "models")) == len(shared()) + 2 * len(overlay("iris"))


def test_a_model_is_added_as_the_readme_says(tmp_path: Path) -> None:
    [commands] = re.findall(r"^cp -r deploy/models/wine .*?(?=^```)", README, re.MULTILINE | re.DOTALL)
    lines = [line for line in commands.splitlines() if not line.startswith("kubectl")]
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    subprocess.run("\n".join(lines), shell=True, cwd=tmp_path, check=True)
    [name] = {path.name for path in (tmp_path / "deploy" / "models").iterdir() if path.is_dir()} - set(MODELS)
    made = overlay(name, tmp_path / "deploy")
    for other in (overlay("iris"), overlay("wine"), shared()):
        assert taken(made, other) == taken(other, made) == []
    together = kustomize.render(tmp_path / "deploy" / "models")
    assert sum(one["metadata"]["name"] == f"{name}-model-server" for one in together) == len(made)
    [deployment] = [one for one in made if one["kind"] == "Deployment"]
    assert values(deployment["spec"]["template"]["spec"]["initContainers"][0])["MODEL_URI"] == f"models:/{name}/1"


def test_prometheus_scrapes_every_model_and_nothing_else() -> None:
    [monitor] = yaml.safe_load_all((DEPLOY / "monitoring" / "servicemonitor.yaml").read_text())
    for documents in (overlay("iris"), overlay("wine"), pasted("churn"), pasted("churn", "emptydir.yaml"), shared()):
        services = [one for one in documents if one["kind"] == "Service"]
        assert len(services) == len(pods(documents)) - (documents == shared())
        for service in services:
            assert selects(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
            assert [one["port"] for one in monitor["spec"]["endpoints"]] == [
                port["name"] for port in service["spec"]["ports"]
            ]


# The checks can fail


@pytest.mark.parametrize("replace", [(r"(instance: )\w+", r"\1model"), (r"labels: .*", "")], ids=["one name", "none"])
def test_models_that_share_pods_are_found(replace: tuple[str, str], tmp_path: Path) -> None:
    copied = shutil.copytree(DEPLOY, tmp_path / "deploy")
    for name in MODELS:
        file = copied / "models" / name / "kustomization.yaml"
        file.write_text(re.sub(*replace, file.read_text()))
    found = taken(overlay("iris", copied), overlay("wine", copied))
    assert sorted({path.partition(".")[0] for path in found}) == KINDS


# The renderer is kustomize's


def ordered(found: Any) -> Any:
    """Without the order of manifests, which means nothing."""
    return sorted(found, key=lambda one: (one["kind"], one["metadata"]["name"]))


@needs_kubectl
@pytest.mark.parametrize("directory", ["base", "shared", "models", "models/iris", "models/wine"])
def test_the_renderer_makes_what_kubectl_makes(directory: str) -> None:
    assert ordered(kustomize.build(DEPLOY / directory)) == ordered(kustomize.render(DEPLOY / directory))


@needs_kubectl
def test_the_renderer_applies_a_component_as_kubectl_does(tmp_path: Path) -> None:
    directory = with_access("models/wine", tmp_path)
    assert ordered(kustomize.build(directory)) == ordered(kustomize.render(directory))


def with_access(directory: str, tmp_path: Path) -> Path:
    """A copy of a kustomization, with the component as the README says to add it. emptydir.yaml has none yet."""
    file = shutil.copytree(DEPLOY, tmp_path / "deploy") / directory / "kustomization.yaml"
    text = file.read_text() if file.exists() else "resources: [emptydir.yaml]\n"
    line = "components: [../../access]" if file.exists() else "components: [access]"
    assert f"`{line}`" in README
    file.write_text(f"{text}{line}\n")
    return file.parent


@pytest.mark.parametrize("directory", [".", "models/wine"])
def test_the_component_lets_in_whom_it_says(directory: str, tmp_path: Path) -> None:
    documents = kustomize.render(with_access(directory, tmp_path))
    for document, version in itertools.product(documents, (OLDEST, NEWEST)):
        validate(document, version)
    [deployment] = [one for one in documents if one["kind"] == "Deployment"]
    spec = deployment["spec"]["template"]["spec"]
    [main] = spec["containers"]
    assert {one["name"] for one in main["env"]} <= read_by("main").keys()

    # The files that the README's Secrets have are where the settings look for them.
    secrets = dict(re.findall(r"kubectl create secret (?:generic|tls) (\S+) (--\S+=.*?)(?:  |$)", README, re.MULTILINE))
    issued = trustme.CA().issue_cert("model-server")
    content = {
        "api-keys": b"x" * 32,
        "tls.crt": issued.cert_chain_pems[0].bytes(),
        "tls.key": issued.private_key_pem.bytes(),
    }
    environ = values(main)
    for name, mount in mounts(main).items():
        [secret] = [one["secret"] for one in spec["volumes"] if one["name"] == name and "secret" in one] or [None]
        if secret:
            assert mount["readOnly"]
            assert "subPath" not in mount
            # Others in the pod can't read it, and fsGroup can.
            assert (secret["defaultMode"], spec["securityContext"]["fsGroup"]) == (0o440, 10001)
            (tmp_path / name).mkdir()
            for found in re.findall(r"[\w-]+\.?\w+(?=$| )", secrets[secret["secretName"]]):
                (tmp_path / name / found).write_bytes(content[found])
            environ = {key: value.replace(mount["mountPath"], str(tmp_path / name)) for key, value in environ.items()}
    settings = Settings.from_env(Reader(environ))
    assert settings.tls is not None
    assert settings.guard is not None

    probes = [main[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {probe["scheme"] for probe in probes} == {"HTTPS"}
    assert {probe["path"] for probe in probes} <= settings.guard.policy.exempt
    assert deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/scheme"] == "https"
