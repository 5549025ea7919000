"""What the files of a downloaded model must be: the manifest that lies beside it, and the comparison with the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import darwin_cpus

# How thoroughly to compare: not at all; that each file is there with its size; its bytes, too, which reads all of them.
VERIFY = ("off", "size", "sha256")

TOLD = 5


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
        """Raises `ValueError` when `text` is not a manifest of this format."""
        try:
            data = json.loads(text)
            if data["format"] != 1:
                raise ValueError(f"manifest format {data['format']!r} is not known here")
            files = [File(str(file["path"]), int(file["size"]), str(file["sha256"])) for file in data["files"]]
            return cls(str(data["model_uri"]), dict(data["resolved"]), files)
        except (KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error

    def damage(self, model: Path, verify: str = "size") -> list[str]:
        """What differs between this manifest and the files below `model`, by file; empty when whole.

        `verify` is one of `VERIFY`. Raises `OSError` when it can't be told: a file one may not look at is not a file
        that is missing.
        """
        if verify == "off":
            return []
        found = [damage for file in self.files if (damage := _differs(model / file.path, file.size))]
        if found or verify == "size":
            return found
        with ThreadPoolExecutor(darwin_cpus.cpu_limit()) as pool:
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


def _differs(path: Path, size: int) -> str | None:
    try:
        there = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{path}: {error.strerror}"
    return None if there == size else f"{path}: {there} bytes instead of {size}"


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
