"""What is in the image, and that the same comes out of every build. All builds here are without a network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from image import build
from tests.conftest import ROOT
from tests.image.containers import run
from tests.test_deploy import default_flavors, pins

PYTHON = "3.11"


def packages(image: str) -> dict[str, str]:
    """Name -> version of what the image's list of packages names."""
    document = json.loads(run(image, "cat", "/sbom/packages.cdx.json").out)
    assert document["bomFormat"] == "CycloneDX"
    return {canonical(one["name"]): one["version"] for one in document["components"]}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def locked(*names: str) -> dict[str, str]:
    together = {package: pin for name in names for package, pin in pins(name, PYTHON).items()}
    return {canonical(package): pin.removeprefix("==") for package, pin in together.items()}


def test_the_default_image_has_what_is_locked(image: str) -> None:
    assert packages(image) == locked("runtime", *default_flavors())
    installed = "import importlib.metadata as m; print(*sorted({d.name for d in m.distributions()}))"
    assert {canonical(name) for name in run(image, "python", "-c", installed).out.split()} == packages(image).keys()


def test_every_licence_is_known(image: str) -> None:
    lines = run(image, "cat", "/sbom/licences.txt").out.splitlines()
    told = {canonical(name): licence for name, _, licence in (line.split(maxsplit=2) for line in lines)}
    assert told.keys() == packages(image).keys()
    assert "unknown" not in told.values()
    assert told["numpy"].startswith("BSD-3-Clause")


def test_fewer_flavors_bring_fewer_packages(sklearn_image: str) -> None:
    assert packages(sklearn_image) == locked("runtime", "sklearn")


def test_the_labels_tell_what_it_is(image: str) -> None:
    labels = json.loads(build.inspect(image, "{{json .Labels}}"))
    assert f'version = "{labels["org.opencontainers.image.version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert labels["org.opencontainers.image.base.name"] == build.base()
    assert {"title", "description", "revision"} <= {name.rpartition(".")[2] for name in labels}


def test_the_same_inputs_give_the_same_image(image: str, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    again.mkdir()
    for pattern in ("*.py", "*.html", "Dockerfile", ".dockerignore"):
        for file in ROOT.glob(pattern):
            shutil.copyfile(file, again / file.name)
    for name in ("image", "requirements", "wheelhouse"):
        shutil.copytree(ROOT / name, again / name, copy_function=shutil.copy)
    # Another checkout: other times, another umask, files that do not matter.
    for file in again.glob("*.py"):
        os.utime(file, (1e9, 1e9))
        file.chmod(0o600)
    (again / "notes.txt").write_text("not for the image")
    identity = build.build("localhost/darwin-test:again", "--no-cache", context=again)
    assert identity == build.inspect(image, "{{.Id}}")


def test_a_models_own_requirements_win(sklearn_image: str) -> None:
    tag = "localhost/darwin-test:model"
    lock = (ROOT / "tests" / "image" / "requirements.txt").read_text()
    context_file = ROOT / "requirements" / "a-model-of-the-tests.txt"
    context_file.write_text(lock)
    try:
        build.build(tag, FLAVORS="sklearn", MODEL_REQUIREMENTS=f"requirements/{context_file.name}")
    finally:
        context_file.unlink()
    before, after = packages(sklearn_image), packages(tag)
    assert before["joblib"] != "1.5.2"
    # MLflow stays ours.
    assert after == before | {"joblib": "1.5.2", "humanize": "4.13.0"}


def test_requirements_that_do_not_fit_stop_the_build() -> None:
    context_file = ROOT / "requirements" / "a-model-of-the-tests.txt"
    context_file.write_text("joblib==0.1\n")
    try:
        with pytest.raises(RuntimeError, match=r"No matching distribution found for joblib==0\.1"):
            build.build(
                "localhost/darwin-test:none", FLAVORS="", MODEL_REQUIREMENTS=f"requirements/{context_file.name}"
            )
    finally:
        context_file.unlink()


def test_an_unknown_flavor_stops_the_build_and_says_which_there_are() -> None:
    with pytest.raises(RuntimeError, match="there is no flavor sklaern") as caught:
        build.build("localhost/darwin-test:none", FLAVORS="sklaern")
    assert "requirements/sklearn.txt" in str(caught.value)
