"""MLflow's import for those who only download."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, clean_environ

SCRIPT = """
import sys
from darwin_runtime import mlflow_import
mlflow_import.prepare(tables=False)
print(sorted(set(mlflow_import.TABLE_LIBRARIES) & sys.modules.keys()))
import mlflow, pandas
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
print(get_artifact_repository("s3://bucket/model").artifact_uri, pandas.DataFrame({"x": [1]}).shape)
"""


def script(*path: Path) -> list[str]:
    environ = clean_environ(PYTHONPATH=":".join(map(str, (ROOT, *path))))
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_who_downloads_needs_no_tables() -> None:
    assert script() == ["[]", "s3://bucket/model (1, 1)"]


def test_plugins_find_what_is_installed(tmp_path: Path) -> None:
    """MLflow imports them along with itself, and goes on without those that it can't import."""
    (tmp_path / "plugin.py").write_text(
        "import pandas\nfrom mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository as Repository\n"
    )
    about = tmp_path / "plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[mlflow.artifact_repository]\ns3 = plugin:Repository\n")
    assert script(tmp_path)[0] == "['numpy', 'pandas']"
