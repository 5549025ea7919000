"""Build images without a Docker engine, with Debian's buildah, for the tests and the report."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASE = ROOT / "build" / "base.tar"

# Any moment will do: with one told, the same inputs give the same digest.
TIMESTAMP = 1767225600


def base() -> str:
    """The name of the image of `make base-image`, imported if it isn't there yet."""
    name = f"localhost/darwin-base:{hashlib.sha256(BASE.read_bytes()).hexdigest()[:16]}"
    if subprocess.run(["podman", "image", "exists", name], check=False).returncode:
        subprocess.run(["podman", "import", "--quiet", BASE, name], check=True, stdout=subprocess.DEVNULL)
    return name


def build(tag: str, *options: str, context: Path = ROOT, **arguments: str) -> str:
    """Build the Dockerfile in `context` on `base` with these build arguments; returns the image's ID.

    Raises `RuntimeError` with what the build wrote when it fails.
    """
    told = [f"--build-arg={name}={value}" for name, value in ({"BASE_IMAGE": base()} | arguments).items()]
    command = [
        "buildah",
        "bud",
        "--isolation=chroot",
        "--network=host",
        "--layers",
        "--force-rm",
        f"--timestamp={TIMESTAMP}",
    ]
    done = subprocess.run(
        [*command, *told, *options, f"--tag={tag}", str(context)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout}{done.stderr}")
    return done.stdout.split()[-1]


def inspect(image: str, template: str) -> str:
    """What `podman image inspect` says, by a Go template."""
    command = ["podman", "image", "inspect", "--format", template, image]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
