"""The facts of a model that a person wants to know: its origin, its files, and the way it predicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darwin_runtime.model.integrity import read_manifest
from darwin_runtime.model.model import Model
from darwin_runtime.protocols import mlflow_scoring
from darwin_runtime.redact import mask_uri
from darwin_runtime.storage import digest, output


@dataclass(frozen=True)
class About:
    """The facts of one model. Those that are not known are empty.

    `digest` is what REQUIRE_SHA256 can ask for; `fallback` is "true" if MLflow could not be asked which model to take,
    else "false". `files` are names and sizes in bytes; `load_seconds` is how long it took to be ready; `chat` is a body
    to begin with, if the model takes them as they are.
    """

    uri: str = ""
    registered_name: str = ""
    version: str = ""
    digest: str = ""
    fallback: str = ""
    run_id: str = ""
    logged_at: str = ""
    mlflow_version: str = ""
    flavors: tuple[str, ...] = ()
    predicts: str = ""
    size: str = ""
    files: Sequence[tuple[str, int]] = ()
    load_seconds: float | None = None
    chat: Any = None


def about_model(model: Model, load_seconds: float | None = None, path: Path | None = None) -> About:
    """`path` is where the model was found, which may be an output of `download.py` that links to its directory."""
    directory, metadata = model.directory, model.pyfunc.metadata
    manifest = read_manifest(directory)
    resolved = manifest.resolved if manifest else {}
    record = output.find(path or directory)
    files = [(path.relative_to(directory).as_posix(), path.stat().st_size) for path in _list_files(directory)]
    size = f"{sum(size for _, size in files):,} bytes in {len(files)} files"
    return About(
        uri=mask_uri(manifest.model_uri) if manifest else "",
        registered_name=resolved.get("name", ""),
        version=resolved.get("version", ""),
        digest=digest.digest_of(manifest) if manifest else "",
        fallback=str(record.fallback).lower() if record else "",
        run_id=metadata.run_id or "",
        logged_at=str(metadata.utc_time_created or ""),
        mlflow_version=str(metadata.mlflow_version or ""),
        flavors=model.flavors,
        predicts=model.predictor.description,
        size=size,
        files=files[:200],
        load_seconds=load_seconds,
        chat=_chat_body(model),
    )


def _chat_body(model: Model) -> Any:
    """The model's own example, or one made up, if it is sent as it is."""
    example = json.loads(model.example) if model.example else None
    if isinstance(example, dict) and not example.keys() & set(mlflow_scoring.SHAPES):
        return example
    streams = model.contract("").streams
    return {"messages": [{"role": "user", "content": "Hello"}]} if streams and not model.input_schema.inputs else None


def _list_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
