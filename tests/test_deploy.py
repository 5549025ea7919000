"""The manifests, the Dockerfile and the lock files agree with the code and with each other."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import mlflow.environment_variables
import pytest
import yaml
from packaging.requirements import Requirement

import cleanup
import darwin_model
import download
from darwin_env import Reader
from tests.conftest import ROOT
from tests.settings import read_by

DEPLOY = ROOT / "deploy"
REQUIREMENTS = ROOT / "requirements"
FILES = sorted(path.name for path in DEPLOY.glob("*.yaml"))
SERVING = ["emptydir.yaml", "pvc.yaml"]

# A role by the script that its container runs; the image's default is the main container's.
ROLES = {"/app/download.py": "init", "/app/cleanup.py": "cleanup"}

Manifest = dict[str, Any]


def manifests(file: str) -> dict[str, Manifest]:
    """By kind; no file has two of one kind."""
    documents = list(yaml.safe_load_all((DEPLOY / file).read_text()))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def pod(file: str) -> Manifest:
    found = manifests(file)
    spec = found["Deployment"]["spec"] if "Deployment" in found else found["CronJob"]["spec"]["jobTemplate"]["spec"]
    return dict(spec["template"]["spec"])


def containers(file: str) -> Iterator[Manifest]:
    yield from pod(file).get("initContainers", ())
    yield from pod(file)["containers"]


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


EVERY_CONTAINER = [
    pytest.param(container, id=f"{file}:{container['name']}") for file in FILES for container in containers(file)
]


def test_there_are_the_three_files_of_the_readme() -> None:
    assert [*SERVING, "cleanup.yaml"] == sorted(FILES, key=lambda name: (name == "cleanup.yaml", name))
    assert all(f"(deploy/{file})" in (ROOT / "README.md").read_text() for file in FILES)


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
        assert settings.strategy == file.removesuffix(".yaml")
    [container] = containers("cleanup.yaml")
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
    init, main = serving("pvc.yaml")
    [job] = containers("cleanup.yaml")
    assert {mounts(one)["model-cache"]["mountPath"] for one in (init, main, job)} == {values(init)["CACHE_PATH"]}
    assert values(job)["CACHE_PATH"] == values(init)["CACHE_PATH"]
    assert [mounts(one)["model-cache"].get("readOnly", False) for one in (init, main, job)] == [False, True, False]
    claim = manifests("pvc.yaml")["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for file in ("pvc.yaml", "cleanup.yaml"):
        [volume] = [volume for volume in pod(file)["volumes"] if volume["name"] == "model-cache"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}


def test_who_uses_the_cache_is_told_by_pod_name() -> None:
    for container in (serving("pvc.yaml")[0], *containers("cleanup.yaml")):
        [name] = [one for one in container["env"] if one["name"] == "POD_NAME"]
        assert name["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}


@pytest.mark.parametrize("file", FILES)
def test_every_mount_has_its_volume_and_is_used(file: str) -> None:
    volumes = [volume["name"] for volume in pod(file)["volumes"]]
    assert {name for container in containers(file) for name in mounts(container)} == set(volumes)
    assert len(volumes) == len(set(volumes))


def test_the_login_is_an_optional_secret_as_the_readme_makes_it() -> None:
    made = re.search(
        r"kubectl create secret generic (\S+) --from-literal=(\w+)=\S+ --from-literal=(\w+)=",
        (ROOT / "README.md").read_text(),
    )
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


@pytest.mark.parametrize("file", SERVING)
def test_probes_ask_routes_that_the_server_has(file: str) -> None:
    _, main = serving(file)
    routes = {
        node.elts[1].value
        for node in ast.walk(ast.parse((ROOT / "darwin_app.py").read_text()))
        if isinstance(node, ast.Tuple)
        and len(node.elts) > 1
        and isinstance(node.elts[0], ast.Constant)
        and node.elts[0].value == "GET"
        and isinstance(node.elts[1], ast.Constant)
    }
    probes = {kind: main[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/livez",
    }
    assert {probe["path"] for probe in probes.values()} <= routes

    [port] = main["ports"]
    assert str(port["containerPort"]) == read_by("main")["PORT"]
    assert {probe["port"] for probe in probes.values()} == {port["name"]}


@pytest.mark.parametrize("file", SERVING)
def test_the_service_leads_to_the_pods(file: str) -> None:
    found = manifests(file)
    deployment, service = found["Deployment"]["spec"], found["Service"]["spec"]
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"] == service["selector"]
    assert {port["targetPort"] for port in service["ports"]} == {port["name"] for port in serving(file)[1]["ports"]}
    name = found["Deployment"]["metadata"]["name"]
    assert f"deployment/{name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", SERVING)
def test_a_prediction_under_way_can_end(file: str) -> None:
    timeout = read_by("main")["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"]
    assert pod(file)["terminationGracePeriodSeconds"] > float(timeout or "nan")


@pytest.mark.parametrize("container", EVERY_CONTAINER)
def test_containers_are_locked_down(container: Manifest) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert mounts(container)["tmp"]["mountPath"] == "/tmp"
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("file", FILES)
def test_pods_keep_to_the_restricted_standard(file: str) -> None:
    context = pod(file)["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {10001}
    assert {next(iter(volume.keys() - {"name"})) for volume in pod(file)["volumes"]} <= {
        "emptyDir",
        "persistentVolumeClaim",
    }
    assert pod(file)["automountServiceAccountToken"] is (file == "cleanup.yaml")


def test_the_cleanup_may_list_pods_and_nothing_else() -> None:
    found = manifests("cleanup.yaml")
    assert found["Role"]["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    account = found["ServiceAccount"]["metadata"]["name"]
    assert pod("cleanup.yaml")["serviceAccountName"] == account
    assert found["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert found["RoleBinding"]["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": found["Role"]["metadata"]["name"],
    }
    # What the log tells to add when the right is missing is the same Role.
    told = yaml.safe_load(cleanup.ROLE_TO_ADD.format(namespace="models"))
    assert told["rules"] == found["Role"]["rules"]
    assert told["metadata"]["name"] == found["Role"]["metadata"]["name"]


def test_the_cleanup_runs_one_at_a_time_and_ends() -> None:
    spec = manifests("cleanup.yaml")["CronJob"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    grace = float(read_by("cleanup")["GRACE_SECONDS"] or "nan")
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 10 * grace
    assert pod("cleanup.yaml")["restartPolicy"] == "Never"


def test_the_image_is_the_same_everywhere() -> None:
    images = {container["image"] for file in FILES for container in containers(file)}
    [image] = images
    readme = (ROOT / "README.md").read_text()
    assert f"docker build -t {image} ." in readme
    assert image in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("file", FILES)
def test_only_image_and_uris_are_to_be_changed(file: str) -> None:
    lines = [line for line in (DEPLOY / file).read_text().splitlines() if "# change:" in line]
    changed = {line.partition("# change:")[0].strip().removeprefix("- ") for line in lines}
    expected = {f"image: {container['image']}" for container in containers(file)}
    if file in SERVING:
        init = values(serving(file)[0])
        expected |= {f"value: {init[name]}" for name in ("MODEL_URI", "MLFLOW_TRACKING_URI")}
    assert changed == expected
    assert len(lines) == len(list(containers(file))) + 2 * (file in SERVING)


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
        if len(parts) >= len(pattern) and all(map(fnmatch.fnmatch, parts, pattern)):
            verdict = not line.startswith("!")
    return verdict


def test_every_module_is_copied_into_the_image() -> None:
    build, final = stages()
    flat = [copied.split() for copied in of(build, "COPY") if copied.endswith(" /app/")]
    patterns = [pattern for *sources, _ in flat for pattern in sources]
    modules = [path.name for path in ROOT.glob("*.py")]
    assert "darwin_serve.py" in modules
    for module in modules:
        assert any(fnmatch.fnmatch(module, pattern) for pattern in patterns), module
        assert not ignored(module), module
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
        *("examples/log_iris.py", "deploy/pvc.yaml", "Makefile", ".run/mlflow.db", "requirements/dev.txt"),
        *("image/report.py", "image/__init__.py", "build/base.tar"),
        *("darwin_env.pyc", "__pycache__/darwin_env.cpython-311.pyc", ".env", "Dockerfile"),
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
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    [label] = of(stages()[1], "LABEL")
    assert f'org.opencontainers.image.version="{version[1]}"' in label


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
    default = re.search(r'^ARG FLAVORS="(.*)"$', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert default
    return default[1].split()


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
    assert set(darwin_model.FLAVORS.values()) == set(flavors())


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
