"""From a directory to a model that is whole, loaded, and has answered its own input example."""

from __future__ import annotations

import contextlib
import json
import logging
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darwin_runtime import allocator
from darwin_runtime.errors import BadRequest, EncodingError, InputError, InputRejected, PredictionFailed, RoleError
from darwin_runtime.logs import mask_uri
from darwin_runtime.model import model as model_module
from darwin_runtime.model.model import Model
from darwin_runtime.protocols import base as protocols
from darwin_runtime.schema.rows import Rows
from darwin_runtime.storage import cache, digest, disk, output
from darwin_runtime.storage.manifest import Manifest, summary

logger = logging.getLogger("darwin.serve")


def example_rows(model: Model) -> Rows | None:
    """The model's own input example, if it has one and our parsers take it."""
    if model.example is None:
        return None
    try:
        rows = protocols.read_invocations(model.example, {}, model.contract("")).rows
    except (BadRequest, InputError):
        return None
    return None if rows.passthrough else rows


@dataclass(frozen=True)
class About:
    """What a person wants to know of a model: where it came from and what it is made of. Empty: not known.

    `files` are names and sizes in bytes; `load_seconds` is how long it took to be ready; `chat` is a body to begin
    with, if the model takes them as they are.
    """

    uri: str = ""
    registered_name: str = ""
    version: str = ""
    run_id: str = ""
    logged_at: str = ""
    mlflow_version: str = ""
    flavors: tuple[str, ...] = ()
    predicts: str = ""
    size: str = ""
    files: Sequence[tuple[str, int]] = ()
    load_seconds: float | None = None
    chat: Any = None


def about(model: Model, load_seconds: float | None = None) -> About:
    manifest, metadata = _manifest(model.directory), model.pyfunc.metadata
    resolved = manifest.resolved if manifest else {}
    files = [(path.relative_to(model.directory).as_posix(), path.stat().st_size) for path in _files(model.directory)]
    size = f"{sum(size for _, size in files):,} bytes in {len(files)} files"
    return About(
        uri=mask_uri(manifest.model_uri) if manifest else "",
        registered_name=resolved.get("name", ""),
        version=resolved.get("version", ""),
        run_id=metadata.run_id or "",
        logged_at=str(metadata.utc_time_created or ""),
        mlflow_version=str(metadata.mlflow_version or ""),
        flavors=model.flavors,
        predicts=model.path.description,
        size=size,
        files=files[:200],
        load_seconds=load_seconds,
        chat=_chat(model),
    )


def _chat(model: Model) -> Any:
    """The model's own example, or one made up, if it is sent as it is."""
    example = json.loads(model.example) if model.example else None
    if isinstance(example, dict) and not example.keys() & set(protocols.SHAPES):
        return example
    streams = model.contract("").streams
    return {"messages": [{"role": "user", "content": "Hello"}]} if streams and not model.plan.inputs else None


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def self_test(model: Model) -> str:
    """Have `model` answer its own input example; say in a few words what was done. Raises `RoleError` if it can't."""
    if model.example is None:
        return "it has no input example to test it with"
    try:
        request = protocols.read_invocations(model.example, {}, model.contract(""))
    except (BadRequest, InputError) as error:
        logger.warning("the model's input example cannot be sent as a request: %s", error)
        request = None
    try:
        protocols.write_predictions(
            model.predict(request.rows, request.params) if request else model.predict_own_example()
        )
    except (InputRejected, PredictionFailed, EncodingError) as error:
        raise RoleError(f"the model in {model.directory} fails on its own input example: {error}") from error
    return "it answered its own input example"


def _manifest(directory: Path) -> Manifest | None:
    """What `download.py` left word of, in an output or in the cache."""
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


def load(
    path: Path,
    model_config: Mapping[str, Any] | None = None,
    method: str = "",
    verify: str = "size",
    required: str = "",
) -> Model:
    """Find, check and load the model at `path`, to be asked for `method`; it is not run. Raises `RoleError`.

    `verify` is one of `manifest.VERIFY`, `required` the digest of `digest` that it must have, if any.
    """
    found = model_module.find_model(path)
    check_files(found)
    # Of all that the model brings nothing is run, nor read by anything else, before its bytes are known.
    seen = digest.look(found) if required else None
    if seen and seen.digest != required:
        raise digest.refusal(f"the model in {found}", seen.digest, required)
    if seen:
        logger.info("the model in %s has sha256 %s, as %s asks", found, seen.digest, digest.NAME)
    check_whole(found, verify)
    logger.info("loading the model in %s", found)
    sys.dont_write_bytecode = True  # beside the model's own code it would be a file that nobody knows
    began = time.monotonic()
    try:
        model = model_module.load(found, model_config, method)
    except RoleError as error:
        try:
            check_whole(found, "sha256")
        except RoleError as damage:
            raise RoleError(f"{error}. And {damage}") from error
        raise
    if seen:
        digest.check_unchanged(found, seen)
    allocator.give_back()
    return replace(model, load_seconds=time.monotonic() - began)


def make_ready(model: Model, name: str, *, fast_path: bool) -> Model:
    """`model` on its quickest proven path, after it has answered its own input example. Raises `RoleError`."""
    model = model.proven(example_rows(model), fast=fast_path)
    outcome = self_test(model)
    flavors = ", ".join(model.flavors)
    logger.info("model %s is ready (%s): it %s; %s", name or model.directory, flavors, model.path.description, outcome)
    return model
