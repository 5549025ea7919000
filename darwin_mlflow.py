"""MLflow's import, with our defaults for what it reads from the environment and the user left unset."""

from __future__ import annotations

import gc
import os
import sys
import warnings

DEFAULTS = {
    # Its log lines go through our handler, which masks secrets.
    "MLFLOW_CONFIGURE_LOGGING": "false",
    # Nothing may leave a closed cluster.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Its own retries multiply with ours; its default is 7, growing to minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    # It holds whole chunks, up to 2 GiB, in memory.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    # Without a git binary, GitPython warns at import.
    "GIT_PYTHON_REFRESH": "quiet",
}


def prepare(**more: str) -> None:
    """Import MLflow, after setting `DEFAULTS` and `more` where nothing is set. Takes seconds: call it when needed."""
    for name, value in {**DEFAULTS, **more}.items():
        if not os.environ.get(name):
            os.environ[name] = value
    if "mlflow" in sys.modules:
        return
    collects = gc.isenabled()
    gc.disable()
    with warnings.catch_warnings():
        # It warns of its own type hints.
        warnings.simplefilter("ignore")
        import mlflow  # noqa: F401
    # What it brings stays to the end. Looking for garbage among it, now and again at exit, takes a third of a second.
    gc.freeze()
    if collects:
        gc.enable()
