"""A clean environment for every test, two real MLflow servers, a Kubernetes API, and a cache for all that need one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pytest
import requests

from darwin_runtime.storage.cache import Cache
from tests.support import prepared, shared
from tests.support.apiserver import ApiServer
from tests.support.share import SEED, SHARE

ROOT = prepared.ROOT

# These files take longest. A process of pytest-xdist takes a file at a time, and no long one may come last.
LONGEST = [
    "download",
    "serve",
    "hostile",
    "workers",
    "journey",
    "hostile_registry",
    "openapi_contract",
    "fuzz",
    "estimators",
    "simulation",
    "crash",
    "secrets",
    "connections",
    "mixed_clients",
    "resolve",
    "properties",
    "digest",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip each test as soon as it starts a process")


def pytest_configure(config: pytest.Config) -> None:
    shared.directory()
    if config.getoption("fast"):
        for owner, name in ((subprocess.Popen, "__init__"), (os, "fork"), (prepared, "start")):
            setattr(owner, name, _skipping(getattr(owner, name)))


def _skipping(start: Callable[..., Any]) -> Callable[..., Any]:
    """Skip a test that calls `start`. pytest-xdist, outside of tests, starts its processes with it."""

    def skip_or_start(*arguments: Any, **options: Any) -> Any:
        if "PYTEST_CURRENT_TEST" in os.environ:
            pytest.skip("it starts a process")
        return start(*arguments, **options)

    return skip_or_start


def pytest_report_header() -> str:
    return f"of exhaustive tests 1 part in SHARE={SHARE}, by SEED={SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


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
    from darwin_runtime import mlflow_import
    from darwin_runtime.model.load import SERVING

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (mlflow_import.DEFAULTS | SERVING).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def ours(serving_environment: None) -> Iterator[Callable[[str], str]]:
    """The URL of our application in this process, now answering with the model that it is called with."""
    from tests.support.servers import switching

    with switching() as switch:
        yield switch


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server of the test's own, on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # It looks so often, in seconds, whether it is to end.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
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
    """Run the role `script` to its end, in a fork of a prepared process."""
    done = prepared.run(ROOT / script, env=clean_environ(**settings))
    return Finished(done.returncode, done.stdout, done.stderr)


def run_fresh(script: str, /, **settings: object) -> Finished:
    """Run `python <script>` to its end, as a container does."""
    environ, command = clean_environ(**settings), [sys.executable, str(ROOT / script)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
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


@dataclass(frozen=True)
class Tracking:
    """A running MLflow server, and what a role needs to reach it."""

    uri: str
    username: str = ""
    password: str = ""

    @property
    def environ(self) -> dict[str, Any]:
        login = {"MLFLOW_TRACKING_USERNAME": self.username, "MLFLOW_TRACKING_PASSWORD": self.password}
        return {"MLFLOW_TRACKING_URI": self.uri} | (login if self.username else {})


@pytest.fixture(scope="session")
def mlflow_server() -> Iterator[Tracking]:
    """`mlflow server` over sqlite, serving artifacts itself, with the basic-auth app on."""
    username, password = "admin", "an-admin-password-1234"

    def start(home: Path) -> tuple[str, int]:
        (home / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
            # Hashing the password again for each request takes a tenth of a second.
            "auth_cache_ttl_seconds = 3600\n"
            f"database_uri = sqlite:///{home}/auth.db\nadmin_username = {username}\nadmin_password = {password}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        return start_mlflow(home, "--app-name", "basic-auth")

    with shared.server("mlflow-with-logins", start) as uri:
        yield Tracking(uri, username, password)


@pytest.fixture(scope="session")
def open_server() -> Iterator[Tracking]:
    """The same without authentication."""
    with shared.server("mlflow", start_mlflow) as uri:
        yield Tracking(uri)


@contextmanager
def mlflow_serving(home: Path, *arguments: str, host: str = "127.0.0.1", port: int = 0) -> Iterator[Tracking]:
    """An `mlflow server` that keeps everything in `home`."""
    uri, group = start_mlflow(home, *arguments, host=host, port=port)
    try:
        yield Tracking(uri)
    finally:
        os.killpg(group, signal.SIGTERM)


def start_mlflow(home: Path, *arguments: str, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
    """Start an `mlflow server` that keeps everything in `home`; return its URI and process group. It outlives us."""
    port = port or free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", *arguments),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{home}/mlflow.db"),
        *("--serve-artifacts", "--artifacts-destination", str(home / "artifacts")),
    ]
    environ = clean_environ(
        MLFLOW_AUTH_CONFIG_PATH=home / "auth.ini",
        MLFLOW_FLASK_SERVER_SECRET_KEY="a-secret-for-forms",
        MLFLOW_DISABLE_TELEMETRY="true",
        # Eight more processes would wait for jobs that nobody sends.
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    )
    log = home / "log"
    detached = ["sh", "-c", 'exec "$@" < /dev/null > log 2>&1 & echo $!', "-", *command]
    # It is nobody's child: whoever starts it may end before it.
    done = subprocess.run(
        detached, env=prepared.uncovered(environ), cwd=home, stdout=subprocess.PIPE, start_new_session=True, check=True
    )
    uri, pid = f"http://{host}:{port}", int(done.stdout)

    def healthy() -> bool:
        assert _is_running(pid), f"mlflow server ended:\n{log.read_text()}"
        try:
            return requests.get(f"{uri}/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    wait_until(healthy, "mlflow server", deadline=120)
    return uri, os.getpgid(pid)


def _is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
