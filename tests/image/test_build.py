"""What is in the image, and that the same comes out of every build. All builds here are without a network."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    for pattern in ("*.py", "Dockerfile", ".dockerignore"):
        for file in ROOT.glob(pattern):
            shutil.copyfile(file, again / file.name)
    for name in ("darwin_runtime", "image", "requirements", "wheelhouse"):
        shutil.copytree(ROOT / name, again / name, copy_function=shutil.copy)
    # Another checkout: other times, another umask, files that do not matter.
    for file in (*again.glob("*.py"), *again.glob("darwin_runtime/**/*.py")):
        os.utime(file, (1e9, 1e9))
        file.chmod(0o600)
    (again / "notes.txt").write_text("not for the image")
    identity = build.build("localhost/darwin-test:again", "--no-cache", context=again)
    assert identity == build.inspect(image, "{{.Id}}")


@contextmanager
def given(**files: str) -> Iterator[str]:
    """MODEL_REQUIREMENTS, while these files are in requirements/; the first is the list."""
    paths = [ROOT / "requirements" / f"{name}.txt" for name in files]
    try:
        for path, text in zip(paths, files.values(), strict=True):
            path.write_text(text)
        yield str(paths[0].relative_to(ROOT))
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def test_a_models_own_requirements_win(image: str) -> None:
    tag = "localhost/darwin-test:model"
    here = Path(__file__).parent
    texts = {
        name: (here / f"{file}.txt").read_text()
        for name, file in (("a-list", "requirements"), ("constraints", "constraints"))
    }
    texts["a-list"] = texts["a-list"].replace("\n", "\r\n")
    with given(**texts) as path:
        build.build(tag, MODEL_REQUIREMENTS=path)
    before, after = packages(image), packages(tag)
    changed = {"joblib": "1.5.2", "humanize": "4.13.0", "catboost": "1.2.8"}
    assert not changed.items() & before.items()
    # MLflow stays ours, and CatBoost comes without what only its plots need.
    assert after == before | changed


@pytest.mark.parametrize(
    ("text", "flavors", "says"),
    [
        ("joblib==0.1", "", r"No matching distribution found for joblib==0\.1"),
        ("lightgbm", "", "LightGBM needs the OpenMP library that scikit-learn brings"),
    ],
    ids=["what does not exist", "LightGBM without OpenMP"],
)
def test_what_cannot_work_stops_the_build(text: str, flavors: str, says: str) -> None:
    with given(**{"a-list": text}) as path, pytest.raises(RuntimeError, match=says):
        build.build("localhost/darwin-test:none", FLAVORS=flavors, MODEL_REQUIREMENTS=path)


def test_requirements_that_are_not_there_stop_the_build() -> None:
    with pytest.raises(RuntimeError, match=r"there is no MODEL_REQUIREMENTS=model/requirements\.txt: copy the file"):
        build.build("localhost/darwin-test:none", FLAVORS="", MODEL_REQUIREMENTS="model/requirements.txt")


def test_an_unknown_flavor_stops_the_build_and_says_which_there_are() -> None:
    with pytest.raises(RuntimeError, match="there is no flavor sklaern") as caught:
        build.build("localhost/darwin-test:none", FLAVORS="sklaern")
    assert "requirements/sklearn.txt" in str(caught.value)
