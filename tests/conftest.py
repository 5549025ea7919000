"""A clean environment for every test, two real MLflow servers, a Kubernetes API, and a cache for all that need one."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pytest
import requests

from darwin_cache import Cache
from tests.apiserver import ApiServer

ROOT = Path(__file__).parent.parent

# What a developer's machine sets and a test must not see.
_STRAY = re.compile(
    r"""(?xi)^(
    (MLFLOW|AWS|KUBERNETES|FEATURE_STORE|OFS_ADMIN)_.* | (HTTPS?|ALL|NO)_PROXY | (REQUESTS|CURL)_CA_BUNDLE
    | MODEL_.* | OUTPUT_PATH | STORAGE_STRATEGY | CACHE_PATH | MAX_RETRIES | BACKOFF_SECONDS | DEPLOYMENT_NAME
    | DOWNLOAD_TIMEOUT_SECONDS | VERIFY | REQUIRE_SHA256 | LINK_MODE | POD_NAME | NAMESPACE | TTL_DAYS | MAX_SIZE_GB
    | LOW_WATERMARK_PERCENT | DRY_RUN | GRACE_SECONDS | METRICS_TEXTFILE | PUSHGATEWAY_URL | HOST | PORT | ROOT_PATH
    | SERVICE_NAME
    | LOG_.* | ENV | SERVING_MODEL_CONFIG | REQUEST_TIMEOUT_SECONDS
    | API_KEYS_FILE | AUTH_EXEMPT | TLS_.* | CORS_ORIGINS
    | WORKERS | BATCHING | MAX_(BATCH_ROWS|QUEUE_ROWS|ROWS|BODY_MB|HEADER_KB|CONNECTIONS) | FAST_PATH
    | RECEIVE_TIMEOUT_SECONDS | SEND_TIMEOUT_SECONDS | KEEP_ALIVE_SECONDS | DRAIN_SECONDS | .*_NUM_THREADS
    )$"""
)


def clean_environ(**settings: object) -> dict[str, str]:
    """This process's environment without what would leak into a role, and with `settings`."""
    kept = {name: value for name, value in os.environ.items() if not _STRAY.match(name)}
    return kept | {"PYTHONUNBUFFERED": "1"} | {name: str(value) for name, value in settings.items()}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if _STRAY.match(name):
            monkeypatch.delenv(name)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.prepare(tmp_path / "cache")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path / "serviceaccount", namespace="default") as running:
        yield running


@pytest.fixture(scope="module")
def serving_environment() -> Iterator[None]:
    """Whatever loading a model sets for good is set now, and unset again: another test may want MLflow's defaults."""
    import darwin_mlflow
    import darwin_model

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (darwin_mlflow.DEFAULTS | darwin_model.SERVING).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def ours(serving_environment: None) -> Iterator[Callable[[str], str]]:
    """The URL of our application in this process, now answering with the model that it is called with."""
    from tests.servers import switching

    with switching() as switch:
        yield switch


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server of the test's own, on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Finished:
    """A role that ran to its end."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.rstrip().rpartition("\n")[2]


def run_role(script: str, /, **settings: object) -> Finished:
    """Run `python <script>` to its end, as a container would."""
    done = subprocess.run(
        [sys.executable, ROOT / script],
        env=clean_environ(**settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def absent(reason: str) -> NoReturn:
    """Skip the test for want of what `reason` names; where all tests have to run, fail it."""
    if os.environ.get("REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str, package: str) -> str:
    """The path of a program of the system's, which Debian has in `package`."""
    return shutil.which(name) or absent(f"{name} is not installed (Debian's package {package})")


def wait_until(condition: Callable[[], object], what: str, deadline: float = 60) -> None:
    """Poll `condition` until it holds; fails the test with `what` when it doesn't in time."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Tracking:
    """A running MLflow server, and what a role needs to reach it."""

    uri: str
    username: str
    password: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, Any]:
        login = {"MLFLOW_TRACKING_USERNAME": self.username, "MLFLOW_TRACKING_PASSWORD": self.password}
        return {"MLFLOW_TRACKING_URI": self.uri} | (login if self.username else {})


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """`mlflow server` over sqlite, serving artifacts itself, with the basic-auth app on."""
    home = tmp_path_factory.mktemp("mlflow-server")
    username, password = "admin", "an-admin-password-1234"
    (home / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{home}/auth.db\nadmin_username = {username}\nadmin_password = {password}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    with mlflow_serving(home, "--app-name", "basic-auth", username=username, password=password) as running:
        yield running


@pytest.fixture(scope="session")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """The same without authentication, which takes the server a tenth of a second for each request."""
    with mlflow_serving(tmp_path_factory.mktemp("open-server")) as running:
        yield running


@contextmanager
def mlflow_serving(
    home: Path, *arguments: str, host: str = "127.0.0.1", port: int = 0, username: str = "", password: str = ""
) -> Iterator[Tracking]:
    """An `mlflow server` that keeps everything in `home`."""
    port = port or free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", *arguments),
            *("--host", host, "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{home}/mlflow.db"),
            *("--serve-artifacts", "--artifacts-destination", str(home / "artifacts")),
        ],
        env=clean_environ(
            MLFLOW_AUTH_CONFIG_PATH=home / "auth.ini",
            MLFLOW_FLASK_SERVER_SECRET_KEY="a-secret-for-forms",
            MLFLOW_DISABLE_TELEMETRY="true",
        ),
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    uri, lines = f"http://{host}:{port}", list[str]()
    reader = threading.Thread(target=_collect, args=(process, lines), daemon=True)
    reader.start()

    def healthy() -> bool:
        assert process.poll() is None, "mlflow server ended:\n" + "".join(lines)
        try:
            return requests.get(f"{uri}/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    try:
        wait_until(healthy, "mlflow server", deadline=120)
        yield Tracking(uri, username, password, process, lines)
    finally:
        # Its workers are in its own process group.
        os.killpg(process.pid, 15)
        process.wait(timeout=30)
        reader.join(timeout=30)
        assert process.stdout is not None
        process.stdout.close()


def _collect(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    lines.extend(process.stdout)
