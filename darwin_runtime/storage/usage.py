"""Which pods use which entries: by a lease, or by a name in a pod's annotations, environment, commands or mounts."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darwin_runtime.storage.cache import ABANDONED_SECONDS, KEY, Lease
from darwin_runtime.storage.mounts import Place, containers, overlapping, places_of
from darwin_runtime.storage.references import make_alias

Pod = Mapping[str, Any]

# From here on, the name in a lease may be the beginning of another pod's name.
CUT_LENGTH = 63

# The scripts of the CronJob, by the image's name and by that of Darwin's chart: they use no entry.
_CLEANUPS = {"cleanup.py", "cleanup_cache.py"}
_WORD = re.compile(r"[^\s;&|()<>'\"]+")


@dataclass
class InUse:
    """The entries that pods use, by key, with the pods' names; and the pods that may use any, with their volume."""

    keys: dict[str, set[str]] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)

    def reason(self, key: str) -> str | None:
        """Why the entry must stay; None when no pod uses it."""
        if pods := self.keys.get(key):
            return f"in use by {', '.join(sorted(pods))}"
        if self.unmatched:
            return f"may be in use by {', '.join(sorted(self.unmatched))}"
        return None

    def warnings(self) -> Iterator[str]:
        """A line for each pod that may use any entry."""
        for pod, volume in sorted(self.unmatched.items()):
            yield (
                f"pod {pod} mounts the cache, in its volume {volume}, and names no entry, so every entry is kept; "
                f"name the key of its entry in an annotation, mount another subPath, or delete the pod"
            )


def in_use(
    pods: Sequence[Pod], leases: Sequence[Lease], names: Mapping[str, str], listed: float, own: str, root: Path
) -> InUse:
    """What the pods that have not ended use: by lease, or by a key or alias that `_texts` finds.

    `names` maps every key and alias that exists to its key: checksums in annotations look like keys, too. `listed` is
    when the listing of the pods began, in the leases' time: a later lease is of a pod too new to be listed. A pod that
    mounts the cache at `root` and matches nothing may use anything, but not this one, whose name is `own`.
    """
    found = InUse()
    for lease in leases:
        if lease.written > listed:
            found.keys.setdefault(lease.key, set()).add(lease.pod)
    this = _called(own, pods)
    places = places_of(root, this or pods)
    programs = [_program(one) for pod in this for one in containers(pod) if overlapping(pod, one, places)]
    # In a pod of several programs it is not known which of them this is.
    cleanup = programs[0] if len(programs) == 1 else []
    for pod, held in _holders(pods, leases):
        name = _name(pod)
        keys = {lease.key for lease in held}
        keys |= {names[word] for text in _texts(pod) for word in KEY.findall(text) if word in names}
        for key in keys:
            found.keys.setdefault(key, set()).add(name)
        if not keys and this != [pod] and (volume := _volume_of_any(pod, places, cleanup)):
            found.unmatched[name] = volume
    return found


def dead_leases(pods: Sequence[Pod], leases: Sequence[Lease], listed: float) -> list[Lease]:
    """The leases, older than the listing of the pods, of pods that have ended or are gone."""
    held = {lease for _, some in _holders(pods, leases) for lease in some}
    return [lease for lease in leases if lease.written <= listed and lease not in held]


def _holders(pods: Sequence[Pod], leases: Sequence[Lease]) -> Iterator[tuple[Pod, set[Lease]]]:
    """The pods that have not ended, each with all leases that may be its own.

    The kubelet's UID of a pod is not always the API server's: a virtual cluster has two, and a static pod shows none.
    So a lease of a UID that no listed pod has counts for each pod of its name that has no lease of its own UID.
    """
    uids = Counter(_uid(pod) for pod in pods)
    by_uid, by_name = defaultdict(set), defaultdict(set)
    for lease in leases:
        if lease.uid and lease.uid in uids:
            by_uid[lease.uid].add(lease)
        else:
            for name in {lease.pod, _first_label(lease.pod)}:
                by_name[name].add(lease)
    shared = Counter(name for pod in pods for name in _names(pod))
    for pod in filter(_lives, pods):
        own = by_uid.get(_uid(pod), set())
        named = {lease for name in _names(pod) for lease in by_name.get(name, ())}
        if own:
            yield pod, own | {lease for lease in named if not lease.uid}
        elif len(_name(pod)) < CUT_LENGTH and shared[_name(pod)] == 1:
            yield pod, named - _predecessors({lease for lease in named if lease.pod == _name(pod)})
        else:
            yield pod, named


def _predecessors(leases: Set[Lease]) -> set[Lease]:
    """Of the leases of one name, which no two pods have at a time, those of UIDs before the last one.

    A pod that was deleted by force may write its lease after its successor's, so a day must lie in between.
    """
    last: dict[str, float] = {}
    for lease in leases:
        last[lease.uid] = max(lease.written, last.get(lease.uid, 0.0))
    last.pop("", None)
    before = max(last.values(), default=0.0) - ABANDONED_SECONDS
    return {lease for lease in leases if lease.uid and last[lease.uid] < before}


def _lives(pod: Pod) -> bool:
    # Pending, Unknown and terminating pods need their models too.
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def _name(pod: Pod) -> str:
    return str(pod.get("metadata", {}).get("name", ""))


def _uid(pod: Pod) -> str:
    return str(pod.get("metadata", {}).get("uid", ""))


def _names(pod: Pod) -> set[str]:
    """The names that a pod may have in its leases; one that ends with a dot is the beginning of a host's name."""
    spec = pod.get("spec", {})
    host = str(spec.get("hostname") or _name(pod))
    node = str(spec.get("nodeName") or "") if spec.get("hostNetwork") else ""
    given = [_environ(pod, container).get("POD_NAME", "") for container in containers(pod)]
    # The host's name may have a domain that the node's does not have, or the other way round.
    labels = [_first_label(node), _first_label(host) if spec.get("setHostnameAsFQDN") else ""]
    return ({_cut(name) for name in (_name(pod), host, node, *given)} | {*labels}) - {"", "."}


def _cut(name: str) -> str:
    return name[:CUT_LENGTH].rstrip("-.")


def _first_label(name: str) -> str:
    return name.partition(".")[0].lower() + "."


def _called(own: str, pods: Sequence[Pod]) -> list[Pod]:
    """The pods with the name `own`; those whose host may be called so if there are none."""
    named = [pod for pod in pods if own in (_name(pod), _cut(_name(pod)))]
    return named or [pod for pod in pods if _names(pod) & {own, _first_label(own)}]


def _environ(pod: Pod, container: Mapping[str, Any]) -> dict[str, str]:
    """The variables of a container whose value is in the pod: literals, and the pod's name."""
    found = {}
    for one in container.get("env") or ():
        at = ((one.get("valueFrom") or {}).get("fieldRef") or {}).get("fieldPath")
        found[one["name"]] = _name(pod) if at == "metadata.name" else one.get("value") or ""
    return found


def _texts(pod: Pod) -> Iterator[str]:
    """The places where a pod may name an entry, and the alias that its settings amount to."""
    yield from (pod.get("metadata", {}).get("annotations") or {}).values()
    for container in containers(pod):
        environ = _environ(pod, container)
        yield from (*environ.values(), *_words(container))
        yield from (mount.get("subPath") or "" for mount in container.get("volumeMounts") or ())
        if environ.get("DEPLOYMENT_NAME") and environ.get("MODEL_URI"):
            yield make_alias(environ["DEPLOYMENT_NAME"], environ["MODEL_URI"])


def _words(container: Mapping[str, Any]) -> list[str]:
    return [*(container.get("command") or ()), *(container.get("args") or ())]


def _volume_of_any(pod: Pod, places: set[Place], cleanup: Sequence[Any]) -> str | None:
    """The volume by which a pod without an entry may use any; None if it mounts none, or cannot use one yet.

    A cleanup, such as the program `cleanup`, uses no entry. A download leases one first; behind it in a pending pod, no
    later container has started.
    """
    mounting = [(one, volume) for one in containers(pod) if (volume := overlapping(pod, one, places))]
    first = mounting[0][0] if mounting else {}
    starts_with_it = first in (pod.get("spec", {}).get("initContainers") or ()) and _leases(pod, first)
    if starts_with_it and pod.get("status", {}).get("phase") == "Pending":
        return None
    harmless = [_cleans(one) or _leases(pod, one) or (cleanup and _program(one) == cleanup) for one, _ in mounting]
    return next((volume for (_, volume), fine in zip(mounting, harmless, strict=True) if not fine), None)


def _program(container: Mapping[str, Any]) -> list[Any]:
    """All that decides what a container runs; nothing where that is the image's default, as it is for a server."""
    words = _words(container)
    return [words, *(container.get(name) for name in ("image", "env", "envFrom"))] if words else []


def _scripts(container: Mapping[str, Any]) -> set[str]:
    """The Python scripts in a command, also in one for a shell."""
    paths = [path for word in _words(container) for path in _WORD.findall(word)]
    return {path.rpartition("/")[2] for path in paths if path.endswith(".py")}


def _cleans(container: Mapping[str, Any]) -> bool:
    return bool(scripts := _scripts(container)) and scripts <= _CLEANUPS


def _leases(pod: Pod, container: Mapping[str, Any]) -> bool:
    """Whether the container is the image's download through the cache, and its lease is sure to have the pod's name."""
    environ = _environ(pod, container)
    through_cache = _scripts(container) == {"download.py"} and environ.get("STORAGE_STRATEGY") == "pvc"
    return through_cache and environ.get("POD_NAME") == _name(pod)
