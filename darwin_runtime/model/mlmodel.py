"""A model's directory and its description, the file `MLmodel`: found, read and checked."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from darwin_runtime.errors import RoleError
from darwin_runtime.storage import digest, disk
from darwin_runtime.storage.manifest import MODEL_FILE

PYFUNC = "python_function"

# Keys under which the flavors in `MLmodel` name a file or directory of the model.
DATA_KEYS = ("data", "model_path", "pickled_model", "model_data", "model_binary", "python_model", "model_code_path")

# More than any model's description or requirements, or its input example, has.
MAX_TEXT_BYTES, MAX_EXAMPLE_BYTES = 16 << 20, 64 << 20

logger = logging.getLogger("darwin.model")


def find_model(path: Path) -> Path:
    """The directory with `MLmodel`: `path`, its `model`, or the parent where `path` ends in `model` and isn't there.

    Where that is a link into a cache, the directory it leads to: MLflow opens no link that leads out of a model's own.
    Raises `RoleError` saying where it looked, and if a link leads nowhere, which.
    """
    places = [path, path / "model"]
    # Darwin's chart serves <dir>/model, but a download by its own scripts may put the model in <dir>.
    if path.name == "model" and not path.exists() and not path.is_symlink():
        places = [path, path.parent]
    for place in places:
        try:
            found = stat.S_ISREG((place / MODEL_FILE).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise RoleError(f"cannot look for a model at {place}, as user {os.getuid()}: {error}") from error
        if found:
            return (place / MODEL_FILE).resolve().parent
    links = [
        link for place in places for link in (place, place / MODEL_FILE) if link.is_symlink() and not link.exists()
    ]
    if links:
        raise RoleError(
            f"no model at {path}: {links[0]} is a link to {links[0].readlink()}, which is not there: the volume with "
            "the model cache is probably not mounted at the same path as in the init container"
        )
    looked = ", ".join(str(place / MODEL_FILE) for place in places)
    state = "does not exist" if not path.exists() else "is empty" if not _entries(path) else "holds no MLflow model"
    raise RoleError(f"no model at {path}, which {state} (looked for {looked}): check that the download put it there")


def _entries(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return [""]


def read_description(directory: Path) -> dict[str, Any]:
    file = directory / MODEL_FILE
    try:
        text = disk.read_small(file.resolve(), MAX_TEXT_BYTES)
        description = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise RoleError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(description, dict) or not isinstance(description.get("flavors"), dict):
        raise RoleError(f"{file} does not describe an MLflow model ({file.stat().st_size} bytes): it may be truncated")
    _check_names(file, description)
    if not isinstance(description["flavors"].get(PYFUNC), dict):
        flavors = ", ".join(map(str, description["flavors"])) or "none"
        raise RoleError(
            f"{file} has no {PYFUNC} flavor (it has: {flavors}), so MLflow cannot serve this model: log it with one"
        )
    if _is_truncated(text, description):
        raise RoleError(
            f"{file} ends before utc_time_created, which MLflow writes last: it is truncated, download it again"
        )
    return description


def _is_truncated(text: bytes, description: Mapping[str, Any]) -> bool:
    """Whether MLflow began `text`, and did not end it: a signature may be missing from what is valid YAML.

    MLflow writes its keys in alphabetical order. A file by hand, or by another tool, lacks what only MLflow writes.
    """
    by_mlflow = "mlflow_version" in description or isinstance(description["flavors"][PYFUNC].get("env"), dict)
    if "utc_time_created" in description or not by_mlflow:
        return False
    if "is_signature_from_type_hint" in description:
        return "type_hint_from_example" not in description
    last = max(map(str, description))
    return last < "mlflow_version" or (last != "prompts" and not text.endswith(b"\n"))


def _check_names(file: Path, description: Mapping[str, Any]) -> None:
    """Raise `RoleError` where `MLmodel` has something read that is no part of the model: MLflow follows any path."""
    found = [(key, conf.get(key)) for conf in _mappings(description["flavors"]) for key in (*DATA_KEYS, "code")]
    found += [("serving_input_path", _mapping(description.get("saved_input_example_info")).get("serving_input_path"))]
    found += [("artifact_path", _mapping(description.get("saved_input_example_info")).get("artifact_path"))]
    found += [("path", one.get("path")) for conf in _mappings(description["flavors"]) for one in _artifacts(conf)]
    for key, name in found:
        # Of model_code_path, which is where the file once was, MLflow takes the last part.
        if isinstance(name, str) and key != "model_code_path" and (name[:1] == "/" or ".." in name.split("/")):
            raise RoleError(f"{file} has {key}: {name[:300]!r}, which leads out of the model: it is not loaded")
    for text in _every_text(description):
        if text.rpartition("/")[2] in digest.APART:
            raise RoleError(f"{file} names {text[:300]!r}, which is no part of a model: it is not loaded")


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[Mapping[Any, Any]]:
    return [inner for inner in _mapping(value).values() if isinstance(inner, dict)]


def _artifacts(conf: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    return _mappings(conf.get("artifacts"))


def _every_text(value: Any) -> Iterator[str]:
    """Every string in what was YAML, whose anchors can put one part into many places."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, (dict, list)) and id(one) not in seen:
            seen.add(id(one))
            waiting += [*one.keys(), *one.values()] if isinstance(one, dict) else one


def read_example(directory: Path, description: Mapping[str, Any]) -> bytes | None:
    name = _mapping(description.get("saved_input_example_info")).get("serving_input_path")
    if not name:
        return None
    try:
        file = (directory / str(name)).resolve()
        if not file.is_relative_to(directory.resolve()):
            raise ValueError(f"{name} is a link that leads out of the model")
        # MLflow writes NaN, which JSON does not have; null stands for it in requests.
        example = json.loads(disk.read_small(file, MAX_EXAMPLE_BYTES), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("the model's input example cannot be read: %s", error)
        return None
    return json.dumps(example).encode()
