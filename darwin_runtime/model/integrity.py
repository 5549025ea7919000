"""The integrity of a model's files: they are as they were downloaded, and have the digest that is asked for."""

from __future__ import annotations

import contextlib
import logging
import stat
from collections.abc import Iterator
from pathlib import Path

from darwin_runtime.errors import RoleError
from darwin_runtime.storage import cache, digest, disk, output
from darwin_runtime.storage.manifest import Manifest, summary

logger = logging.getLogger("darwin.serve")


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest that `download.py` left with the model, in an output or in the cache."""
    if manifest := cache.manifest_of(directory):
        return manifest
    record = output.read(directory)
    return record.manifest if record else None


def check_whole(directory: Path, verify: str = "size") -> None:
    """Raise `RoleError` naming each file that is not as it was downloaded, as far as `verify` looks."""
    try:
        damage = cache.damage_of(directory, verify)
        if damage is None:
            record = output.read(directory)
            damage = record.manifest.damage(directory, verify) if record else []
    except OSError as error:
        raise RoleError(f"the model in {directory} cannot be read: {error}") from error
    if damage:
        raise RoleError(
            f"the model is damaged: {summary(damage)}. Run download.py again with VERIFY={verify}, which replaces "
            f"it: in Kubernetes, set that on the init container and delete the pod"
        )


def check_files(directory: Path) -> None:
    """Raise `RoleError` for what would be waited for forever, or never end, when something reads it as a file."""
    try:
        for path in disk.below(directory):
            with contextlib.suppress(FileNotFoundError):  # a link to nothing
                mode = path.stat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise RoleError(f"{path} is a pipe, socket or device where a model has files: remove it")
    except OSError as error:
        raise RoleError(f"the model in {directory} cannot be read: {error}") from error


@contextlib.contextmanager
def required_digest(directory: Path, required: str) -> Iterator[None]:
    """Check that the model has the digest `required`, if any, before and after it is read. Raises `RoleError`."""
    if not required:
        yield
        return
    seen = digest.look(directory)
    if seen.digest != required:
        raise digest.refusal(f"the model in {directory}", seen.digest, required)
    logger.info("the model in %s has sha256 %s, as %s asks", directory, seen.digest, digest.NAME)
    yield
    digest.check_unchanged(directory, seen)
