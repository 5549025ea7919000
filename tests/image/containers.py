"""Containers run as Kubernetes would run them: locked down, and pods out of parsed manifests as the kubelet does it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.conftest import Finished, wait_until
from tests.support.apiserver import ApiServer

Manifest = dict[str, Any]

# The network is that of the tests, which have one of their own with nothing but loopback. The limits are what a
# process here may set.
_RUN = (
    *("podman", "--runtime", "runc", "run", "--pull=never", "--network=host"),
    *("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"),
)
# Whoever nobody knows: no entry in /etc/passwd, no home.
STRANGER = "1234567:0"

TMP = "--tmpfs=/tmp"
# Of an option that comes twice, the later one holds.
LOCKED = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *(f"--user={STRANGER}", "--memory=512m", "--memory-swap=512m", "--cpus=1"),
)


def run(image: str, *command: str, options: Sequence[str] = (*LOCKED, TMP), **env: object) -> Finished:
    """Run a container to its end."""
    told = [*_RUN, "--rm", *options, *_variables(env), image, *command]
    done = subprocess.run(told, capture_output=True, text=True, timeout=300, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def _variables(env: Mapping[str, object]) -> list[str]:
    return [f"--env={name}={value}" for name, value in env.items()]


@dataclass
class Container:
    """One that runs in the background."""

    name: str
    port: int = 8000

    def podman(self, command: str, *arguments: str) -> str:
        done = subprocess.run(["podman", command, *arguments, self.name], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def log(self) -> str:
        return self.podman("logs")

    def state(self, key: str) -> Any:
        return json.loads(self.podman("inspect", "--format={{json .State}}"))[key]

    def get(self, path: str) -> requests.Response | None:
        """The answer, or None while nobody listens."""
        try:
            return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=5)
        except requests.ConnectionError:
            return None

    def post(self, path: str, body: object) -> requests.Response:
        return requests.post(f"http://127.0.0.1:{self.port}{path}", json=body, timeout=30)

    def wait_ready(self, path: str = "/ready", deadline: float = 120) -> None:
        def ready() -> bool:
            assert self.state("Running"), f"{self.name} ended:\n{self.log()}"
            answer = self.get(path)
            return answer is not None and answer.ok

        wait_until(ready, f"{self.name} is ready", deadline)

    def wait_end(self, deadline: float = 60) -> int:
        wait_until(lambda: not self.state("Running"), f"{self.name} ends", deadline)
        return int(self.state("ExitCode"))


@contextmanager
def running(
    image: str, *command: str, options: Sequence[str] = (*LOCKED, TMP), port: int = 8000, **env: object
) -> Iterator[Container]:
    """A container that runs until the end of the block."""
    name = f"darwin-{uuid.uuid4().hex[:12]}"
    told = [*_RUN, "--detach", f"--name={name}", *options, *_variables(env), image, *command]
    try:
        done = subprocess.run(told, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield Container(name, port)
    finally:
        subprocess.run(["podman", "rm", "--force", "--time=0", name], check=True, capture_output=True)


@dataclass
class Pod:
    """A pod that has been started: what its init containers said, and its main container while it runs."""

    name: str
    uid: str
    directory: Path
    manifest: Manifest
    init: list[Finished] = field(default_factory=list)
    main: Container | None = None

    @property
    def server(self) -> Container:
        assert self.main is not None
        return self.main

    def termination(self, container: str) -> str:
        """The termination message that `kubectl describe pod` would show."""
        return (self.directory / "termination" / container).read_text()


@dataclass
class Node:
    """Runs pods of parsed manifests. `claims` and `configmaps` are directories by name; `hosts` name -> address.

    Volumes lie where the kubelet has them, owned as `fsGroup` says. Kinds of volumes and variables that are not known
    here are errors.
    """

    directory: Path
    claims: dict[str, Path] = field(default_factory=dict)
    configmaps: dict[str, Path] = field(default_factory=dict)
    hosts: Mapping[str, str] = field(default_factory=dict)
    api: ApiServer | None = None
    environ: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def pod(self, template: Manifest, name: str) -> Iterator[Pod]:
        """Start a pod from a pod template: init containers one after the other, then the main one, if none failed.

        It has the label of its ReplicaSet, of which pods of one template are.
        """
        spec, metadata = template["spec"], template.get("metadata", {})
        replica_set = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
        labels = metadata.get("labels", {}) | {"pod-template-hash": replica_set}
        template = template | {"metadata": metadata | {"labels": labels}}
        with self._prepared(template, name) as (pod, volumes):
            for container in spec.get("initContainers", ()):
                pod.init.append(self._to_end(pod, container, volumes))
                if pod.init[-1].code:
                    yield pod
                    return
            [main] = spec["containers"]
            image, options = self._container(pod, main, volumes)
            [port] = [port["containerPort"] for port in main["ports"]]
            with running(image, options=options, port=port) as pod.main:
                yield pod

    def wait_ready(self, pod: Pod, deadline: float = 120) -> None:
        """Wait until the startup probe, or else the readiness probe, succeeds; then ask the other probes."""
        [main] = pod.manifest["spec"]["containers"]
        first = "startupProbe" if "startupProbe" in main else "readinessProbe"
        pod.server.wait_ready(self._probe(main, first), deadline)
        for kind in ("readinessProbe", "livenessProbe"):
            answer = pod.server.get(self._probe(main, kind))
            assert answer is not None
            assert answer.ok, kind

    @staticmethod
    def _probe(container: Manifest, kind: str) -> str:
        probe = container[kind]["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports.get(probe["port"], probe["port"]) in ports.values()
        return str(probe["path"])

    def job(self, template: Manifest, name: str) -> Finished:
        """Run a Job's only container to its end."""
        [container] = template["spec"]["containers"]
        with self._prepared(template, name) as (pod, volumes):
            return self._to_end(pod, container, volumes)

    def _to_end(self, pod: Pod, container: Manifest, volumes: Mapping[str, Path]) -> Finished:
        image, options = self._container(pod, container, volumes)
        return run(image, options=options)

    @contextmanager
    def _prepared(self, template: Manifest, name: str) -> Iterator[tuple[Pod, dict[str, Path]]]:
        """A pod with its volumes, known to the API server until the end of the block."""
        spec = template["spec"]
        uid = str(uuid.uuid4())
        manifest = {
            "metadata": {**template.get("metadata", {}), "name": name, "namespace": "default", "uid": uid},
            "spec": spec,
            "status": {"phase": "Running"},
        }
        pod = Pod(name, uid, self.directory / "pods" / uid, manifest)
        volumes = {volume["name"]: self._volume(pod, volume) for volume in spec.get("volumes", ())}
        (pod.directory / "termination").mkdir(parents=True)
        group = spec.get("securityContext", {}).get("fsGroup")
        if group is not None:
            for volume, path in volumes.items():
                if "configMap" not in next(one for one in spec["volumes"] if one["name"] == volume):
                    os.chown(path, -1, group)
                    path.chmod(0o2775)
        if self.api:
            self.api.pods = [*self.api.pods, manifest]
        try:
            yield pod, volumes
        finally:
            if self.api:
                self.api.pods = [one for one in self.api.pods if one is not manifest]

    def _volume(self, pod: Pod, volume: Manifest) -> Path:
        match volume:
            case {"emptyDir": _, "name": str(name)}:
                path = pod.directory / "volumes" / "kubernetes.io~empty-dir" / name
                path.mkdir(parents=True)
                path.chmod(0o777)
            case {"persistentVolumeClaim": {"claimName": claim}}:
                path = self.claims[claim]
            case {"configMap": {"name": config}}:
                path = self.configmaps[config]
            case _:
                raise AssertionError(volume)
        return path

    def _container(self, pod: Pod, container: Manifest, volumes: Mapping[str, Path]) -> tuple[str, list[str]]:
        """Image, and podman's options."""
        assert "args" not in container
        spec = pod.manifest["spec"]
        context = spec.get("securityContext", {}) | container.get("securityContext", {})
        options = [f"--hostname={pod.name}", *(f"--add-host={host}:{address}" for host, address in self.hosts.items())]

        if "runAsUser" in context:
            options.append(f"--user={context['runAsUser']}:{context['runAsGroup']}")
        if "fsGroup" in context:
            options.append(f"--group-add={context['fsGroup']}")
        if context.get("readOnlyRootFilesystem"):
            options += ["--read-only", "--read-only-tmpfs=false"]
        if context.get("allowPrivilegeEscalation") is False:
            options.append("--security-opt=no-new-privileges")
        options += [f"--cap-drop={name}" for name in context.get("capabilities", {}).get("drop", ())]

        limits = container.get("resources", {}).get("limits", {})
        if "cpu" in limits:
            options.append(f"--cpus={limits['cpu']}")
        if "memory" in limits:
            memory = str(limits["memory"]).replace("Mi", "m").replace("Gi", "g")
            options += [f"--memory={memory}", f"--memory-swap={memory}"]

        for mount in container.get("volumeMounts", ()):
            mode = ":ro" if mount.get("readOnly") else ""
            options.append(f"--volume={volumes[mount['name']]}:{mount['mountPath']}{mode}")
        message = pod.directory / "termination" / container["name"]
        message.touch()
        message.chmod(0o666)
        options.append(f"--volume={message}:/dev/termination-log")
        variables = dict(self.environ)
        if self.api:
            variables |= self.api.environ
            if spec.get("automountServiceAccountToken", True):
                options.append(f"--volume={self.api.directory}:/var/run/secrets/kubernetes.io/serviceaccount:ro")
        for variable in container.get("env", ()):
            value = self._value(pod, variable)
            if value is not None:
                variables[variable["name"]] = value
        options += _variables(variables)

        if container.get("command"):
            options.append(f"--entrypoint={json.dumps(container['command'])}")
        return container["image"], options

    def _value(self, pod: Pod, variable: Manifest) -> str | None:
        match variable:
            case {"value": str(value)}:
                return value
            case {"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}:
                return pod.name
            case {"valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['pod-template-hash']"}}}:
                return str(pod.manifest["metadata"].get("labels", {}).get("pod-template-hash", ""))
            case {"valueFrom": {"secretKeyRef": {"optional": True}}}:
                return None  # there are no Secrets
        raise AssertionError(variable)
