"""The entry of the cache that a pod uses: pinned by its rollout, or meant by its URI now, or the last one known."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from darwin_runtime.errors import RoleError, StoreUnreachable
from darwin_runtime.storage import access, disk, locks, pins, references, resolve
from darwin_runtime.storage.artifacts import Source
from darwin_runtime.storage.attempts import Deadline, RetryPolicy
from darwin_runtime.storage.cache import Cache, make_key
from darwin_runtime.storage.entry_check import Claim, EntryCheck
from darwin_runtime.storage.locks import Lock
from darwin_runtime.storage.pins import Pin
from darwin_runtime.storage.single_flight import POLL_SECONDS, Waiting, ensure_entry

# So long MLflow is waited for, retries and all, where what the URI last resolved to is at hand.
PATIENCE_SECONDS = 60.0

# Kubernetes makes the hash of 10 letters at most; a label has 63.
_HASH = re.compile(r"[a-z0-9]{1,63}")
# A pod of a ReplicaSet is called <deployment>-<hash>-<5 letters>, where the beginning is cut to 58 letters.
_CUT_NAME = 63

logger = logging.getLogger("darwin.download")


@dataclass(frozen=True)
class Wanted:
    """What a pod asks the cache for. `rollout` is the hash of its ReplicaSet, empty where it belongs to none."""

    model_uri: str
    rollout: str
    claim: Claim
    retry: RetryPolicy
    deadline: Deadline


@dataclass(frozen=True)
class Found:
    """The entry to use; `fallback` if MLflow could not be asked."""

    key: str
    fallback: bool = False


def why_no_rollout(value: str, pod: str) -> str | None:
    """Why POD_TEMPLATE_HASH names no rollout of `pod`, empty where its name is not known; None where it does."""
    if not _HASH.fullmatch(value):
        return "is no hash of a pod template"
    if pod and len(pod) < _CUT_NAME and not re.search(rf"-{value}-[a-z0-9]+$", pod):
        return f"is not in the name of the pod, {pod}"
    return None


def find(cache: Cache, wanted: Wanted) -> Found:
    """The entry for a pod, whole, leased, and downloaded if need be. Raises `RoleError` where there is none."""
    place = access.place(wanted.model_uri)
    known = _pins(cache) if wanted.rollout else None
    if known is None:
        key, source = _resolve(cache, wanted, place)
        return Found(_ensure(cache, wanted, place, source), False) if source else Found(key, fallback=True)
    return _find_pinned(cache, wanted, place, known)


def _pins(cache: Cache) -> Cache | None:
    """The pins; None on a full volume, which keeps no pod from starting with what the cache has."""
    try:
        return pins.prepare(cache)
    except OSError as error:
        if error.errno not in disk.FULL:
            raise
        logger.warning("this rollout is not pinned: %s", disk.explain(error))
        return None


def _find_pinned(cache: Cache, wanted: Wanted, place: Mapping[str, str], known: Cache) -> Found:
    """One pod of a rollout resolves and downloads; the others wait for its pin, and for the entry that this names."""
    name = pins.name(place, wanted.model_uri, wanted.rollout)
    waiting, began = Waiting(name), time.monotonic()
    is_there: EntryCheck | None = None
    while True:
        pin = pins.use(known, name)
        if pin and (is_there is None or is_there.key != pin.key):
            is_there = EntryCheck(cache, pin.key, wanted.claim)
        if pin and is_there and is_there():
            logger.info("this rollout is pinned to cache entry %s (%s), 0 requests to MLflow", pin.key, _shown(pin))
            return Found(pin.key, pin.fallback)
        held = locks.try_lock(known, name, wanted.claim.owner)
        if isinstance(held, Lock):
            try:
                with held.beating(lambda: (0, 0)):
                    return _fill(cache, wanted, place, known, name)
            finally:
                held.release(done=True)
        wanted.deadline.check(f"waiting for {held.owner} to find {wanted.model_uri}")
        if pin is None and time.monotonic() - began > PATIENCE_SECONDS:
            # MLflow may be out of that pod's reach alone. The first pin wins all the same.
            return _fill(cache, wanted, place, known, name)
        waiting.log(held)
        time.sleep(POLL_SECONDS)


def _fill(cache: Cache, wanted: Wanted, place: Mapping[str, str], known: Cache, name: str) -> Found:
    pin = pins.use(known, name)
    source = None
    if pin is None:
        key, source = _resolve(cache, wanted, place)
        resolved = source.identity if source else cache.manifest(key).resolved
        pin = Pin(wanted.rollout, key, resolved, fallback=source is None)
        try:
            pin = pins.publish(known, name, pin)
            logger.info("this rollout is pinned to cache entry %s (%s)", pin.key, _shown(pin))
        except OSError as error:
            if error.errno not in disk.FULL:
                raise
            logger.warning("this rollout is not pinned: %s", disk.explain(error))
        if pin.key != key:
            source = None
    if source:
        _ensure(cache, wanted, place, source)
    elif not EntryCheck(cache, pin.key, wanted.claim)():
        # The URI may mean another version by now, so this one is not what it last resolved to.
        ensure_entry(cache, _resolve_pinned(wanted, pin), wanted.claim, wanted.retry, wanted.deadline)
    return Found(pin.key, pin.fallback)


def _resolve(cache: Cache, wanted: Wanted, place: Mapping[str, str]) -> tuple[str, Source | None]:
    """The key of what the URI means, with its source; without one it is the last key known, which is whole."""
    last = references.find_ref(cache, place, wanted.model_uri)
    left = wanted.deadline.left()
    try:
        patience = min(left, PATIENCE_SECONDS) if last is not None and cache.has(last[0]) else left
        source = resolve.resolve_within(patience, wanted.model_uri, wanted.retry)
    except StoreUnreachable as error:
        return _last_known(cache, wanted, last, error), None
    return make_key(source.identity, source.listing), source


def _ensure(cache: Cache, wanted: Wanted, place: Mapping[str, str], source: Source) -> str:
    key = ensure_entry(cache, source, wanted.claim, wanted.retry, wanted.deadline)
    try:
        references.set_ref(cache, place, wanted.model_uri, key)
    except OSError as error:  # the model is there all the same
        logger.warning("what %s resolved to is not remembered: %s", wanted.model_uri, disk.explain(error))
    return key


def _last_known(cache: Cache, wanted: Wanted, last: tuple[str, float] | None, error: StoreUnreachable) -> str:
    """The key that the URI last resolved to, if its entry is whole; raises `error` otherwise."""
    if last is None:
        raise RoleError(f"{error}; and the cache {cache.root} has never held this URI's model") from error
    key, age = last
    if not EntryCheck(cache, key, wanted.claim)():
        raise RoleError(f"{error}; and what it last resolved to, cache entry {key}, is not there whole") from error
    what = f"{wanted.model_uri} resolved {age / 3600:.1f} hours ago to cache entry {key}:"
    log_fallback(error, what, cache.manifest(key).resolved)
    return key


def _resolve_pinned(wanted: Wanted, pin: Pin) -> Source:
    """The source of what a rollout is pinned to, which the cache does not hold. Raises `RoleError`."""
    of_registry = "name" in pin.resolved
    uri = f"models:/{pin.resolved['name']}/{pin.resolved.get('version')}" if of_registry else wanted.model_uri
    what = f"this rollout is pinned to {_shown(pin)}, which the cache does not hold any more"
    remedy = f"`kubectl rollout restart` pins what {wanted.model_uri} means now"
    try:
        source = resolve.resolve_within(wanted.deadline.left(), uri, wanted.retry)
    except RoleError as error:
        raise RoleError(f"{what}: {error}. {remedy}") from error
    if make_key(source.identity, source.listing) != pin.key:
        raise RoleError(f"{what}, and {uri} is another model now. {remedy}")
    return replace(source, uri=wanted.model_uri)


def _shown(pin: Pin) -> str:
    if "name" in pin.resolved:
        return f"{pin.resolved['name']} version {pin.resolved.get('version')}"
    return " ".join(f"{name}={value}" for name, value in pin.resolved.items())


def log_fallback(error: StoreUnreachable, what: str, resolved: Mapping[str, str]) -> None:
    shown = " ".join(f"{name}={value}" for name, value in resolved.items())
    logger.warning("%s. FALLING BACK to the model at hand, which may be an older one: %s %s", error, what, shown)
