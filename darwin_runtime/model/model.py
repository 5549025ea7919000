"""Find an MLflow model on disk, load it, and have it predict. Of what serves requests, only this knows MLflow."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from packaging.requirements import InvalidRequirement, Requirement

from darwin_runtime import mlflow_import
from darwin_runtime.errors import InputRejected, PredictionFailed, RoleError
from darwin_runtime.logs import hide
from darwin_runtime.model import fast_path
from darwin_runtime.schema.model_spec import InputSchema, ModelSpec, compile_schema
from darwin_runtime.schema.params import ParamSchema
from darwin_runtime.schema.rows import Rows
from darwin_runtime.schema.signature import Spec
from darwin_runtime.storage import digest, disk

MODEL_FILE = "MLmodel"
PYFUNC = "python_function"

# Keys under which the flavors in `MLmodel` name a file or directory of the model.
DATA_KEYS = ("data", "model_path", "pickled_model", "model_data", "model_binary", "python_model", "model_code_path")

# More than any model's description, requirements or input example has.
SMALL_BYTES, EXAMPLE_BYTES = 16 << 20, 64 << 20

# Where the module's name is not the package's.
PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "databricks": "databricks-sdk",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

# The flavor of the image that brings a library: what FLAVORS, the Dockerfile's argument, is to name.
FLAVORS = {
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

# MLflow then decodes datetimes and bytes for models with type hints.
SERVING = {"_MLFLOW_IS_IN_SERVING_ENVIRONMENT": "true"}

# The same library under another name, without what a server does not need.
SAME_LIBRARY = {"mlflow": "mlflow-skinny", "tensorflow": "tensorflow-cpu", "xgboost": "xgboost-cpu"}

# MLflow quotes the whole input in some messages.
MAX_MESSAGE = 2000

logger = logging.getLogger("darwin.model")


@dataclass(frozen=True)
class Model:
    """A loaded model. `plan` and `params` parse its input; `outputs` is its output signature in JSON form.

    `example` is the JSON body of a request the model was logged with, None if it has none. `paths` are how it does what
    it can be asked for, by the name of the method, the one it was logged with first; `method` is the usual one.
    `load_seconds` is how long loading took.
    """

    directory: Path
    flavors: tuple[str, ...]
    plan: InputSchema
    params: ParamSchema
    outputs: Sequence[Spec]
    example: bytes | None
    pyfunc: Any
    paths: Mapping[str, fast_path.Predictor]
    method: str
    load_seconds: float = 0.0

    @property
    def path(self) -> fast_path.Predictor:
        """How it predicts unless asked otherwise."""
        return self.paths[self.method]

    def contract(self, name: str, version: str = "") -> ModelSpec:
        """What clients who know it by `name` and `version` can ask, and how."""
        classes: Any = getattr(fast_path.raw(self.pyfunc), "classes_", None)
        one_output = isinstance(classes, np.ndarray) and classes.ndim == 1
        return ModelSpec(
            input_schema=self.plan,
            params=self.params,
            # They were inferred from what the method that the model was logged with answers.
            outputs=self.outputs if self.method == next(iter(self.paths)) else (),
            name=name,
            version=version,
            methods=tuple(self.paths),
            method=self.method,
            classes=classes.tolist() if one_output else None,
            streams=getattr(self.pyfunc, "_predict_stream_fn", None) is not None,
        )

    @property
    def batchable(self) -> bool:
        """Whether rows of several requests may be predicted together."""
        return self.path.batchable

    def proven(self, example: Rows | None = None, *, fast: bool = True, budget: float = fast_path.BUDGET) -> Model:
        """This model on the quickest path that is proven to answer the same; `path.description` says which.

        `example` is the model's own, parsed. This runs the model, so not before a fork: mostly for some 50 ms, and for
        about twice `budget`, in seconds, at most.
        """
        asked = fast_path.asked(self.pyfunc, self.method)
        path = fast_path.prove(asked, self.plan, example, method=self.method, fast=fast, budget=budget)
        return replace(self, paths={**self.paths, self.method: path})

    def predict(self, rows: Rows, params: Mapping[str, Any] | None = None, method: str = "") -> Any:
        """What `mlflow.pyfunc`, or another `method` than the usual one, answers to `rows`.

        Raises `RequestRefused` or `PredictionFailed`.
        """
        if rows.passthrough:
            return _worded(lambda: self.pyfunc.predict(rows.value, params=dict(params or {})), unvalidated=True)
        path = self.paths[method or self.method]
        if path.predict_array and not params:
            # Whatever it raises, what counts is what pyfunc says of these rows.
            with contextlib.suppress(BaseException):
                return path.predict_array(rows)
        return _worded(lambda: path.predict_dataframe(rows, params), unvalidated=rows.unvalidated)

    def stream(self, rows: Rows, params: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """The pieces of an answer, as the model yields them. Raises, also later, as `predict` does."""
        pieces = _worded(lambda: self.pyfunc.predict_stream(rows.value, params=dict(params or {})), unvalidated=True)
        done = object()
        try:
            while (piece := _worded(lambda: next(pieces, done), unvalidated=False)) is not done:
                yield piece
        except PredictionFailed as error:
            if isinstance(error.__cause__, NotImplementedError):  # as all classes of MLflow's do that don't stream
                raise InputRejected("this model cannot answer piece by piece: leave out stream") from error
            raise
        finally:
            if hasattr(pieces, "close"):
                pieces.close()

    def predict_own_example(self) -> Any:
        """What the model answers to its input example as MLflow stored it. Raises like `predict`."""
        params = self.pyfunc.metadata.load_input_example_params(str(self.directory))
        return _worded(lambda: self.pyfunc.predict(self.pyfunc.input_example, params=params), unvalidated=False)


def _worded(predict: Callable[[], Any], *, unvalidated: bool) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return predict()
    except MlflowException as error:
        # What MLflow raises on input it was left to check has any code.
        if unvalidated or error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise InputRejected(_short(error), by_schema=error.error_code == "INVALID_PARAMETER_VALUE") from error
        raise PredictionFailed(_short(error)) from error
    except BaseException as error:  # a model's code may raise anything, and only the one who asked is to hear of it
        blameless = isinstance(error, (MemoryError, OSError)) or not isinstance(error, Exception)
        raise (InputRejected if unvalidated and not blameless else PredictionFailed)(_short(error)) from error


def _short(error: BaseException) -> str:
    text = hide(f"{type(error).__name__}: {error}")  # it is told to clients, too
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"


def find_model(path: Path) -> Path:
    """Where `MLmodel` is: `path`, its `model`, or the parent of a `path` that ends in `model` and isn't there.

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


def load(directory: Path, model_config: Mapping[str, Any] | None = None, method: str = "") -> Model:
    """Load the model in `directory`, to be asked for `method` rather than what it was logged to answer with.

    Raises `RoleError` naming the file, library, version or method that is in the way.
    """
    description = _description(directory)
    requirements = _requirements(directory)
    differences = _differences(requirements, description["flavors"][PYFUNC].get("python_version"))
    if differences:
        logger.warning("the model was made with other versions: %s", "; ".join(differences))
    mlflow_import.prepare(SERVING)
    try:
        import mlflow.pyfunc

        pyfunc = mlflow.pyfunc.load_model(str(directory), suppress_warnings=True, model_config=model_config or None)
    except (Exception, SystemExit) as error:  # loading runs the flavor's and the model's own code
        raise RoleError(_why(directory, description, requirements, differences, error)) from error
    signature = pyfunc.metadata.signature
    inputs = signature.inputs.to_dict() if signature and signature.inputs else None
    usual = description["flavors"][PYFUNC].get("predict_fn", "predict")
    methods = dict.fromkeys([usual, *fast_path.methods(pyfunc)])
    if method and method not in methods:
        raise RoleError(f"the model in {directory} has no {method}: PREDICT_METHOD may be {', '.join(methods)}")
    return Model(
        directory=directory,
        flavors=tuple(name for name in description["flavors"] if name != PYFUNC) or (PYFUNC,),
        plan=compile_schema(inputs, from_type_hint=pyfunc.metadata._is_signature_from_type_hint()),
        params=ParamSchema(signature.params.to_dict() if signature and signature.params else None),
        outputs=signature.outputs.to_dict() if signature and signature.outputs else (),
        example=_example(directory, description),
        pyfunc=pyfunc,
        paths={name: fast_path.plain(fast_path.asked(pyfunc, name)) for name in methods},
        method=method or usual,
    )


def _description(directory: Path) -> dict[str, Any]:
    file = directory / MODEL_FILE
    try:
        description = yaml.safe_load(disk.read_small(file.resolve(), SMALL_BYTES))
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
    if "utc_time_created" not in description:
        raise RoleError(
            f"{file} ends before utc_time_created, which MLflow writes last: it is truncated, download it again"
        )
    return description


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
    for text in _strings(description):
        if text.rpartition("/")[2] in digest.APART:
            raise RoleError(f"{file} names {text[:300]!r}, which is no part of a model: it is not loaded")


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[Mapping[Any, Any]]:
    return [inner for inner in _mapping(value).values() if isinstance(inner, dict)]


def _artifacts(conf: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    return _mappings(conf.get("artifacts"))


def _strings(value: Any) -> Iterator[str]:
    """Every string in what was YAML, whose anchors can put one part into many places."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, (dict, list)) and id(one) not in seen:
            seen.add(id(one))
            waiting += [*one.keys(), *one.values()] if isinstance(one, dict) else one


def _example(directory: Path, description: Mapping[str, Any]) -> bytes | None:
    name = _mapping(description.get("saved_input_example_info")).get("serving_input_path")
    if not name:
        return None
    try:
        file = (directory / str(name)).resolve()
        if not file.is_relative_to(directory.resolve()):
            raise ValueError(f"{name} is a link that leads out of the model")
        # MLflow writes NaN, which JSON does not have; null stands for it in requests.
        example = json.loads(disk.read_small(file, EXAMPLE_BYTES), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("the model's input example cannot be read: %s", error)
        return None
    return json.dumps(example).encode()


def _requirements(directory: Path) -> list[Requirement]:
    try:
        lines = disk.read_small((directory / "requirements.txt").resolve(), SMALL_BYTES).decode().splitlines()
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


def _differences(requirements: Sequence[Requirement], python: Any) -> list[str]:
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


def _why(
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
        flavor = FLAVORS.get(_normal(package))
        brings = f"{flavor} among its FLAVORS" if flavor else "the model's requirements.txt as its MODEL_REQUIREMENTS"
        return (
            f"cannot load the model in {directory}: it needs the library {package}, which is not installed{asked}: "
            f"build the image with {brings}"
        )
    parts = [f"cannot load the model in {directory}: {' '.join(_short(error).split())}"]
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


def mlflow_version() -> str:
    """The version of the MLflow that loads models here."""
    return _installed("mlflow") or ""
