"""The layout of OUTPUT_PATH, where a pod's main container finds its model.

    <output>/
      MLmodel, ...             the model's top-level entries: the files themselves, or links into the cache
      model -> ...             for charts that serve <output>/model: to `.`, or to the model in the cache
      .darwin-output.json      what was put here, so that the next run can tell its own entries from other people's
      .darwin-staging/         a download under way

OUTPUT_PATH is usually a mount point, so it can't be replaced by one rename. `MLmodel` is taken away first and put back
last: whoever finds it finds a whole model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import darwin_cache
from darwin_cache import Manifest

MODEL_FILE = "MLmodel"
RECORD = ".darwin-output.json"
STAGING = ".darwin-staging"
MODEL_LINK = "model"


@dataclass(frozen=True)
class Record:
    """What a run put into an output: the model's key, its manifest, and the names of the top-level entries."""

    key: str
    manifest: Manifest
    entries: list[str]


def read(output: Path) -> Record | None:
    """The record of the last run; None when there is none, or none that can be read."""
    try:
        data = json.loads((output / RECORD).read_text(encoding="utf-8"))
        entries = [str(name) for name in data["entries"]]
        if any(name in ("", ".", "..") or "/" in name for name in entries):
            return None  # what is removed by these names must be directly in the output
        return Record(data["key"], Manifest.parse(json.dumps(data["manifest"])), entries)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def holds(output: Path, key: str) -> bool:
    """True when the output is a whole copy of the model `key`."""
    record = read(output)
    return (
        record is not None
        and record.key == key
        and not any((output / name).is_symlink() for name in record.entries)
        and not record.manifest.damage(output)
    )


def stage(output: Path) -> Path:
    """An empty directory, on the output's own file system, to put a model together in."""
    staging = output / STAGING
    darwin_cache.remove_tree(staging)
    staging.mkdir(parents=True)
    return staging


def move(staging: Path, output: Path, key: str, manifest: Manifest) -> None:
    """Put the staged files at the output. Raises `ValueError` when they are not what the manifest says."""
    if damage := manifest.damage(staging):
        raise ValueError(f"not placed, {'; '.join(damage)}")
    darwin_cache.sync_tree(staging)
    _place(staging, output, key, manifest, lambda source, target: source.rename(target), ".")
    darwin_cache.remove_tree(staging)


def link(model: Path, output: Path, key: str, manifest: Manifest) -> None:
    """Put links to the cached model's entries at the output."""
    _place(model, output, key, manifest, lambda source, target: target.symlink_to(source), str(model))


def copy(model: Path, output: Path, key: str, manifest: Manifest) -> None:
    """Put a copy of the cached model at the output, for main containers that don't mount the cache."""
    staging = stage(output)
    shutil.copytree(model, staging, dirs_exist_ok=True)
    move(staging, output, key, manifest)


def _place(
    model: Path,
    output: Path,
    key: str,
    manifest: Manifest,
    put: Callable[[Path, Path], object],
    model_link: str,
) -> None:
    entries = sorted(path.name for path in model.iterdir())
    before = read(output)
    darwin_cache.remove_tree(output / MODEL_FILE)
    # Written before anything is placed: a run that dies in between must not leave entries that nobody owns.
    owned = set(entries) | set(before.entries if before else ())
    darwin_cache.write_atomically(output / RECORD, _dump(key, manifest, sorted(owned)))
    for name in owned:
        darwin_cache.remove_tree(output / name)
    for name in _model_file_last(entries):
        put(model / name, output / name)
    link = output / MODEL_LINK
    if MODEL_LINK not in entries and (link.is_symlink() or not link.exists()):
        darwin_cache.remove_tree(link)
        link.symlink_to(model_link)
    darwin_cache.write_atomically(output / RECORD, _dump(key, manifest, entries))


def _model_file_last(names: list[str]) -> Iterator[str]:
    yield from (name for name in names if name != MODEL_FILE)
    yield MODEL_FILE


def _dump(key: str, manifest: Manifest, entries: list[str]) -> str:
    return json.dumps({"key": key, "manifest": json.loads(manifest.dump()), "entries": entries})
