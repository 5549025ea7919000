"""The way to a model that may serve: from a directory, whole and loaded, to the answer to its own input example."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from darwin_runtime.errors import BadRequest, EncodingError, InputError, InputRejected, PredictionFailed, RoleError
from darwin_runtime.model.integrity import check_files, check_whole, required_digest
from darwin_runtime.model.load import load_model
from darwin_runtime.model.mlmodel import find_model
from darwin_runtime.model.model import Model
from darwin_runtime.protocols import mlflow_scoring
from darwin_runtime.resources import return_free_memory
from darwin_runtime.schema.rows import Rows

logger = logging.getLogger("darwin.serve")


def load_checked(
    path: Path,
    model_config: Mapping[str, Any] | None = None,
    method: str = "",
    verify: str = "size",
    required: str = "",
) -> Model:
    """Find, check and load the model at `path`, to be asked for `method`; it is not run. Raises `RoleError`.

    `verify` is one of `manifest.VERIFY`, `required` the digest of `digest` that it must have, if any.
    """
    found = find_model(path)
    check_files(found)
    # Of all that the model brings nothing is run, nor read by anything else, before its bytes are known.
    with required_digest(found, required):
        check_whole(found, verify)
        logger.info("loading the model in %s", found)
        sys.dont_write_bytecode = True  # beside the model's own code it would be a file that nobody knows
        began = time.monotonic()
        try:
            model = load_model(found, model_config, method)
        except RoleError as error:
            try:
                check_whole(found, "sha256")
            except RoleError as damage:
                raise RoleError(f"{error}. And {damage}") from error
            raise
    return_free_memory()
    return replace(model, load_seconds=time.monotonic() - began)


def example_rows(model: Model) -> Rows | None:
    """The model's own input example, if it has one and our parsers take it."""
    if model.example is None:
        return None
    try:
        rows = mlflow_scoring.read(model.example, {}, model.contract("")).rows
    except (BadRequest, InputError):
        return None
    return None if rows.passthrough else rows


def self_test(model: Model) -> str:
    """Have `model` answer its own input example; say in a few words what was done. Raises `RoleError` if it can't."""
    if model.example is None:
        return "it has no input example to test it with"
    try:
        request = mlflow_scoring.read(model.example, {}, model.contract(""))
    except (BadRequest, InputError) as error:
        logger.warning("the model's input example cannot be sent as a request: %s", error)
        request = None
    try:
        mlflow_scoring.write_predictions(
            model.predict(request.rows, request.params) if request else model.predict_own_example()
        )
    except (InputRejected, PredictionFailed, EncodingError) as error:
        raise RoleError(f"the model in {model.directory} fails on its own input example: {error}") from error
    return "it answered its own input example"


def make_ready(model: Model, name: str, *, fast_path: bool) -> Model:
    """`model` on its quickest proven predictor, after it has answered its own input example. Raises `RoleError`."""
    model = model.with_quickest_predictor(example_rows(model), fast=fast_path)
    outcome = self_test(model)
    flavors = ", ".join(model.flavors)
    logger.info(
        "model %s is ready (%s): it %s; %s", name or model.directory, flavors, model.predictor.description, outcome
    )
    return model
