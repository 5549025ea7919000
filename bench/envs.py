"""Virtual environments: one for this server as its users install it, one for each peer; made from hashed locks."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import BUILD, ROOT

# What the image brings with FLAVORS="sklearn lightgbm xgboost".
OURS = "ours"
_OUR_LOCKS = [ROOT / "requirements" / f"{name}.txt" for name in ("runtime", "sklearn", "lightgbm", "xgboost")]

_VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"

# As image/install.sh does: MLflow asks whether there is a databricks.agents, and counts on a databricks to look into.
_NAMESPACE = "import pathlib, sysconfig as s; pathlib.Path(s.get_path('purelib'), 'databricks').mkdir(exist_ok=True)"


def locks(name: str) -> list[Path]:
    """The files that pin everything in the environment `name`."""
    return _OUR_LOCKS if name == OURS else [ROOT / "bench" / "requirements" / f"{name}.txt"]


def python(name: str) -> Path:
    """The interpreter of the environment `name`, whether or not that has been made."""
    return BUILD / "envs" / name / "bin" / "python"


def digest(name: str) -> str:
    """Changes whenever what is installed in the environment `name` would."""
    parts = [sys.version.encode(), *(lock.read_bytes() for lock in locks(name))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def ensure(name: str) -> None:
    """Make the environment `name`, unless it is there and made from the locks as they are now."""
    home = BUILD / "envs" / name
    stamp = home / "made-from"
    if stamp.is_file() and stamp.read_text() == digest(name):
        return
    sys.stderr.write(f"installing {name} to {home.relative_to(ROOT)}\n")
    _run([sys.executable, "-m", "venv", "--clear", str(home)])
    pip = [str(python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = [part for lock in locks(name) for part in ("-r", str(lock))]
    _run([*pip, "--only-binary=:all:", "--require-hashes", "--no-deps", *wanted])
    if name == OURS:
        _run([str(python(name)), "-c", _NAMESPACE])
    stamp.write_text(digest(name))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}")


def versions(name: str, packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each of `packages` in the environment `name`."""
    done = subprocess.run([python(name), "-c", _VERSIONS, *packages], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))
