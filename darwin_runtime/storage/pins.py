"""The pins of rollouts: every pod of one ReplicaSet serves what its first pod found.

A pin is a directory with a file, and a stamp of its last use. It appears by one rename, so of several pods the first
one wins. It disappears by one rename, after an announcement that a pod can veto: pins live in a cache of their own,
`<cache>/.pins`, by the rules of `cache`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from darwin_runtime.errors import RoleError
from darwin_runtime.storage import disk
from darwin_runtime.storage.cache import (
    LAST_USED,
    LOCKS,
    MAX_NOTE_BYTES,
    PINS,
    STAGING,
    TAKEN,
    TRASH,
    Cache,
    is_key,
    parse_note,
    stamp,
)

FILE = "pin.json"

# The rollouts that have pods, and when the listing of the pods began, by the clock of the file server.
Listing = Callable[[], tuple[Collection[str], float]]

_INNER = (LOCKS, STAGING, TRASH)


@dataclass(frozen=True)
class Pin:
    """What a rollout serves: a key, what it resolved to, and whether that was a fall-back. `rollout` is the hash."""

    rollout: str
    key: str
    resolved: Mapping[str, str]
    fallback: bool


def prepare(cache: Cache) -> Cache:
    """The pins of a cache, made if there are none yet."""
    return Cache.prepare(cache.root / PINS, _INNER)


def name(place: Mapping[str, str], model_uri: str, rollout: str) -> str:
    """The name of the pin for what a URI means, asked at a `place` (`access.place`), to the pods of one rollout."""
    content = json.dumps([sorted(place.items()), model_uri, rollout], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def use(pins: Cache, pin_name: str) -> Pin | None:
    """A pin, which then stays as long as the pod lives; None where there is none.

    Raises `RoleError` for one that cannot be read.
    """
    there = pins.fingerprint(pin_name)
    if there is None:
        return None
    path = pins.root / pin_name / FILE
    try:
        stamp(path.with_name(LAST_USED), os.O_NOFOLLOW)
        found = _parse(disk.read_small(path, MAX_NOTE_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RoleError(f"the pin {path} of this rollout cannot be read ({error}); delete its directory") from error
    return found if pins.veto_removals(pin_name, there) else None


def publish(pins: Cache, pin_name: str, pin: Pin) -> Pin:
    """Pin a rollout; return the pin in force, which may be that of another pod."""
    while True:
        staging = pins.root / STAGING / f"{pin_name}.{secrets.token_hex(8)}"
        staging.mkdir()
        disk.write_atomically(staging / FILE, json.dumps(asdict(pin)))
        stamp(staging / LAST_USED, os.O_EXCL)
        try:
            staging.rename(pins.root / pin_name)
        except OSError as error:
            if staging.exists():
                if error.errno not in TAKEN:
                    raise
                pins.delete_tree(staging)
        disk.sync(pins.root)
        if found := use(pins, pin_name):
            return found


def find(cache: Cache) -> Cache | None:
    """The pins of a cache; None where there are none, or where the first pod died while it made their place."""
    pins = Cache(cache.root / PINS, _INNER)
    return Cache.find(pins.root, _INNER) if pins.is_tagged() else None


def drop_unused(pins: Cache, age: float, listing: Listing, wait: Callable[[], None]) -> int:
    """Remove the pins that nobody has used for `age` seconds, of rollouts without pods; return how many.

    A pod that uses a pin meanwhile is in the second listing, or its use is seen, or it vetoes the removal.
    """
    for path, _ in pins.trash():
        pins.delete_tree(path)
    doomed = _unused(pins, age, listing)
    if not doomed:
        return 0
    removals = [pins.announce(pin_name) for pin_name in doomed]
    dropped = 0
    try:
        wait()
        still = _unused(pins, age, listing)
        for removal in removals:
            if removal.key in still and pins.commit(removal):
                pins.delete_tree(removal.trash)
                dropped += 1
    finally:
        for removal in removals:
            pins.cancel(removal)
    return dropped


def _unused(pins: Cache, age: float, listing: Listing) -> list[str]:
    """The pins that nobody uses. A pin is in use as long as its rollout has pods, so its age begins with their end."""
    rollouts, listed = listing()
    before = min(pins.now() - age, listed)
    found = []
    for pin_name in sorted(filter(is_key, os.listdir(pins.root))):
        path = pins.root / pin_name
        with contextlib.suppress(FileNotFoundError):
            if _rollout(path / FILE) in rollouts:
                pins.touch(pin_name)
            elif (path / LAST_USED).lstat().st_mtime < before:
                found.append(pin_name)
    return found


def _rollout(path: Path) -> str:
    try:
        return _parse(disk.read_small(path, MAX_NOTE_BYTES)).rollout
    except ValueError:
        return ""


def _parse(text: bytes) -> Pin:
    """Raises `ValueError` for what is no pin."""
    found = parse_note(text)
    rollout, key, resolved = found.get("rollout"), found.get("key"), found.get("resolved")
    if not (isinstance(rollout, str) and isinstance(key, str) and is_key(key) and isinstance(resolved, dict)):
        raise ValueError("it is no pin")
    return Pin(rollout, key, {str(one): str(value) for one, value in resolved.items()}, found.get("fallback") is True)
