"""The model that a URI stands for now, found through MLflow's own clients."""

from __future__ import annotations

import re
import urllib.parse
import warnings
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from darwin_runtime import mlflow_import
from darwin_runtime.errors import RoleError
from darwin_runtime.redact import mask_uri
from darwin_runtime.settings import Reader
from darwin_runtime.storage import attempts
from darwin_runtime.storage.artifacts import ArtifactStore, Source, digest_of_model_file, walk
from darwin_runtime.storage.attempts import RetryPolicy
from darwin_runtime.storage.manifest import MODEL_FILE
from darwin_runtime.storage.store_errors import explained, needs_tracking

MODEL_URI_EXAMPLE = "models:/my-model/3"


def check_uri(uri: str) -> str | None:
    """What is wrong with the form of a model URI; None when nothing is."""
    scheme, _, rest = uri.partition(":/")
    if scheme == "models" and not rest.startswith("/"):
        name, *more = rest.rstrip("/").split("/")
        if len(more) > 1 or not name or (more and not more[0]) or name.endswith("@") or name.startswith("@"):
            return "must name a model and a version, alias or stage (models:/name/3, models:/name@champion)"
        if not more and "@" not in name and not name.startswith("m-"):
            return "names no version, alias or stage (models:/name/3, models:/name@champion, models:/name/latest)"
    if scheme in ("model", "run"):
        return f"has the unknown scheme {scheme}:, {scheme}s: is probably meant"
    if scheme == "runs" and not rest.strip("/").partition("/")[2]:
        return "must name a run and the artifact path of the model in it (runs:/<run id>/model)"
    return None


def check_access(read: Reader, variable: str, uri: str) -> None:
    """Read what `uri`, given as `variable`, needs to be found; problems with it or with them are added to `read`."""
    if uri and (why := check_uri(uri)):
        read.problem(variable, why, example=MODEL_URI_EXAMPLE)
    tracking_uri = read.text("MLFLOW_TRACKING_URI")
    if not tracking_uri and needs_tracking(uri):
        read.problem("MLFLOW_TRACKING_URI", f"is needed to resolve {uri}", example="http://mlflow:5000")
    # MLflow takes host:port for a scheme, or for a path.
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", tracking_uri):
        read.problem("MLFLOW_TRACKING_URI", "must be a URL", example=f"http://{tracking_uri}")
    read.text("MLFLOW_TRACKING_USERNAME")
    read.text("MLFLOW_TRACKING_PASSWORD")


def resolve(uri: str) -> Source:
    """Find the model at `uri` and list its root.

    Raises `StoreUnreachable` for failures worth retrying, else `RoleError`: it does not exist, access was refused, no
    model is there.
    """
    with explained(uri):
        repository, root, identity = _locate(uri)
        _check_host(uri, repository)
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
    what = f"cannot resolve {uri}, for which there are {seconds:.0f} s of DOWNLOAD_TIMEOUT_SECONDS"

    def action() -> Source:
        mlflow_import.prepare(tables=False)
        return attempts.retry(lambda: resolve(uri), policy)

    return attempts.run_with_timeout(seconds, action, what)


def _no_model(uri: str, names: Sequence[str]) -> RoleError:
    if not names:
        return RoleError(f"no MLflow model at {uri}: nothing is there")
    nested = next((name for name in names if name.endswith(f"/{MODEL_FILE}")), None)
    hint = f"; there is one at {nested}, ask for {uri.rstrip('/')}/{PurePosixPath(nested).parent}" if nested else ""
    return RoleError(f"no MLflow model at {uri}: no {MODEL_FILE} among its {len(names)} files{hint}")


def _locate(uri: str) -> tuple[Any, str, dict[str, str]]:
    """The artifact repository of a model, the model's path in it, and the identity it resolved to."""
    mlflow_import.prepare()
    from mlflow import MlflowClient, get_registry_uri
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    scheme, _, rest = uri.partition(":/")
    if rest.startswith("/"):
        return get_artifact_repository(uri), "", {"uri": mask_uri(uri)}
    rest = rest.strip("/")
    if scheme == "models":
        client = MlflowClient()
        name, _, suffix = rest.partition("/")
        if not suffix and "@" not in name:
            return _logged_model(client.get_logged_model(name))
        version = _pinned(client, name, suffix)
        repository = get_artifact_repository(f"models:/{version.name}/{version.version}")
        identity = {
            "registry": mask_uri(get_registry_uri()),
            "name": version.name,
            "version": str(version.version),
            "created": str(version.creation_timestamp),
            "source": mask_uri(str(version.source)),
            "run": version.run_id or "",
        }
        return repository, "", identity
    if scheme == "runs":
        run_id, _, path = rest.partition("/")
        client = MlflowClient()
        info = client.get_run(run_id).info
        # MLflow 3 keeps a run's models apart from its artifacts, under the same path.
        name, _, inner = path.partition("/")
        if model := _model_of_run(client, run_id, info.experiment_id, name):
            repository, _, identity = _logged_model(model)
            return repository, inner, {**identity, "path": inner}
        return get_artifact_repository(info.artifact_uri), path, {"run": run_id, "path": path}
    return get_artifact_repository(uri), "", {"uri": mask_uri(uri)}


def _check_host(uri: str, repository: Any) -> None:
    """Raise `RoleError` where a login would go to a host that the registry chose, and the user never named.

    MLflow sends it to every HTTP server that a model's source names, and who may register models may name any.
    """
    from mlflow import get_registry_uri, get_tracking_uri
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

    inner = getattr(repository, "repo", repository)
    if not isinstance(inner, HttpArtifactRepository) or not uri.startswith(("models:", "runs:")):
        return
    credentials = inner._host_creds
    login = credentials.username or credentials.token or credentials.auth or credentials.aws_sigv4
    there = urllib.parse.urlsplit(inner.artifact_uri)
    if login and _origin(inner.artifact_uri) not in (_origin(get_tracking_uri()), _origin(get_registry_uri())):
        raise RoleError(
            f"cannot read {uri}: its files are said to be at {mask_uri(inner.artifact_uri)}, which is not the host of "
            f"MLFLOW_TRACKING_URI and so is not sent its login. If that host is yours, ask it for the files directly: "
            f"mlflow-artifacts://{there.netloc.rpartition('@')[2]}/..."
        )


def _origin(uri: str) -> tuple[str, str | None, int | None]:
    found = urllib.parse.urlsplit(uri)
    return found.scheme, found.hostname, found.port or {"http": 80, "https": 443}.get(found.scheme)


def _logged_model(model: Any) -> tuple[Any, str, dict[str, str]]:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    identity = {"model_id": model.model_id, "created": str(model.creation_timestamp)}
    return get_artifact_repository(model.artifact_location), "", identity


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
