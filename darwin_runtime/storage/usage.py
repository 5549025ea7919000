"""Which pods use which entries: by a lease, or by a name in a pod's environment or annotations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darwin_runtime.storage.cache import KEY, Lease
from darwin_runtime.storage.references import make_alias

Pod = Mapping[str, Any]


@dataclass
class InUse:
    """Which entries pods use, by key, with the pods' names; and the pods that may use any."""

    keys: dict[str, set[str]] = field(default_factory=dict)
    unmatched: set[str] = field(default_factory=set)

    def reason(self, key: str) -> str | None:
        """Why the entry must stay; None when no pod uses it."""
        if pods := self.keys.get(key):
            return f"in use by {', '.join(sorted(pods))}"
        if self.unmatched:
            return f"may be in use by {', '.join(sorted(self.unmatched))}"
        return None


def in_use(
    pods: Sequence[Pod], leases: Sequence[Lease], names: Mapping[str, str], listed: float, own: str, root: Path
) -> InUse:
    """What the pods that have not ended use: by lease, or by a key or alias in their environment or annotations.

    `names` maps every key and alias that exists to its key: checksums in annotations look like keys, too. `listed` is
    when the listing of the pods began, in the leases' time: a later lease is of a pod too new to be listed. A pod that
    mounts the cache at `root` and matches nothing may use anything, but not this one, whose name is `own`.
    """
    found = InUse()
    by_pod: dict[str, set[str]] = {}
    for lease in leases:
        by_pod.setdefault(lease.uid or lease.pod, set()).add(lease.key)
        if lease.written > listed:
            found.keys.setdefault(lease.key, set()).add(lease.pod)
    claims = _claims(pods, own, root)
    for pod in filter(_lives, pods):
        name = _name(pod)
        keys = {key for one in _identities(pod) for key in by_pod.get(one, ())}
        keys |= {names[word] for text in _texts(pod) for word in KEY.findall(text) if word in names}
        for key in keys:
            found.keys.setdefault(key, set()).add(name)
        if not keys and own not in _identities(pod) and claims.intersection(_volumes(pod).values()):
            found.unmatched.add(name)
    return found


def dead_leases(pods: Sequence[Pod], leases: Sequence[Lease], listed: float) -> list[Lease]:
    """The leases, older than the listing of the pods, of pods that have ended or are gone."""
    alive = {one for pod in filter(_lives, pods) for one in _identities(pod)}
    return [lease for lease in leases if lease.written <= listed and (lease.uid or lease.pod) not in alive]


def _lives(pod: Pod) -> bool:
    # Pending, Unknown and terminating pods need their models too.
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def _name(pod: Pod) -> str:
    return str(pod.get("metadata", {}).get("name", ""))


def _identities(pod: Pod) -> set[str]:
    """What a pod may call itself: its UID; its name, or its host's, cut to 63 characters."""
    spec, metadata = pod.get("spec", {}), pod.get("metadata", {})
    names = [_name(pod), spec.get("hostname"), spec.get("nodeName") if spec.get("hostNetwork") else None]
    cut = {name[:63].rstrip("-.") for name in names if name}
    return (cut | {_name(pod), str(metadata.get("uid", ""))}) - {""}


def _containers(pod: Pod) -> Iterator[Mapping[str, Any]]:
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        yield from pod.get("spec", {}).get(kind) or ()


def _texts(pod: Pod) -> Iterator[str]:
    """Where a pod may name an entry: environment and annotations; and the alias that its settings amount to."""
    yield from (pod.get("metadata", {}).get("annotations") or {}).values()
    for container in _containers(pod):
        environ = {one["name"]: one.get("value") or "" for one in container.get("env") or ()}
        yield from environ.values()
        if environ.get("DEPLOYMENT_NAME") and environ.get("MODEL_URI"):
            yield make_alias(environ["DEPLOYMENT_NAME"], environ["MODEL_URI"])


# Volumes that no other pod can mount, or that hold no files of a pod's.
_PRIVATE = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "image", "name", "projected", "secret"}


def _volumes(pod: Pod) -> dict[str, str]:
    """A pod's volumes that other pods may mount too: name in the pod -> what it is, the same for all pods."""
    return {
        volume["name"]: json.dumps([kind, {**source, "readOnly": None}], sort_keys=True)
        for volume in pod.get("spec", {}).get("volumes") or ()
        for kind, source in volume.items()
        if kind not in _PRIVATE and isinstance(source, Mapping)
    }


def _claims(pods: Sequence[Pod], own: str, root: Path) -> set[str]:
    """The volumes that may hold the cache: what this pod mounts there if it is among `pods`, else what any pod does."""
    this = [pod for pod in pods if own in _identities(pod)]
    return {
        _volumes(pod)[mount["name"]]
        for pod in this or pods
        for container in _containers(pod)
        for mount in container.get("volumeMounts") or ()
        if mount["name"] in _volumes(pod) and root.is_relative_to(mount["mountPath"])
    }
