"""Finding and loading models, and what is said when that fails; predictions against MLflow's own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from darwin_runtime import mlflow_import
from darwin_runtime.errors import InputRejected, PredictionFailed, RoleError
from darwin_runtime.model.load import SERVING, load_model
from darwin_runtime.model.mlmodel import find_model, read_description, read_example
from tests.support.models import NESTED_ROW, TYPED_ROW, iris_table, load_pyfunc, model_path


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # load() sets these for good; another test may want MLflow's defaults.
    for name, value in (mlflow_import.DEFAULTS | SERVING).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def iris(tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(model_path("iris"), tmp_path / "iris"))


def edit(directory: Path, change: Callable[[Any], Any]) -> None:
    file = directory / "MLmodel"
    description = yaml.safe_load(file.read_text())
    change(description)
    file.write_text(yaml.safe_dump(description))


def test_where_a_model_is_found(tmp_path: Path, iris: Path) -> None:
    inside = tmp_path / "output"
    inside.mkdir()
    (inside / "model").symlink_to(iris)
    assert find_model(iris) == iris
    assert find_model(inside) == iris, "MLflow opens no links that lead out of a model's directory"
    assert find_model(iris / "model") == iris
    (iris / "model").symlink_to(".")
    assert find_model(iris / "model") == iris
    assert find_model(iris) == iris


@pytest.mark.parametrize(
    ("make", "path", "says"),
    [
        (lambda _: None, "absent", "does not exist"),
        (lambda _: None, "", "is empty"),
        (lambda at: (at / "other").touch(), "", "holds no MLflow model"),
        (lambda _: None, "absent/model", "absent/MLmodel"),
        (lambda at: (at / "MLmodel").symlink_to("/cache/k/model/MLmodel"), "", "link to /cache/k/model/MLmodel"),
        (lambda at: (at / "model").symlink_to("/cache/k/model"), "model", "not mounted at the same path"),
        (lambda at: (at / "model").symlink_to("/cache/k/model"), "", "not mounted at the same path"),
    ],
)
def test_no_model(tmp_path: Path, make: Callable[[Path], None], path: str, says: str) -> None:
    make(tmp_path)
    with pytest.raises(RoleError, match=says) as caught:
        find_model(tmp_path / path)
    assert str(tmp_path / path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"artifact_path: model\nflav", b"\xff\xfe\x00", b"{", b"flavors: [a]", b"- a\n", b"a: 'b"]
)
def test_a_damaged_description_is_named(iris: Path, content: bytes) -> None:
    (iris / "MLmodel").write_bytes(content)
    with pytest.raises(RoleError, match=str(iris / "MLmodel")) as caught:
        load_model(iris)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_python_function_says_what_it_has(iris: Path) -> None:
    edit(iris, lambda description: description["flavors"].pop("python_function"))
    with pytest.raises(RoleError, match="no python_function flavor \\(it has: sklearn\\)"):
        load_model(iris)


@pytest.mark.parametrize("size", [0, 10, -100])
@pytest.mark.parametrize("kind", ["iris", "typed"])
def test_a_truncated_model_is_named(tmp_path: Path, kind: str, size: int) -> None:
    directory = Path(shutil.copytree(model_path(kind), tmp_path / kind))
    file = directory / ("model.skops" if kind == "iris" else "python_model.pkl")
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(RoleError) as caught:
        load_model(directory)
    assert str(file) in str(caught.value)
    assert ("is empty" if size == 0 else f"{len(content[:size])} bytes") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_data_file_is_named(iris: Path) -> None:
    (iris / "model.skops").unlink()
    with pytest.raises(RoleError, match=f"{iris / 'model.skops'} is missing"):
        load_model(iris)


def test_a_missing_library_is_named_with_the_version_asked_for(iris: Path) -> None:
    edit(iris, lambda description: description["flavors"]["python_function"].update(loader_module="nosuchflavor.x"))
    with (iris / "requirements.txt").open("a") as file:
        file.write("\n# a comment\n--index-url=https://example.com\nNoSuchFlavor[gpu]==3.2.1 ; python_version > '3'\n")
    with pytest.raises(RoleError, match="library nosuchflavor, which is not installed") as caught:
        load_model(iris)
    assert "NoSuchFlavor[gpu]==3.2.1" in str(caught.value)
    assert str(caught.value).endswith("build the image with the model's requirements.txt as its MODEL_REQUIREMENTS")


def test_a_missing_library_nobody_listed(iris: Path) -> None:
    edit(iris, lambda description: description["flavors"]["python_function"].update(loader_module="nosuchflavor"))
    with pytest.raises(RoleError, match=r"nosuchflavor, which is not installed .*does not list it"):
        load_model(iris)


def test_the_library_that_reads_the_model_file_is_missing(iris: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "skops"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    (iris / "requirements.txt").write_text("skops==0.13.0\n")
    with pytest.raises(
        RoleError, match=r"skops, which is not installed \(the model asks for skops==0\.13\.0\)"
    ) as caught:
        load_model(iris)
    assert str(caught.value).endswith("build the image with sklearn among its FLAVORS")


def test_other_versions_are_logged_in_one_line(iris: Path, caplog: pytest.LogCaptureFixture) -> None:
    (iris / "requirements.txt").write_text("scikit-learn==0.1\nnumpy\nmlflow==1.2\nabsent-package==4\n")
    edit(iris, lambda description: description["flavors"]["python_function"].update(python_version="3.7.1"))
    with caplog.at_level(logging.WARNING):
        load_model(iris)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the model was made with other versions: scikit-learn==0.1 (")
    for part in (
        "mlflow==1.2 (",
        "absent-package==4 (not installed)",
        "Python 3.7.1 (this is ",
        "BASE_IMAGE=python:3.7-slim)",
    ):
        assert part in line
    assert "numpy" not in line


def test_other_versions_are_told_again_when_loading_fails(iris: Path) -> None:
    (iris / "requirements.txt").write_text("scikit-learn==0.1\n")
    (iris / "model.skops").write_bytes(b"junk")
    with pytest.raises(RoleError, match=r"made with other versions: scikit-learn==0\.1"):
        load_model(iris)


def test_no_warning_when_the_versions_agree(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load_model(model_path("iris"))
    assert caplog.records == []
    assert model.flavors == ("sklearn",)
    assert model.example is not None


def test_predictions_are_pyfuncs() -> None:
    model = load_model(model_path("iris"))
    features, _ = iris_table()
    rows = model.input_schema.split(list(features.columns), features.to_numpy().tolist())
    expected = load_pyfunc(model_path("iris")).predict(features)
    np.testing.assert_array_equal(model.predict(rows), expected)


@pytest.mark.parametrize(("kind", "row"), [("typed", TYPED_ROW), ("nested", NESTED_ROW)])
def test_enforcement_by_mlflow_changes_nothing(kind: str, row: dict[str, Any]) -> None:
    """What we hand to pyfunc has the dtypes that its signature asks for already."""
    model = load_model(model_path(kind))
    frame = model.input_schema.records([row, row]).for_model()
    seen = model.predict(model.input_schema.records([row, row]))
    if kind == "typed":
        assert seen == [f"{name}:{frame[name].dtype}:{frame[name].tolist()!r}" for name in frame.columns]
        assert [part.split(":")[1] for part in seen] == [
            *("bool", "int32", "int64", "float32", "float64"),
            str(pd.Series(["text"]).dtype),
            *("object", "datetime64[ns]"),
        ]
    else:
        assert "numbers:object:[[1.5, 2.0], [1.5, 2.0]]" in seen


def test_params_reach_the_model_and_defaults_apply() -> None:
    model = load_model(model_path("params"))
    rows = model.input_schema.records([{"a": 1, "b": 2}])
    given = model.params.parse({"factor": 3, "weights": [1], "since": "2025-01-01"})
    (answer,) = model.predict(rows, given)
    expected = load_pyfunc(model_path("params")).predict(
        pd.DataFrame({"a": [1.0], "b": [2.0]}), params={"factor": 3, "weights": [1.0], "since": "2025-01-01"}
    )
    assert answer == expected[0]
    assert (answer["factor"], answer["count"], answer["mode"]) == ("3.0", "3", "'fast'")


def test_who_is_to_blame() -> None:
    checked, unchecked = (load_model(model_path(kind)) for kind in ("answers", "untyped_answers"))
    with pytest.raises(PredictionFailed, match="RuntimeError: the model is out of sorts"):
        checked.predict(checked.input_schema.records([{"form": "raise"}]))
    with pytest.raises(PredictionFailed, match="KeyError"):
        checked.predict(checked.input_schema.records([{"form": "no such form"}]))
    with pytest.raises(InputRejected, match="KeyError"):
        unchecked.predict(unchecked.input_schema.records([{"form": "no such form"}]))
    with pytest.raises(InputRejected):
        checked.predict(checked.input_schema.records([{"form": None}]))
    with pytest.raises(PredictionFailed, match="AttributeError"):
        checked.predict(checked.input_schema.records([{"form": "attribute"}]))
    with pytest.raises(InputRejected, match="AttributeError"):
        unchecked.predict(unchecked.input_schema.records([{"form": "attribute"}]))
    with pytest.raises(PredictionFailed, match="Panic: in another language"):
        unchecked.predict(unchecked.input_schema.records([{"form": "panic"}]))


def test_a_description_cut_between_lines_is_truncated(iris: Path) -> None:
    """What is left is valid YAML, and would be served without its signature."""
    file = iris / "MLmodel"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: lines.index(next(line for line in lines if line.startswith("mlflow_version")))]))
    with pytest.raises(RoleError, match=f"{file} ends before"):
        load_model(iris)


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("write", [yaml.safe_dump, json.dumps])
@pytest.mark.parametrize(
    "rest",
    [
        {},
        {"signature": {"inputs": '[{"type": "double", "name": "a"}]'}},
        {"time_created": "today", "artifact_path": "x", "run_id": "7"},
    ],
    ids=str,
)
def test_a_description_that_others_wrote(iris: Path, rest: Any, write: Callable[[Any], str], end: str) -> None:
    sklearn = yaml.safe_load((iris / "MLmodel").read_text())["flavors"]["sklearn"]
    own = {"loader_module": "mlflow.sklearn", "model_path": "model.skops", "env": "conda.yaml", "python_version": "3.9"}
    described = {"flavors": {"python_function": own, "sklearn": sklearn}, **rest}
    (iris / "MLmodel").write_text(write(described).rstrip() + end)
    assert len(load_model(iris).input_schema.inputs) == ("signature" in rest)


@pytest.mark.parametrize("kind", ["iris", "no_signature", "hinted", "typed"])
def test_a_description_without_its_last_line_loses_nothing(tmp_path: Path, kind: str) -> None:
    directory = Path(shutil.copytree(model_path(kind), tmp_path / kind))
    file = directory / "MLmodel"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("utc_time_created")]
    for text in ("\n".join(lines), "\n".join(lines) + "\n"):
        file.write_text(text)
        assert load_model(directory).input_schema.inputs == load_model(model_path(kind)).input_schema.inputs


def test_no_beginning_of_a_description_is_served_without_its_signature(iris: Path) -> None:
    file = iris / "MLmodel"
    text = file.read_text()
    begin, end = text.index("loader_module"), text.index("type_hint_from_example")
    for size in range(begin, len(text)):
        file.write_text(text[:size])
        if size < end:
            with pytest.raises(RoleError, match=str(file)):
                read_description(iris)
        else:
            with contextlib.suppress(RoleError):
                assert read_description(iris)["signature"]["inputs"].endswith("]")


def test_an_impossible_date_in_the_description_is_named(iris: Path) -> None:
    file = iris / "MLmodel"
    file.write_text(file.read_text() + "\nwhen: 2024-13-45\n")
    with pytest.raises(RoleError, match=str(file)):
        load_model(iris)


def test_an_odd_example_entry_is_no_example(iris: Path) -> None:
    edit(iris, lambda description: description.update(saved_input_example_info=3))
    description = yaml.safe_load((iris / "MLmodel").read_text())
    assert read_example(iris, description) is None


def test_an_example_with_nan_is_a_request(iris: Path) -> None:
    (iris / "serving_input_example.json").write_text('{"dataframe_records": [{"a": NaN}]}')
    model = load_model(iris)
    assert model.example is not None
    assert json.loads(model.example) == {"dataframe_records": [{"a": None}]}


def test_a_place_that_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    # Root, who runs the tests in CI, may look everywhere.
    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(RoleError, match="Permission denied"):
        find_model(tmp_path)


def test_type_hints_are_mlflows_to_check() -> None:
    model = load_model(model_path("hinted"))
    assert model.predict(model.input_schema.instances([{"a": 1, "b": 2}])) == [3]
    assert model.predict(model.input_schema.features({"a": 1})) == [1]
    with pytest.raises(InputRejected) as caught:
        model.predict(model.input_schema.instances([{"a": "x"}]))
    assert caught.value.by_schema


def test_a_model_cannot_change_what_was_in_the_environment(iris: Path) -> None:
    before = dict(os.environ)
    load_model(iris)
    assert dict(os.environ) == before
