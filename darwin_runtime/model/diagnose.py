"""The reasons why a model does not load or predict: differences of versions, missing files, and their wording."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from darwin_runtime.model.mlmodel import DATA_KEYS, MAX_TEXT_BYTES
from darwin_runtime.redact import hide
from darwin_runtime.storage import disk

# Where the module's name is not the package's.
PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "databricks": "databricks-sdk",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

# The flavor of the image that brings a library: what FLAVORS, the Dockerfile's argument, is to name.
FLAVOR_OF_PACKAGE = {
    "catboost": "catboost",
    "databricks-sdk": "databricks",
    "keras": "tensorflow",
    "lightgbm": "lightgbm",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "scikit-learn": "sklearn",
    "skops": "sklearn",
    "tensorflow": "tensorflow",
    "torch": "pytorch",
    "xgboost": "xgboost",
}

# The same library under another name, without what a server does not need.
SAME_LIBRARY = {"mlflow": "mlflow-skinny", "tensorflow": "tensorflow-cpu", "xgboost": "xgboost-cpu"}

# MLflow quotes the whole input in some messages.
MAX_MESSAGE = 2000


def read_requirements(directory: Path) -> list[Requirement]:
    try:
        lines = disk.read_small((directory / "requirements.txt").resolve(), MAX_TEXT_BYTES).decode().splitlines()
    except (OSError, ValueError):
        return []
    return list(_parsed(lines))


def _parsed(lines: Sequence[str]) -> Iterator[Requirement]:
    for line in lines:
        try:
            requirement = Requirement(line.partition(" #")[0].strip())
        except InvalidRequirement:  # an option, a file, a URL: nothing to compare
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def _installed(package: str) -> str | None:
    for name in (package, SAME_LIBRARY.get(package)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if name:
                return importlib.metadata.version(name)
    return None


def list_differences(requirements: Sequence[Requirement], python: Any) -> list[str]:
    """What the model was made with and this process hasn't got, such as `numpy==1.26.4 (2.4.6 is installed)`."""
    found = []
    for requirement in requirements:
        installed = _installed(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if installed is None:
            found.append(f"{wanted} (not installed)")
        elif not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{wanted} ({installed} is installed)")
    running = platform.python_version()
    minor = ".".join(str(python).split(".")[:2])
    if python and minor != ".".join(running.split(".")[:2]):
        found.append(f"Python {python} (this is {running}: build the image with BASE_IMAGE=python:{minor}-slim)")
    return found


def explain_failure(
    directory: Path,
    description: Mapping[str, Any],
    requirements: Sequence[Requirement],
    differences: Sequence[str],
    error: BaseException,
) -> str:
    """The reason, as far as it shows, why the model in `directory` could not be loaded."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and inner not in chain:
        chain.append(inner)
    absent = next((e.name for e in chain if isinstance(e, ModuleNotFoundError) and e.name), None)
    if absent:
        package = PACKAGES.get(absent.split(".")[0], absent.split(".")[0])
        wanted = [str(r) for r in requirements if _normal(r.name) == _normal(package)]
        asked = f" (the model asks for {wanted[0]})" if wanted else " (the model's requirements.txt does not list it)"
        flavor = FLAVOR_OF_PACKAGE.get(_normal(package))
        brings = f"{flavor} among its FLAVORS" if flavor else "the model's requirements.txt as its MODEL_REQUIREMENTS"
        return (
            f"cannot load the model in {directory}: it needs the library {package}, which is not installed{asked}: "
            f"build the image with {brings}"
        )
    parts = [f"cannot load the model in {directory}: {' '.join(short_message(error).split())}"]
    files = list(_data_files(directory, description))
    bad = [note for _, note in files if note]
    if bad:
        parts.append("; ".join(bad))
    elif files:
        sizes = ", ".join(f"{file} ({file.stat().st_size} bytes)" for file, _ in files if file.is_file())
        parts.append(f"if it is truncated or damaged, download it again: {sizes or files[0][0]}")
    if differences:
        parts.append(f"the model was made with other versions: {'; '.join(differences)}")
    return ". ".join(parts)


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _data_files(directory: Path, description: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Each file or directory that the flavors name, and what is visibly wrong with it, if anything."""
    names = dict.fromkeys(
        conf[key].rpartition("/")[2] if key == "model_code_path" else conf[key]
        for conf in description["flavors"].values()
        if isinstance(conf, dict)
        for key in DATA_KEYS
        if isinstance(conf.get(key), str)
    )
    for name in names:
        file = directory / name
        if not file.exists():
            yield file, f"{file} is missing"
        elif file.is_file():
            yield file, f"{file} is empty" if not file.stat().st_size else ""
        else:
            inside = [part for part in sorted(file.rglob("*")) if part.is_file()]
            empty = [part for part in inside if not part.stat().st_size and part.name != "__init__.py"]
            yield file, f"{file} is empty" if not inside else f"{empty[0]} is empty" if empty else ""


def short_message(error: BaseException) -> str:
    text = hide(f"{type(error).__name__}: {error}")  # it is told to clients, too
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"


def mlflow_version() -> str:
    """The version of the MLflow that loads models here."""
    return _installed("mlflow") or ""
