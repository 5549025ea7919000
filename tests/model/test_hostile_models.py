"""Model directories that nobody logged: what our own code reads of them stays in them, ends, and is told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from darwin_runtime.errors import RoleError
from darwin_runtime.model.about import about_model
from darwin_runtime.model.load import load_model
from darwin_runtime.model.self_test import load_checked
from tests.conftest import run_role
from tests.support.models import model_path
from tests.support.servers import serving


@pytest.fixture
def iris(tmp_path: Path) -> Path:
    return shutil.copytree(model_path("iris"), tmp_path / "iris")


def describe(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    description = yaml.safe_load((model / "MLmodel").read_text())
    change(description)
    (model / "MLmodel").write_text(yaml.safe_dump(description))


def flavor(name: str, key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda description: description["flavors"].setdefault(name, {}).update({key: value})


def example(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda description: description["saved_input_example_info"].update({key: value})


CLIMBING = ["../secret.json", "/etc/passwd", "code/../../secret.json", ".."]


@pytest.mark.parametrize("name", CLIMBING)
@pytest.mark.parametrize(
    "place",
    [
        lambda name: flavor("python_function", "data", name),
        lambda name: flavor("python_function", "code", name),
        lambda name: flavor("python_function", "model_path", name),
        lambda name: flavor("python_function", "python_model", name),
        lambda name: flavor(
            "python_function", "artifacts", {"weights": {"path": name, "uri": "file:///home/me/weights"}}
        ),
        lambda name: flavor("sklearn", "pickled_model", name),
        lambda name: flavor("sklearn", "code", name),
        lambda name: example("artifact_path", name),
        lambda name: example("serving_input_path", name),
    ],
)
def test_no_path_leads_out_of_a_model(
    place: Callable[[str], Callable[[dict[str, Any]], object]], name: str, iris: Path
) -> None:
    (iris.parent / "secret.json").write_text('{"inputs": [["s3cr3t"]]}')
    describe(iris, place(name))
    with pytest.raises(RoleError, match="leads out of the model: it is not loaded") as caught:
        load_checked(iris)
    assert "s3cr3t" not in str(caught.value)


def test_where_models_from_code_once_were_is_no_path_out_of_them(iris: Path) -> None:
    """MLflow keeps the whole path of where the file was and takes the last part."""
    describe(iris, flavor("python_function", "model_code_path", "/home/me/agent.py"))
    load_checked(iris)


def test_an_example_that_is_a_link_to_elsewhere_is_not_shown(iris: Path, caplog: pytest.LogCaptureFixture) -> None:
    (iris.parent / "secret.json").write_text('{"inputs": [["s3cr3t"]]}')
    (iris / "serving_input_example.json").unlink()
    (iris / "serving_input_example.json").symlink_to(iris.parent / "secret.json")
    assert load_model(iris).example is None
    assert "a link that leads out of the model" in caplog.text


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _zero(path: Path) -> None:
    os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))


@contextlib.contextmanager
def _directory_of(path: Path) -> Iterator[str]:
    """A short name of it: of a socket's path, 107 bytes count."""
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{directory}"
    finally:
        os.close(directory)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, _directory_of(path) as short:
        made.bind(f"{short}/{path.name}")


def _link_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_fifo, _zero, _socket, _link_to_zero])
@pytest.mark.parametrize(
    "name", ["model.skops", "requirements.txt", "serving_input_example.json", "registered_model_meta"]
)
def test_what_is_no_file_is_named(name: str, make: Callable[[Path], None], iris: Path) -> None:
    """Reading it would never end. Where it is `MLmodel`, there is no model."""
    (iris / name).unlink(missing_ok=True)
    make(iris / name)
    with pytest.raises(RoleError, match=f"{name} is a pipe, socket or device where a model has files"):
        load_checked(iris)


def test_the_role_ends_instead_of_waiting_for_a_pipe(iris: Path) -> None:
    (iris / "model.skops").unlink()
    os.mkfifo(iris / "model.skops")
    done = run_role("darwin_serve.py", MODEL_LOCAL_PATH=iris, HOST="127.0.0.1", PORT=0)
    assert done.code == 1
    assert "model.skops is a pipe, socket or device" in done.last
    os.mkfifo(iris.parent / "pipe")
    (iris / "MLmodel").unlink()
    os.mkfifo(iris / "MLmodel")
    done = run_role("darwin_serve.py", MODEL_LOCAL_PATH=iris, HOST="127.0.0.1", PORT=0)
    assert done.code == 1
    assert "no model at" in done.last


def test_a_source_that_is_no_file_is_told(iris: Path, tmp_path: Path) -> None:
    """Of the downloader: a local path, or a registry on disk."""
    os.mkfifo(iris / "code")
    done = run_role("download.py", MODEL_URI=iris, OUTPUT_PATH=tmp_path / "models", MAX_RETRIES=0)
    assert done.code == 1
    assert "code is no file, but a pipe, socket or device" in done.last
    assert not (tmp_path / "models" / "MLmodel").exists()


@pytest.mark.parametrize("target", ["outside", "outside/file", "/etc/passwd"])
def test_a_source_that_links_elsewhere_is_not_followed(target: str, iris: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("s3cr3t")
    (iris / "code").symlink_to(tmp_path / target)
    done = run_role("download.py", MODEL_URI=iris, OUTPUT_PATH=tmp_path / "models", MAX_RETRIES=0)
    assert done.code == 1, done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "models").rglob("*code*"))


def test_a_source_that_goes_round_in_circles_ends(iris: Path, tmp_path: Path) -> None:
    (iris / "a").mkdir()
    (iris / "a" / "loop").symlink_to("..")
    done = run_role("download.py", MODEL_URI=iris, OUTPUT_PATH=tmp_path / "models", MAX_RETRIES=0)
    assert done.code == 1
    assert "too deep; nothing was downloaded" in done.last


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b"flavors: [1]",
        b"flavors: {1: 2}",
        b"flavors: {python_function: []}",
        b"!!python/object/apply:os.system [exit]",
        b"a: &a [x]\n"
        + b"".join(b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c]\n" % (98 + n, 98 + n, *(97 + n,) * 6) for n in range(24)),
        b"flavors: {python_function: {loader_module: mlflow.sklearn, data: [1]}}\nutc_time_created: 1\n",
    ],
)
def test_a_description_that_makes_no_sense_is_told(text: bytes, iris: Path) -> None:
    (iris / "MLmodel").write_bytes(text)
    with pytest.raises(RoleError):
        load_checked(iris)


def test_a_description_without_an_end_is_not_read(iris: Path) -> None:
    with (iris / "MLmodel").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RoleError, match="has more than 16777216 bytes"):
        load_checked(iris)


def test_an_example_or_requirements_without_an_end_are_left_out(iris: Path) -> None:
    for name in ("serving_input_example.json", "requirements.txt"):
        with (iris / name).open("wb") as file:
            file.truncate(1 << 40)
    assert load_model(iris).example is None


def test_names_that_are_no_text_do_not_keep_a_model_from_being_served(iris: Path) -> None:
    (iris / os.fsdecode(b"\xff\x1b[2J\n")).touch()
    with serving(iris) as served:
        assert served.get("/docs").status_code == 200
        assert served.get("/openapi.json").status_code == 200
    assert "\x1b" not in served.log


@pytest.mark.parametrize("value", [7, ["x"], {"a": 1}, True])
@pytest.mark.parametrize("key", ["run_id", "mlflow_version", "model_uuid", "utc_time_created", "artifact_path"])
def test_odd_values_are_shown_or_refused_in_words(key: str, value: object, iris: Path) -> None:
    describe(iris, lambda description: description.update({key: value}))
    try:
        model = load_checked(iris)
    except RoleError:
        return
    json.dumps(about_model(model).__dict__)


def test_links_to_nothing_and_rings_of_links_are_no_files(iris: Path) -> None:
    (iris / "gone").symlink_to("nothing")
    (iris / "ring").symlink_to("ring")
    with pytest.raises(RoleError, match="ring"):
        load_checked(iris)
    (iris / "ring").unlink()
    load_checked(iris)


def test_bytecode_is_not_left_beside_a_model_s_code(iris: Path) -> None:
    (iris / "code").mkdir()
    (iris / "code" / "darwin_test_of_bytecode.py").write_text("")
    describe(iris, flavor("python_function", "code", "code"))
    load_checked(iris)
    import importlib

    importlib.import_module("darwin_test_of_bytecode")
    assert os.listdir(iris / "code") == ["darwin_test_of_bytecode.py"]
