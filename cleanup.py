"""CronJob: keep the shared model cache within its age and size, never touching a model that a pod uses.

Settings (environment variables): CACHE_PATH, NAMESPACE, TTL_DAYS, MAX_SIZE_GB, LOW_WATERMARK_PERCENT, DRY_RUN,
GRACE_SECONDS, METRICS_TEXTFILE, PUSHGATEWAY_URL, POD_NAME, LOG_LEVEL, LOG_FORMAT, ENV, SERVICE_NAME.

How: list the pods and the leases, plan, announce what may go, wait out the grace period, list pods and leases again,
move what is still free into the trash (one rename each), list once more, then restore or delete. A pod writes its
lease, looks for its entry, vetoes announcements and looks again, so one of the listings sees the lease, or the pod
vetoes the move, or it finds the entry gone and downloads it anew; `cache` has the details.

The result is one line of JSON on stdout.

Exit codes: 0 done; 1 failed, and nothing was removed that was not checked first; 2 the settings are bad, or CACHE_PATH
is not a cache.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import k8s_client
from darwin_runtime.errors import ApiError, ConfigError, NotACache, NotInCluster, RoleError
from darwin_runtime.job_metrics import publish
from darwin_runtime.logs import format_bytes
from darwin_runtime.role import log_settings, run_role
from darwin_runtime.settings import Reader
from darwin_runtime.storage import disk, pins, references
from darwin_runtime.storage.cache import ABANDONED_SECONDS, DAY, Cache, Entry, Lease, Removal
from darwin_runtime.storage.usage import InUse, dead_leases, in_use

GIB = 1024**3

# How coarse the times of files may be: a lease this much older than a listing may still be younger than it.
CLOCK_GRAIN_SECONDS = 2.0

# Well below the age at which announcements are taken for those of a dead cleanup.
MAX_GRACE_SECONDS = ABANDONED_SECONDS / 4

ROLE_TO_ADD = """apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: model-cache-cleanup, namespace: {namespace}}}
rules:
  - apiGroups: [""]
    resources: [pods]
    verbs: [list]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: model-cache-cleanup, namespace: {namespace}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: model-cache-cleanup}}
subjects:
  - {{kind: ServiceAccount, name: {account}, namespace: {home}}}"""

# How the API server calls a service account.
_ACCOUNT = re.compile(r"system:serviceaccount:(?P<home>[a-z0-9.-]+):(?P<account>[a-z0-9.-]+)")

logger = logging.getLogger("darwin.cleanup")


@dataclass(frozen=True)
class Settings:
    cache: Path
    namespace: str
    ttl_days: float
    max_size_gb: float
    low_watermark_percent: float
    dry_run: bool
    grace_seconds: float
    metrics_textfile: str
    pushgateway_url: str
    pod: str

    @classmethod
    def from_env(cls, read: Reader) -> Settings:
        """`namespace` is empty where the service account's is meant. Raises `ConfigError` naming every bad variable."""
        settings = cls(
            cache=Path(read.text("CACHE_PATH", "/model-cache")),
            namespace=read.text("NAMESPACE"),
            ttl_days=read.number("TTL_DAYS", 7, minimum=0),
            max_size_gb=read.number("MAX_SIZE_GB", 0, minimum=0),
            low_watermark_percent=read.number("LOW_WATERMARK_PERCENT", 90, minimum=0, maximum=100),
            dry_run=read.flag("DRY_RUN", False),
            grace_seconds=read.number("GRACE_SECONDS", 120, minimum=0, maximum=MAX_GRACE_SECONDS),
            metrics_textfile=read.text("METRICS_TEXTFILE"),
            pushgateway_url=read.text("PUSHGATEWAY_URL"),
            pod=read.text("POD_NAME", socket.gethostname()),
        )
        read.finish()
        return settings


@dataclass(frozen=True)
class Decision:
    entry: Entry
    remove: bool
    reason: str


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
    max_size = settings.max_size_gb * GIB
    size = sum(decision.entry.bytes for decision in decisions.values() if not decision.remove)
    if max_size and size > max_size:
        # Some more than needed, so that not every run has to evict.
        goal = max_size * settings.low_watermark_percent / 100
        why = f"least recently used, to come below {settings.low_watermark_percent:g}% of "
        why += f"MAX_SIZE_GB={settings.max_size_gb:g}"
        for entry in sorted(entries, key=lambda entry: -entry.idle):
            if size <= goal:
                break
            if not decisions[entry.key].remove and not used.reason(entry.key):
                decisions[entry.key] = Decision(entry, True, why)
                size -= entry.bytes
        if size > max_size:
            logger.warning("what pods use is %s, more than MAX_SIZE_GB=%g", format_bytes(size), settings.max_size_gb)
    return [decisions[entry.key] for entry in entries]


def execute(decisions: Sequence[Decision], cache: Cache, settings: Settings, listing: UsageListing) -> Counter[str]:
    """Carry out a plan; returns what was done: removed, spared, restored, freed (bytes)."""
    done: Counter[str] = Counter()
    doomed = [decision.entry.key for decision in decisions if decision.remove]
    # What a run that was killed left in the trash is judged together with this run's.
    waiting = cache.trash()
    if not waiting and not doomed:
        return done
    removals = []
    try:
        removals += [cache.announce(key) for key in doomed]
        logger.info("waiting GRACE_SECONDS=%g before removing %d entries", settings.grace_seconds, len(doomed))
        # For what a network file system shows late: to this one a lease, to a pod the announcement.
        time.sleep(settings.grace_seconds)
        waiting += _move(removals, cache, listing(), done)
        # Pods that name an entry without a lease may have come in between.
        waiting = _restore(waiting, cache, listing(), done)
    except Exception:
        # What is in use can't be told any more: everything goes back.
        for removal in removals:
            cache.restore(removal.trash, removal.key)
        for path, key in waiting:
            cache.restore(path, key)
        raise
    finally:
        for removal in removals:
            cache.cancel(removal)
    sizes = {decision.entry.key: decision.entry.bytes for decision in decisions}
    for path, key in waiting:
        if _succeeds(partial(cache.delete_tree, path), path):
            done["removed"] += 1
            done["freed"] += sizes.get(key, 0)
        else:
            done["failed"] += 1
    return done


def _succeeds(action: Callable[[], object], path: Path) -> bool:
    """Do something to `path`; what can't be done is told, and keeps nothing else from being done."""
    try:
        action()
    except FileNotFoundError:
        pass  # another cleanup was first; or it is still on its way
    except OSError as error:
        logger.error("%s: %s", path, disk.explain(error))
        return False
    return True


def _move(removals: Sequence[Removal], cache: Cache, used: InUse, done: Counter[str]) -> list[tuple[Path, str]]:
    moved = []
    for removal in removals:
        reason = used.reason(removal.key)
        if reason is None and cache.commit(removal):
            moved.append((removal.trash, removal.key))
        else:
            done["spared"] += 1
            logger.info("kept %s: %s", removal.key, reason or "a pod has just come to use it")
    return moved


def _restore(
    waiting: Sequence[tuple[Path, str]], cache: Cache, used: InUse, done: Counter[str]
) -> list[tuple[Path, str]]:
    still = []
    for path, key in waiting:
        reason = used.reason(key)
        if reason and cache.restore(path, key):
            done["restored"] += 1
            logger.info("restored %s: %s", key, reason)
        else:
            still.append((path, key))  # free; or damaged, or a copy of what was downloaded anew
    return still


class UsageListing:
    """Lists pods and leases afresh at each call, and returns which entries are in use."""

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
        except ApiError as error:
            namespace = self.settings.namespace
            role = f"; add this Role and RoleBinding:\n{_role_to_add(error, namespace)}" if error.code == 403 else ""
            raise RoleError(
                f"cannot list the pods of namespace {namespace}, so nothing is removed: {error}{role}"
            ) from error
        except (NotInCluster, ValueError) as error:
            raise RoleError(f"cannot tell what is in use, so nothing is removed: {error}") from error
        except OSError as error:
            why = f"{self.cache.root}: {disk.explain(error)}"
            raise RoleError(f"cannot tell what is in use, so nothing is removed: {why}") from error
        known = references.all_names(self.cache)
        return in_use(self.pods, self.leases, known, self.listed, self.settings.pod, self.settings.cache)

    def rollouts(self) -> tuple[set[str], float]:
        """The hashes of the pod templates of all pods, and when their listing, a new one, began."""
        self()
        labels = (pod.get("metadata", {}).get("labels") or {} for pod in self.pods)
        return {str(one["pod-template-hash"]) for one in labels if "pod-template-hash" in one}, self.listed


def _role_to_add(error: ApiError, namespace: str) -> str:
    known = _ACCOUNT.search(error.message)
    names = known.groupdict() if known else {"account": "model-cache-cleanup", "home": namespace}
    return ROLE_TO_ADD.format(namespace=namespace, **names)


def report(decisions: Sequence[Decision], strange: Sequence[str]) -> Iterator[str]:
    """A table of the entries, the longest unused first."""
    row = "{:<6}  {:<12}  {:>10}  {:>9}  {}".format
    yield row("", "entry", "size", "unused", "why")
    for decision in sorted(decisions, key=lambda decision: -decision.entry.idle):
        entry = decision.entry
        action = "remove" if decision.remove else "keep"
        yield row(action, *entry.columns, f"{decision.reason} ({entry.model_uri})")
    for name in strange:
        yield row("keep", name[:12], "", "", f"{name} is not an entry made by download.py; left alone")


def tidy(cache: Cache, listing: UsageListing, used: InUse) -> int:
    """Remove what belongs to nobody any more, and note the use of what is in use; returns how much of it failed."""
    done = [_succeeds(partial(cache.touch, key), cache.model(key)) for key in used.keys]
    for lease in dead_leases(listing.pods, listing.leases, listing.listed):
        logger.info("dropping the lease of %s, which is gone", lease.pod)
        done.append(_succeeds(partial(cache.drop_lease, lease), Path(lease.name)))
    known = pins.find(cache)
    for path in [*cache.leftovers(), *(known.leftovers() if known else ())]:
        logger.info("removing %s, which a download or a cleanup left that is no more", path)
        done.append(_succeeds(partial(cache.delete_tree, path), path))
    return done.count(False)


def run(service_account: Path, read: Reader) -> None:
    settings = Settings.from_env(read)
    log_settings(read)
    began = time.monotonic()
    result: dict[str, float] = {"success": 0}
    try:
        cache = Cache.find(settings.cache)
        if cache is None:
            logger.info("%s is empty, nothing to do", settings.cache)
            result |= {"entries": 0, "bytes": 0}
        else:
            result |= _clean(cache, settings, service_account, read.environ)
        if failed := result.get("failed"):
            raise RoleError(f"{failed} things in {settings.cache} could not be removed: the log says which, and why")
        result["success"] = 1
    except NotACache as error:
        raise ConfigError([f"CACHE_PATH={settings.cache}: {error}"]) from error
    except OSError as error:
        raise RoleError(f"{settings.cache}: {disk.explain(error)}") from error
    finally:
        result["seconds"] = round(time.monotonic() - began, 3)
        publish(result, settings.metrics_textfile, settings.pushgateway_url)


def _clean(cache: Cache, settings: Settings, service_account: Path, environ: Mapping[str, str]) -> dict[str, float]:
    """Returns what was found and done, by the names of `_METRICS`."""
    try:
        home = k8s_client.namespace(service_account)
        client = k8s_client.Client.in_cluster(environ, service_account)
    except NotInCluster as error:
        raise RoleError(f"cannot list pods, so nothing is removed: {error}") from error
    settings = replace(settings, namespace=settings.namespace or home)
    with client:
        listing = UsageListing(cache, settings, client)
        used = listing()
        if settings.namespace != home and not listing.pods:
            # Kubernetes lists no pods, without an error, for a namespace that does not exist.
            raise RoleError(
                f"NAMESPACE={settings.namespace} has no pods, while this one is in {home}; nothing is removed. "
                f"Set NAMESPACE to the namespace of the pods that mount the cache, or leave it out"
            )
        for line in used.warnings():
            logger.warning("%s", line)
        entries, strange = cache.entries(cache.now())
        decisions = plan(entries, used, settings)
        for line in report(decisions, strange):
            logger.info("%s", line)
        doomed = [decision for decision in decisions if decision.remove]
        if settings.dry_run:
            done = Counter(removed=len(doomed), freed=sum(decision.entry.bytes for decision in doomed))
        else:
            failed = tidy(cache, listing, used)
            done = execute(decisions, cache, settings, listing)
            done["failed"] += failed
            references.drop_dangling(cache, DAY)
            if known := pins.find(cache):
                wait = partial(time.sleep, settings.grace_seconds)
                pins.drop_unused(known, settings.ttl_days * DAY, listing.rollouts, wait)
    total = sum(entry.bytes for entry in entries)
    _summary("DRY_RUN, would remove" if settings.dry_run else "removed", done, entries, total)
    return {
        "dry_run": int(settings.dry_run),
        "entries": len(entries),
        "bytes": total,
        "entries_in_use": sum(used.reason(entry.key) is not None for entry in entries),
        "unknown": len(strange),
        **{name: done[name] for name in ("removed", "freed", "spared", "restored", "failed")},
    }


def _summary(what: str, done: Counter[str], entries: Sequence[Entry], total: int) -> None:
    back = "".join(f", {done[name]} {name}" for name in ("spared", "restored") if done[name])
    freed = f"{format_bytes(done['freed'])} of {format_bytes(total)} freed"
    logger.info("%s %d of %d entries%s: %s", what, done["removed"], len(entries), back, freed)


def main(environ: Mapping[str, str] = os.environ, service_account: Path = k8s_client.SERVICE_ACCOUNT) -> int:
    return run_role(partial(run, service_account), environ)


if __name__ == "__main__":
    sys.exit(main())
