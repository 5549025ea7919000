"""MLflow's import, with our defaults for what it reads from the environment and the user left unset."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator, Mapping

DEFAULTS = {
    # Its log lines go through our handler, which masks secrets.
    "MLFLOW_CONFIGURE_LOGGING": "false",
    # Nothing may leave a closed cluster.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Its own retries multiply with ours; its default is 7, growing to minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    # As many connections as a download has files under way. It warns of each that it closes.
    "MLFLOW_HTTP_POOL_MAXSIZE": "16",
    # It holds whole chunks, up to 2 GiB, in memory.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    # Without a git binary, GitPython warns at import.
    "GIT_PYTHON_REFRESH": "quiet",
}

# Where they are, MLflow imports them for what it does with tables. Where they aren't, as with `mlflow-skinny` alone,
# its clients work without: in 50 MiB less, and a third of a second earlier.
TABLE_LIBRARIES = ("pandas", "numpy")

# Whose entry points are no plugins.
ITSELF = ("mlflow", "mlflow-skinny", "mlflow-tracing")


def prepare(more: Mapping[str, str] = DEFAULTS, *, tables: bool = True) -> None:
    """Import MLflow, after setting `DEFAULTS` and `more` where nothing is set. Takes seconds: call it when needed.

    Without `tables` it is good for its clients only, in a process that does not load models.
    """
    for name, value in {**DEFAULTS, **more}.items():
        if not os.environ.get(name):
            os.environ[name] = value
    if "mlflow" in sys.modules:
        return
    collects = gc.isenabled()
    gc.disable()
    with warnings.catch_warnings(), contextlib.nullcontext() if tables or _has_plugins() else _hidden(TABLE_LIBRARIES):
        # It warns of its own type hints.
        warnings.simplefilter("ignore")
        import mlflow  # noqa: F401
    # What it brings stays to the end. Looking for garbage among it, now and again at exit, takes a third of a second.
    gc.freeze()
    if collects:
        gc.enable()


def _has_plugins() -> bool:
    """Whether MLflow imports code of others along with itself, which may need anything."""
    groups = [group for group in importlib.metadata.entry_points().groups if group.startswith("mlflow.")]
    plugins = (plugin for group in groups for plugin in importlib.metadata.entry_points(group=group))
    return any(plugin.dist is None or plugin.dist.name not in ITSELF for plugin in plugins)


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Have `names` look as if they were not installed."""
    new = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(new))  # type: ignore[arg-type]  # None is how the import system has it
    try:
        yield
    finally:
        for name in new:
            del sys.modules[name]
