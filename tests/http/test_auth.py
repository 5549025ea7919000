"""Requests with and without API keys, on real servers; key files replaced as the kubelet does it."""

from __future__ import annotations

import base64
import contextlib
import gc
import hmac
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import tritonclient.http as triton
from tritonclient.http.auth import BasicAuth

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.errors import ConfigError
from darwin_runtime.http.app import make_app
from darwin_runtime.http.auth import EXEMPTIBLE, MAX_KEYS, Guard, Keys
from darwin_runtime.http.service import Service
from darwin_runtime.http.settings import Settings
from darwin_runtime.model.load import load_model
from darwin_runtime.settings import Reader
from tests.conftest import run_role, wait_until
from tests.support.models import IRIS, model_path
from tests.support.mounts import Mount
from tests.support.servers import Served, in_thread, serving

pytestmark = pytest.mark.usefixtures("serving_environment")

KEY, OTHER = "correct-horse-battery-staple", "Tr0ub4dor&3-and-some-more"
BEARER = {"Authorization": f"Bearer {KEY}"}
BODY = {"features": IRIS}

# Every route, and some that are none, with the keys of an error in its protocol's words.
DARWIN, MLFLOW, KSERVE = {"detail"}, {"error_code", "message"}, {"error"}
GUARDED = [
    ("POST", "/predict", DARWIN),
    ("POST", "/invocations", MLFLOW),
    ("POST", "/v1/models/flowers:predict", KSERVE),
    ("POST", "/v1/models/other:predict", KSERVE),
    ("POST", "/v2/models/flowers/infer", KSERVE),
    ("POST", "/v2/models/flowers/versions/1/infer", KSERVE),
    ("GET", "/schema", DARWIN),
    ("GET", "/version", MLFLOW),
    ("GET", "/v1/models", KSERVE),
    ("GET", "/v1/models/flowers", KSERVE),
    ("GET", "/v1/models/flowers:predict", KSERVE),
    ("GET", "/v2", KSERVE),
    ("GET", "/v2/models/flowers", KSERVE),
    ("GET", "/v2/models/flowers/ready", KSERVE),
    ("GET", "/v2/models/other/ready", KSERVE),
    ("GET", "/v2/models/flowers/versions/1", KSERVE),
    ("GET", "/v2/models/flowers/versions/1/ready", KSERVE),
    ("GET", "/", DARWIN),
    ("GET", "/docs", DARWIN),
    ("GET", "/openapi.json", DARWIN),
    ("GET", "/nowhere", DARWIN),
    ("GET", "/predict", DARWIN),
    ("DELETE", "/predict", DARWIN),
    ("OPTIONS", "/predict", DARWIN),
    ("GET", "/v2/nowhere", KSERVE),
    ("PUT", "/v1/models", KSERVE),
    ("GET", "/livez/", DARWIN),
    ("GET", "/livez%0A", DARWIN),
    ("GET", "//livez", DARWIN),
    ("GET", "/%6Cive", DARWIN),
    ("GET", "/metrics/../schema", DARWIN),
]
OPEN = sorted(EXEMPTIBLE["probes"] | EXEMPTIBLE["metrics"])


def guarded(keys: Path, exempt: frozenset[str] = frozenset(OPEN)) -> Service:
    service = Service(BatchLimits(), "flowers", guard=Guard(Keys(keys), certificates=False, exempt=exempt))
    service.use(load_model(model_path("iris")))
    return service


@pytest.fixture(scope="module")
def url(serving_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server in this process that wants a key."""
    file = tmp_path_factory.mktemp("keys") / "api-keys"
    file.write_text(f"# for the tests\n\n  {KEY}  \r\n{OTHER}\n# {'not-a-key-at-all' * 2}")
    with in_thread(make_app(guarded(file))) as url:
        yield url


def send(url: str, verb: str, path: str, **options: Any) -> requests.Response:
    """Without tidying up the path, which `requests` does otherwise."""
    with requests.Session() as session:
        request = session.prepare_request(requests.Request(verb, url, **options))
        request.url = url + path
        return session.send(request, timeout=60)


@pytest.mark.parametrize(("verb", "path", "shape"), GUARDED)
def test_without_a_key_nothing_is_told(url: str, verb: str, path: str, shape: set[str]) -> None:
    for headers in ({}, {"Authorization": "Bearer not-one-of-the-keys"}):
        answer = send(url, verb, path, json=BODY, headers=headers | {"Accept": "text/html"})
        assert answer.status_code == 401, (path, answer.text)
        assert answer.json().keys() == shape
        assert not any(name in answer.text for name in ("flowers", "petal", "sklearn", "iris"))
        challenges = answer.raw.headers.getlist("WWW-Authenticate")
        error = ', error="invalid_token"' if headers else ""
        assert challenges == [f'Bearer realm="model server"{error}', 'Basic realm="model server", charset="UTF-8"']
    with_key = send(url, verb, path, json=BODY, headers=BEARER)
    assert with_key.status_code != 401, "with a key it gets further"


def test_mlflows_errors_have_its_code(url: str) -> None:
    assert send(url, "POST", "/invocations").json()["error_code"] == "UNAUTHENTICATED"


@pytest.mark.parametrize("path", OPEN)
def test_what_is_left_open(url: str, path: str) -> None:
    for verb in ("GET", "HEAD"):
        assert send(url, verb, path).status_code == 200


def test_every_route_is_either_guarded_or_known_to_be_open(url: str) -> None:
    document = send(url, "GET", "/openapi.json", headers=BEARER).json()
    told = {(verb.upper(), path) for path, operations in document["paths"].items() for verb in operations}
    tested = {(verb, path) for verb, path, _ in GUARDED} | {("GET", path) for path in OPEN}
    assert told - tested == set()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "authorization",
    [
        f"Bearer {KEY}",
        f"bearer {KEY}",
        f"BEARER   {KEY} ",
        f"Bearer {OTHER}",
        basic("", KEY),
        basic("anybody", KEY),
        basic("ü", OTHER),
        basic("a", KEY).replace("Basic", "basic"),
    ],
)
def test_ways_to_give_a_key(url: str, authorization: str) -> None:
    answer = send(url, "POST", "/predict", json=BODY, headers={"Authorization": authorization})
    assert (answer.status_code, answer.json()) == (200, {"scores": [1]})


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Token {KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer {KEY} {KEY}",
        f"Bearer {KEY.upper()}",
        f"Bearer {basic('', KEY)[6:]}",
        "Bearer not-a-key-at-allnot-a-key-at-all",
        "Bearer # for the tests",
        basic(KEY, ""),
        basic(KEY, KEY[:-1]),
        "Basic " + base64.b64encode(KEY.encode()).decode(),
        f"Basic {KEY}",
        "Basic ====",
        "Basic \xff\xfe",
        "Digest username=x",
        "Bearer " + "x" * 20_000,
    ],
)
def test_what_is_no_key(url: str, authorization: str) -> None:
    headers = {"Authorization": authorization.encode("latin-1")}
    answer = send(url, "POST", "/predict", json=BODY, headers=headers)
    assert answer.status_code == 401
    for path in (f"/predict?api_key={KEY}", f"/predict?access_token={KEY}"):
        assert send(url, "POST", path, json=BODY, headers={"X-API-Key": KEY}).status_code == 401


def test_clients_with_a_login(url: str) -> None:
    assert requests.get(f"{url}/schema", auth=("me", KEY), timeout=60).status_code == 200
    client = triton.InferenceServerClient(urlsplit(url).netloc)
    with pytest.raises(triton.InferenceServerException, match="an API key is needed"):
        client.get_model_metadata("flowers")
    client.register_plugin(BasicAuth("me", KEY))
    assert client.get_model_metadata("flowers")["name"] == "flowers"
    client.close()


def test_the_body_is_neither_awaited_nor_asked_for(url: str) -> None:
    host, port = urlsplit(url).netloc.split(":")
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n"
    for key, expected in (("", b"HTTP/1.1 401 "), (f"Authorization: Bearer {KEY}\r\n", b"HTTP/1.1 100 ")):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(f"{head}{key}\r\n".encode())
            assert connection.recv(65536).startswith(expected)


def test_every_key_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n{OTHER}\n{KEY}-3\n")
    keys, compared, original = Keys(tmp_path / "keys"), list[int](), hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(len(other))
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for key, is_known in ((KEY, True), (f"{KEY}-3", True), ("x", False)):
        compared.clear()
        assert keys.is_valid(key.encode()) == is_known
        assert compared == [32] * 3


def test_no_key_stays_in_memory(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    seen: dict[int, Any] = {}
    todo: list[Any] = [Keys(tmp_path / "keys")]
    while todo:
        one = todo.pop()
        if id(one) not in seen and not isinstance(one, type) and type(one).__name__ not in ("module", "function"):
            seen[id(one)] = one
            todo += gc.get_referents(one)
    texts = [one for one in seen.values() if isinstance(one, (bytes, str))]
    assert any(isinstance(one, bytes) and len(one) == 32 for one in texts), "the digest was found"
    assert not any(KEY in (one if isinstance(one, str) else one.decode("latin-1")) for one in texts)


# Settings

GOOD = {"MODEL_LOCAL_PATH": "/models"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "there is no key in"),
        (b"\n # comment\n\n", "there is no key in"),
        (b"ok-key-of-enough-letters\nfifteen-letters\n", "line 2 of"),
        (b"sixteen letters and-spaces\n", "line 1 of"),
        ("sixteen-letters-ü\n".encode(), "line 1 of"),
        (b"\0binary-key-of-enough-letters\n", "line 1 of"),
        (b"\xef\xbb\xbfkey-after-a-byte-order-mark\n", "line 1 of"),
        ("\n".join(f"key-number-{n:08d}" for n in range(MAX_KEYS + 1)).encode(), "1001 keys, more than 1000"),
        (None, "cannot read"),
    ],
)
def test_a_bad_file_is_a_bad_setting(tmp_path: Path, content: bytes | None, why: str) -> None:
    file = tmp_path / "api-keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(Reader(GOOD | {"API_KEYS_FILE": str(file)}))
    [problem] = caught.value.problems
    assert problem.startswith("API_KEYS_FILE: ")
    assert why in problem
    assert "for example API_KEYS_FILE=/etc/darwin/keys/api-keys" in problem
    for line in (content or b"").splitlines():
        assert line.strip() in (b"", b"# comment") or line.decode("latin-1") not in problem


def test_a_key_in_place_of_the_file_is_not_shown() -> None:
    ended = run_role("darwin_serve.py", MODEL_LOCAL_PATH="/models", API_KEYS_FILE=KEY)
    assert (ended.code, KEY in ended.err) == (2, False)
    assert "API_KEYS_FILE: must be the absolute path of a file, not a key" in ended.err


@pytest.mark.parametrize(
    ("value", "exempt"),
    [
        ("", set(OPEN)),
        ("probes,metrics", set(OPEN)),
        (" Metrics ", {"/metrics"}),
        ("probes", EXEMPTIBLE["probes"]),
        ("none", set()),
    ],
)
def test_what_may_be_left_open(tmp_path: Path, value: str, exempt: set[str]) -> None:
    (tmp_path / "keys").write_text(KEY)
    settings = Settings.from_env(Reader(GOOD | {"API_KEYS_FILE": str(tmp_path / "keys"), "AUTH_EXEMPT": value}))
    assert settings.guard is not None
    assert settings.guard.policy.exempt == exempt
    with in_thread(make_app(guarded(tmp_path / "keys", settings.guard.policy.exempt))) as url:
        for path in OPEN:
            assert send(url, "GET", path).status_code == (200 if path in exempt else 401)
            assert send(url, "GET", path, headers=BEARER).status_code == 200


@pytest.mark.parametrize("value", ["all", "probes,docs", "none,probes", ",", "/livez"])
def test_what_may_not(value: str) -> None:
    with pytest.raises(ConfigError, match=r"AUTH_EXEMPT=.*must be some of probes, metrics, or none"):
        Settings.from_env(Reader(GOOD | {"AUTH_EXEMPT": value}))


def test_nobody_needs_a_key_by_default() -> None:
    assert Settings.from_env(Reader(GOOD)).guard is None


# Rotation


def statuses(served: Served, key: str, count: int = 12) -> set[int]:
    """What connections are answered with this key which are open together, so that all workers have some."""
    headers = {"Authorization": f"Bearer {key}"}
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(requests.Session()) for _ in range(count)]
        return {session.post(f"{served.url}/predict", json=BODY, headers=headers).status_code for session in sessions}


def becomes(served: Served, key: str, status: int) -> None:
    wait_until(lambda: statuses(served, key) == {status}, f"{status} for a key")


def test_keys_are_rotated_under_a_running_server(tmp_path: Path) -> None:
    mount = Mount(tmp_path / "secret", api_keys=f"{KEY}\n")
    file = mount / "api.keys"
    with serving(model_path("iris"), WORKERS=2, API_KEYS_FILE=file) as served:
        assert (statuses(served, KEY), statuses(served, OTHER)) == ({200}, {401})
        # A connection that stays open, too, has to give a key that is valid now.
        with requests.Session() as session:
            assert session.get(f"{served.url}/schema", headers=BEARER, timeout=60).status_code == 200
            mount.put(api_keys=f"{OTHER}\n")
            becomes(served, OTHER, 200)
            becomes(served, KEY, 401)
            assert session.get(f"{served.url}/schema", headers=BEARER, timeout=60).status_code == 401
        # A file that is gone, or can't be read, is no statement on keys.
        (mount / "..data").rename(mount / "..away")
        wait_until(lambda: "What was read before stays in use" in (statuses(served, OTHER), served.log)[1], "a word")
        assert statuses(served, OTHER, 40) == {200}
        (mount / "..away").rename(mount / "..data")
        # A line that is no key must not keep what was taken out.
        mount.put(api_keys=f"{KEY}\nshort\n")
        becomes(served, KEY, 200)
        becomes(served, OTHER, 401)
        # Emptied: nobody is let in.
        mount.put(api_keys="# none left\n")
        becomes(served, KEY, 401)
        assert served.get("/ready").status_code == 200
        mount.put(api_keys=f"{KEY}\n{OTHER}\n")
        becomes(served, OTHER, 200)
        log = served.log
    assert f"API_KEYS_FILE: cannot read {file}: No such file or directory. What was read before" in log
    assert log.count("cannot read") <= 2, "once for each worker"
    assert f"{file} has changed, and line 2 of it is no key; the others apply" in log
    assert f"there is no key left in {file}: nobody is let in" in log
    assert f"{file} has changed: 2 keys are valid from now on" in log
    assert not any(secret in log for secret in (KEY, OTHER, "short"))
    assert f"API_KEYS_FILE={file}" in log, "where they are is no secret"


def test_while_it_is_loading(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    entered, leave = tmp_path / "entered", tmp_path / "leave"
    config = json.dumps({"entered": str(entered), "leave": str(leave)})
    settings: dict[str, Any] = {"API_KEYS_FILE": tmp_path / "keys", "SERVING_MODEL_CONFIG": config, "WORKERS": 2}
    with serving(model_path("slow_to_load"), wait=False, **settings) as served:
        wait_until(entered.exists, "loading")
        asked = {path: served.get(path).status_code for path in ("/livez", "/ready", "/metrics", "/docs", "/schema")}
        assert asked == {"/livez": 200, "/ready": 503, "/metrics": 200, "/docs": 401, "/schema": 401}
        assert served.get("/docs", headers=BEARER).status_code == 503
        assert served.get("/schema", auth=("", KEY)).status_code == 503
        leave.touch()
        wait_until(served.ready, "readiness")
        assert served.get("/v1/models", headers=BEARER).status_code == 200
        assert served.get("/v1/models").status_code == 401
