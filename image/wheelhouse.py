"""Gather every wheel that a build of the image needs, for building without a network: `make wheelhouse`."""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEELHOUSE = ROOT / "wheelhouse"

# What is not installed with a model's requirements though something asks for it: see image/install.sh, `make lock`.
_LEFT_OUT = ("mlflow", "graphviz", "matplotlib", "plotly", "gitpython", "databricks-sdk")

# The newest glibc whose wheels are taken: Debian 12's, on which the official slim images are built.
_GLIBC_MINOR = 36


def _default(argument: str) -> str:
    """The default of one of the Dockerfile's arguments."""
    found = re.search(rf'^ARG {argument}="?([^"\n]*)', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    return found[1]


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
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return into

    def download(self, pins: Path) -> None:
        """Put the wheels of `pins` into the wheelhouse."""
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        kinds = ["manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, _GLIBC_MINOR + 1))]
        tags = [f"--platform={kind}_{self._machine}" for kind in kinds]
        which = ["--only-binary=:all:", f"--python-version={self._python}", "--implementation=cp", *tags]
        subprocess.run([*pip, "--require-hashes", *which, "--dest", WHEELHOUSE, "--requirement", pins], check=True)


def gather(target: Target, flavors: Sequence[str], model: Path | None) -> None:
    """Fill the wheelhouse with the locked packages of `flavors`, and what the requirements of a `model` change."""
    locks = [ROOT / "requirements" / f"{name}.txt" for name in ("runtime", *flavors)]
    if unknown := [lock for lock in locks if not lock.exists()]:
        sys.exit(f"there is no flavor {unknown[0].stem}")
    for old in WHEELHOUSE.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as directory:
        pins = target.pins(Path(directory, "image.txt"), locks, "--no-deps")
        target.download(pins)
        target.download(target.pins(Path(directory, "sbom.txt"), [ROOT / "requirements" / "sbom.txt"], "--no-deps"))
        if model:
            present = Path(directory, "present.in")
            present.write_text("\n".join(re.findall(r"^([\w.-]+)==", pins.read_text(), re.MULTILINE)))
            excludes = Path(directory, "excludes")
            excludes.write_text("\n".join(_LEFT_OUT))
            target.download(target.pins(pins, [model, present], "--only-binary=:all:", f"--excludes={excludes}"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m image.wheelhouse", description=__doc__)
    base = _default("BASE_IMAGE")
    parser.add_argument(
        "--python", default=re.sub(r"^python:(3\.\d+).*", r"\1", base), help="minor version (%(default)s)"
    )
    parser.add_argument("--machine", default=platform.machine(), help="x86_64 or aarch64 (%(default)s)")
    parser.add_argument("--flavors", default=_default("FLAVORS"), help='as for the Dockerfile ("%(default)s")')
    parser.add_argument("--model-requirements", type=Path, metavar="FILE", help="a model's own requirements.txt")
    chosen = parser.parse_args()
    gather(Target(chosen.python, chosen.machine), chosen.flavors.split(), chosen.model_requirements)
    wheels = list(WHEELHOUSE.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.0f} MB, for Python {chosen.python} on {chosen.machine}: {WHEELHOUSE}")


if __name__ == "__main__":
    main()
