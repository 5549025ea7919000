"""A registry, an artifact server or a redirect that means no good: what it gets to see, and what ends up on disk."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from darwin_runtime.errors import RoleError
from darwin_runtime.storage import fetch as fetch_module
from darwin_runtime.storage.attempts import RetryPolicy
from tests.conftest import Finished, http_server
from tests.support.storage import download

LOGIN = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "canary-pa55word"}
BASIC = "Basic " + base64.b64encode(b"ann:canary-pa55word").decode()

FILES = {"MLmodel": b"flavors: {}\n", "weights": bytes(range(256)) * 64}

Answer = Callable[["_Handler"], None]


@dataclass
class Registry:
    """MLflow's registry and artifact server, as far as a download asks it: version 1 of the model `m`.

    `source` is where it says that the files are; `answers` are given, by the end of the path, instead of the usual
    ones. `seen` are the requests: path and Authorization.
    """

    url: str = ""
    source: str = "mlflow-artifacts:/m"
    files: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0

    @property
    def environ(self) -> dict[str, str]:
        return {"MLFLOW_TRACKING_URI": self.url, "MODEL_URI": "models:/m/1", **LOGIN}


class _Handler(BaseHTTPRequestHandler):
    registry: Registry

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        at = urlsplit(self.path)
        self.registry.seen.append((at.path, self.headers.get("Authorization", "")))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with contextlib.suppress(ConnectionError):
            self.answer(at.path, parse_qs(at.query))

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        for end, answer in self.registry.answers.items():
            if path.endswith(end):
                answer(self)
                return
        if path.endswith("/get-download-uri"):
            self.json({"artifact_uri": self.registry.source})
        elif path.endswith("/registered-models/get"):
            self.json({"registered_model": {"name": "m"}})
        elif path.endswith("/model-versions/get"):
            version = {"name": "m", "version": "1", "creation_timestamp": 1, "source": self.registry.source}
            self.json({"model_version": version})
        elif path.endswith("/mlflow-artifacts/artifacts"):
            self.json({"files": self.registry.files if query["path"] == ["m"] else []})
        elif (name := path.rpartition("/")[2]) in FILES:
            self.send(200, FILES[name])
        else:
            self.send(404, b"{}")

    def json(self, answer: Any) -> None:
        self.send(200, json.dumps(answer).encode(), Content_Type="application/json")

    def send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def registry(**given: Any) -> Iterator[Registry]:
    files = [{"path": name, "is_dir": False, "file_size": len(body)} for name, body in FILES.items()]
    running = Registry(**{"files": files, **given})
    with http_server(type("Handler", (_Handler,), {"registry": running})) as running.url:
        yield running


def attempt(tmp_path: Path, running: Registry, **settings: object) -> Finished:
    defaults = {"MAX_RETRIES": 0, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1, "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": 0}
    done = download(tmp_path, **{**running.environ, **defaults, **settings})
    assert "Traceback" not in done.err, done.err
    assert "canary" not in done.err
    return done


Fetch = Callable[[Registry], Path]


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serving_environment: None) -> Fetch:
    """Fetch the model in this process, as the server does; returns where to. Raises `RoleError`."""

    def fetched(running: Registry) -> Path:
        for name, value in {**running.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(fetch_module, "RetryPolicy", lambda: RetryPolicy(0))
        (tmp_path / "models").mkdir()
        fetch_module.fetch_model("models:/m/1", tmp_path / "models")
        return tmp_path / "models"

    return fetched


def whole(tmp_path: Path) -> bool:
    return all((tmp_path / "models" / name).read_bytes() == body for name, body in FILES.items())


def nothing(tmp_path: Path) -> bool:
    """No model at the output, nor anything that its files would be read from."""
    return not (tmp_path / "models" / "MLmodel").exists()


def test_this_registry_is_one_as_far_as_downloads_can_tell(tmp_path: Path) -> None:
    with registry() as running:
        assert attempt(tmp_path, running).code == 0
    assert whole(tmp_path)
    assert {login for _, login in running.seen} == {BASIC}


# Listings


def _file(path: str, size: Any = 1, *, is_dir: Any = False) -> dict[str, Any]:
    return {"path": path, "is_dir": is_dir, "file_size": size}


@pytest.mark.parametrize(
    "listed",
    [
        _file("../../escaped"),
        _file("/tmp/escaped"),
        _file("a/../../escaped"),
        _file("%2e%2e%2fescaped"),
        _file("..\\escaped"),
        _file("weights"),
        _file("weights/escaped"),
        _file("x" * 300),
        _file("x/" * 1500 + "x"),
        _file("\ud800"),
        _file("x", -1),
        _file("x", -(10**30)),
        _file("x", "many"),
        _file("x", [1]),
        _file("x", 1e400),
        _file("x", 10**20),
        _file("."),
        _file("./x"),
        _file("x//y"),
        _file(""),
        {"path": "x"},
        {"is_dir": False},
        {"path": 7, "is_dir": False},
        "x",
        None,
    ],
)
def test_a_listing_that_lies_is_not_followed(listed: Any, fetch: Fetch, tmp_path: Path) -> None:
    with registry() as running:
        running.files.append(listed)
        with pytest.raises((RoleError, OSError)):
            fetch(running)
    assert not [path for path, _ in running.seen if path.endswith("/weights")], "nothing was begun"
    assert nothing(tmp_path)
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("names", ["same", "deeper", "up", "many"])
def test_directories_without_an_end(names: str, fetch: Fetch, tmp_path: Path) -> None:
    def listing(handler: _Handler) -> None:
        inside = parse_qs(urlsplit(handler.path).query)["path"][0]
        root = handler.registry.files if inside == "m" else []
        found = {"same": ["d"], "deeper": ["d"], "up": [".."], "many": [f"d{n}" for n in range(20_000)]}[names]
        handler.json({"files": [*root, *(_file(name, is_dir=True) for name in found)]})

    with (
        registry(answers={"/mlflow-artifacts/artifacts": listing}) as running,
        pytest.raises(RoleError, match=r"not in it or too deep|more than 100000|unsafe name"),
    ):
        fetch(running)
    assert len(running.seen) < 200
    assert nothing(tmp_path)


def test_names_in_a_listing_forge_no_line_of_the_log(tmp_path: Path) -> None:
    with registry() as running:
        running.files.append(_file("x\n2026-01-31T12:00:00.000Z INFO darwin.download: all is well\x1b[2J"))
        done = attempt(tmp_path, running)
    assert done.code == 1
    assert not re.search(r"^\S+ INFO darwin.download: all is well", done.err, re.MULTILINE)
    assert "\x1b" not in done.err


# Bodies


def endless(handler: _Handler) -> None:
    """More than was listed, until who asked has enough."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    try:
        while handler.registry.sent < 1 << 30:
            handler.registry.sent += handler.wfile.write(bytes(1 << 16))
    except OSError:
        return


@pytest.mark.parametrize("strategy", ["emptydir", "pvc"])
def test_a_body_of_more_than_was_listed_is_stopped_at_once(strategy: str, tmp_path: Path) -> None:
    with registry(answers={"/weights": endless}) as running:
        done = attempt(tmp_path, running, STORAGE_STRATEGY=strategy)
    assert done.code == 1
    assert "bytes instead of the 16384 listed" in done.last
    assert running.sent < 64 << 20, "what the sockets between take"
    assert nothing(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1 << 20


def test_a_description_without_an_end_is_stopped_too(tmp_path: Path) -> None:
    """It is read before anything else, where no registry vouches for the model."""
    with registry(answers={"/MLmodel": endless}) as running:
        done = attempt(tmp_path, running, MODEL_URI="mlflow-artifacts:/m")
    assert done.code == 1
    assert "MLmodel of more than 16777216 bytes" in done.last
    assert running.sent < 256 << 20


def test_an_error_without_an_end_is_stopped_too(tmp_path: Path) -> None:
    def refused(handler: _Handler) -> None:
        handler.send_response = lambda code: BaseHTTPRequestHandler.send_response(handler, 403)  # type: ignore[method-assign, assignment, misc]
        endless(handler)

    with registry(answers={"/weights": refused}) as running:
        done = attempt(tmp_path, running)
    assert done.code == 1
    assert "HTTP 403" in done.last
    assert running.sent < 256 << 20
    assert len(done.err) < 100_000


# Elsewhere


def redirect(to: str) -> Answer:
    return lambda handler: handler.send(302, b"", Location=to)


@pytest.mark.parametrize("end", ["/weights", "/mlflow-artifacts/artifacts", "/model-versions/get"])
def test_a_redirect_takes_no_login_along(end: str, tmp_path: Path) -> None:
    with registry() as other, registry() as running:
        running.answers[end] = lambda handler: handler.send(302, b"", Location=other.url + handler.path)
        done = attempt(tmp_path, running)
    assert done.code == 0, done.err
    assert whole(tmp_path)
    assert other.seen
    assert {login for _, login in other.seen} == {""}


@pytest.mark.parametrize("end", ["/weights", "/MLmodel", "/mlflow-artifacts/artifacts", "/model-versions/get"])
@pytest.mark.parametrize("to", ["file:///etc/hostname", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x", "data:,x", "//"])
def test_a_redirect_to_no_web_server_is_not_followed(to: str, end: str, fetch: Fetch, tmp_path: Path) -> None:
    with registry(answers={end: redirect(to)}) as running, pytest.raises(RoleError):
        fetch(running)
    assert any(path.endswith(end) for path, _ in running.seen)
    assert not (tmp_path / "models" / Path(end).name).exists()


def test_redirects_in_a_circle(fetch: Fetch) -> None:
    circle: dict[str, Answer] = {"/weights": lambda handler: handler.send(302, b"", Location=handler.path)}
    with registry(answers=circle) as running, pytest.raises(RoleError):
        fetch(running)
    assert any(path.endswith("/weights") for path, _ in running.seen)
    assert len(running.seen) < 200


RUN, LOGGED = "a" * 32, "m-" + "a" * 32


def _wrapping(there: str) -> dict[str, Answer]:
    """The answers for a run, and for a logged model, whose files are `there`."""
    info = {"run_id": RUN, "run_uuid": RUN, "experiment_id": "7", "artifact_uri": there}
    model = {"model_id": LOGGED, "experiment_id": "7", "name": "m", "artifact_uri": there, "creation_timestamp_ms": 1}
    return {
        "/runs/get": lambda handler: handler.json({"run": {"info": info, "data": {}}}),
        "/logged-models/search": lambda handler: handler.json({"models": []}),
        f"/logged-models/{LOGGED}": lambda handler: handler.json({"model": {"info": model}}),
    }


@pytest.mark.parametrize(
    ("source", "inner"),
    [
        ("mlflow-artifacts://{host}/m", ""),
        ("{url}/api/2.0/mlflow-artifacts/artifacts/m", ""),
        (f"runs:/{RUN}/m", "mlflow-artifacts://{host}"),
        (f"runs:/{RUN}/m", "{url}/api/2.0/mlflow-artifacts/artifacts/"),
        (f"models:/{LOGGED}", "mlflow-artifacts://{host}/m"),
    ],
)
@pytest.mark.parametrize("token", ["", "canary-t0ken"])
def test_a_source_elsewhere_is_not_sent_the_login(source: str, inner: str, token: str, tmp_path: Path) -> None:
    """Everyone who may register a model may name any host as the place of its files, also by way of a run."""
    without = {"MLFLOW_TRACKING_USERNAME": "", "MLFLOW_TRACKING_PASSWORD": "", "MLFLOW_TRACKING_TOKEN": ""}
    login = {**without, "MLFLOW_TRACKING_TOKEN": token} if token else {}
    with registry() as other, registry() as running:
        named = {"url": other.url, "host": urlsplit(other.url).netloc}
        running.source = source.format(**named)
        running.answers = _wrapping(inner.format(**named))
        done = attempt(tmp_path, running, **login)
        assert done.code == 1
        assert "is not the host of MLFLOW_TRACKING_URI and so is not sent its login" in done.last
        assert other.seen == []
        assert nothing(tmp_path)
        # Where there is no login, nothing is lost.
        done = attempt(tmp_path, running, **without)
        assert done.code == 0, done.err
        assert whole(tmp_path)
        # Nor where the user names the host.
        done = attempt(tmp_path / "named", running, MODEL_URI=f"mlflow-artifacts://{urlsplit(other.url).netloc}/m")
        assert done.code == 0, done.err


@pytest.mark.parametrize("source", ["file:///etc", "/etc", "file:///proc/self"])
def test_a_source_on_this_machine_without_a_model(source: str, fetch: Fetch, tmp_path: Path) -> None:
    with (
        registry(source=source) as running,
        pytest.raises(RoleError, match=r"no MLflow model|lists more than|cannot read"),
    ):
        fetch(running)
    assert nothing(tmp_path)


def test_a_registry_that_pages_without_an_end_is_left(tmp_path: Path) -> None:
    """The models of a run are searched page by page; there is a limit to the time that all takes."""
    asked = threading.Event()

    def page(handler: _Handler) -> None:
        asked.set()
        handler.json({"models": [], "next_page_token": "more"})

    run = {"run": {"info": {"run_id": "r", "experiment_id": "0", "artifact_uri": "mlflow-artifacts:/m"}}}
    answers: dict[str, Answer] = {"/logged-models/search": page, "/runs/get": lambda handler: handler.json(run)}
    with registry(answers=answers) as running:
        done = attempt(tmp_path, running, MODEL_URI="runs:/r/model", DOWNLOAD_TIMEOUT_SECONDS=8)
    assert asked.is_set()
    assert done.code == 1
    assert "within 8 s: no answer in time" in done.last
