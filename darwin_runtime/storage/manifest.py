"""What the files of a downloaded model must be: the manifest that lies beside it, and the comparison with the disk."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from darwin_runtime import resources
from darwin_runtime.storage import disk

# How thoroughly to compare: not at all; that each file is there with its size; its bytes, too, which reads all of them.
VERIFY = ("off", "size", "sha256")

TOLD = 5

MODEL_FILE = "MLmodel"

# A manifest of a hundred thousand files has less.
MANIFEST_BYTES = 64 << 20

# What file systems take: of a name, and of a path below some others.
NAME_BYTES, PATH_BYTES = 255, 2048


@dataclass(frozen=True)
class File:
    """One file of a model: path relative to the model's root (with `/`), size in bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Where a model came from and what is in it. `resolved` is the identity that its URI led to."""

    model_uri: str
    resolved: Mapping[str, str]
    files: Sequence[File]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def dump(self) -> str:
        return json.dumps({"format": 1, **asdict(self)}, indent=1)

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Raises `ValueError` when `text` is not a manifest of this format, or names what is no place for a file."""
        try:
            data = json.loads(text)
            if data["format"] != 1:
                raise ValueError(f"manifest format {data['format']!r} is not known here")
            resolved = {_text(name): _text(value) for name, value in dict(data["resolved"]).items()}
            found = cls(_text(data["model_uri"]), resolved, [_file(**file) for file in data["files"]])
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error
        check_names([file.path for file in found.files])
        return found

    def damage(self, model: Path, verify: str = "size", *, alone: bool = False) -> list[str]:
        """What differs between this manifest and the files below `model`, by file; empty when whole.

        `verify` is one of `VERIFY`; where it looks at bytes and the model is `alone` in its directory, files that the
        manifest does not have are damage, too. Links are, whatever they lead to. Raises `OSError` when it can't be
        told: a file one may not look at is not a file that is missing.
        """
        if verify == "off":
            return []
        places = {model / parent for file in self.files for parent in PurePosixPath(file.path).parents[:-1]}
        found = [f"{place}: a link" for place in sorted(places) if place.is_symlink()]
        found += [damage for file in self.files if (damage := _differs(model / file.path, file.size))]
        if MODEL_FILE not in {file.path for file in self.files}:
            found.append(f"{model / MODEL_FILE}: not in the manifest")
        if found or verify == "size":
            return found
        if alone:
            known = {model / file.path for file in self.files}
            there = (path for path in disk.below(model) if path.is_symlink() or not path.is_dir())
            if strange := [f"{path}: not in the manifest" for path in there if path not in known]:
                return strange
        with ThreadPoolExecutor(resources.cpu_limit()) as pool:
            digests = pool.map(lambda file: digest(model / file.path), self.files)
            return [
                f"{model / file.path}: not the bytes that were downloaded (sha256)"
                for file, there in zip(self.files, digests, strict=True)
                if there != file.sha256
            ]


def summary(damage: Sequence[str]) -> str:
    """The first few of what `Manifest.damage` found, for a message."""
    more = f"; and {len(damage) - TOLD} files more" if len(damage) > TOLD else ""
    return "; ".join(damage[:TOLD]) + more


def check_names(names: Sequence[str]) -> None:
    """Raise `ValueError` for names of files, somebody else's word, that would choose where else files go."""
    known = set(names)
    if len(known) != len(names):
        raise ValueError(f"a file twice: {Counter(names).most_common(1)[0][0][:300]!r}")
    for name in names:
        if why := _why_unsafe(name):
            raise ValueError(f"a file with the unsafe name {name[:300]!r}, {why}")
        if both := [str(parent) for parent in PurePosixPath(name).parents[:-1] if str(parent) in known]:
            raise ValueError(f"{both[0][:300]!r} both as a file and as a directory")


def _why_unsafe(name: str) -> str | None:
    parts = name.split("/")
    if "\\" in name or "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
        return "which leads elsewhere"
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "which is not UTF-8"
    return "which is too long" if max(sizes) > NAME_BYTES or sum(sizes) + len(sizes) > PATH_BYTES else None


def _file(path: Any, size: Any, sha256: Any) -> File:
    if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"the manifest tells no size and sha256 of {path!r}")
    return File(_text(path), size, sha256)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()  # raises for what no page and no terminal could show
    return value


def _differs(path: Path, size: int) -> str | None:
    try:
        there = path.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{path}: {error.strerror}"
    if not stat.S_ISREG(there.st_mode):
        return f"{path}: not a regular file"
    return None if there.st_size == size else f"{path}: {there.st_size} bytes instead of {size}"


def digest(path: Path) -> str:
    """sha256 of a file, in hex. Raises as `disk.chunks` does."""
    sha = hashlib.sha256()
    for chunk in disk.chunks(path):
        sha.update(chunk)
    return sha.hexdigest()


def copy(source: Path, target: Path) -> str:
    """Copy a file to where none is; sha256 of what was copied. Raises as `disk.chunks` does."""
    sha = hashlib.sha256()
    with target.open("xb") as file:
        for chunk in disk.chunks(source):
            sha.update(chunk)
            file.write(chunk)
    return sha.hexdigest()
