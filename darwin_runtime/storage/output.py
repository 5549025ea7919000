"""The layout of OUTPUT_PATH, where a pod's main container finds its model.

    <output>/
      MLmodel, ...             the model's top-level entries: the files themselves, or links into the cache
      model -> ...             for charts that serve <output>/model: to `.`, or to the model in the cache; not there on
                               volumes without symbolic links
      .darwin-output.json      what was put here, so that the next run can tell its own entries from other people's
      .darwin-staging/         a download under way

OUTPUT_PATH is usually a mount point, so it can't be replaced by one rename. `MLmodel` is taken away first and put back
last: whoever finds it finds a whole model.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from darwin_runtime.errors import NoLinks, RoleError
from darwin_runtime.settings import Reader
from darwin_runtime.storage import disk, places
from darwin_runtime.storage import manifest as manifest_module
from darwin_runtime.storage.manifest import MANIFEST_BYTES, MODEL_FILE, Manifest, summary

RECORD = ".darwin-output.json"
STAGING = ".darwin-staging"
MODEL_LINK = "model"
_KEY = "key"

logger = logging.getLogger("darwin.download")


@dataclass(frozen=True)
class Record:
    """What a run put into an output: the model's key, its manifest, and the names of the top-level entries.

    `fallback` if MLflow could not be asked which model to take.
    """

    key: str
    manifest: Manifest
    entries: list[str]
    fallback: bool = False


def check_place(read: Reader, output: Path, cache: Path | None, uri: str) -> None:
    """Add a problem to `read` where the model at `uri` can't go to `output`, see `places.conflict`."""
    if why := places.conflict(output, cache, uri):
        read.problems.append(why)


def make(output: Path) -> None:
    """Make the directory. Raises `RoleError` where that is impossible, or nothing can be written to it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        writable = os.access(output, os.W_OK | os.X_OK)
    except OSError as error:
        raise RoleError(f"cannot create OUTPUT_PATH {output}: {disk.explain(error)}") from error
    if not writable:
        number = errno.EROFS if os.statvfs(output).f_flag & os.ST_RDONLY else errno.EACCES
        why = disk.explain(OSError(number, os.strerror(number), str(output)))
        raise RoleError(f"cannot write to OUTPUT_PATH {output}: {why}")


def read(output: Path) -> Record | None:
    """The record of the last run; None when there is none, or none that can be read."""
    try:
        # As much again as its manifest has.
        data = json.loads(disk.read_small(output / RECORD, 2 * MANIFEST_BYTES))
        entries = [str(name) for name in data["entries"]]
        if any(name in ("", ".", "..") or "/" in name for name in entries):
            return None  # what is removed by these names must be directly in the output
        manifest = Manifest.parse(json.dumps(data["manifest"]))
        return Record(str(data["key"]), manifest, entries, data.get("fallback") is True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def find(path: Path) -> Record | None:
    """The record of the output that a model is served from: `path`, or the directory of the link `path` for charts."""
    return read(path.parent if path.name == MODEL_LINK and path.is_symlink() else path)


def note_fallback(output: Path, fallback: bool) -> None:
    """Note in the record of an output, if it has one, whether MLflow could not be asked which model to take."""
    record = read(output)
    if record and record.fallback != fallback:
        text = _dump(record.key, record.manifest, record.entries, fallback=fallback)
        disk.write_atomically(output / RECORD, text)


def current_record(output: Path, verify: str = "size", *, key: str | None = None) -> Record | None:
    """The record of the model at the output, if that is a whole copy, and has `key`, where given.

    The files themselves are looked at, as far as `verify` says, and last; what is only linked is no copy.
    """
    record = read(output)
    if record is None or key not in (None, record.key):
        return None
    return record if _is_whole(output, record, verify) else None


def clear(output: Path) -> None:
    """Take away what runs have put here, and what they left staged; what others have put here stays."""
    unstage(output)
    if record := read(output):
        # As when it is replaced: without `MLmodel` there is no model.
        for name in (MODEL_FILE, *record.entries, *_model_link(output), RECORD):
            disk.remove_tree(output / name)


def _model_link(output: Path) -> list[str]:
    return [MODEL_LINK] if (output / MODEL_LINK).is_symlink() else []


def _is_whole(output: Path, record: Record, verify: str) -> bool:
    linked = any((output / name).is_symlink() for name in record.entries)
    return not linked and not record.manifest.damage(output, verify)


def stage(output: Path, key: str) -> Path:
    """A directory, on the output's own file system, to put the model `key` together in: with what an earlier run left
    of it, otherwise empty."""
    staging = output / STAGING
    mark = staging / _KEY
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == key):
        disk.remove_tree(staging)
        staging.mkdir(parents=True)
        disk.write_atomically(mark, key)
    return staging


def unstage(output: Path) -> None:
    """Remove what an earlier run left staged."""
    disk.remove_tree(output / STAGING)


def _unstaged_when_full(output: Path) -> AbstractContextManager[None]:
    return disk.discard_when_full(output, partial(unstage, output))


def staged(staging: Path) -> tuple[Path, Path]:
    """Where the model is in a staging directory, and where its parts are."""
    return staging / "model", staging / "parts"


def move(staging: Path, output: Path, key: str, manifest: Manifest) -> None:
    """Put the staged files at the output. Raises `RoleError` when they are not what the manifest says."""
    with _unstaged_when_full(output):
        if damage := manifest.damage(staging):
            raise RoleError(f"not placed, {summary(damage)}")
        disk.sync_tree(staging)
        _place(staging, output, key, manifest, ".")
        unstage(output)


def link(model: Path, output: Path, key: str, manifest: Manifest) -> None:
    """Put links to the cached model's entries at the output, unless they are there.

    Raises `NoLinks`, with the output as it was, on a file system without them.
    """
    with _unstaged_when_full(output):
        if not _links(output, key, model):
            unstage(output)
            links, _ = staged(output / STAGING)
            links.mkdir(parents=True)
            for name in os.listdir(model):
                disk.make_link(links / name, model / name)
            _place(links, output, key, manifest, str(model))
            unstage(output)


def _links(output: Path, key: str, model: Path) -> bool:
    """Whether the output is links to the model `key` in `model`."""
    record, entries = read(output), sorted(os.listdir(model))
    if not record or record.key != key or record.entries != entries or not os.path.lexists(output / MODEL_LINK):
        return False
    try:
        return all((output / name).readlink() == model / name for name in entries)
    except OSError:
        return False  # something else than a link is there, or nothing


def copy(model: Path, output: Path, key: str, manifest: Manifest) -> None:
    """Put a copy of the cached model at the output, for main containers that don't mount the cache."""
    unstage(output)
    copied, _ = staged(output / STAGING)
    with _unstaged_when_full(output):
        for file in manifest.files:
            target = copied / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if manifest_module.copy(model / file.path, target) != file.sha256:
                raise RoleError(f"not placed, {model / file.path}: not the bytes that were downloaded (sha256)")
    move(copied, output, key, manifest)


def _place(staging: Path, output: Path, key: str, manifest: Manifest, model_link: str) -> None:
    entries = sorted(os.listdir(staging))
    before = read(output)
    disk.remove_tree(output / MODEL_FILE)
    # Written before anything is placed: a run that dies in between must not leave entries that nobody owns.
    owned = set(entries) | set(before.entries if before else ())
    disk.write_atomically(output / RECORD, _dump(key, manifest, sorted(owned)))
    for name in owned:
        disk.remove_tree(output / name)
    for name in _model_file_last(entries):
        (staging / name).rename(output / name)
    link = output / MODEL_LINK
    if MODEL_LINK not in entries and (link.is_symlink() or not link.exists()):
        disk.remove_tree(link)
        try:
            disk.make_link(link, model_link)
        except NoLinks as error:
            why = f"the link {link} for charts is not there ({error.strerror})"
            logger.warning("%s: serve OUTPUT_PATH itself, with MODEL_LOCAL_PATH=%s", why, output)
    disk.write_atomically(output / RECORD, _dump(key, manifest, entries))


def _model_file_last(names: list[str]) -> Iterator[str]:
    yield from (name for name in names if name != MODEL_FILE)
    yield MODEL_FILE


def _dump(key: str, manifest: Manifest, entries: list[str], *, fallback: bool = False) -> str:
    return json.dumps({"key": key, "manifest": json.loads(manifest.dump()), "entries": entries, "fallback": fallback})
