"""Clients that others wrote, unchanged: Triton's and KServe's for KServe's protocols, MLflow's for its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import tritonclient.http as triton

from tests.conftest import ROOT, absent, clean_environ
from tests.support.models import TYPED_ROW, iris_table, load_pyfunc, model_path
from tests.support.servers import serving

TABLE, _ = iris_table()


@pytest.fixture
def client(ours: Callable[[str], str]) -> Iterator[Any]:
    client = triton.InferenceServerClient(urlsplit(ours("iris")).netloc)
    yield client
    client.close()


def tensor(name: str, values: Any, datatype: str, *, binary: bool) -> Any:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def test_triton_finds_its_way(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("model")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("model")
    assert [(each["name"], each["datatype"]) for each in metadata["inputs"]] == [(name, "FP64") for name in TABLE]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_asks(client: Any, binary: bool, binary_output: bool, compression: str | None) -> None:
    expected = load_pyfunc(model_path("iris")).predict(TABLE)
    whole = [tensor("input", TABLE.to_numpy(), "FP64", binary=binary)]
    columns = [tensor(str(name), TABLE[[name]].to_numpy(), "FP64", binary=binary) for name in TABLE]
    for inputs in (whole, columns):
        answer = client.infer(
            "model",
            inputs,
            outputs=[triton.InferRequestedOutput("predict", binary_data=binary_output)],
            request_id="7",
            request_compression_algorithm=compression,
        )
        np.testing.assert_array_equal(answer.as_numpy("predict").ravel(), expected)
        assert answer.get_response()["id"] == "7"


@pytest.mark.parametrize("binary", [True, False])
def test_triton_asks_for_probabilities(client: Any, binary: bool) -> None:
    expected = load_pyfunc(model_path("iris")).get_raw_model().predict_proba(TABLE)
    inputs = [tensor("input", TABLE.to_numpy(), "FP64", binary=binary)]
    outputs = [triton.InferRequestedOutput("predict_proba", binary_data=binary)]
    answer = client.infer("model", inputs, outputs=outputs)
    np.testing.assert_array_equal(answer.as_numpy("predict_proba"), expected)
    answer = client.infer("model", inputs, parameters={"predict_method": "predict_proba"})
    np.testing.assert_array_equal(answer.as_numpy("predict_proba"), expected)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("names", [("predict", "predict_proba"), ("decision_function", "predict_proba", "predict")])
def test_triton_asks_for_several_methods(client: Any, binary: bool, names: tuple[str, ...]) -> None:
    model = load_pyfunc(model_path("iris")).get_raw_model()
    inputs = [tensor("input", TABLE.to_numpy(), "FP64", binary=binary)]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    answer = client.infer("model", inputs, outputs=outputs)
    assert [each["name"] for each in answer.get_response()["outputs"]] == list(names)
    for name in names:
        expected = getattr(model, name)(TABLE)
        np.testing.assert_array_equal(answer.as_numpy(name).reshape(expected.shape), expected)


@pytest.mark.parametrize("binary", [True, False])
def test_triton_sends_every_type(ours: Callable[[str], str], binary: bool) -> None:
    client = triton.InferenceServerClient(urlsplit(ours("typed_echo")).netloc)
    datatypes = {"flag": ("BOOL", np.bool_), "small": ("INT32", np.int32), "big": ("INT64", np.int64)}
    datatypes |= {"single": ("FP32", np.float32), "double": ("FP64", np.float64)}
    inputs = []
    for name, value in TYPED_ROW.items():
        datatype, dtype = datatypes.get(name, ("BYTES", np.object_))
        if name == "blob" and binary:
            value = b"\0\xff"
        inputs.append(tensor(name, np.array([value], dtype=dtype), datatype, binary=binary))
    answer = client.infer("model", inputs)
    for name in datatypes:
        assert answer.as_numpy(name).ravel()[0] == datatypes[name][1](TYPED_ROW[name])
    assert answer.as_numpy("text").ravel()[0] == "grün".encode()
    assert answer.as_numpy("when").ravel()[0] == str(TYPED_ROW["when"]).encode()
    assert answer.as_numpy("blob").ravel()[0] == b"\0\xff"
    client.close()


def test_triton_shows_our_errors(client: Any) -> None:
    inputs = [tensor("input", TABLE.to_numpy()[:, :3].copy(), "FP64", binary=True)]
    with pytest.raises(triton.InferenceServerException, match="4 values") as caught:
        client.infer("model", inputs)
    assert caught.value.status() == "400"
    with pytest.raises(triton.InferenceServerException, match="there is no model 'other'"):
        client.infer("other", inputs)


def test_clients_that_write_nan(ours: Callable[[str], str]) -> None:
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    address = urlsplit(ours("optional"))
    table = pd.DataFrame({"x": [1.5, np.nan], "maybe_string": ["a", None], "maybe_datetime": [pd.NaT, pd.Timestamp(0)]})
    expected = load_pyfunc(model_path("optional")).predict(table)
    client = ScoringServerClient(str(address.hostname), address.port)
    assert client.invoke(table).get_predictions().to_numpy().ravel().tolist() == expected
    with triton.InferenceServerClient(address.netloc) as other:
        answer = other.infer("model", [tensor("x", table[["x"]].to_numpy(), "FP64", binary=False)])
    assert answer.as_numpy("predict").ravel().tolist() == [expected[0].encode()]


def test_mlflow_asks(ours: Callable[[str], str]) -> None:
    # MLflow warns of its own type hints at its first import, which is for tests.support.models.
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    address = urlsplit(ours("iris"))
    client = ScoringServerClient(str(address.hostname), address.port)
    client.wait_server_ready(timeout=60)
    expected = load_pyfunc(model_path("iris")).predict(TABLE)
    predictions = client.invoke(TABLE).get_predictions()
    assert isinstance(predictions, pd.DataFrame)
    np.testing.assert_array_equal(predictions.to_numpy().ravel(), expected)
    with pytest.raises(Exception, match="Invalid input"):
        client.invoke(TABLE.drop(columns=["petal width (cm)"]))


def test_kserve_asks() -> None:
    python = ROOT / "build" / "clients" / "bin" / "python"
    if not python.exists():
        absent("KServe's client is not installed (make clients)")
    with serving(model_path("iris"), WORKERS=2, MODEL_NAME="iris") as served:
        script = ROOT / "tests" / "clients" / "kserve_client.py"
        done = subprocess.run([python, script, served.url], env=clean_environ(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "live": [True, True],
        "server_ready": True,
        "model_ready": [True, True],
        "v1": [1, 0],
        "v2, binary False": ["7", "predict", [1, 0]],
        "v2, binary True": ["7", "predict", [1, 0]],
    }
