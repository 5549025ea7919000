"""The settings by which a model is found and read, checked before any store is asked."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from darwin_runtime.redact import mask_uri
from darwin_runtime.settings import Reader

MODEL_URI_EXAMPLE = "models:/my-model/3"

# The path of MLflow's artifact server. An http(s) URI without it is no MLflow server's.
ARTIFACTS = "/mlflow-artifacts/artifacts"

# The variables that decide, beside the URI, where the bytes of a model come from.
_OF_TRACKING = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_WORKSPACE"),
    *("DATABRICKS_HOST", "DATABRICKS_CONFIG_PROFILE", "DATABRICKS_CONFIG_FILE"),
)
_OF_STORE = (
    *("MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_CONFIG_FILE"),
    *("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "STORAGE_EMULATOR_HOST", "AZURE_STORAGE_CONNECTION_STRING"),
)
_PLACE = (*_OF_TRACKING, *_OF_STORE)

# The parts of Azure's connection string that are no secret.
_AZURE_PLACE = ("AccountName", "BlobEndpoint", "DefaultEndpointsProtocol", "EndpointSuffix")

# Values that go into a header or a URL as they are. A Secret that `echo` made ends with a line end.
_ONE_LINE = (
    *_PLACE,
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_UC_OSS_TOKEN"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ROLE_ARN", "AZURE_STORAGE_ACCESS_KEY", "DATABRICKS_TOKEN"),
    *("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"),
)


def needs_tracking(uri: str) -> bool:
    return uri.startswith(("models:", "runs:", "mlflow-artifacts:"))


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
    if scheme in ("http", "https") and f"{ARTIFACTS}/" not in rest:
        return (
            "is no place of an MLflow server's artifacts (.../api/2.0/mlflow-artifacts/artifacts/<path>); archives and "
            "web directories cannot be read: log the model to MLflow, or copy its directory to a store"
        )
    return None


def check_access(read: Reader, variable: str, uri: str) -> None:
    """Read what `uri`, given as `variable`, needs to be found; problems with it or with them are added to `read`.

    A mistake that is found here ends the role. Found later, it could pass for an outage.
    """
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
    for name in _ONE_LINE:
        if any(not letter.isprintable() for letter in read.environ.get(name, "")):
            read.problems.append(
                f"{name} holds a line end or another character that cannot be printed; a Secret from `echo` has one: "
                f"make it with `printf %s` or `kubectl create secret --from-literal`"
            )
    for name, check in _FILES.items():
        if (path := read.raw(name)) and (why := _why_unusable(Path(path), check)):
            read.problems.append(f"{name}={path}: {why}")


def _check_ca(path: Path) -> None:
    context = ssl.create_default_context()
    context.load_verify_locations(**{"capath" if path.is_dir() else "cafile": str(path)})


def _check_client(path: Path) -> None:
    ssl.create_default_context().load_cert_chain(path)


# The files that clients of stores read, and how.
_FILES: Mapping[str, Callable[[Path], None]] = {
    **dict.fromkeys(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE"), _check_ca),
    "MLFLOW_TRACKING_SERVER_CERT_PATH": _check_ca,
    "MLFLOW_TRACKING_CLIENT_CERT_PATH": _check_client,
}


def _why_unusable(path: Path, check: Callable[[Path], None]) -> str | None:
    try:
        check(path)
    except ssl.SSLError as error:
        needed = "a PEM certificate and its private key" if check is _check_client else "PEM certificates"
        return f"the file does not hold {needed} ({error.reason or error}); mount the right file"
    except OSError as error:
        return f"the file cannot be read ({error.strerror}); mount it there, or unset the variable"
    return None


def place(uri: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What decides, beside `uri`, where its bytes come from: variable -> value, without secrets."""
    names = _PLACE if needs_tracking(uri) else _OF_STORE
    return {name: _shown(name, value) for name in names if (value := environ.get(name, "").strip())}


def _shown(name: str, value: str) -> str:
    if name == "AZURE_STORAGE_CONNECTION_STRING":
        return ";".join(sorted(part for part in value.split(";") if part.partition("=")[0] in _AZURE_PLACE))
    return mask_uri(value)


def identify(uri: str, resolved: Mapping[str, str]) -> dict[str, str]:
    """The identity of what `uri` resolved to: with the place that it comes from.

    A tracking server that is its own registry is named once.
    """
    where = place(uri)
    if where.get("MLFLOW_TRACKING_URI") == resolved.get("registry"):
        where.pop("MLFLOW_TRACKING_URI", None)
    return {**where, **resolved}


def comes_from_here(uri: str, model_uri: str, identity: Mapping[str, str]) -> bool:
    """Whether a model is of `uri` as it is now: `model_uri` had led to `identity`, and would be asked in that place."""
    if model_uri != mask_uri(uri):
        return False
    then = {name: value for name, value in identity.items() if name in _PLACE}
    if "registry" in identity:
        then.setdefault("MLFLOW_TRACKING_URI", identity["registry"])
    return then == place(uri)
