"""CronJob: keep the shared model cache within its age and size, never touching a model that a pod uses.

Settings (environment variables): CACHE_PATH, NAMESPACE, TTL_DAYS, MAX_SIZE_GB, DRY_RUN, GRACE_SECONDS, POD_NAME,
LOG_LEVEL, LOG_FORMAT, ENV, SERVICE_NAME.

How: list the pods and the leases, plan, move what may go into the trash (one rename each), wait out the grace period,
list pods and leases again, then restore or delete. A pod writes its lease before it looks for an entry, so either the
second listing sees the lease, or the pod saw that the entry was gone and downloads it anew.

Exit codes: 0 done; 1 failed, and nothing was removed that was not checked first; 2 the settings are bad, or CACHE_PATH
is not a cache.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import darwin_cache
import k8s_client
from darwin_cache import KEY, Cache, Entry, Lease, NotACache
from darwin_env import ConfigError, Reader
from darwin_log import Redactor, RoleError, human, log_settings, run_role

DAY = 86400.0
GIB = 1024**3

# How coarse the times of files may be: a lease this much older than a listing may still be younger than it.
CLOCK_GRAIN_SECONDS = 2.0

# A download in which nothing happened for this long is dead, or else it is refused when it tries to publish.
ABANDONED_SECONDS = DAY

ROLE_TO_ADD = """apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: model-cache-cleanup, namespace: {namespace}}}
rules:
  - apiGroups: [""]
    resources: [pods]
    verbs: [list]"""

Pod = Mapping[str, Any]

logger = logging.getLogger("darwin.cleanup")


@dataclass(frozen=True)
class Settings:
    cache: Path
    namespace: str
    ttl_days: float
    max_size_gb: float
    dry_run: bool
    grace_seconds: float
    pod: str

    @classmethod
    def from_env(cls, read: Reader) -> Settings:
        """`namespace` is empty where the service account's is meant. Raises `ConfigError` naming every bad variable."""
        settings = cls(
            cache=Path(read.text("CACHE_PATH", "/model-cache")),
            namespace=read.text("NAMESPACE"),
            ttl_days=read.number("TTL_DAYS", 7, least=0),
            max_size_gb=read.number("MAX_SIZE_GB", 0, least=0),
            dry_run=read.flag("DRY_RUN", False),
            grace_seconds=read.number("GRACE_SECONDS", 60, least=0),
            pod=read.text("POD_NAME", socket.gethostname()),
        )
        read.finish()
        return settings


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


@dataclass(frozen=True)
class Decision:
    entry: Entry
    remove: bool
    reason: str


def in_use(
    pods: Sequence[Pod], leases: Sequence[Lease], names: Mapping[str, str], listed: float, settings: Settings
) -> InUse:
    """What the pods that have not ended use: by lease, or by a key or alias in their environment or annotations.

    `names` maps every key and alias that exists to its key: checksums in annotations look like keys, too. `listed` is
    when the listing of the pods began, in the leases' time: a later lease is of a pod too new to be listed. A pod that
    mounts the cache and matches nothing may use anything.
    """
    found = InUse()
    for lease in leases:
        if lease.written > listed:
            found.keys.setdefault(lease.key, set()).add(lease.pod)
    claims = _claims(pods, settings)
    for pod in filter(_lives, pods):
        name = _name(pod)
        keys = {lease.key for lease in leases if _same_pod(lease.pod, name)}
        keys |= {names[word] for text in _texts(pod) for word in KEY.findall(text) if word in names}
        for key in keys:
            found.keys.setdefault(key, set()).add(name)
        if not keys and not _same_pod(settings.pod, name) and claims.intersection(_volumes(pod).values()):
            found.unmatched.add(name)
    return found


def dead_leases(pods: Sequence[Pod], leases: Sequence[Lease], listed: float) -> list[Lease]:
    """The leases, older than the listing of the pods, of pods that have ended or are gone."""
    alive = [_name(pod) for pod in filter(_lives, pods)]
    return [
        lease for lease in leases if lease.written <= listed and not any(_same_pod(lease.pod, name) for name in alive)
    ]


def plan(entries: Sequence[Entry], used: InUse, settings: Settings) -> list[Decision]:
    """What to do with each entry: first by age, then, while the rest is too large, by least recent use."""
    decisions = {}
    for entry in entries:
        if reason := used.reason(entry.key):
            decisions[entry.key] = Decision(entry, False, reason)
        elif entry.idle >= settings.ttl_days * DAY:
            decisions[entry.key] = Decision(entry, True, f"unused for TTL_DAYS={settings.ttl_days:g}")
        else:
            decisions[entry.key] = Decision(entry, False, f"used within TTL_DAYS={settings.ttl_days:g}")
    if settings.max_size_gb:
        size = sum(decision.entry.bytes for decision in decisions.values() if not decision.remove)
        for entry in sorted(entries, key=lambda entry: -entry.idle):
            if size <= settings.max_size_gb * GIB:
                break
            if not decisions[entry.key].remove and not used.reason(entry.key):
                why = f"least recently used, to come below MAX_SIZE_GB={settings.max_size_gb:g}"
                decisions[entry.key] = Decision(entry, True, why)
                size -= entry.bytes
        if size > settings.max_size_gb * GIB:
            logger.warning("what pods use is %s, more than MAX_SIZE_GB=%g", human(size), settings.max_size_gb)
    return [decisions[entry.key] for entry in entries]


def execute(decisions: Sequence[Decision], cache: Cache, settings: Settings, look: Look) -> Counter[str]:
    """Carry out a plan; returns what was done: removed, restored, freed (bytes)."""
    done: Counter[str] = Counter()
    # What a run that was killed left in the trash is judged together with this run's.
    waiting = cache.trash()
    doomed = [decision.entry.key for decision in decisions if decision.remove]
    waiting += [(trash, key) for key in doomed if (trash := cache.move_to_trash(key))]
    if not waiting:
        return done
    try:
        # At once for leases written before the rename, after the grace period for those a network file system showed
        # late.
        waiting = _restore(waiting, cache, look(), done)
        if waiting:
            logger.info("waiting GRACE_SECONDS=%g before deleting %d entries", settings.grace_seconds, len(waiting))
            time.sleep(settings.grace_seconds)
            waiting = _restore(waiting, cache, look(), done)
    except Exception:
        # What is in use can't be told any more: everything goes back.
        for path, key in waiting:
            cache.restore(path, key)
        raise
    sizes = {decision.entry.key: decision.entry.bytes for decision in decisions}
    for path, key in waiting:
        darwin_cache.remove_tree(path)
        done["removed"] += 1
        done["freed"] += sizes.get(key, 0)
    cache.drop_refs_to({key for _, key in waiting if not cache.has(key)})
    return done


def _restore(
    waiting: Sequence[tuple[Path, str]], cache: Cache, used: InUse, done: Counter[str]
) -> list[tuple[Path, str]]:
    still = []
    for path, key in waiting:
        reason = used.reason(key)
        if reason is None:
            still.append((path, key))
        elif cache.restore(path, key):
            done["restored"] += 1
            logger.info("restored %s: %s", key, reason)
        else:
            still.append((path, key))  # damaged, or a copy of what was downloaded anew
    return still


class Look:
    """Lists pods and leases afresh at each call, and says what is in use."""

    def __init__(self, cache: Cache, settings: Settings, client: k8s_client.Client) -> None:
        self.cache = cache
        self.settings = settings
        self.client = client
        self.pods: list[dict[str, Any]] = []
        self.leases: list[Lease] = []
        self.listed = 0.0

    def __call__(self) -> InUse:
        """Raises `RoleError` when pods or leases can't be listed."""
        try:
            self.listed = self.cache.now() - CLOCK_GRAIN_SECONDS
            self.pods = self.client.list_pods(self.settings.namespace)
            self.leases = self.cache.leases()
        except k8s_client.ApiError as error:
            namespace = self.settings.namespace
            role = f"; the Role to add:\n{ROLE_TO_ADD.format(namespace=namespace)}" if error.code == 403 else ""
            raise RoleError(
                f"cannot list the pods of namespace {namespace}, so nothing is removed: {error}{role}"
            ) from error
        except (k8s_client.NotInCluster, OSError, ValueError) as error:
            raise RoleError(f"cannot tell what is in use, so nothing is removed: {error}") from error
        return in_use(self.pods, self.leases, self.cache.names(), self.listed, self.settings)


def report(decisions: Sequence[Decision], strange: Sequence[str]) -> Iterator[str]:
    """A table of the entries, the longest unused first."""
    row = "{:<6}  {:<12}  {:>10}  {:>9}  {}".format
    yield row("", "entry", "size", "unused", "why")
    for decision in sorted(decisions, key=lambda decision: -decision.entry.idle):
        entry = decision.entry
        action = "remove" if decision.remove else "keep"
        days = f"{entry.idle / DAY:.1f} d"
        yield row(action, entry.key[:12], human(entry.bytes), days, f"{decision.reason} ({entry.model_uri})")
    for name in strange:
        yield row("keep", name[:12], "", "", f"{name} is not an entry made by download.py; left alone")


def tidy(cache: Cache, look: Look, used: InUse) -> None:
    """Remove what belongs to nobody any more, and note the use of what is in use."""
    for key in used.keys:
        if cache.has(key):
            cache.touch(key)
    for lease in dead_leases(look.pods, look.leases, look.listed):
        logger.info("dropping the lease of %s, which is gone", lease.pod)
        cache.drop_lease(lease)
    for path in list(cache.abandoned(ABANDONED_SECONDS)):
        logger.info("removing %s, an abandoned download", path)
        darwin_cache.remove_tree(path)


def run(service_account: Path, read: Reader, redact: Redactor) -> None:
    settings = Settings.from_env(read)
    log_settings(read.seen, redact)
    try:
        cache = Cache.find(settings.cache)
        if cache is None:
            logger.info("%s is empty, nothing to do", settings.cache)
            return
        _clean(cache, settings, service_account, read.environ)
    except NotACache as error:
        raise ConfigError([f"CACHE_PATH={settings.cache}: {error}"]) from error
    except OSError as error:
        raise RoleError(f"{settings.cache}: {error}; is the volume mounted read-only, or full?") from error


def _clean(cache: Cache, settings: Settings, service_account: Path, environ: Mapping[str, str]) -> None:
    try:
        home = k8s_client.namespace(service_account)
        client = k8s_client.Client.in_cluster(environ, service_account)
    except k8s_client.NotInCluster as error:
        raise RoleError(f"cannot list pods, so nothing is removed: {error}") from error
    settings = replace(settings, namespace=settings.namespace or home)
    with client:
        look = Look(cache, settings, client)
        used = look()
        if settings.namespace != home and not look.pods:
            # Kubernetes lists no pods, without an error, for a namespace that does not exist.
            raise RoleError(
                f"NAMESPACE={settings.namespace} has no pods, while this one is in {home}; nothing is removed. "
                f"Set NAMESPACE to the namespace of the pods that mount the cache, or leave it out"
            )
        for pod in sorted(used.unmatched):
            logger.warning("pod %s mounts the cache and uses an entry unknown, so every entry is kept", pod)
        entries, strange = cache.entries()
        decisions = plan(entries, used, settings)
        for line in report(decisions, strange):
            logger.info("%s", line)
        doomed = [decision for decision in decisions if decision.remove]
        if settings.dry_run:
            _summary("DRY_RUN, would remove", len(doomed), sum(d.entry.bytes for d in doomed), entries)
            return
        tidy(cache, look, used)
        done = execute(decisions, cache, settings, look)
        cache.drop_dangling_aliases(DAY)
    _summary("removed", done["removed"], done["freed"], entries, restored=done["restored"])


def _summary(what: str, count: int, freed: int, entries: Sequence[Entry], restored: int = 0) -> None:
    total = sum(entry.bytes for entry in entries)
    back = f", {restored} restored" if restored else ""
    logger.info("%s %d of %d entries%s: %s of %s freed", what, count, len(entries), back, human(freed), human(total))


def _lives(pod: Pod) -> bool:
    # Pending, Unknown and terminating pods need their models too.
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def _name(pod: Pod) -> str:
    return str(pod.get("metadata", {}).get("name", ""))


def _same_pod(hostname: str, pod: str) -> bool:
    """A pod's host name is its name, cut to 63 characters."""
    return hostname == pod or (len(pod) > 63 and hostname == pod[:63].rstrip("-."))


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
            yield darwin_cache.make_alias(environ["DEPLOYMENT_NAME"], environ["MODEL_URI"])


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


def _claims(pods: Sequence[Pod], settings: Settings) -> set[str]:
    """The volumes that may hold the cache: what this pod mounts there if it is among `pods`, else what any pod does."""
    own = [pod for pod in pods if _same_pod(settings.pod, _name(pod))]
    return {
        _volumes(pod)[mount["name"]]
        for pod in own or pods
        for container in _containers(pod)
        for mount in container.get("volumeMounts") or ()
        if mount["name"] in _volumes(pod) and settings.cache.is_relative_to(mount["mountPath"])
    }


def main(environ: Mapping[str, str] = os.environ, service_account: Path = k8s_client.SERVICE_ACCOUNT) -> int:
    return run_role(partial(run, service_account), environ)


if __name__ == "__main__":
    sys.exit(main())
