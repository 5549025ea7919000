"""The digest of a model's directory, by which REQUIRE_SHA256 pins what may be loaded.

It is the sha256 of what `sha256sum -z` prints for every regular file, in the bytewise order of their paths, each
relative to the directory and beginning with `./`. The directory is the one in which `MLmodel` really is, after links.
Not in it are the files of `APART`, which say how a model came here. README has the command that computes it.

Anything else than files and directories keeps a digest from being told, but for our own link `model -> .`: what a link
leads to could be changed without touching the directory.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from darwin_runtime import resources
from darwin_runtime.errors import RoleError
from darwin_runtime.settings import Reader
from darwin_runtime.storage import cache, disk
from darwin_runtime.storage import manifest as manifest_module

NAME = "REQUIRE_SHA256"

# Which registry a model came from, and what `download.py` put where. `model` loads nothing that names one.
APART = ("registered_model_meta", ".darwin-output.json")


@dataclass(frozen=True)
class Seen:
    """The digest of a directory, and what tells that it is still as it was: an identity for each path in it."""

    digest: str
    marks: Mapping[Path, tuple[int, ...]]


def required(read: Reader) -> str:
    """The digest that is asked for, in lower case; empty where none is."""
    value = read.text("REQUIRE_SHA256").lower()
    if value and not re.fullmatch("[0-9a-f]{64}", value):
        example = hashlib.sha256().hexdigest()
        read.problem(NAME, "must be a sha256, 64 hex digits, as README's command and the log tell it", example=example)
    return value


def digest(files: Iterable[tuple[str, str]]) -> str:
    """The digest of a directory with these files: path with `/` and sha256 in hex."""
    sha = hashlib.sha256()
    for path, told in sorted((os.fsencode(path), told) for path, told in files if path not in APART):
        sha.update(told.encode() + b"  ./" + path + b"\0")
    return sha.hexdigest()


def digest_of(manifest: manifest_module.Manifest) -> str:
    """The digest of what the manifest says is there."""
    return digest((file.path, file.sha256) for file in manifest.files)


def refusal(what: object, seen: str, wanted: str) -> RoleError:
    """What to raise for a model that is not the one asked for."""
    return RoleError(
        f"{what} is not the model that REQUIRE_SHA256 asks for: expected {wanted}, seen {seen}. If it is the one you "
        f"mean, set {NAME}={seen}"
    )


def look(directory: Path) -> Seen:
    """Read all of a model's directory, the one in which `MLmodel` really is. Nothing of it is run or parsed.

    Raises `RoleError` for what is neither file nor directory, and where it can't be read.
    """
    try:
        marks = _marks(directory)
        files = [path for path, mark in marks.items() if stat.S_ISREG(mark[2])]
        for path, mark in marks.items():
            if not (stat.S_ISREG(mark[2]) or stat.S_ISDIR(mark[2])):
                raise RoleError(f"{path} is a link, pipe, socket or device: {NAME} takes models of plain files only")
        with ThreadPoolExecutor(resources.cpu_limit()) as pool:
            digests = list(pool.map(manifest_module.digest, files))
    except OSError as error:
        raise RoleError(f"the model in {directory} cannot be read for {NAME}: {error}") from error
    names = [path.relative_to(directory).as_posix() for path in files]
    return Seen(digest(zip(names, digests, strict=True)), marks)


def check_unchanged(directory: Path, seen: Seen) -> None:
    """Raise `RoleError` where something below `directory` is not as it was when it was `seen`."""
    try:
        now = _marks(directory)
    except OSError as error:
        raise RoleError(f"the model in {directory} was changed while it was loaded: {error}") from error
    if now != seen.marks:
        paths = sorted(path for path in now.keys() | seen.marks.keys() if now.get(path) != seen.marks.get(path))
        raise RoleError(f"the model was changed while it was loaded: {paths[0]}; see who else writes to this volume")


def _marks(directory: Path) -> dict[Path, tuple[int, ...]]:
    # In a cache, another could take the whole entry's place meanwhile, which its own directory shows.
    places = [directory.parent, directory] if cache.is_key(directory.parent.name) else [directory]
    paths = [*places, *(path for path in disk.below(directory) if not _is_ours(directory, path))]
    return {path: disk.identity(path.lstat()) for path in paths}


def _is_ours(directory: Path, path: Path) -> bool:
    return path == directory / "model" and path.is_symlink() and str(path.readlink()) == "."
