"""Kustomize, as far as `deploy/` uses it, for machines without kubectl.

`test_kustomize.py` compares it with kubectl's. An unknown field, kind or reference is an error.
Documentation: https://kubectl.docs.kubernetes.io/references/kustomize/kustomization/
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

NAMES = ("kustomization.yaml", "kustomization.yml", "Kustomization")
FIELDS = {"apiVersion", "kind", "resources", "components", "namePrefix", "labels", "patches"}

# The lists that a strategic merge merges, and the field that tells their items apart. It replaces other lists.
MERGED = {
    **dict.fromkeys(("containers", "initContainers", "env", "volumes"), "name"),
    "volumeMounts": "mountPath",
}

# The maps of labels of a kind, besides `metadata.labels`. A `*` stands for every item of a list.
LABELS: dict[str, tuple[str, ...]] = {
    "Deployment": (
        "spec.selector.matchLabels",
        "spec.template.metadata.labels",
        "spec.template.spec.topologySpreadConstraints.*.labelSelector.matchLabels",
    ),
    "Service": ("spec.selector",),
    "PodDisruptionBudget": ("spec.selector.matchLabels",),
    "NetworkPolicy": ("spec.podSelector.matchLabels",),
    "HorizontalPodAutoscaler": (),
}


def render(directory: Path) -> list[Manifest]:
    """The manifests of a kustomization, by kubectl where it is installed."""
    if not shutil.which("kubectl"):
        return build(directory)
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def build(directory: Path, visited: tuple[Path, ...] = ()) -> list[Manifest]:
    """The manifests of a kustomization, by this module."""
    root = directory.resolve()
    assert not any(one.is_relative_to(root) for one in visited), f"cycle: {root} contains a kustomization that uses it"
    [file] = [root / name for name in NAMES if (root / name).exists()]
    kustomization = yaml.safe_load(file.read_text())
    assert kustomization.keys() <= FIELDS, kustomization.keys() - FIELDS
    made = []
    for name in kustomization.get("resources", ()):
        path = (root / name).resolve()
        if path.is_dir():
            made += build(path, (*visited, root))
        else:
            assert path.is_relative_to(root), f"{path} is outside of {root}"
            made += list(yaml.safe_load_all(path.read_text()))
    for name in kustomization.get("components", ()):
        component = yaml.safe_load((root / name / "kustomization.yaml").read_text())
        assert component.pop("kind") == "Component"
        assert component.keys() <= {"apiVersion", "patches"}
        made = _patched(made, component)
    made = _patched(made, kustomization)
    if prefix := kustomization.get("namePrefix"):
        _prefix(made, prefix)
    for label in kustomization.get("labels", ()):
        assert label.keys() == {"pairs", "includeSelectors"}
        assert label["includeSelectors"]
        for document in made:
            document["metadata"].setdefault("labels", {}).update(label["pairs"])
            for path in LABELS[document["kind"]]:
                for labels in _at(document, path.split(".")):
                    labels.update(label["pairs"])
    assert len({_identity(one) for one in made}) == len(made), "one manifest of each kind and name"
    return made


def _identity(document: Manifest) -> tuple[str, str, str]:
    return document["apiVersion"], document["kind"], document["metadata"]["name"]


def _patched(documents: list[Manifest], kustomization: Manifest) -> list[Manifest]:
    """Each patch is a strategic merge into the manifest of its kind and name, which must exist."""
    for one in kustomization.get("patches", ()):
        assert one.keys() == {"patch"}
        patch = yaml.safe_load(one["patch"])
        assert [_identity(document) for document in documents].count(_identity(patch)) == 1
        documents = [
            merge(document, patch) if _identity(document) == _identity(patch) else document for document in documents
        ]
    return documents


def merge(base: Any, patch: Any, field: str = "") -> Any:
    """A strategic merge: maps by their fields, some lists by the items that have the same name, the new items first."""
    assert patch is not None, "the patch deletes a field"
    if isinstance(base, dict) and isinstance(patch, dict):
        assert not any(name.startswith("$") for name in patch), patch
        return base | {name: merge(base.get(name), value, name) for name, value in patch.items()}
    if isinstance(base, list) and isinstance(patch, list) and field in MERGED:
        key = MERGED[field]
        patches = {one[key]: one for one in patch}
        known = {one[key] for one in base}
        new = [one for one in patch if one[key] not in known]
        return new + [merge(one, patches[one[key]]) if one[key] in patches else one for one in base]
    return patch


def _prefix(documents: list[Manifest], prefix: str) -> None:
    """Prefix the names, and the references to them: here only that of a HorizontalPodAutoscaler."""
    named = {(one["kind"], one["metadata"]["name"]) for one in documents}
    for document in documents:
        assert document["kind"] in LABELS, f"references to a {document['kind']} are unknown here"
        document["metadata"]["name"] = prefix + document["metadata"]["name"]
        if document["kind"] == "HorizontalPodAutoscaler":
            target = document["spec"]["scaleTargetRef"]
            if (target["kind"], target["name"]) in named:
                target["name"] = prefix + target["name"]


def _at(found: Any, path: list[str]) -> Iterator[Manifest]:
    """Every map at a path, where there is one."""
    if not path:
        yield found
    elif path[0] == "*":
        for one in found:
            yield from _at(one, path[1:])
    elif path[0] in found:
        yield from _at(found[path[0]], path[1:])
