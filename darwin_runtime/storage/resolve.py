"""The model that a URI stands for now, found through MLflow's own clients."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from darwin_runtime import mlflow_import
from darwin_runtime.errors import RoleError
from darwin_runtime.redact import mask_uri
from darwin_runtime.storage import access, attempts, login
from darwin_runtime.storage.access import check_uri
from darwin_runtime.storage.artifacts import ArtifactStore, Source, digest_of_model_file, walk
from darwin_runtime.storage.attempts import RetryPolicy
from darwin_runtime.storage.manifest import MODEL_FILE
from darwin_runtime.storage.store_errors import explained

# A source that is a URI of MLflow's own, again and again, goes round in circles.
MAX_WRAPPED = 4


def resolve(uri: str) -> Source:
    """Find the model at `uri` and list its root.

    Raises `StoreUnreachable` for failures worth retrying, else `RoleError`: it does not exist, access was refused, no
    model is there.
    """
    with explained(uri):
        mlflow_import.prepare()
        login.guard(uri)
        repository, root, resolved = _locate(uri)
        identity = access.identify(uri, resolved)
        store = ArtifactStore(uri, repository, root)
        files, directories = store.list()
        listing = [(file.path, file.size) for file in files] + [(f"{name}/", None) for name in directories]
        if MODEL_FILE not in (file.path for file in files):
            raise _no_model(uri, [file.path for file in walk(uri, store, listing)])
        if "name" not in identity:
            # No registry vouches for what is there, and a listing doesn't change when a file does: MLmodel tells models
            # apart, as it holds the id and the time of logging.
            identity = {**identity, "mlmodel": digest_of_model_file(uri, store)}
    return Source(uri, identity, listing, store)


def resolve_within(seconds: float, uri: str, policy: RetryPolicy) -> Source:
    """Resolve with retries, and for `seconds` at most. Raises as `resolve` does."""
    where = f"the tracking server {mask_uri(os.environ.get('MLFLOW_TRACKING_URI', ''))}"
    what = f"resolve {uri} by {where if access.needs_tracking(uri) else 'its store'}"

    def action() -> Source:
        mlflow_import.prepare(tables=False)
        return attempts.retry(lambda: resolve(uri), policy)

    return attempts.run_with_timeout(seconds, action, what)


def _no_model(uri: str, names: Sequence[str]) -> RoleError:
    if not names:
        return RoleError(f"no MLflow model at {uri}: nothing is there")
    hint = ""
    if nested := next((name for name in names if name.endswith(f"/{MODEL_FILE}")), None):
        inner = f"{uri.rstrip('/')}/{PurePosixPath(nested).parent}"
        # The registry's URIs have no path of a directory in them.
        remedy = "register a version with that directory as its source" if check_uri(inner) else f"ask for {inner}"
        hint = f"; there is one at {nested}, {remedy}"
    return RoleError(f"no MLflow model at {uri}: no {MODEL_FILE} among its {len(names)} files{hint}")


def _locate(uri: str, depth: int = 0) -> tuple[Any, str, dict[str, str]]:
    """The artifact repository of a model, the model's path in it, and what it resolved to."""
    from mlflow import MlflowClient, get_registry_uri
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if depth > MAX_WRAPPED:
        raise RoleError(f"the source of a model version is {uri}, which leads to sources in a circle: register it anew")
    scheme, _, rest = uri.partition(":/")
    if rest.startswith("/") or scheme not in ("models", "runs"):
        if depth:
            login.check_source(uri)
        return get_artifact_repository(uri), "", {"uri": mask_uri(uri)}
    rest = rest.strip("/")
    client = MlflowClient()
    if scheme == "runs":
        run_id, _, path = rest.partition("/")
        info = client.get_run(run_id).info
        # MLflow 3 keeps a run's models apart from its artifacts, under the same path.
        name, _, inner = path.partition("/")
        if model := _model_of_run(client, run_id, info.experiment_id, name):
            repository, _, resolved = _logged_model(model, depth)
            return repository, inner, {**resolved, "path": inner}
        repository, _, _ = _locate(info.artifact_uri, depth + 1)
        return repository, path, {"run": run_id, "path": path}
    name, _, suffix = rest.partition("/")
    if not suffix and "@" not in name:
        return _logged_model(client.get_logged_model(name), depth)
    version = _pinned(client, name, suffix)
    registry = get_registry_uri()
    resolved = {
        "registry": mask_uri(registry),
        "name": version.name,
        "version": str(version.version),
        "created": str(version.creation_timestamp),
        "source": mask_uri(str(version.source)),
        "run": version.run_id or "",
    }
    if registry.startswith(("databricks", "uc:")):
        repository = get_artifact_repository(f"models:/{version.name}/{version.version}").repo
        # Unity Catalog brings no files itself: it names a store, and lends a login for it.
        if hasattr(repository, "_get_artifact_repo"):
            repository = repository._get_artifact_repo()
        return repository, "", resolved
    source = client.get_model_version_download_uri(version.name, version.version)
    repository, root, _ = _locate(source, depth + 1)
    return repository, root, resolved


def _logged_model(model: Any, depth: int) -> tuple[Any, str, dict[str, str]]:
    repository, root, _ = _locate(model.artifact_location, depth + 1)
    return repository, root, {"model_id": model.model_id, "created": str(model.creation_timestamp)}


def _pinned(client: Any, name: str, suffix: str) -> Any:
    """The registered model version that a version, `@alias`, stage or `latest` stands for right now."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    if not suffix:
        try:
            return client.get_model_version_by_alias(*name.rsplit("@", 1))
        except MlflowException as error:
            # Servers answer 400 for an alias that does not exist.
            if error.error_code == "INVALID_PARAMETER_VALUE" and "not found" in str(error):
                raise MlflowException(str(error), RESOURCE_DOES_NOT_EXIST) from error
            raise
    if suffix.isdecimal():
        return client.get_model_version(name, suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # stages are deprecated, and still in use
        versions = client.get_latest_versions(name, None if suffix.lower() == "latest" else [suffix])
    if not versions:
        raise MlflowException(f"model {name!r} has no version in stage {suffix!r}", RESOURCE_DOES_NOT_EXIST)
    return max(versions, key=lambda version: int(version.version))


def _model_of_run(client: Any, run_id: str, experiment_id: str, name: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    if "'" in name:
        return None
    token = None
    while True:
        try:
            page = client.search_logged_models([experiment_id], filter_string=f"name = '{name}'", page_token=token)
        except MlflowException as error:
            if error.get_http_status_code() == 404:
                return None  # a server older than logged models
            raise
        for model in page:
            if model.source_run_id == run_id:
                return model
        token = page.token
        if not token:
            return None
