"""The places of mounts: a volume, and a path in it. Two places overlap where one path is the other, or above it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

Object = Mapping[str, Any]
Place = tuple[str, tuple[str, ...]]

# Volumes that no other pod can mount, or that hold no files of a pod's.
_PRIVATE = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "image", "name", "projected", "secret"}

# Two pods that differ in these fields of a volume share its files all the same.
_ACCESS = {"fsType", "mountOptions", "nodePublishSecretRef", "readOnly", "type", "user", "volumeAttributes"}
_ACCESS |= {"secretFile", "secretName", "secretNamespace", "secretRef"}


def containers(pod: Object) -> Iterator[Object]:
    """A pod's containers, without debug containers that have ended: those never start again."""
    debugged = pod.get("status", {}).get("ephemeralContainerStatuses") or ()
    ended = {one["name"] for one in debugged if "terminated" in (one.get("state") or {})}
    spec = pod.get("spec", {})
    yield from (*(spec.get("initContainers") or ()), *(spec.get("containers") or ()))
    yield from (one for one in spec.get("ephemeralContainers") or () if one["name"] not in ended)


def overlapping(pod: Object, container: Object, places: set[Place]) -> str | None:
    """The name in `pod` of the volume by which the container mounts one of the `places`, or a part of one."""
    shared = _shared_volumes(pod)
    for mount in (*(container.get("volumeMounts") or ()), *(container.get("volumeDevices") or ())):
        volume, path = shared.get(mount["name"], ("", ""))
        parts = _parts(path, _inside(mount)[0])
        for other, inner in places:
            if volume == other and all(one == two for one, two in zip(parts, inner, strict=False)):
                return str(mount["name"])
    return None


def places_of(root: Path, pods: Iterable[Object]) -> set[Place]:
    """The places that the directory `root` has in these pods."""
    found = set()
    # By its own name and by that which links in it lead to: a pod may mount either.
    for path in {_absolute(str(root.absolute())), _absolute(str(root.resolve()))}:
        for pod in pods:
            shared = _shared_volumes(pod)
            for container in containers(pod):
                above = {_absolute(mount["mountPath"]): mount for mount in container.get("volumeMounts") or ()}
                # A mount hides what another has below it.
                at = max(filter(path.is_relative_to, above), key=lambda one: len(one.parts), default=None)
                if at is not None and above[at]["name"] in shared:
                    volume, start = shared[above[at]["name"]]
                    inside, whole = _inside(above[at])
                    found.add((volume, _parts(start, inside, str(path.relative_to(at)) if whole else "")))
    return found


def _shared_volumes(pod: Object) -> dict[str, tuple[str, str]]:
    """A pod's volumes that other pods may mount too: name in the pod -> which one, and the path of its root there."""
    found = {}
    for volume in pod.get("spec", {}).get("volumes") or ():
        for kind, source in volume.items():
            if kind not in _PRIVATE and isinstance(source, Mapping):
                fields = {**source, **(source.get("volumeAttributes") or {})}
                path = fields.pop("path", "")
                which = [kind, {name: value for name, value in fields.items() if name not in _ACCESS}]
                found[volume["name"]] = json.dumps(which, sort_keys=True), path
    return found


def _inside(mount: Object) -> tuple[str, bool]:
    """The path of a mount in its volume, and whether that is the whole path: nobody knows variables here."""
    literal, variable, _ = (mount.get("subPathExpr") or "").partition("$(")
    return (literal.rpartition("/")[0], False) if variable else (mount.get("subPath") or literal, True)


def _absolute(path: str) -> PurePosixPath:
    return PurePosixPath(os.path.normpath(f"/{path.lstrip('/')}"))


def _parts(*paths: str) -> tuple[str, ...]:
    """The names in a path; none if it leads upwards, since it may then lead anywhere in the volume."""
    parts = PurePosixPath("/".join(("", *paths))).parts[1:]
    return () if ".." in parts else parts
