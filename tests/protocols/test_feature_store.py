"""The feature-store form of /predict, against a store of this test's own over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.errors import FeatureStoreError
from darwin_runtime.protocols import feature_store
from darwin_runtime.protocols.feature_store import FeatureStore
from tests.http.test_protocol import PARENT
from tests.support.models import IRIS, model_path
from tests.support.servers import in_thread, serving, switching

pytestmark = pytest.mark.usefixtures("serving_environment")

KEYS = {"flower_id": 7}
VALUES = {**IRIS, "flower_id": None, "color": "blue"}


class Store:
    """Knows one flower. `fault` is how it fails, `nested` whether its schemas lie one level deeper."""

    def __init__(self) -> None:
        self.fault: Any = None
        self.nested = False
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        self.gate = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/admin/v1/feature-group/schema", self.schema),
                Route("/store/feature-group/read-features", self.read),
            ]
        )

    def _faulty(self, path: str) -> Response | None:
        if self.fault is None or self.fault[0] not in path:
            return None
        kind = self.fault[1]
        if kind == "slow":
            self.gate.wait(60)
        elif kind == "redirect":
            return RedirectResponse("http://127.0.0.1:1/")
        elif kind == "once" and len(self.asked) > 1:
            return None
        elif isinstance(kind, (dict, list)):
            return JSONResponse(kind)
        return PlainTextResponse("out of order", kind if isinstance(kind, int) else 503)

    def schema(self, request: Request) -> Response:
        group = request.query_params["name"]
        self.asked.append(("schema", group, dict(request.headers)))
        if fault := self._faulty("schema"):
            return fault
        if group != "flowers":
            return JSONResponse({"error": "no such group"}, 404)
        answer: Any = {"data": {"schema": [{"name": name, "type": "double"} for name in VALUES]}}
        return JSONResponse({"body": answer} if self.nested else answer)

    async def read(self, request: Request) -> Response:
        asked = await request.json()
        self.asked.append(("read", asked, dict(request.headers)))

        if fault := await asyncio.to_thread(self._faulty, "read"):
            return fault
        if asked["primaryKeys"]["values"] != [[7]]:
            return JSONResponse({"data": {"successfulKeys": [], "failedKeys": asked["primaryKeys"]["values"]}})
        found = [VALUES[name] for name in asked["featureColumns"]]
        return JSONResponse({"data": {"successfulKeys": [{"key": [7], "features": found}], "failedKeys": []}})


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Store, str]]:
    store = Store()
    with in_thread(store.app) as url:
        yield store, url


@pytest.fixture
def store(running: tuple[Store, str]) -> Iterator[Store]:
    store = running[0]
    store.fault, store.nested, store.asked, store.gate = None, False, [], threading.Event()
    yield store
    store.gate.set()


@pytest.fixture
def predict(running: tuple[Store, str], store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(feature_store, "TIMEOUT_SECONDS", (1.0, 0.3))
    url = running[1]
    features = FeatureStore(f"{url}/store/", f"{url}/admin/v1")
    with switching(store=features) as switch:
        ours = switch("iris")

        def post(body: Any, **headers: str) -> requests.Response:
            data = body if isinstance(body, bytes) else json.dumps(body)
            return requests.post(ours + "/predict", data=data, headers=headers, timeout=60)

        yield post


ASKED = {"feature_group": "flowers", "ofs_keys": KEYS}


def message(answer: requests.Response) -> str:
    detail = answer.json()["detail"]
    return f"{detail['message']}: {detail.get('error')}"


@pytest.mark.parametrize("nested", [False, True])
def test_features_are_looked_up(predict: Any, store: Store, nested: bool) -> None:
    store.nested = nested
    assert predict({"features": IRIS}).json() == predict(ASKED).json() == {"scores": [1]}
    (kind, group, first), (then, asked, headers) = store.asked
    assert (kind, group, then) == ("schema", "flowers", "read")
    assert asked == {
        "featureGroupName": "flowers",
        "featureColumns": [*IRIS, "color"],
        "primaryKeys": {"names": ["flower_id"], "values": [[7]]},
    }
    assert first["content-type"] == headers["content-type"] == "application/json"
    # The columns are known now.
    assert predict(ASKED).status_code == 200
    assert [kind for kind, _, _ in store.asked] == ["schema", "read", "read"]


def test_the_store_learns_on_whose_behalf(predict: Any, store: Store) -> None:
    predict(ASKED, **{"X-Request-ID": "abc", "traceparent": PARENT})
    assert [headers["x-request-id"] for _, _, headers in store.asked] == ["abc", "abc"]
    assert {headers["traceparent"][:35] for _, _, headers in store.asked} == {PARENT[:35]}


def test_keys_reach_the_model_if_its_signature_names_them(running: tuple[Store, str], store: Store) -> None:
    found = FeatureStore(f"{running[1]}/store", f"{running[1]}/admin/v1").features("flowers", KEYS, {})
    assert found == {**IRIS, "color": "blue", "flower_id": 7}


def test_what_the_store_has_is_checked_like_the_rest(predict: Any, store: Store) -> None:
    store.fault = ("read", {"data": {"successfulKeys": [{"features": ["long", 1, 2, 3, "blue"]}]}})
    answer = predict(ASKED)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["detail"]["errors"]] == ["sepal length (cm)"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"feature_group": "flowers"}, "both feature_group and ofs_keys"),
        ({"ofs_keys": KEYS}, "both feature_group and ofs_keys"),
        ({**ASKED, "features": IRIS}, "either features, or both"),
        ({"feature_group": "", "ofs_keys": KEYS}, "name of a feature group"),
        ({"feature_group": 1, "ofs_keys": KEYS}, "name of a feature group"),
        ({"feature_group": "flowers", "ofs_keys": {}}, "object of primary keys"),
        ({"feature_group": "flowers", "ofs_keys": [7]}, "object of primary keys"),
        (b'{"feature_group": "flowers", "ofs_keys": {"a": 1, "b": NaN}}', "NaN or Infinity for 'b'"),
        (b'{"feature_group": "flowers", "ofs_keys": {"a": -Infinity}}', "NaN or Infinity for 'a'"),
        (b'{"feature_group": ', "not valid JSON"),
    ],
)
def test_bad_requests(predict: Any, store: Store, body: Any, why: str) -> None:
    answer = predict(body)
    assert answer.status_code == 422
    assert why in message(answer)
    assert store.asked == []


@pytest.mark.parametrize(
    ("fault", "status", "why"),
    [
        (("schema", 500), 502, "answered 500 for the schema of feature group 'flowers'"),
        (("read", 503), 502, "answered 503 for features of group 'flowers'"),
        (("read", 404), 404, "does not know features of group 'flowers'"),
        (("schema", "slow"), 504, "did not answer in time for the schema"),
        (("read", "slow"), 504, "did not answer in time for features"),
        (("read", "redirect"), 502, "answered 307"),
        (("schema", {"data": {}}), 502, "has no schema of feature group"),
        (("schema", [1]), 502, "has no schema"),
        (("schema", {"data": {"schema": [{}]}}), 502, "has no schema"),
        (("read", {"data": {"successfulKeys": [{"features": [1]}]}}), 502, "with other than 5 values"),
        (("read", {"data": {"successfulKeys": [{}]}}), 502, "with other than 5 values"),
        (("read", {"status": "ERROR"}), 502, "has no keys of feature group"),
    ],
)
def test_a_store_that_fails(predict: Any, store: Store, fault: Any, status: int, why: str) -> None:
    store.fault = fault
    answer = predict(ASKED)
    assert answer.status_code == status
    assert why in message(answer)
    assert predict({"features": IRIS}).status_code == 200


def test_a_failure_that_passes_is_not_told(predict: Any, store: Store) -> None:
    store.fault = ("schema", "once")
    assert predict(ASKED).json() == {"scores": [1]}
    assert [kind for kind, _, _ in store.asked] == ["schema", "schema", "read"]


def test_unknown_groups_and_keys(predict: Any) -> None:
    answer = predict({**ASKED, "feature_group": "trees"})
    assert (answer.status_code, "feature group 'trees'" in message(answer)) == (404, True)
    answer = predict({**ASKED, "ofs_keys": {"flower_id": 8}})
    assert (answer.status_code, "no features for the key {'flower_id': 8}" in message(answer)) == (404, True)


def test_no_answer_at_all() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(FeatureStoreError, match="cannot be reached") as caught:
        FeatureStore(url, url).features("flowers", KEYS, {})
    assert caught.value.status == 502


def test_no_json(running: tuple[Store, str], store: Store) -> None:
    store.fault = ("schema", 200)
    url = running[1]
    with pytest.raises(FeatureStoreError, match="not JSON"):
        FeatureStore(f"{url}/store", f"{url}/admin/v1").features("flowers", KEYS, {})


def test_without_a_store_the_request_says_how_to_have_one() -> None:
    with switching() as switch:
        answer = requests.post(switch("iris") + "/predict", json=ASKED, timeout=60)
    assert answer.status_code == 422
    assert "set FEATURE_STORE_URL and OFS_ADMIN_URL" in message(answer)


def test_the_role_with_a_store(running: tuple[Store, str], store: Store) -> None:
    url = running[1]
    environ: dict[str, Any] = {"FEATURE_STORE_URL": f"{url}/store", "OFS_ADMIN_URL": f"{url}/admin/v1"}
    with serving(model_path("iris"), WORKERS=2, **environ) as served:
        assert served.post("/predict", ASKED).json() == {"scores": [1]}
        assert "feature_group" in served.get("/openapi.json").text


def test_a_store_that_takes_too_long_holds_nobody_up(
    running: tuple[Store, str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "LOOKUPS", 1)
    store.fault = ("schema", "slow")
    url = running[1]
    features = FeatureStore(f"{url}/store", f"{url}/admin/v1")
    with switching(store=features, limits=BatchLimits(timeout=0.2)) as switch, ThreadPoolExecutor(6) as threads:
        ours = switch("iris") + "/predict"
        answers = list(threads.map(lambda _: requests.post(ours, json=ASKED, timeout=60), range(6)))
        assert {answer.status_code for answer in answers} == {503, 504}
        assert requests.post(ours, json={"features": IRIS}, timeout=60).json() == {"scores": [1]}
    features.close()


def test_an_answer_that_trickles_or_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def trickle(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.01)

    monkeypatch.setattr(feature_store, "ANSWER_SECONDS", 0.1)
    with in_thread(trickle) as url, pytest.raises(FeatureStoreError, match="did not answer in time") as caught:
        FeatureStore(url, url).features("flowers", KEYS, {})
    assert caught.value.status == 504
