"""The manifests, the Dockerfile and the lock files agree with the code and with each other."""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import mlflow.environment_variables
import pytest
import yaml
from packaging.requirements import Requirement

import cleanup
import download
from darwin_runtime.http.endpoints import ROUTES
from darwin_runtime.model.diagnose import FLAVOR_OF_PACKAGE
from darwin_runtime.settings import Reader
from darwin_runtime.storage import attempts
from image import wheelhouse
from tests.conftest import ROOT
from tests.support.settings import read_by

DEPLOY = ROOT / "deploy"
README = (ROOT / "README.md").read_text()
REQUIREMENTS = ROOT / "requirements"
PVC, CACHE, CLEANUP = "base/pvc.yaml", "shared/cache.yaml", "shared/cleanup.yaml"
SCALING, KSERVE = "base/scaling.yaml", "kserve/kserve.yaml"
POLICIES = ["base/network.yaml", "shared/network.yaml"]
SERVING = ["emptydir.yaml", PVC]
FILES = sorted(
    str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*.yaml") if path.stem not in ("kustomization", "alerts")
)
KUSTOMIZATIONS = sorted(
    str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.stem.lower() == "kustomization"
)

# A role by the script that its container runs; the image's default is the main container's.
ROLES = {"/app/download.py": "init", "/app/cleanup.py": "cleanup"}

TOP = ["cleanup.py", "darwin_serve.py", "download.py", "k8s_client.py"]

Manifest = dict[str, Any]

# What a kind makes its pods from. KServe's has the pod's fields among its own.
TEMPLATES: dict[str, Callable[[Manifest], Manifest]] = {
    "Deployment": lambda spec: dict(spec["template"]),
    "CronJob": lambda spec: dict(spec["jobTemplate"]["spec"]["template"]),
    "ClusterServingRuntime": lambda spec: {"spec": {name: spec[name] for name in ("containers", "volumes")}},
}


def manifests(file: str) -> list[Manifest]:
    return list(yaml.safe_load_all((DEPLOY / file).read_text()))


def manifest(file: str, kind: str, name: str | None = None) -> Manifest:
    """The only one of its kind in a file, or of its kind and name."""
    [found] = [
        one for one in manifests(file) if one["kind"] == kind and name in (None, one.get("metadata", {}).get("name"))
    ]
    return found


def templates(file: str) -> list[Manifest]:
    return [TEMPLATES[one["kind"]](one["spec"]) for one in manifests(file) if one["kind"] in TEMPLATES]


def template(file: str) -> Manifest:
    [found] = templates(file)
    return found


def pod(file: str) -> Manifest:
    return dict(template(file)["spec"])


def containers(file: str) -> list[Manifest]:
    return [*pod(file).get("initContainers", ()), *pod(file)["containers"]]


def at(found: Any, path: str) -> Any:
    """What is at a path like `capabilities.drop`; None where there is nothing."""
    for step in path.split("."):
        found = (found or {}).get(step)
    return found


def walk(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field, as (".containers.0.name", "server")."""
    steps = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for step, value in steps:
        yield f"{path}.{step}", value
        yield from walk(value, f"{path}.{step}")


def changed(original: Manifest, path: str, value: Any) -> Manifest:
    """A copy with another value at a path."""
    copied = copy.deepcopy(original)
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    inner: Any = copied
    for step in steps:
        inner = inner[step] if isinstance(step, int) else inner.setdefault(step, {})
    inner[last] = value
    return copied


def role(container: Manifest) -> str:
    command = container.get("command", ["python", "/app/darwin_serve.py"])
    assert command[0] == "python"
    assert (ROOT / PurePosixPath(command[1]).name).exists()
    return ROLES.get(command[1], "main")


def values(container: Manifest) -> dict[str, str]:
    """The environment that a container is given as text."""
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


def mounts(container: Manifest) -> dict[str, Manifest]:
    return {mount["name"]: mount for mount in container["volumeMounts"]}


def serving(file: str) -> tuple[Manifest, Manifest]:
    """The init container and the main container of a Deployment."""
    init, main = containers(file)
    assert (role(init), role(main)) == ("init", "main")
    return init, main


WITH_PODS = [file for file in FILES if templates(file)]
MAIN = [file for file in WITH_PODS if role(containers(file)[-1]) == "main"]
EVERY_CONTAINER = [
    pytest.param(container, id=f"{file}:{container['name']}") for file in WITH_PODS for container in containers(file)
]


def test_every_file_is_in_the_readme() -> None:
    assert [file for file in FILES if f"(deploy/{file})" not in README] == []
    assert (WITH_PODS, MAIN) == ([PVC, "emptydir.yaml", KSERVE, CLEANUP], [PVC, "emptydir.yaml", KSERVE])


@pytest.mark.parametrize("directory", [".", "base", "shared"])
def test_a_directory_that_is_pasted_holds_nothing_that_a_cluster_lacks(directory: str) -> None:
    """`kubectl apply -f` takes every file of these endings, and no other. Two of a name would undo each other."""
    files = [path for path in (DEPLOY / directory).iterdir() if path.suffix in (".yaml", ".yml", ".json")]
    documents = [one for path in files for one in yaml.safe_load_all(path.read_text())]
    assert documents
    assert [one["kind"] for one in documents if (one["apiVersion"], one["kind"]) in CUSTOM] == []
    assert len({(one["kind"], one["metadata"]["name"]) for one in documents}) == len(documents)


# Whether a cluster takes them

[OLDEST] = re.findall(r"Kubernetes (\d+\.\d+) and newer", README)
NEWEST = kubernetes_validate.latest_version().rpartition(".")[0]

TEXT = {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def fields(required: Manifest, **optional: Any) -> Manifest:
    """The JSON Schema of an object that has these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | optional,
        "additionalProperties": False,
    }


def resource(spec: Manifest) -> Manifest:
    metadata = fields({"name": TEXT}, labels=TEXTS, annotations=TEXTS)
    return fields({"apiVersion": TEXT, "kind": TEXT, "metadata": metadata, "spec": spec})


def items(schema: Manifest) -> Manifest:
    return {"type": "array", "minItems": 1, "items": schema}


PROTOCOL = {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]}

# What is no part of Kubernetes: those fields of KServe's and the Prometheus Operator's resource definitions that are in
# use here.
# Containers and volumes are validated as those of a pod.
CUSTOM = {
    ("serving.kserve.io/v1alpha1", "ClusterServingRuntime"): resource(
        fields(
            {"containers": {"type": "array", "contains": {"properties": {"name": {"const": "kserve-container"}}}}},
            annotations=TEXTS,
            volumes={"type": "array"},
            protocolVersions=items(PROTOCOL),
            supportedModelFormats=items(
                fields(
                    {"name": TEXT},
                    version=TEXT,
                    autoSelect={"type": "boolean"},
                    priority={"type": "integer", "minimum": 1},
                )
            ),
        )
    ),
    ("serving.kserve.io/v1beta1", "InferenceService"): resource(
        fields(
            {
                "predictor": fields(
                    {
                        "model": fields(
                            {"modelFormat": fields({"name": TEXT}, version=TEXT)},
                            runtime=TEXT,
                            storageUri=TEXT,
                            protocolVersion=PROTOCOL,
                        )
                    },
                    automountServiceAccountToken={"type": "boolean"},
                    minReplicas={"type": "integer"},
                    maxReplicas={"type": "integer"},
                )
            }
        )
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): resource(
        fields({"selector": fields({"matchLabels": TEXTS}), "endpoints": items(fields({"port": TEXT}))})
    ),
}

# The fields of kustomize that are in use here.
KUSTOMIZATION = fields(
    {},
    apiVersion={"enum": ["kustomize.config.k8s.io/v1beta1", "kustomize.config.k8s.io/v1alpha1"]},
    kind={"enum": ["Kustomization", "Component"]},
    resources=items(TEXT),
    namePrefix={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?-$"},
    labels=items(fields({"pairs": TEXTS, "includeSelectors": {"const": True}})),
    patches=items(fields({"patch": TEXT})),
)


def validate(document: Manifest, version: str) -> None:
    if schema := CUSTOM.get((document["apiVersion"], document["kind"])):
        jsonschema.validate(document, schema, jsonschema.Draft202012Validator)
        if document["kind"] not in TEMPLATES:
            return
        found = TEMPLATES[document["kind"]](document["spec"])
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "made"}, **found}
    assert kubernetes_validate.validate(document, version, strict=True) == version


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("file", FILES)
def test_kubernetes_takes_it(file: str, version: str) -> None:
    for document in manifests(file):
        validate(document, version)


@pytest.mark.parametrize("file", KUSTOMIZATIONS)
def test_kustomize_takes_it(file: str) -> None:
    jsonschema.validate(yaml.safe_load((DEPLOY / file).read_text()), KUSTOMIZATION)


@pytest.mark.parametrize(
    ("file", "kind", "path", "value"),
    [
        (PVC, "Deployment", "spec.template.spec.containers.0.livenessProbes", {}),
        (PVC, "Deployment", "spec.template.spec.containers.0.env.0.value", 7),
        (CACHE, "PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany"),
        (CLEANUP, "CronJob", "spec.jobTemplate.spec.backoffLimit", "one"),
        (SCALING, "HorizontalPodAutoscaler", "spec.targetCPUUtilizationPercentage", 80),
        (SCALING, "HorizontalPodAutoscaler", "apiVersion", "autoscaling/v2beta1"),
        (SCALING, "PodDisruptionBudget", "spec.selector", "model-server"),
        ("base/network.yaml", "NetworkPolicy", "spec.egress.0.ports.0.number", 53),
        (KSERVE, "ClusterServingRuntime", "apiVersion", "serving.kserve.io/v1beta1"),
        (KSERVE, "ClusterServingRuntime", "spec.protocolVersions.0", "v3"),
        (KSERVE, "ClusterServingRuntime", "spec.supportedModelFormats.0.priority", 0),
        (KSERVE, "ClusterServingRuntime", "spec.containers.0.name", "server"),
        (KSERVE, "ClusterServingRuntime", "spec.containers.0.ports.0.containerPort", "8080"),
        (KSERVE, "ClusterServingRuntime", "spec.volumes.0.emptydir", {}),
        (KSERVE, "ClusterServingRuntime", "spec.securityContext", {}),
        (KSERVE, "InferenceService", "spec.predictor.model.storageURI", "s3://bucket"),
        ("monitoring/servicemonitor.yaml", "ServiceMonitor", "spec.endpoints.0.portName", "http"),
    ],
)
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_a_mistake_is_refused(file: str, kind: str, path: str, value: object, version: str) -> None:
    original = next(one for one in manifests(file) if one["kind"] == kind)
    with pytest.raises(
        (jsonschema.ValidationError, kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)
    ):
        validate(changed(original, path, value), version)


# What is in them


@pytest.mark.parametrize("container", EVERY_CONTAINER)
def test_every_variable_is_a_setting_of_its_role(container: Manifest) -> None:
    names = [one["name"] for one in container["env"]]
    known = read_by(role(container)) | read_by("every")
    unknown = [name for name in names if name not in known and not hasattr(mlflow.environment_variables, name)]
    assert unknown == []
    assert len(names) == len(set(names))
    # Kubernetes takes nothing but text: an unquoted 7 or false is refused.
    assert {type(value) for value in values(container).values()} <= {str}


def test_the_settings_are_good_ones() -> None:
    for file in SERVING:
        settings = download.Settings.from_env(Reader(values(serving(file)[0])))
        assert settings.strategy == Path(file).stem
    [container] = containers(CLEANUP)
    told = cleanup.Settings.from_env(Reader(values(container)))
    default = cleanup.Settings.from_env(Reader({}))
    assert told == default, "what is shown are the defaults"
    assert {"TTL_DAYS", "MAX_SIZE_GB", "DRY_RUN"} <= values(container).keys()


@pytest.mark.parametrize("file", SERVING)
def test_the_main_container_looks_where_the_init_container_puts_the_model(file: str) -> None:
    init, main = serving(file)
    assert values(init)["OUTPUT_PATH"] == values(main)["MODEL_LOCAL_PATH"]
    for container in (init, main):
        assert mounts(container)["models"]["mountPath"] == values(init)["OUTPUT_PATH"]
    assert not mounts(init)["models"].get("readOnly")
    assert mounts(main)["models"]["readOnly"] is True


def test_the_cache_is_at_one_path_and_the_main_container_only_reads_it() -> None:
    init, main = serving(PVC)
    [job] = containers(CLEANUP)
    assert {mounts(one)["model-cache"]["mountPath"] for one in (init, main, job)} == {values(init)["CACHE_PATH"]}
    assert values(job)["CACHE_PATH"] == values(init)["CACHE_PATH"]
    assert [mounts(one)["model-cache"].get("readOnly", False) for one in (init, main, job)] == [False, True, False]
    claim = manifest(CACHE, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for file in (PVC, CLEANUP):
        [volume] = [volume for volume in pod(file)["volumes"] if volume["name"] == "model-cache"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}


def references(container: Manifest) -> dict[str, str]:
    """The environment that a container is given from fields of its pod."""
    return {
        one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"]
        for one in container["env"]
        if "fieldRef" in one.get("valueFrom", {})
    }


def test_who_uses_the_cache_is_told_by_pod_name() -> None:
    rollout = {"POD_TEMPLATE_HASH": "metadata.labels['pod-template-hash']"}
    assert references(serving(PVC)[0]) == {"POD_NAME": "metadata.name"} | rollout
    assert references(containers(CLEANUP)[0]) == {"POD_NAME": "metadata.name"}


@pytest.mark.parametrize("file", SERVING)
def test_the_uri_names_a_version_and_is_the_first_variable(file: str) -> None:
    """An alias can mean another version at the start of the next pod."""
    uri = serving(file)[0]["env"][0]
    assert uri["name"] == "MODEL_URI"
    assert re.fullmatch(r"models:/\w+/\d+", uri["value"])


@pytest.mark.parametrize("file", WITH_PODS)
def test_every_mount_has_its_volume_and_is_used(file: str) -> None:
    volumes = [volume["name"] for volume in pod(file)["volumes"]]
    assert {name for container in containers(file) for name in mounts(container)} == set(volumes)
    assert len(volumes) == len(set(volumes))


def test_the_login_is_an_optional_secret_as_the_readme_makes_it() -> None:
    made = re.search(r"kubectl create secret generic (\S+) --from-literal=(\w+)=\S+ --from-literal=(\w+)=", README)
    assert made
    for file in SERVING:
        secrets = {
            one["name"]: one["valueFrom"]["secretKeyRef"]
            for one in serving(file)[0]["env"]
            if "secretKeyRef" in one.get("valueFrom", {})
        }
        assert secrets == {
            "MLFLOW_TRACKING_USERNAME": {"name": made[1], "key": made[2], "optional": True},
            "MLFLOW_TRACKING_PASSWORD": {"name": made[1], "key": made[3], "optional": True},
        }


def routes() -> set[str]:
    """What can be asked of the server with GET."""
    return {path for route in ROUTES if route.verb == "GET" for path in route.paths}


@pytest.mark.parametrize("file", MAIN)
def test_probes_ask_routes_that_the_server_has(file: str) -> None:
    main = containers(file)[-1]
    probes = {kind: main[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/livez",
    }
    assert {probe["path"] for probe in probes.values()} <= routes()

    [port] = main["ports"]
    assert str(port["containerPort"]) == values(main).get("PORT", read_by("main")["PORT"])
    # By its name, but for those who ask without knowing names.
    assert {probe["port"] for probe in probes.values()} == {port["name" if file in SERVING else "containerPort"]}


def labels(file: str) -> Manifest:
    return dict(template(file)["metadata"]["labels"])


@pytest.mark.parametrize("file", SERVING)
def test_the_service_leads_to_the_pods(file: str) -> None:
    deployment, service = (manifest(file, kind)["spec"] for kind in ("Deployment", "Service"))
    assert deployment["selector"]["matchLabels"] == labels(file) == service["selector"]
    assert {port["targetPort"] for port in service["ports"]} == {port["name"] for port in serving(file)[1]["ports"]}
    name = manifest(file, "Deployment")["metadata"]["name"]
    assert f"deployment/{name}" in README


@pytest.mark.parametrize("file", SERVING)
def test_a_prediction_under_way_can_end(file: str) -> None:
    """Also with the DRAIN_SECONDS that the manifest suggests for load balancers which notice late."""
    timeout = float(read_by("main")["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] or "nan")
    [suggested] = re.findall(r'# - \{name: DRAIN_SECONDS, value: "(\d+)"\}', (DEPLOY / file).read_text())
    assert 7 < float(suggested) < pod(file)["terminationGracePeriodSeconds"] - timeout
    assert f"`{suggested}`" in README


@pytest.mark.parametrize("file", SERVING)
def test_a_wrong_version_ends_a_rollout_in_minutes(file: str) -> None:
    """A good pod gets the time of its startup probe, and five minutes to download. In these, a bad one gives up."""
    probe = serving(file)[1]["startupProbe"]
    deadline = manifest(file, "Deployment")["spec"]["progressDeadlineSeconds"]
    download_seconds = deadline - probe["periodSeconds"] * probe["failureThreshold"]
    assert download_seconds == 300
    retry = download.Settings.from_env(Reader(values(serving(file)[0]))).retry
    backoff_seconds = sum(
        min(attempts.MAX_BACKOFF_SECONDS, retry.backoff_seconds * 2**attempt) for attempt in range(retry.retries)
    )
    assert 2 * backoff_seconds < download_seconds
    assert deadline <= 15 * 60


@pytest.mark.parametrize("container", EVERY_CONTAINER)
def test_containers_are_locked_down(container: Manifest) -> None:
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert mounts(container)["tmp"]["mountPath"] == "/tmp"
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    # A ResourceQuota on limits.cpu or limits.memory rejects a container without.
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}


@pytest.mark.parametrize("file", SERVING)
def test_the_init_container_costs_no_quota(file: str) -> None:
    init, main = (kubernetes_quantities(container) for container in serving(file))
    assert all(init[name] <= main[name] for name in init)


def kubernetes_quantities(container: Manifest) -> dict[tuple[str, str], float]:
    """(requests or limits, resource) -> amount. A quantity in any other form than these comes back changed."""
    units = {"": 1.0, "m": 0.001, "Mi": 2.0**20, "Gi": 2.0**30}
    found = {}
    for kind, amounts in container["resources"].items():
        for name, amount in amounts.items():
            number, unit = re.fullmatch(r"([1-9]\d*)(m|Mi|Gi)?", amount).groups("")  # type: ignore[union-attr]
            # The API server writes 1000m as 1, and 1024Mi as 1Gi: `kubectl apply` would then see a difference for ever.
            assert unit == "" or int(number) % (1000 if unit == "m" else 1024), amount
            found[kind, name] = int(number) * units[unit]
    return found


@pytest.mark.parametrize("container", EVERY_CONTAINER)
def test_a_container_that_is_killed_leaves_a_message(container: Manifest) -> None:
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    kubernetes_quantities(container)


# The Pod Security Standard "restricted": what may be in these fields, wherever in a pod they are ...
PROFILES = ["RuntimeDefault", "Localhost"]
MAY_BE: dict[str, Sequence[Any]] = {
    **dict.fromkeys(["hostNetwork", "hostPID", "hostIPC", "hostProcess", "privileged"], (False,)),
    **dict.fromkeys(["httpGet.host", "tcpSocket.host", "seLinuxOptions.user", "seLinuxOptions.role"], ("",)),
    "seLinuxOptions.type": ["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"],
    "hostPort": [0],
    "procMount": ["Default"],
    "sysctls": [[]],
    "capabilities.add": [[], ["NET_BIND_SERVICE"]],
    "runAsNonRoot": [True],
    "seccompProfile.type": PROFILES,
    "appArmorProfile.type": PROFILES,
}
# ... what may not ...
MAY_NOT_BE = {"runAsUser": 0}
# ... and what every container must have, from its pod if not by itself.
MUST_BE: dict[str, list[Any]] = {
    "allowPrivilegeEscalation": [False],
    "capabilities.drop": [["ALL"]],
    "runAsNonRoot": [True],
    "seccompProfile.type": PROFILES,
}
VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"),
}


def violations(spec: Manifest) -> set[str]:
    """The paths at which a pod does not keep to the standard."""
    found = set()
    for path, value in walk(spec):
        found |= {path for field, good in MAY_BE.items() if path.endswith(f".{field}") and value not in good}
        found |= {path for field, bad in MAY_NOT_BE.items() if path.endswith(f".{field}") and value == bad}
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(kind, ())):
            context = spec.get("securityContext", {}) | container.get("securityContext", {})
            path = f".{kind}.{index}.securityContext."
            found |= {path + field for field, good in MUST_BE.items() if at(context, field) not in good}
    for index, volume in enumerate(spec["volumes"]):
        found |= {f".volumes.{index}.{kind}" for kind in volume.keys() - VOLUMES - {"name"}}
    return found


@pytest.mark.parametrize("file", WITH_PODS)
def test_pods_keep_to_the_restricted_standard(file: str) -> None:
    assert violations(pod(file)) == set()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hostNetwork", True),
        ("hostPID", True),
        ("hostIPC", True),
        ("securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
        ("securityContext.runAsNonRoot", False),
        ("securityContext.windowsOptions.hostProcess", True),
        ("volumes.0.hostPath", {"path": "/"}),
        ("volumes.0.nfs", {"server": "nfs", "path": "/"}),
        ("containers.0.securityContext.privileged", True),
        ("containers.0.securityContext.allowPrivilegeEscalation", None),
        ("containers.0.securityContext.capabilities.drop", ["NET_RAW"]),
        ("containers.0.securityContext.capabilities.add", ["SYS_ADMIN"]),
        ("containers.0.securityContext.procMount", "Unmasked"),
        ("containers.0.securityContext.runAsNonRoot", None),
        ("containers.0.securityContext.runAsUser", 0),
        ("containers.0.securityContext.seccompProfile.type", "Unconfined"),
        ("containers.0.securityContext.appArmorProfile.type", "Unconfined"),
        ("containers.0.securityContext.seLinuxOptions.role", "sysadm_r"),
        ("containers.0.ports.0.hostPort", 8000),
        ("containers.0.livenessProbe.httpGet.host", "169.254.169.254"),
    ],
)
@pytest.mark.parametrize("file", MAIN)
def test_what_the_restricted_standard_forbids_is_noticed(file: str, path: str, value: object) -> None:
    assert f".{path}" in violations(changed(pod(file), path, value))


def test_who_writes_to_the_cache_is_one_user() -> None:
    for file in (*SERVING, CLEANUP):
        context = pod(file)["securityContext"]
        assert {context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {10001}


def test_only_the_cleanup_gets_a_token() -> None:
    given = {file: pod(file)["automountServiceAccountToken"] for file in (*SERVING, CLEANUP)}
    assert given == {"emptydir.yaml": False, PVC: False, CLEANUP: True}
    assert manifest(KSERVE, "InferenceService")["spec"]["predictor"]["automountServiceAccountToken"] is False


def test_the_cleanup_may_list_pods_and_nothing_else() -> None:
    rights, account, binding = (manifest(CLEANUP, kind) for kind in ("Role", "ServiceAccount", "RoleBinding"))
    assert rights["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    name = account["metadata"]["name"]
    assert pod(CLEANUP)["serviceAccountName"] == name
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name}]
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": rights["metadata"]["name"],
    }
    # The log shows the same Role and RoleBinding where the right is missing.
    text = cleanup.ROLE_TO_ADD.format(namespace="models", account=name, home="models")
    role, bound = yaml.safe_load_all(text)
    assert role["rules"] == rights["rules"]
    assert role["metadata"]["name"] == rights["metadata"]["name"]
    assert bound["roleRef"] == binding["roleRef"]
    assert bound["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": "models"}]


def test_a_cleanup_that_hangs_is_replaced_and_another_ends() -> None:
    spec = manifest(CLEANUP, "CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Replace"
    grace = float(read_by("cleanup")["GRACE_SECONDS"] or "nan")
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 10 * grace
    assert pod(CLEANUP)["restartPolicy"] == "Never"


@pytest.mark.parametrize("file", SERVING)
def test_a_rollout_takes_no_pod_before_it_has_another(file: str) -> None:
    spec = manifest(file, "Deployment")["spec"]
    # Without its type, every `kubectl apply` changes it.
    assert spec["strategy"]["type"] == "RollingUpdate"
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert spec["strategy"]["rollingUpdate"]["maxSurge"] not in (0, "0%")


@pytest.mark.parametrize("file", SERVING)
def test_scaling_is_of_the_deployment(file: str) -> None:
    scaler = manifest(SCALING, "HorizontalPodAutoscaler")["spec"]
    deployment = manifest(file, "Deployment")
    assert scaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    # A number of pods in the Deployment would undo the autoscaler's with each `kubectl apply`.
    assert "replicas" not in deployment["spec"]
    # A utilisation is a share of what is requested.
    requests = containers(file)[-1]["resources"]["requests"]
    assert {metric["resource"]["name"] for metric in scaler["metrics"]} <= requests.keys()
    # `minAvailable: 1` would not let the node of a single pod be drained.
    budget = manifest(SCALING, "PodDisruptionBudget")["spec"]
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels(file)}}


def ports(rules: list[Manifest]) -> set[tuple[str, int]]:
    return {(port["protocol"], port["port"]) for rule in rules for port in rule["ports"]}


DNS = {("UDP", 53), ("TCP", 53)}


@pytest.mark.parametrize("file", [*SERVING, CLEANUP])
def test_pods_reach_what_they_need_and_nothing_else(file: str) -> None:
    policies = [one for network in POLICIES for one in manifests(network)]
    [policy] = [
        one["spec"] for one in policies if one["spec"]["podSelector"]["matchLabels"].items() <= labels(file).items()
    ]
    assert policy["policyTypes"] == ["Ingress", "Egress"], "where a type has no rule, nothing passes"
    if file == CLEANUP:
        assert "ingress" not in policy
        assert ports(policy["egress"]) == DNS | {("TCP", 443), ("TCP", 6443)}
    else:
        init, main = serving(file)
        assert ports(policy["ingress"]) == {("TCP", main["ports"][0]["containerPort"])}
        tracking = urlsplit(values(init)["MLFLOW_TRACKING_URI"]).port
        assert ports(policy["egress"]) == DNS | {("TCP", tracking), ("TCP", 443)}


def test_kserve_finds_the_runtime_and_the_runtime_the_model() -> None:
    runtime, service = (manifest(KSERVE, kind) for kind in ("ClusterServingRuntime", "InferenceService"))
    formats, model = runtime["spec"]["supportedModelFormats"], service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert {one["name"] for one in formats} == {model["modelFormat"]["name"]} == {"mlflow"}
    # KServe refuses a runtime with several priorities for a format. Its own has 1.
    assert {(one["autoSelect"], one["priority"]) for one in formats} == {(True, 2)}

    [container] = containers(KSERVE)
    # There KServe mounts it. It fills in the name, and nothing else may look like a template.
    assert values(container)["MODEL_LOCAL_PATH"] == "/mnt/models"
    assert values(container)["MODEL_NAME"] == "{{.Name}}"
    assert json.dumps(container).count("{{") == 1
    assert set(runtime["spec"]["protocolVersions"]) <= {route.split("/")[1] for route in routes()}
    [port] = container["ports"]
    assert port["name"] in ("http1", "h2c"), "Knative takes no other"
    assert runtime["spec"]["annotations"] == {
        "prometheus.kserve.io/port": str(port["containerPort"]),
        "prometheus.kserve.io/path": "/metrics",
    }


# What there is to change


def project_version() -> str:
    [version] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return str(version)


def test_the_image_is_the_same_everywhere() -> None:
    images = {container["image"] for file in WITH_PODS for container in containers(file)}
    [image] = images
    # Kubernetes pulls `latest` at each start, and a version only where it is missing.
    assert image.endswith(f":{project_version()}")
    assert not any("imagePullPolicy" in container for file in WITH_PODS for container in containers(file))
    assert "serve-md-runtime:latest" not in README
    assert f"docker build -t {image} ." in README
    assert image in (ROOT / "Dockerfile").read_text()


# Beside the image of each container, the URIs of each init container, and the name of the model.
TO_CHANGE = {
    KSERVE: ["storageUri: s3://bucket/path/to/model"],
    "base/network.yaml": ["{protocol: TCP, port: 5000}", "{protocol: TCP, port: 443}"],
    "monitoring/servicemonitor.yaml": ["labels: {release: kube-prometheus-stack}"],
}


def marked(file: str, what: str) -> list[str]:
    """The lines with this mark, without it."""
    lines = (DEPLOY / file).read_text().splitlines()
    return [
        line.partition("  # change:")[0].strip().removeprefix("- ") for line in lines if f"# change: {what}" in line
    ]


@pytest.mark.parametrize("file", FILES)
def test_only_image_uris_and_name_are_to_be_changed(file: str) -> None:
    expected = [*TO_CHANGE.get(file, []), *marked(file, "name")]
    if file in WITH_PODS:
        expected = [*expected, *(f"image: {container['image']}" for container in containers(file))]
    if file in SERVING:
        init = values(serving(file)[0])
        expected = [*expected, *(f"value: {init[name]}" for name in ("MODEL_URI", "MLFLOW_TRACKING_URI"))]
    assert sorted(marked(file, "")) == sorted(expected)


@pytest.mark.parametrize("file", FILES)
def test_the_name_of_the_model_is_marked_wherever_it_is(file: str) -> None:
    """Every name of an object and every instance, and no other line."""
    lines = [line for line in (DEPLOY / file).read_text().splitlines() if not line.lstrip().startswith("#")]
    name = re.compile(r"^  name: model-server\b|instance: model-server\b|kind: Deployment, name: model-server\b")
    assert [line for line in lines if name.search(line) and "# change: name" not in line] == (
        ["  name: model-server"] if file == "monitoring/servicemonitor.yaml" else []
    )
    assert [line for line in lines if "# change: name" in line and not name.search(line)] == []
    assert bool(marked(file, "name")) == (file in (*SERVING, SCALING, "base/network.yaml"))


# The Dockerfile


def stages() -> list[list[tuple[str, str]]]:
    """(instruction, rest) of each stage; what stands before the first FROM is left out."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: list[list[tuple[str, str]]] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            found.append([])
        if found and instruction:
            found[-1].append((instruction, " ".join(rest.split())))
    return found


def of(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for name, rest in stage if name == instruction]


def ignored(path: str) -> bool:
    """What `.dockerignore` says about a file: the last pattern that matches it or a directory above it wins."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = PurePosixPath(line.removeprefix("!")).parts
        parts = PurePosixPath(path).parts
        anywhere = pattern[0] == "**" and any(fnmatch.fnmatch(part, pattern[1]) for part in parts)
        if anywhere or (len(parts) >= len(pattern) and all(map(fnmatch.fnmatch, parts, pattern))):
            verdict = not line.startswith("!")
    return verdict


def test_every_module_is_copied_into_the_image() -> None:
    build, final = stages()
    copied = of(build, "COPY")
    assert {"*.py /app/", "darwin_runtime/ /app/darwin_runtime/"} <= set(copied)
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(TOP)
    modules = [
        *TOP,
        *(str(path.relative_to(ROOT)) for path in ROOT.glob("darwin_runtime/**/*") if path.suffix != ".pyc"),
    ]
    assert {"darwin_runtime/http/page.html", "darwin_runtime/http/openapi.json"} <= set(modules)
    for module in modules:
        assert module.endswith("__pycache__") or not ignored(module), module
    assert "--from=build /app /app" in of(final, "COPY")


def test_scripts_have_the_names_that_charts_use() -> None:
    build, final = stages()
    links = dict(re.findall(r"ln -s (/app/\w+\.py) (/scripts/\w+\.py)", " ".join(of(build, "RUN"))))
    assert links == {
        "/app/download.py": "/scripts/download_model.py",
        "/app/cleanup.py": "/scripts/cleanup_cache.py",
    }
    assert "--from=build /scripts /scripts" in of(final, "COPY")


def test_nothing_but_the_sources_goes_to_the_builder() -> None:
    for path in (
        *("tests/conftest.py", "tests/__init__.py", ".git/config", ".git/HEAD", ".venv/bin/python", ".venv/ready"),
        *("examples/log_iris.py", "deploy/base/pvc.yaml", "Makefile", ".run/mlflow.db", "requirements/dev.txt"),
        *("image/report.py", "image/__init__.py", "build/base.tar"),
        *("cleanup.pyc", "darwin_runtime/http/__pycache__/app.cpython-311.pyc", ".env", "Dockerfile"),
    ):
        assert ignored(path), path
    for lock in ("runtime", *flavors()):
        assert not ignored(f"requirements/{lock}.txt")


def test_the_final_stage_runs_the_server_as_a_numbered_user() -> None:
    _, final = stages()
    assert of(final, "USER") == ["10001:0"]
    # Whatever runs after USER would run as that user, and fail.
    assert [name for name, _ in final[final.index(("USER", "10001:0")) :] if name in ("RUN", "COPY", "ADD")] == []
    [command] = of(final, "CMD")
    assert json.loads(command) == ["python", "/app/darwin_serve.py"]
    assert of(final, "WORKDIR") == ["/app"]
    assert of(final, "EXPOSE") == [read_by("main")["PORT"]]
    [environment] = of(final, "ENV")
    assert dict(part.split("=", 1) for part in environment.split()) == {
        "PATH": "/venv/bin:${PATH}",
        "LD_LIBRARY_PATH": "/venv/lib",
        "HOME": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def test_the_package_index_stays_out_of_the_image() -> None:
    build, final = stages()
    assert {argument.partition("=")[0] for argument in of(build, "ARG")} == {
        "PIP_INDEX_URL",
        "PIP_TRUSTED_HOST",
        "FLAVORS",
        "MODEL_REQUIREMENTS",
    }
    assert of(final, "ARG") == ["BASE_IMAGE", "REVISION"]
    assert of(build, "FROM") == ["${BASE_IMAGE} AS build"]
    assert of(final, "FROM") == ["${BASE_IMAGE}"]
    assert not any("pip" in copied for copied in of(final, "COPY"))


def test_what_the_build_runs_is_given_to_the_builder() -> None:
    build = stages()[0]
    [copied] = [rest.split()[:-1] for rest in of(build, "COPY") if "image/install.sh" in rest]
    for file in copied:
        assert not ignored(file)
        assert (ROOT / file).exists()
    run = {rest.removeprefix("./") for rest in of(build, "RUN") if rest.startswith("./")}
    assert run == {PurePosixPath(file).name for file in copied if file.endswith(".sh")}
    for script in run:
        assert os.access(ROOT / "image" / script, os.X_OK)


def test_the_image_has_the_version_of_the_project() -> None:
    [label] = of(stages()[1], "LABEL")
    assert f'org.opencontainers.image.version="{project_version()}"' in label


# The lock files


def flavors() -> list[str]:
    extras = re.search(
        r"^\[project\.optional-dependencies\]\n(.*?)^\[",
        (ROOT / "pyproject.toml").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert extras
    return re.findall(r"^(\w+) = \[", extras[1], re.MULTILINE)


def default_flavors() -> list[str]:
    return wheelhouse.default("FLAVORS").split()


def locked(name: str) -> list[Requirement]:
    """The requirements of a lock file. Fails when one has no hash, or is not pinned."""
    text = (REQUIREMENTS / f"{name}.txt").read_text().replace("\\\n", " ")
    found = []
    for line in filter(None, text.splitlines()):
        requirement, *hashes = line.split(" --hash=")
        assert hashes, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest.strip()) for digest in hashes), requirement
        parsed = Requirement(requirement)
        assert re.fullmatch(r"==[^*,]+", str(parsed.specifier)), requirement
        found.append(parsed)
    return found


def pins(name: str, python: str) -> dict[str, str]:
    """Package -> version that a lock file installs on Linux for a minor version of Python."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    chosen = [one for one in locked(name) if one.marker is None or one.marker.evaluate(environment)]
    found = {one.name: str(one.specifier) for one in chosen}
    assert len(found) == len(chosen), "one version of each"
    return found


def test_every_flavor_has_its_lock() -> None:
    assert sorted(path.stem for path in REQUIREMENTS.glob("*.txt")) == sorted(["dev", "runtime", "sbom", *flavors()])
    assert {"sklearn", "lightgbm", "xgboost", "catboost"} == set(default_flavors())
    # What the log tells to build with when a library is missing.
    assert set(FLAVOR_OF_PACKAGE.values()) == set(flavors())


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_images_get_the_versions_that_were_tested(python: str) -> None:
    tested, core = pins("dev", python), pins("runtime", python)
    together = dict(tested)
    for name in ("runtime", *flavors()):
        lock = pins(name, python)
        assert core.items() <= lock.items(), "a flavor's lock is enough by itself"
        conflicts = {
            package: version for package, version in lock.items() if together.setdefault(package, version) != version
        }
        assert conflicts == {}, name
    # The default image has nothing that the tests did not run with.
    for name in default_flavors():
        assert pins(name, python).items() <= tested.items()


def test_no_test_tool_gets_into_the_image() -> None:
    names = {requirement.name for name in ("runtime", *flavors()) for requirement in locked(name)}
    assert names & {"mlflow", "pytest", "moto", "coverage", "mypy", "ruff", "trustme", "freezegun", "pip"} == set()
    assert {"mlflow-skinny", "pandas", "starlette", "uvicorn"} <= names
