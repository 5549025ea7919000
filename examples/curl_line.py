"""Print the curl command that sends a model's own input example to the MLflow route. Used by `make run`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path


def main(model: Path, port: str) -> None:
    body = json.dumps(json.loads((model / "serving_input_example.json").read_text()))
    command = ["curl", f"http://127.0.0.1:{port}/invocations", "-H", "Content-Type: application/json", "-d", body]
    sys.stdout.write(shlex.join(command) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
