"""Each role as a container with a read-only root, without capabilities, as a user that nobody knows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import mlflow.catboost
import mlflow.lightgbm
import mlflow.xgboost
import numpy as np
import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT, wait_until
from tests.image.conftest import make_readable
from tests.image.containers import LOCKED, TMP, run, running
from tests.support.models import REQUIREMENTS, iris_table, load_pyfunc, model_path, save

ROW = {"features": iris_table()[0].iloc[0].to_dict()}


def readme_command(start: str) -> str:
    """What the README's `docker run` line that starts so runs in the image."""
    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if start in line]
    return line.partition("serve-md-runtime:0.1.0 ")[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def estimator(flavor: str) -> Any:
    match flavor:
        case "xgboost":
            import xgboost

            return xgboost.XGBClassifier(n_estimators=5)
        case "lightgbm":
            import lightgbm

            return lightgbm.LGBMClassifier(n_estimators=5, verbose=-1)
        case _:
            import catboost

            return catboost.CatBoostClassifier(iterations=5, verbose=False, allow_writing_files=False)


@pytest.fixture(scope="module")
def served(models: Path) -> Any:
    """The directory of a model of this flavor, readable by all."""

    def make(flavor: str) -> Path:
        path = models / flavor
        if path.exists():
            return path
        if flavor in ("iris", "params"):
            shutil.copytree(model_path(flavor), path)
        else:
            features, target = iris_table()
            model = estimator(flavor).fit(features, target)
            logger = getattr(mlflow, flavor)
            signature = mlflow.models.infer_signature(features, model.predict(features))
            save(lambda at: logger.save_model(model, at, signature=signature, **REQUIREMENTS), path)
        return make_readable(path)

    return make


def mounted(path: Path, at: str = "/models") -> str:
    return f"--volume={path}:{at}:ro"


def test_mlflow_is_there_as_the_readme_says(image: str) -> None:
    command = readme_command('python -c "import mlflow')
    done = run(image, "sh", "-c", command)
    assert done.code == 0, done.err
    assert re.fullmatch(r"3\.\d+\.\d+\n", done.out)
    assert done.err == ""


def test_without_settings_it_says_what_it_needs(image: str) -> None:
    done = run(image)
    assert done.code == 2
    assert "MODEL_LOCAL_PATH: is not set" in done.last


@pytest.mark.parametrize("flavor", ["iris", "params", "xgboost", "lightgbm", "catboost"])
def test_the_default_image_serves(image: str, served: Any, flavor: str) -> None:
    path = served(flavor)
    with running(image, options=(*LOCKED, TMP, mounted(path)), MODEL_LOCAL_PATH="/models") as server:
        server.wait_ready()
        table = pd.DataFrame({"a": [1.5], "b": [2.5]}) if flavor == "params" else iris_table()[0].iloc[::10]
        answer = server.post("/invocations", {"dataframe_split": table.to_dict(orient="split", index=False)})
        assert answer.status_code == 200, answer.text
        expected = np.asarray(load_pyfunc(path).predict(table)).tolist()
        assert answer.json()["predictions"] == expected
        assert "Traceback" not in server.log()


def test_it_drains(image: str, served: Any) -> None:
    options = (*LOCKED, TMP, mounted(served("iris")), "--stop-timeout=60")
    with running(image, options=options, MODEL_LOCAL_PATH="/models", DRAIN_SECONDS="3") as server:
        server.wait_ready()
        server.podman("kill", "--signal=TERM")

        def draining() -> bool:
            answer = server.get("/ready")
            return answer is not None and answer.status_code == 503

        wait_until(draining, "/ready says 503")
        assert server.post("/predict", ROW).status_code == 200
        assert server.wait_end() == 0


@pytest.mark.parametrize(("cpus", "workers"), [("0.5", 1), ("1", 1), ("1.5", 2), ("2", 2)])
def test_there_are_as_many_workers_as_cpus(image: str, served: Any, cpus: str, workers: int) -> None:
    options = (*LOCKED, TMP, mounted(served("iris")), f"--cpus={cpus}")
    with running(image, options=options, MODEL_LOCAL_PATH="/models") as server:
        server.wait_ready()
        # A single one serves by itself.
        expected = [] if workers == 1 else [str(number + 1) for number in range(workers)]

        def started() -> list[str]:
            return sorted(re.findall(r"worker (\d+) \(pid \d+\) is ready", server.log()))

        wait_until(lambda: started() == expected, f"{workers} workers")


def test_nothing_in_the_image_can_be_written(image: str, tmp_path: Path) -> None:
    """What the image's own files and directories allow, root being writable or not."""
    script = """
import os
for directory, _, files in os.walk("/"):
    if directory.startswith(("/proc", "/sys", "/dev")):
        continue
    for path in (directory, *(os.path.join(directory, file) for file in files)):
        if not os.path.islink(path) and os.access(path, os.W_OK):
            print(path)
"""
    tmp_path.chmod(0o777)
    options = (*LOCKED, TMP, f"--volume={tmp_path}:/models")
    assert run(image, "python", "-c", script, options=options).out.split() == ["/tmp", "/models"]
    writable = tuple(option for option in LOCKED if not option.startswith("--read-only"))
    found = set(run(image, "python", "-c", script, options=(*writable, TMP)).out.split())
    # Debian's own scratch places.
    assert found <= {"/tmp", "/var/tmp", "/run/lock"}


def test_the_scripts_have_charts_names(image: str) -> None:
    for script, wants in (("download_model.py", "MODEL_URI"), ("cleanup_cache.py", "CACHE_PATH")):
        done = run(image, "python", f"/scripts/{script}")
        assert done.code == 2
        assert wants in done.last


def test_a_library_that_is_not_in_the_image(sklearn_image: str, served: Any, tmp_path: Path) -> None:
    message = tmp_path / "termination"
    message.touch()
    message.chmod(0o666)
    options = (*LOCKED, TMP, mounted(served("xgboost")), f"--volume={message}:/dev/termination-log")
    done = run(sklearn_image, options=options, MODEL_LOCAL_PATH="/models")
    assert done.code == 1
    assert re.search(
        r"it needs the library xgboost, which is not installed \(.*\): build the image with xgboost among its FLAVORS$",
        done.last,
    )
    assert message.read_text().strip() in done.last


def test_databricks_is_a_flavor_that_is_named(image: str) -> None:
    settings = {
        "MODEL_URI": "models:/iris/1",
        "MLFLOW_TRACKING_URI": "databricks",
        "DATABRICKS_HOST": "https://127.0.0.1",
    }
    done = run(
        image, "python", "/app/download.py", MAX_RETRIES=0, DATABRICKS_TOKEN="x", OUTPUT_PATH="/tmp/o", **settings
    )
    assert done.code == 1
    assert done.last.endswith("build the image with databricks among its FLAVORS")


def test_a_model_of_another_python_is_told_before_it_is_unpickled(image: str, served: Any, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(served("params"), path)
    description = yaml.safe_load((path / "MLmodel").read_text())
    function = description["flavors"]["python_function"]
    function["python_version"] = "3.9.7"
    (path / "MLmodel").write_text(yaml.safe_dump(description, sort_keys=False))
    # What another Python's bytecode does: it does not load.
    (path / function["python_model"]).write_bytes(b"\x80\x05not a pickle")
    make_readable(path)
    done = run(image, options=(*LOCKED, TMP, mounted(path)), MODEL_LOCAL_PATH="/models")
    assert done.code == 1
    told = r"Python 3\.9\.7 \(this is 3\.\d+\.\d+: build the image with BASE_IMAGE=python:3\.9-slim\)"
    first, last = done.err.splitlines()[0], done.last
    assert re.search(rf"the model was made with other versions: .*{told}", done.err)
    assert re.search(told, last), (first, last)


def test_too_little_memory_is_named(image: str, served: Any) -> None:
    options = (*LOCKED, TMP, mounted(served("iris")), "--memory=90m", "--memory-swap=90m")
    done = run(image, options=options, MODEL_LOCAL_PATH="/models")
    assert done.code == 137
    # Nobody can say more who is killed; the README explains.
    assert done.last.endswith("loading the model in /models")


def test_a_missing_mount_is_named(image: str) -> None:
    done = run(image, MODEL_LOCAL_PATH="/models")
    assert done.code == 1
    assert "no model at /models, which does not exist" in done.last


@pytest.fixture(scope="module")
def source(served: Any) -> str:
    return mounted(served("iris"), "/source")


def test_a_volume_that_can_only_be_read_is_named(image: str, source: str, tmp_path: Path) -> None:
    options = (*LOCKED, TMP, source, f"--volume={tmp_path}:/out:ro")
    done = run(image, "python", "/app/download.py", options=options, MODEL_URI="/source", OUTPUT_PATH="/out")
    assert done.code == 1
    assert "cannot write to OUTPUT_PATH" in done.last
    assert "OUTPUT_PATH /out: the volume is mounted read-only; mount it writable" in done.last


def test_a_volume_of_another_user_is_named(image: str, source: str, tmp_path: Path) -> None:
    options = (*LOCKED, TMP, source, f"--volume={tmp_path}:/out")
    done = run(image, "python", "/app/download.py", options=options, MODEL_URI="/source", OUTPUT_PATH="/out")
    assert done.code == 1
    assert "OUTPUT_PATH /out: user 1234567 of group " in done.last
    assert re.search("may not: /out belongs to user .*runAsUser", done.last), done.last


def test_an_output_that_nothing_is_mounted_at_is_named(image: str, source: str) -> None:
    done = run(image, "python", "/app/download.py", options=(*LOCKED, TMP, source), MODEL_URI="/source")
    assert done.code == 1
    assert "cannot create OUTPUT_PATH /models: the root file system is read-only; mount a volume there" in done.last
    assert "the root file system is read-only; mount a volume there, such as an emptyDir" in done.last


NO_ROOM = {"no /tmp": (), "a full /tmp": ("--tmpfs=/tmp:size=4k",)}

# A file of a page is all that goes there.
FILL = "import os; os.path.ismount('/tmp') and open('/tmp/full', 'w').write('x' * 4096)"


def after_filling(script: str) -> tuple[str, ...]:
    return "python", "-c", f"{FILL}; os.execv('/venv/bin/python', ['python', '/app/{script}'])"


@pytest.mark.parametrize("scratch", NO_ROOM.values(), ids=NO_ROOM)
def test_serving_needs_no_tmp(image: str, served: Any, scratch: tuple[str, ...]) -> None:
    options = (*LOCKED, *scratch, mounted(served("iris")), "--cpus=2")
    with running(image, *after_filling("darwin_serve.py"), options=options, MODEL_LOCAL_PATH="/models") as server:
        server.wait_ready()
        assert server.post("/predict", ROW).status_code == 200


@pytest.mark.parametrize("scratch", NO_ROOM.values(), ids=NO_ROOM)
def test_a_tmp_without_room_is_named(image: str, source: str, tmp_path: Path, scratch: tuple[str, ...]) -> None:
    tmp_path.chmod(0o777)
    options = (*LOCKED, *scratch, source, f"--volume={tmp_path}:/models")
    for script, variable in (("download.py", "MODEL_URI"), ("darwin_serve.py", "MLFLOW_MODEL_URI")):
        done = run(image, *after_filling(script), options=options, **{variable: "/source"})
        assert done.code == 1
        assert "/tmp cannot be written to, or is full; mount an emptyDir with free space there" in done.last


def test_a_tmp_that_is_too_small_for_the_model_is_named(image: str, source: str) -> None:
    options = (*LOCKED, "--tmpfs=/tmp:size=8k", source)
    done = run(image, options=options, MLFLOW_MODEL_URI="/source")
    assert done.code == 1
    assert re.search(r"cannot put /source on disk: the volume is full .* only .* are free: ", done.last), done.last
