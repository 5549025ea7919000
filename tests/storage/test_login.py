"""The hosts that get MLflow's login, and those that get none."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from darwin_runtime import mlflow_import
from darwin_runtime.errors import RoleError
from darwin_runtime.storage import login
from tests.conftest import http_server


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server, and the headers of every request that it got."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with http_server(Handler) as url:
        yield url, seen


def test_every_request_of_mlflow_s_goes_by_the_check() -> None:
    """The check replaces the one function by which MLflow sends requests with a login. An upgrade may move it."""
    mlflow_import.prepare()
    import mlflow

    root = Path(mlflow.__file__).parent
    name = "_get_http_response_with_retries"
    files = [path for room in ("store", "tracking", "utils", "artifacts") for path in (root / room).rglob("*.py")]
    using = {str(path.relative_to(root)) for path in files if name in path.read_text(encoding="utf-8")}
    assert using == {"utils/rest_utils.py", "utils/request_utils.py"}
    # By `http_request`, with the login, and by no other function there.
    assert (root / "utils/rest_utils.py").read_text().count(f"{name}(") == 1
    assert "cloud_storage_http_request" in (root / "utils/request_utils.py").read_text()


@pytest.mark.parametrize("kind", ["basic", "token", "plugin"])
def test_a_login_goes_to_named_hosts_alone(
    kind: str, elsewhere: tuple[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_import.prepare()
    from mlflow.tracking.request_auth import registry
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    class Plugin:
        def get_name(self) -> str:
            return "canary"

        def get_auth(self) -> tuple[str, str]:
            return ("ann", "of-a-plugin")

    url, seen = elsewhere
    monkeypatch.setattr(registry._request_auth_provider_registry, "_registry", [Plugin()])
    environ = {
        "basic": {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "canary-pa55word"},
        "token": {"MLFLOW_TRACKING_TOKEN": "canary-token"},
        "plugin": {"MLFLOW_TRACKING_AUTH": "canary"},
    }[kind]
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.internal:5000")
    host = url.partition("//")[2]

    login.guard("models:/m/1")
    with pytest.raises(Exception, match="is not sent its login") as caught:
        http_request(get_default_host_creds(url), "/x", "GET")
    assert isinstance(caught.value.__context__, RoleError)
    assert seen == []
    for named in (url + "/api/2.0/mlflow-artifacts/artifacts/m", f"mlflow-artifacts://{host}/m"):
        login.guard(named)
        http_request(get_default_host_creds(url), "/x", "GET")
        assert "Authorization" in seen.pop()
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", url)
    login.guard("models:/m/1")
    http_request(get_default_host_creds(url), "/x", "GET")
    assert "Authorization" in seen.pop()
    # Without a login, nothing is lost.
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    for name in environ:
        monkeypatch.delenv(name)
    login.guard("models:/m/1")
    http_request(get_default_host_creds(url), "/x", "GET")
    assert "Authorization" not in seen.pop()


@pytest.mark.parametrize(
    ("source", "sent"),
    [
        ("abfss://c@account.dfs.core.windows.net/m", True),
        ("abfss://c@account.dfs.core.windows.net.example.com/m", False),
        ("abfss://c@example.com/m", False),
        ("r2://bucket@account.r2.cloudflarestorage.com/m", True),
        ("r2://bucket@example.com/m", False),
        ("b2://bucket@s3.us-west-004.backblazeb2.com/m", True),
        ("b2://bucket@example.com/m", False),
        ("s3://bucket/m", True),
        ("/models/m", True),
    ],
)
def test_a_source_does_not_choose_who_gets_a_store_s_credentials(source: str, sent: bool) -> None:
    if sent:
        login.check_source(source)
        return
    with pytest.raises(RoleError, match="is not sent the credentials of"):
        login.check_source(source)
