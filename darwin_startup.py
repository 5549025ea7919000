"""From a directory to a model that is whole, loaded, and has answered its own input example."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import darwin_cache
import darwin_memory
import darwin_model
import darwin_output
import darwin_protocols as protocols
from darwin_cells import InputError
from darwin_log import RoleError
from darwin_model import Model, PredictionFailed, Refused
from darwin_protocols import Malformed, Unwritable

logger = logging.getLogger("darwin.serve")


def example_rows(model: Model) -> Any:
    """The model's own input example, if it has one and our parsers take it."""
    if model.example is None:
        return None
    try:
        return protocols.read_invocations(model.example, protocols.JSON, model.plan, model.params).rows
    except (Malformed, InputError):
        return None


def self_test(model: Model) -> str:
    """Have `model` answer its own input example; say in a few words what was done. Raises `RoleError` if it can't."""
    if model.example is None:
        return "it has no input example to test it with"
    try:
        request = protocols.read_invocations(model.example, protocols.JSON, model.plan, model.params)
    except (Malformed, InputError) as error:
        logger.warning("the model's input example cannot be sent as a request: %s", error)
        request = None
    try:
        protocols.write_predictions(
            model.predict(request.rows, request.params) if request else model.predict_own_example()
        )
    except (Refused, PredictionFailed, Unwritable) as error:
        raise RoleError(f"the model in {model.directory} fails on its own input example: {error}") from error
    return "it answered its own input example"


def _manifest(directory: Path) -> darwin_cache.Manifest | None:
    """What `download.py` left word of, in an output or in the cache."""
    record = darwin_output.read(directory)
    return record.manifest if record else darwin_cache.manifest_of(directory)


def _altered(directory: Path) -> list[str]:
    """The files whose bytes, of the right number, are not those that were downloaded; reads all of them."""
    manifest = _manifest(directory)
    return manifest.altered(directory) if manifest else []


def check_whole(directory: Path) -> None:
    """Raise `RoleError` naming each file that is missing or has not the size that was downloaded."""
    manifest = _manifest(directory)
    try:
        damage = manifest.damage(directory) if manifest else []
    except OSError as error:
        raise RoleError(f"the model in {directory} cannot be read: {error}") from error
    if damage:
        raise RoleError(f"the model is damaged: {'; '.join(damage)}. Run download.py again, which replaces it")


def load(path: Path, model_config: Mapping[str, Any] | None = None) -> Model:
    """Find, check and load the model at `path`; it is not run. Raises `RoleError`."""
    found = darwin_model.find_model(path)
    check_whole(found)
    logger.info("loading the model in %s", found)
    try:
        model = darwin_model.load(found, model_config)
    except RoleError as error:
        if altered := _altered(found):
            raise RoleError(f"{error}. {'; '.join(altered)}: delete {found} and run download.py again") from error
        raise
    darwin_memory.give_back()
    return model


def make_ready(model: Model, name: str, *, fast_path: bool) -> Model:
    """`model` on its quickest proven path, after it has answered its own input example. Raises `RoleError`."""
    model = model.proven(example_rows(model), fast=fast_path)
    outcome = self_test(model)
    flavors = ", ".join(model.flavors)
    logger.info("model %s is ready (%s): it %s; %s", name or model.directory, flavors, model.path.description, outcome)
    return model
