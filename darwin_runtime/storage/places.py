"""The places of a download on disk: which of them are one directory, or one in the other, by path or by mount."""

from __future__ import annotations

import os
import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

from darwin_runtime.storage.cache import TAG_NAME, Cache

MOUNTS = Path("/proc/self/mountinfo")


class _Mount(NamedTuple):
    """A mount: its file system, the directory of that which is mounted, and where."""

    device: str
    root: Path
    point: Path


def conflict(output: Path, cache: Path | None, uri: str) -> str | None:
    """The reason why the model at `uri` can't go to `output`; None when it can. Nothing is written.

    `cache` is None for a download that uses none.
    """
    own, named = "give it a directory of its own, such as an emptyDir", f"OUTPUT_PATH={output}"
    if cache and (how := _relation(output, cache)):
        return f"{named} {how} the model cache CACHE_PATH={cache}, so pods would replace each other's models; {own}"
    place = Path(os.path.realpath(output))
    for above in (place, *place.parents):
        if Cache(above).is_tagged():
            how = "is" if above == place else "is inside"
            return f"{named} {how} the model cache {above}, which has a {TAG_NAME}; {own}"
    source = _local_path(uri)
    if source and (how := _relation(output, source)):
        return f"{named} {how} the directory of MODEL_URI={uri}, whose files the download would replace; {own}"
    return None


def _local_path(uri: str) -> Path | None:
    """The path that a model URI is, if it is one."""
    if uri.startswith("file:"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(uri).path))
    return Path(uri) if uri and not re.match(r"[A-Za-z][\w+.-]*:", uri) else None


def _relation(one: Path, other: Path) -> str | None:
    """How a directory is related to another, in words; None when they share nothing."""
    one, other = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    inside, around = _is_within(one, other), _is_within(other, one)
    return {(True, True): "is", (True, False): "is inside", (False, True): "contains"}.get((inside, around))


def _is_within(inner: Path, outer: Path) -> bool:
    if inner.is_relative_to(outer) or any(_same(place, outer) for place in (inner, *inner.parents)):
        return True
    # A volume can also be mounted whole at one place, and a directory of it (subPath) at another.
    mount, around = _mount(inner), _mount(outer)
    if not mount or not around or mount.device != around.device:
        return False
    whole = around.root / outer.relative_to(around.point)
    # Of some network file systems every mount has the same root, so only the directories themselves decide.
    return mount.root.is_relative_to(whole) and _same(outer / mount.root.relative_to(whole), mount.point)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _mount(path: Path) -> _Mount | None:
    """The mount that has the resolved `path`; None where the system lists no mounts."""
    try:
        lines = os.fsdecode(MOUNTS.read_bytes()).rstrip("\n").split("\n")
    except OSError:
        return None
    found = None
    for line in lines:
        _, _, device, *names, _ = line.split(" ", 5)
        root, point = (Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), name)) for name in names)
        # Of two mounts at one place the later one hides the other.
        if path.is_relative_to(point) and (not found or point.is_relative_to(found.point)):
            found = _Mount(device, root, point)
    return found
