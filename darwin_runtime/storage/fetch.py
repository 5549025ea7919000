"""The entrance to downloads: both storage strategies and the server bring files to disk through `download`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from darwin_runtime.errors import ConfigError, RoleError
from darwin_runtime.storage import access, digest, disk, resolve
from darwin_runtime.storage.artifacts import PARTS
from darwin_runtime.storage.attempts import Deadline, RetryPolicy, retry
from darwin_runtime.storage.manifest import Manifest
from darwin_runtime.storage.transfer import Transfer

TIMEOUT_SECONDS = 3600.0

logger = logging.getLogger("darwin.transfer")


def download(transfer: Transfer, required: str = "", discard: Callable[[], object] = lambda: None) -> Manifest:
    """Bring the files of a `transfer`, and return their manifest.

    Raises as `Transfer.run` does, and `RoleError` for a model without the `required` digest. The next attempt resumes
    from the files that arrived, but not on a full volume and not with another model: `discard` is called then.
    """
    with disk.discard_when_full(transfer.model, discard, lambda: transfer.total - transfer.arrived()):
        manifest = transfer.source.manifest(transfer.run())
    seen = digest.digest_of(manifest)
    if required and seen != required:
        discard()
        raise digest.refusal(transfer.source.uri, seen, required)
    return manifest


def fetch_model(uri: str, destination: Path) -> None:
    """Put the model at `uri` into the existing directory `destination`, `MLmodel` at its root, every file checked.

    Raises `ConfigError` for a URI of no known form, `RoleError` when it can't be had or put there.
    """
    if why := access.check_uri(uri):
        raise ConfigError([f"{uri!r} {why}"])
    parts = destination / PARTS
    try:
        source = retry(partial(resolve.resolve, uri), RetryPolicy())
        manifest = download(Transfer(source, destination, parts, RetryPolicy(), Deadline(TIMEOUT_SECONDS)))
        logger.info("%s has sha256 %s, which %s can ask for", uri, digest.digest_of(manifest), digest.NAME)
        disk.remove_tree(parts)
    except OSError as error:
        raise RoleError(f"cannot put {uri} on disk: {disk.explain(error)}") from error
