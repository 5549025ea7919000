"""The references to an entry of the cache: aliases for Darwin's chart, and refs for an unreachable MLflow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from darwin_runtime.errors import NoLinks
from darwin_runtime.redact import mask_uri
from darwin_runtime.storage import disk
from darwin_runtime.storage.cache import MAX_NOTE_BYTES, REFS, TRASH, Cache, is_key, key_of, parse_note

logger = logging.getLogger("darwin.download")


def make_alias(deployment: str, model_uri: str) -> str:
    """The name under which Darwin's chart looks for a deployment's model."""
    return hashlib.sha256(f"{deployment}:{model_uri}".encode()).hexdigest()


def set_alias(cache: Cache, alias: str, key: str) -> None:
    """Point `alias` to `key`, but on a volume without symbolic links log where the model is.

    Raises `OSError` where the name is taken by something that is no link.
    """
    path = cache.root / alias
    with contextlib.suppress(OSError):
        if str(path.readlink()) == key:
            os.utime(path, follow_symlinks=False)  # for which there is room on a full volume
            return
    try:
        disk.replace_link(path, key)
    except NoLinks as error:
        logger.warning(
            "the link %s to the model is not there (%s): set MODEL_LOCAL_PATH=%s in the main container, or mount a "
            "cache volume that has symbolic links",
            *(path, error.strerror, cache.model(key)),
        )


def aliases(cache: Cache) -> dict[str, str]:
    """Alias -> key, for every link in the cache whose both ends look like keys."""
    links = {}
    for name in os.listdir(cache.root):
        path = cache.root / name
        with contextlib.suppress(FileNotFoundError):  # another cleanup is dropping it
            if is_key(name) and path.is_symlink() and is_key(target := str(path.readlink())):
                links[name] = target
    return links


def all_names(cache: Cache) -> dict[str, str]:
    """Every name by which an entry, published or in the trash, may be asked for -> its key."""
    keys = {name for name in os.listdir(cache.root) if is_key(name) and not (cache.root / name).is_symlink()}
    keys |= {key for path in cache.inside(TRASH) if (key := key_of(path))}
    return {key: key for key in keys} | aliases(cache)


def drop_dangling(cache: Cache, age: float) -> None:
    """Remove aliases and refs, made more than `age` seconds ago, of entries that are gone: a new one may come."""
    before = cache.now() - age
    for alias, key in aliases(cache).items():
        path, taken = cache.root / alias, disk.temporary(cache.root / alias)
        with contextlib.suppress(FileNotFoundError):
            if not cache.has(key) and path.lstat().st_mtime < before:
                path.rename(taken)
                # Its pod may have made it anew in between.
                if taken.lstat().st_mtime < before:
                    taken.unlink()
                else:
                    taken.rename(path)
    for path in cache.inside(REFS):
        with contextlib.suppress(FileNotFoundError):
            if (referred := _referred(path)) and not cache.has(referred) and path.lstat().st_mtime < before:
                path.unlink()


def set_ref(cache: Cache, place: Mapping[str, str], model_uri: str, key: str) -> None:
    """Remember what a URI resolved to at a `place` (`access.place`), for when the tracking server can't be asked."""
    path = _ref(cache, place, model_uri)
    if _referred(path) == key:
        with contextlib.suppress(OSError):  # for which there is room on a full volume
            os.utime(path, follow_symlinks=False)
            return
    disk.write_atomically(path, json.dumps({"key": key}))


def find_ref(cache: Cache, place: Mapping[str, str], model_uri: str) -> tuple[str, float] | None:
    """The key that was last resolved for a URI there, and how many seconds ago; None when it never was."""
    path = _ref(cache, place, model_uri)
    with contextlib.suppress(OSError):
        if key := _referred(path):
            return key, max(0.0, cache.now() - path.lstat().st_mtime)
    return None


def _ref(cache: Cache, place: Mapping[str, str], model_uri: str) -> Path:
    where = dict(place)
    # A ref of a tracking server alone has the name that it had before anything else was part of the place.
    names = [
        where.pop("MLFLOW_TRACKING_URI", ""),
        mask_uri(model_uri),
        *(f"{name}={where[name]}" for name in sorted(where)),
    ]
    return cache.root / REFS / f"{hashlib.sha256(chr(10).join(names).encode()).hexdigest()}.json"


def _referred(ref: Path) -> str | None:
    """The key in a ref; None when there is none, or none that can be read."""
    try:
        key = parse_note(disk.read_small(ref, MAX_NOTE_BYTES)).get("key")
    except (OSError, ValueError):
        return None
    return key if isinstance(key, str) and is_key(key) else None
