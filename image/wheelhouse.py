"""Gather every wheel that a build of the image needs, for building without a network: `make wheelhouse`."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WHEELHOUSE = ROOT / "wheelhouse"

# What image/install.sh does not resolve with a model's requirements, as something they ask for was left out on purpose.
_APART = ("mlflow", "mlflow-skinny", "catboost")

# The newest glibc whose wheels are taken: Debian 12's, on which the official slim images are built.
_GLIBC_MINOR = 36


def default(argument: str) -> str:
    """The default of one of the Dockerfile's arguments."""
    found = re.search(rf'^ARG {argument}="?([^"\n]*)', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _run(command: Sequence[str | Path], **options: Any) -> None:
    """Run it; where it fails it has said why, and so this ends."""
    if code := subprocess.run(command, check=False, **options).returncode:
        sys.exit(code)


class Target:
    """The Python and the machine that the wheels are for, which need not be those that gather them."""

    def __init__(self, python: str, machine: str) -> None:
        self._python = python
        self._machine = machine

    def pins(self, into: Path, sources: Sequence[Path], *options: str) -> Path:
        """Write to `into` what of `sources` is for this target. What is there already is preferred."""
        uv = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--generate-hashes", *options]
        target = ["--python-version", self._python, "--python-platform", f"{self._machine}-manylinux_2_{_GLIBC_MINOR}"]
        command: list[str | Path] = [*uv, *target, *sources, "--output-file", into]
        index = {"UV_DEFAULT_INDEX": os.environ["PIP_INDEX_URL"]} if os.environ.get("PIP_INDEX_URL") else {}
        _run(command, stdout=subprocess.DEVNULL, env={**os.environ, **index})
        return into

    def download(self, pins: Path) -> None:
        """Put the wheels of `pins` into the wheelhouse."""
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        kinds = ["manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, _GLIBC_MINOR + 1))]
        tags = [f"--platform={kind}_{self._machine}" for kind in kinds]
        which = ["--only-binary=:all:", f"--python-version={self._python}", "--implementation=cp", *tags]
        _run([*pip, "--require-hashes", *which, "--dest", WHEELHOUSE, "--requirement", pins])


def gather(target: Target, flavors: Sequence[str], model: Path | None) -> None:
    """Fill the wheelhouse with the locked packages of `flavors`, and what the requirements of a `model` change."""
    locks = [ROOT / "requirements" / f"{name}.txt" for name in ("runtime", *flavors)]
    if missing := [path for path in (*locks, *([model] if model else ())) if not path.is_file()]:
        sys.exit(f"there is no {missing[0]}")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        found = [
            target.pins(place / "image.txt", locks, "--no-deps"),
            target.pins(place / "sbom.txt", [ROOT / "requirements" / "sbom.txt"], "--no-deps"),
        ]
        if model:
            locked = found[0].read_text()
            present = place / "present.in"
            names = set(re.findall(r"^([\w.-]+)==", locked, re.MULTILINE)) - set(_APART)
            present.write_text("\n".join(sorted(names)))
            apart, alone = place / "apart", place / "alone.in"
            apart.write_text("\n".join(_APART))
            alone.write_text("\n".join(re.findall(r"^catboost\b.*", model.read_text(), re.MULTILINE | re.IGNORECASE)))
            found.append(target.pins(place / "alone.txt", [alone], "--no-deps"))
            # What is locked is preferred, and other indexes that the list names count like the first, as with pip.
            preferred = place / "model.txt"
            preferred.write_text(locked)
            options = (
                f"--excludes={apart}",
                "--index-strategy=unsafe-best-match",
                "--emit-index-url",
                "--emit-find-links",
            )
            found.append(target.pins(preferred, [model, present], "--only-binary=:all:", *options))
        for old in WHEELHOUSE.glob("*.whl"):
            old.unlink()
        for pins in found:
            target.download(pins)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m image.wheelhouse", description=__doc__)
    base = default("BASE_IMAGE")
    parser.add_argument(
        "--python", default=re.sub(r"^python:(3\.\d+).*", r"\1", base), help="minor version (%(default)s)"
    )
    parser.add_argument("--machine", default=platform.machine(), help="x86_64 or aarch64 (%(default)s)")
    parser.add_argument("--flavors", default=default("FLAVORS"), help='as for the Dockerfile ("%(default)s")')
    parser.add_argument("--model-requirements", type=Path, metavar="FILE", help="a model's own requirements.txt")
    chosen = parser.parse_args()
    gather(Target(chosen.python, chosen.machine), chosen.flavors.split(), chosen.model_requirements)
    wheels = list(WHEELHOUSE.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.0f} MB, for Python {chosen.python} on {chosen.machine}: {WHEELHOUSE}")


if __name__ == "__main__":
    main()
