"""Pages of other origins, and the headers that keep a browser from doing what nobody asked it to."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from darwin_runtime.errors import ConfigError
from darwin_runtime.http import cors
from darwin_runtime.http.server import HEADERS
from darwin_runtime.http.settings import Settings
from darwin_runtime.settings import Reader
from tests.conftest import wait_until
from tests.support.models import IRIS, model_path
from tests.support.servers import Served, serving

KEY = "correct-horse-battery-staple"
APP, LOCAL, FOREIGN = "https://app.example", "http://localhost:3000", "https://evil.example"
ASKED = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.fixture(scope="module")
def role(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Keys are needed, and two origins may ask."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    settings: dict[str, Any] = {"API_KEYS_FILE": file, "CORS_ORIGINS": f"{APP}, {LOCAL}"}
    with serving(model_path("chatting"), WORKERS=1, **settings) as served:
        yield served


def allowed(answer: requests.Response) -> str | None:
    return answer.headers.get("Access-Control-Allow-Origin")


@pytest.mark.parametrize("origin", [APP, LOCAL])
def test_a_preflight_needs_no_key(role: Served, origin: str) -> None:
    asked = {"Origin": origin, **ASKED, "Access-Control-Request-Headers": ", ".join(cors.ASKED_WITH)}
    answer = requests.options(f"{role.url}/predict", headers=asked, timeout=60)
    assert (answer.status_code, allowed(answer)) == (200, origin)
    told = {name.strip().lower() for name in answer.headers["Access-Control-Allow-Headers"].split(",")}
    assert {name.lower() for name in cors.ASKED_WITH} <= told
    assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize(
    "origin", [FOREIGN, f"{APP}.evil.example", "https://app.example:444", "http://app.example", "null"]
)
def test_other_origins_are_not_allowed(role: Served, origin: str) -> None:
    answer = requests.options(f"{role.url}/predict", headers={"Origin": origin, **ASKED}, timeout=60)
    assert (answer.status_code, allowed(answer)) == (400, None)
    answer = role.get("/schema", headers={"Origin": origin, "Authorization": f"Bearer {KEY}"})
    assert allowed(answer) is None


def test_headers_and_verbs_that_nobody_needs_are_not_allowed(role: Served) -> None:
    for more in ({"Access-Control-Request-Headers": "x-other"}, {"Access-Control-Request-Method": "DELETE"}):
        answer = requests.options(f"{role.url}/predict", headers={"Origin": APP, **ASKED, **more}, timeout=60)
        assert answer.status_code == 400


def test_what_is_no_preflight_needs_a_key(role: Served) -> None:
    for headers in ({}, {"Origin": APP}, {"Access-Control-Request-Method": "POST"}):
        assert requests.options(f"{role.url}/predict", headers=headers, timeout=60).status_code == 401


def test_errors_can_be_read_by_the_page(role: Served) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "all is well"}
    answers = {
        401: role.post("/invocations", body, headers={"Origin": APP}),
        404: role.get("/nowhere", headers={"Origin": APP, **key}),
        422: role.post("/predict", {}, headers={"Origin": APP, **key}),
        200: role.post("/invocations", body, headers={"Origin": APP, **key}),
    }
    for status, answer in answers.items():
        assert (answer.status_code, allowed(answer)) == (status, APP)
        assert answer.headers["Vary"] == "Origin"
        told = answer.headers["Access-Control-Expose-Headers"]
        assert {"X-Request-ID", "Retry-After", "WWW-Authenticate"} <= set(told.split(", "))


def test_not_ready_can_be_read_by_the_page(tmp_path: Path) -> None:
    entered, leave = tmp_path / "entered", tmp_path / "leave"
    config = json.dumps({"entered": str(entered), "leave": str(leave)})
    settings: dict[str, Any] = {"SERVING_MODEL_CONFIG": config, "CORS_ORIGINS": "*"}
    with serving(model_path("slow_to_load"), wait=False, WORKERS=1, **settings) as served:
        wait_until(entered.exists, "loading")
        answer = served.get("/schema", headers={"Origin": FOREIGN})
        assert (answer.status_code, allowed(answer)) == (503, "*")
        leave.touch()


# By default


@pytest.fixture(scope="module")
def plain() -> Iterator[Served]:
    with serving(model_path("chatting"), WORKERS=1) as served:
        yield served


def test_it_is_off_by_default(plain: Served) -> None:
    answer = requests.options(f"{plain.url}/predict", headers={"Origin": APP, **ASKED}, timeout=60)
    assert answer.status_code == 405
    answer = plain.get("/ready", headers={"Origin": APP})
    assert [name for name in answer.headers if name.lower().startswith("access-control") or name == "Vary"] == []


def check(answer: requests.Response) -> None:
    """That it has what every answer has, once."""
    for name, value in HEADERS:
        assert answer.raw.headers.getlist(name) == [value]
    assert "Server" not in answer.headers


def test_every_answer_has_the_headers_that_are_safe(plain: Served, role: Served) -> None:
    for path in ("/livez", "/ready", "/schema", "/docs", "/openapi.json", "/metrics", "/v2", "/nowhere", "/predict"):
        check(plain.get(path))
    check(plain.post("/predict", {"features": IRIS}))
    check(plain.post("/invocations", {"prompt": "all is well"}))
    streamed = plain.post("/invocations", {"prompt": "all is well", "stream": True})
    assert streamed.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    check(streamed)
    check(requests.options(f"{role.url}/predict", headers={"Origin": APP, **ASKED}, timeout=60))
    check(role.get("/schema"))
    assert dict(HEADERS) == {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def test_so_has_what_is_no_http(plain: Served) -> None:
    with socket.create_connection(
        (str(urlsplit(plain.url).hostname), int(urlsplit(plain.url).port or 0))
    ) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"x-content-type-options: nosniff" in answer.lower()
    assert b"\r\nserver:" not in answer.lower()


def test_the_page_is_not_framed(plain: Served) -> None:
    for path in ("/docs", "/"):
        answer = plain.get(path, headers={"Accept": "text/html"})
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        for part in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
            assert part in answer.headers["Content-Security-Policy"].split("; ")


# Settings


@pytest.mark.parametrize(
    "origins",
    [
        "",
        "*",
        APP,
        f"{APP},{LOCAL}",
        f" {APP} , ",
        "http://127.0.0.1:8080",
        "http://[::1]:3000",
        "https://a-b.c1.example",
    ],
)
def test_origins(origins: str) -> None:
    settings = Settings.from_env(Reader({"MODEL_LOCAL_PATH": "/models", "CORS_ORIGINS": origins}))
    assert settings.origins == tuple(part.strip() for part in origins.split(",") if part.strip())


@pytest.mark.parametrize(
    "origins",
    [
        *("app.example", f"{APP}/", f"{APP}/path", "https://App.example", "https://*.example", f"*,{APP}", "null"),
        *("https://app.example:443", "http://app.example:80", "ftp://app.example", "https://me@app.example"),
        *("https://app.example:x", "https://app.example?x", f"{APP} {LOCAL}", "https://", "https://-"),
    ],
)
def test_what_is_no_origin(origins: str) -> None:
    with pytest.raises(ConfigError, match=r"CORS_ORIGINS=.*for example CORS_ORIGINS="):
        Settings.from_env(Reader({"MODEL_LOCAL_PATH": "/models", "CORS_ORIGINS": origins}))
