"""Each role as a container starts it, `python <role>.py`, and each exit code that it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from darwin_runtime.storage.cache import Cache
from tests.conftest import run_fresh
from tests.support.models import model_path


def test_a_download(tmp_path: Path) -> None:
    done = run_fresh("download.py", MODEL_URI=model_path("iris"), OUTPUT_PATH=tmp_path / "models")
    assert done.code == 0, done.err
    assert (tmp_path / "models" / "MLmodel").read_bytes() == (model_path("iris") / "MLmodel").read_bytes()
    assert done.out == ""


@pytest.mark.parametrize(
    ("script", "settings", "code", "words"),
    [
        ("download.py", {"MODEL_URI": "/nowhere/at/all", "OUTPUT_PATH": "{tmp}/models"}, 1, "/nowhere/at/all"),
        ("download.py", {"OUTPUT_PATH": "{tmp}/models"}, 2, "MODEL_URI"),
        ("darwin_serve.py", {"MODEL_LOCAL_PATH": "{tmp}", "HOST": "127.0.0.1", "PORT": "0"}, 1, "no model at {tmp}"),
        ("darwin_serve.py", {}, 2, "MODEL_LOCAL_PATH"),
        ("cleanup.py", {"CACHE_PATH": "{tmp}/none"}, 0, "is empty, nothing to do"),
        ("cleanup.py", {"CACHE_PATH": "{tmp}/cache", "NAMESPACE": "default"}, 1, "cannot list pods"),
        ("cleanup.py", {"CACHE_PATH": "{tmp}/cache", "TTL_DAYS": "soon"}, 2, "TTL_DAYS"),
    ],
)
def test_an_exit_code(script: str, settings: dict[str, str], code: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (Cache.prepare(tmp_path / "cache").root / "notes").mkdir()
    done = run_fresh(script, **{name: value.format(tmp=tmp_path) for name, value in settings.items()})
    assert done.code == code, done.err
    assert words.format(tmp=tmp_path) in done.err
    assert "Traceback" not in done.err
