"""Which failures are answers, and which are worth another try: by real servers and real clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from darwin_runtime.errors import RoleError, StoreUnreachable
from darwin_runtime.settings import Reader
from darwin_runtime.storage import access, resolve
from darwin_runtime.storage.artifacts import RemoteFile, Source
from darwin_runtime.storage.attempts import RetryPolicy
from tests.conftest import free_port, http_server
from tests.support.apiserver import ApiServer


@contextmanager
def answering(status: int, body: bytes, content_type: str) -> Iterator[str]:
    """A server that answers every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http_server(Handler) as url:
        yield url


@pytest.fixture(autouse=True)
def _no_retries_of_mlflow_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


HTML = (b"<html>no</html>", "text/html")
GATEWAY = (b'{"message": "no"}', "application/json")


@pytest.mark.parametrize("body", [HTML, GATEWAY])
@pytest.mark.parametrize(
    ("status", "passing"),
    [(code, False) for code in (400, 401, 403, 404, 405, 410, 451)]
    + [(code, True) for code in (408, 429, 500, 502, 503, 504)],
)
@pytest.mark.parametrize("uri", ["models:/m/1", "mlflow-artifacts:/m"])
def test_statuses(
    uri: str, status: int, passing: bool, body: tuple[bytes, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, *body) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        with pytest.raises(RoleError) as caught:
            resolve.resolve(uri)
    assert isinstance(caught.value, StoreUnreachable) is passing, caught.value
    assert uri in str(caught.value)


@pytest.mark.parametrize("status", [507, 520, 530])
def test_a_gateway_s_own_statuses(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(status, *HTML) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        with pytest.raises(StoreUnreachable):
            resolve.resolve("models:/m/1")


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ("InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ("AccessDenied", "READ permission"),
        ("NoSuchBucket", "does not exist"),
        ("RequestTimeTooSkewed", "RequestTimeTooSkewed"),
    ],
)
def test_s3_says_no(code: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status = 404 if code == "NoSuchBucket" else 403
    with answering(status, f"<Error><Code>{code}</Code></Error>".encode(), "application/xml") as server:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", server)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-key-of-some-length")
        with pytest.raises(RoleError, match=word) as caught:
            resolve.resolve("s3://bucket/model")
    assert not isinstance(caught.value, StoreUnreachable)


def test_s3_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-key-of-some-length")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreUnreachable):
        resolve.resolve("s3://bucket/other-model")


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(StoreUnreachable, match=f"{uri} .*Connection refused"):
        resolve.resolve("models:/m/1")


def test_an_untrusted_certificate_is_no_passing_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ApiServer(tmp_path / "serviceaccount") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        with pytest.raises(RoleError, match="REQUESTS_CA_BUNDLE") as caught:
            resolve.resolve("models:/m/1")
    assert not isinstance(caught.value, StoreUnreachable)


def test_a_refused_host_name_is_told_from_a_missing_right(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"Invalid Host header - possible DNS rebinding attack detected"
    with answering(403, body, "text/plain") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        with pytest.raises(RoleError, match="--allowed-hosts"):
            resolve.resolve("models:/m/1")


@pytest.mark.parametrize("uri", ["mlflow:5000", "127.0.0.1:9", "host.name:80/prefix"])
def test_a_tracking_uri_without_a_scheme_is_a_bad_setting(uri: str) -> None:
    read = Reader({"MLFLOW_TRACKING_URI": uri})
    access.check_access(read, "MODEL_URI", "models:/m/1")
    [problem] = read.problems
    assert f"MLFLOW_TRACKING_URI=http://{uri}" in problem


@pytest.mark.parametrize("uri", ["http://mlflow:5000", "https://h/p", "sqlite:////tmp/x.db", "databricks", "/mlruns"])
def test_other_tracking_uris_are_mlflows_to_judge(uri: str) -> None:
    read = Reader({"MLFLOW_TRACKING_URI": uri})
    access.check_access(read, "MODEL_URI", "models:/m/1")
    assert read.problems == []


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RoleError, match="nothing is there"):
        resolve.resolve(str(tmp_path / "absent"))


@pytest.mark.parametrize("uri", ["nonsense://x/y", "ftp://127.0.0.1:1/x"])
def test_unknown_stores(uri: str) -> None:
    with pytest.raises(RoleError):
        resolve.resolve(uri)


def test_a_bad_knob_of_mlflow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RoleError, match="MLFLOW_HTTP_REQUEST_MAX_RETRIES") as caught:
        resolve.resolve("models:/m/1")
    assert not isinstance(caught.value, StoreUnreachable)


@dataclass
class Told:
    """A store that lists what it was told, and has nothing."""

    files: Sequence[tuple[str, int | None]] = ()
    inside: Callable[[str], tuple[list[RemoteFile], list[str]]] = lambda _: ([], [])

    def list(self, directory: str = "") -> tuple[list[RemoteFile], list[str]]:
        return self.inside(directory)

    def open(self, path: str, offset: int) -> None:
        raise AssertionError(path)

    def download(self, path: str, local: str) -> None:
        raise AssertionError(path)

    def source(self) -> Source:
        return Source("s3://b/m", {}, [("MLmodel", 1), *self.files], self)


@pytest.mark.parametrize(
    "name",
    [
        "../up",
        "/etc/passwd",
        "a/../../b",
        "a\\b",
        "nul\0",
        "",
        ".",
        "./a",
        "a//b",
        "\ud800",
        "é" * 128,
        "a/" * 1024 + "a",
    ],
)
def test_a_listing_does_not_choose_where_files_go(name: str) -> None:
    with pytest.raises(RoleError, match=r"unsafe name .*nothing was downloaded"):
        Told([(name, 1)]).source().files()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("a", 1), ("a", 1)], "a file twice: 'a'"),
        ([("a", 1), ("a/b", 1)], "'a' both as a file and as a directory"),
        ([("a", -1)], "'a' with -1 bytes"),
        ([(".darwin-staging/a", -1), ("b", -(10**30))], "'b' with -1"),
    ],
)
def test_what_can_not_be_true_of_files_is_not_believed(files: list[tuple[str, int | None]], words: str) -> None:
    with pytest.raises(RoleError, match=words):
        Told(files).source().files()


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        (lambda _: ([], ["loop"]), "'loop' in the directory 'loop', which is not in it"),
        (lambda directory: ([], [directory]), "not in it"),
        (lambda _: ([RemoteFile("MLmodel", 1)], []), "'MLmodel' in the directory 'loop'"),
        (lambda directory: ([], [f"{directory}/.."]), "unsafe name|too deep"),
        (lambda directory: ([], [f"{directory}/deeper"]), "too deep"),
        (lambda directory: ([RemoteFile(f"{directory}/{n}", 1) for n in range(100_001)], []), "more than 100000"),
        (lambda directory: ([], [f"{directory}/{n}" for n in range(5000)]), "more than 100000"),
    ],
)
def test_a_listing_without_an_end_comes_to_one(
    inside: Callable[[str], tuple[list[RemoteFile], list[str]]], words: str
) -> None:
    with pytest.raises(RoleError, match=words):
        Told([("loop/", None)], inside).source().files()


def test_waiting_grows_and_is_bounded() -> None:
    delays = list(RetryPolicy(2000, 5.0).delays())
    assert len(delays) == 2000
    for attempt, delay in enumerate(delays[:4]):
        assert 2.5 * 2**attempt <= delay <= 5 * 2**attempt
    assert all(30 <= delay <= 60 for delay in delays[4:])


def test_the_identity_holds_no_credentials(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text(json.dumps({"flavors": {}}))
    source = resolve.resolve(str(tmp_path))
    assert set(source.identity) == {"uri", "mlmodel"}
    (tmp_path / "MLmodel").write_text(json.dumps({"flavors": {}, "other": 1}))
    assert resolve.resolve(str(tmp_path)).identity["mlmodel"] != source.identity["mlmodel"]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_root_is_listed_at_once_and_the_rest_on_demand(depth: int, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"abc"[:depth])
    deep.mkdir(parents=True, exist_ok=True)
    (tmp_path / "MLmodel").write_text("flavors: {}")
    (deep / "weights").write_bytes(b"12345")
    source = resolve.resolve(str(tmp_path))
    assert set(source.listing) == {("MLmodel", 11), ("weights", 5) if not depth else ("a/", None)}
    files = {file.path: file.size for file in source.files()}
    assert files == {"MLmodel": 11, "/".join([*"abc"[:depth], "weights"]): 5}


def test_a_model_further_down_is_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "a" / "model" / "MLmodel").touch()
    with pytest.raises(RoleError, match=f"no MLmodel among its 1 files; .* ask for {tmp_path}/a/model"):
        resolve.resolve(str(tmp_path))
