"""Pin and hash what each peer needs: `python -m bench.lock` makes bench/requirements/*.txt from the *.in beside them.

What is pinned already stays, unless `--upgrade` is given.

The libraries that models are made of get the versions of requirements/, so that every server loads the same files.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import ROOT

_SHARED = {
    "joblib",
    "lightgbm",
    "mlflow",
    "mlflow-skinny",
    "numpy",
    "pandas",
    "scikit-learn",
    "scipy",
    "skops",
    "xgboost-cpu",
}

_PIN = re.compile(r"^(?P<pin>(?P<name>[\w-]+)==.*?) \\$", re.MULTILINE)


def _pins() -> list[str]:
    """Constraints such as `numpy==2.2.6 ; python_full_version < '3.11'`."""
    text = "\n".join(lock.read_text() for lock in sorted((ROOT / "requirements").glob("*.txt")))
    return sorted({found["pin"] for found in _PIN.finditer(text) if found["name"] in _SHARED})


def main() -> None:
    uv = str(Path(sys.executable).with_name("uv"))
    options = [*sys.argv[1:], "--quiet", "--universal", "--python-version", "3.10", "--generate-hashes"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(_pins()) + "\n")
        constraints.flush()
        for wanted in sorted((ROOT / "bench" / "requirements").glob("*.in")):
            made = wanted.with_suffix(".txt")
            command = [uv, "pip", "compile", *options, "--no-annotate", "--no-header", "-c", constraints.name]
            subprocess.run([*command, wanted, "-o", made], check=True)


if __name__ == "__main__":
    main()
