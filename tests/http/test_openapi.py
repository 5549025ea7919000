"""The OpenAPI document: valid for every model, and true: its examples are answered, its schemas hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import requests
from openapi_spec_validator import OpenAPIV31SpecValidator

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.http.app import make_app
from darwin_runtime.http.auth import EXEMPTIBLE, Guard, Keys
from darwin_runtime.http.service import VERSION, Service
from darwin_runtime.model.load import load_model
from tests.conftest import ROOT
from tests.support.models import BUILDERS, IRIS, model_path
from tests.support.servers import in_thread

pytestmark = pytest.mark.usefixtures("serving_environment")

KINDS = sorted(BUILDERS.keys() - {"slow_to_load", "waiting", "broken"})

# How many routes have an example, where not all four have one.
EXAMPLES = {"no_signature": 0, "untyped": 0, "untyped_answers": 0, "untyped_echo": 0, "chatting": 1, "hinted": 3}


def document(url: str) -> Any:
    answer = requests.get(url + "/openapi.json", timeout=60)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    return answer.json()


def resolver(whole: Any, schema: Any) -> Any:
    """`schema` as a document of its own."""
    return {**schema, "components": whole["components"]}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_valid(ours: Callable[[str], str], kind: str) -> None:
    OpenAPIV31SpecValidator(document(ours(kind))).validate()


@pytest.mark.parametrize("kind", KINDS)
def test_its_examples_fit_its_schemas_and_are_answered(ours: Callable[[str], str], kind: str) -> None:
    url = ours(kind)
    whole = document(url)
    asked = 0
    for path, operations in whole["paths"].items():
        if "post" not in operations:
            continue
        operation = operations["post"]
        content = operation["requestBody"]["content"]["application/json"]
        if "example" not in content:
            continue
        jsonschema.validate(content["example"], resolver(whole, content["schema"]))
        answer = requests.post(url + path, json=content["example"], timeout=60)
        assert answer.status_code == 200, (path, answer.text)
        told = operation["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), resolver(whole, told))
        asked += 1
    assert asked == EXAMPLES.get(kind, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sample_of_the_schema_is_answered(ours: Callable[[str], str], kind: str) -> None:
    url = ours(kind)
    answer = requests.get(url + "/schema", timeout=60)
    if EXAMPLES.get(kind, 4) < 3:
        assert answer.status_code == 404
        return
    body = answer.json()["sample_request"]
    jsonschema.validate(body["features"], answer.json()["json_schema"])
    answer = requests.post(url + "/predict", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"features": {}}),
        ("/predict", {"features": {**IRIS, "petal width (cm)": "x"}}),
        ("/invocations", {"dataframe_records": [{}]}),
        ("/v1/models/model:predict", {"instances": [{}]}),
        ("/v2/models/model/infer", {"inputs": []}),
    ],
)
def test_errors_have_the_shape_it_tells(ours: Callable[[str], str], path: str, body: Any) -> None:
    url = ours("iris")
    whole, answer = document(url), requests.post(url + path, json=body, timeout=60)
    told = whole["paths"][path]["post"]["responses"][str(answer.status_code)]
    jsonschema.validate(answer.json(), resolver(whole, told["content"]["application/json"]["schema"]))


def test_it_tells_this_model_s_columns(ours: Callable[[str], str]) -> None:
    row = document(ours("optional"))["components"]["schemas"]["Row"]
    assert row["required"] == ["x"]
    assert row["properties"]["maybe_long"]["anyOf"][0]["type"] == "integer"
    params = document(ours("params"))["components"]["schemas"]["Params"]["properties"]
    assert params["factor"]["default"] == 2.0
    assert document(ours("iris"))["components"]["schemas"]["Params"]["properties"]["predict_method"] == {
        "enum": ["predict", "predict_proba", "predict_log_proba", "decision_function"],
        "default": "predict",
    }


def test_every_route_it_tells_is_there(ours: Callable[[str], str]) -> None:
    url = ours("iris")
    for path, operations in document(url)["paths"].items():
        for verb in operations:
            assert requests.request(verb, url + path, timeout=60).status_code not in (404, 405), path


def test_it_tells_where_it_is_shown() -> None:
    service = Service(BatchLimits(), "iris")
    service.use(load_model(model_path("iris")))
    with in_thread(make_app(service, "/models/iris")) as url:
        for base in (url, f"{url}/models/iris"):
            whole = document(base)
            assert whole["servers"] == [{"url": "/models/iris"}]
            assert "/v2/models/iris/infer" in whole["paths"]


@pytest.mark.parametrize(("key", "certificate"), [(True, False), (False, True), (True, True)])
def test_it_tells_how_one_gets_in(tmp_path: Path, key: bool, certificate: bool) -> None:
    (tmp_path / "keys").write_text("a-key-for-the-document\n")
    keys = Keys(tmp_path / "keys") if key else None
    service = Service(BatchLimits(), guard=Guard(keys, certificates=certificate, exempt=EXEMPTIBLE["probes"]))
    service.use(load_model(model_path("iris")))
    whole = json.loads(service.health.loaded.documents.openapi("").body)
    OpenAPIV31SpecValidator(whole).validate()
    schemes: dict[str, Any] = {"bearer": ("http", "bearer"), "basic": ("http", "basic")} if key else {}
    schemes |= {"certificate": ("mutualTLS", None)} if certificate else {}
    told = whole["components"]["securitySchemes"]
    assert {name: (each["type"], each.get("scheme")) for name, each in told.items()} == schemes
    # What is in one object is needed together; one of the objects will do.
    alternatives: list[set[str]] = [{"bearer"}, {"basic"}] if key else [set()]
    both = {"certificate"} if certificate else set()
    assert [set(each) for each in whole["security"]] == [each | both for each in alternatives]
    refusals = ({"401"} if key else set()) | ({"403"} if certificate else set())
    with in_thread(make_app(service)) as url:
        for path, operations in whole["paths"].items():
            is_open = path in EXEMPTIBLE["probes"]
            for verb, operation in operations.items():
                assert operation.get("security") == ([] if is_open else None)
                assert operation["responses"].keys() & {"401", "403"} == (set() if is_open else refusals)
                # And so it is.
                answer = requests.request(verb, url + path, timeout=60)
                assert (answer.status_code in (401, 403)) == (not is_open), path
                if verb == "post":
                    content = operation["responses"][str(answer.status_code)]["content"]["application/json"]
                    jsonschema.validate(answer.json(), resolver(whole, content["schema"]))


def test_nothing_is_needed_by_default(ours: Callable[[str], str]) -> None:
    whole = document(ours("iris"))
    assert "security" not in whole
    assert "securitySchemes" not in whole["components"]
    assert not any(op["responses"].keys() & {"401", "403"} for ops in whole["paths"].values() for op in ops.values())


def test_versions_agree() -> None:
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f'image.version="{VERSION}"' in (ROOT / "Dockerfile").read_text()


def test_nothing_is_said_before_there_is_a_model() -> None:
    with in_thread(make_app(Service(BatchLimits()))) as url:
        assert requests.get(url, timeout=60).json() == {"status": "alive"}
        for path in ("/openapi.json", "/docs", "/v1/models/model", "/v2/models/model", "/schema"):
            answer = requests.get(url + path, timeout=60)
            assert answer.status_code == 503, path
            assert "still loading" in json.dumps(answer.json())
