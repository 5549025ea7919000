"""What `/openapi.json` says one may ask is asked, and the answers are what it says, with Schemathesis."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import model_path
from tests.support.servers import serving

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_headers_conformance", "response_schema_conformance"),
)


@pytest.mark.parametrize("kind", ["iris", "typed", "tensors", "chatting"])
def test_answers_are_what_the_document_says(kind: str, tmp_path: Path) -> None:
    with serving(model_path(kind), WORKERS=1) as served:
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "--no-color", "run", f"{served.url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", "10"),
            *("--generation-deterministic", "--warnings", "off"),
        ]
        # Where it would look for settings, and write to.
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in served.log
    tested = re.search(r"^ *(\d+) generated, (\d+) passed", done.stdout, re.MULTILINE)
    assert tested, done.stdout
    assert int(tested[1]) == int(tested[2]) >= 300
