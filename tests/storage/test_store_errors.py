"""Each row of (store, failure): its line and its exit code, by real servers and MLflow's real clients."""

from __future__ import annotations

import contextlib
import errno
import json
import socketserver
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from darwin_runtime.errors import RoleError, StoreUnreachable
from darwin_runtime.storage import resolve, store_errors
from darwin_runtime.storage.store_errors import AZURE, DATABRICKS, FTP, GOOGLE, LINES, LOCAL, MLFLOW, OTHER, S3, explain
from tests.conftest import free_port, http_server

KEYS = {"AWS_ACCESS_KEY_ID": "an-access-key-id", "AWS_SECRET_ACCESS_KEY": "a-very-secret-access-key"}
AWS = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
LOGIN = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "canary-pa55word"}
NO_LOGIN = {"MLFLOW_TRACKING_USERNAME": "", "MLFLOW_TRACKING_PASSWORD": ""}
PAGE = b"<!DOCTYPE html><html><head><title>Sign in &amp; go on</title></head></html>"


@contextlib.contextmanager
def answering(status: int, body: bytes, content_type: str = "application/json") -> Iterator[str]:
    """A server that answers every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http_server(Handler) as url:
        yield url


def said(code: str, words: str) -> bytes:
    """An error in MLflow's form."""
    return json.dumps({"error_code": code, "message": words}).encode()


def code(name: str) -> bytes:
    """An error in S3's form."""
    return f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>says {name}</Message></Error>".encode()


@dataclass
class Row:
    """The answer of a store to every request; the words of our line; whether another attempt is made."""

    store: str
    failure: object
    status: int
    body: bytes
    words: list[str]
    passes: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.store}-{self.failure}-{'-'.join(self.environ)}"


ROWS = [
    Row(MLFLOW, 400, 400, said("INVALID_PARAMETER_VALUE", "odd"), ["HTTP 400", "the server rejects", "odd"]),
    Row(MLFLOW, 401, 401, b"who?", ["HTTP 401", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", "who?"]),
    Row(
        *(MLFLOW, 401, 401, b"who?", ["HTTP 401", "the credentials were refused: check MLFLOW_TRACKING_TOKEN"]),
        environ={
            "MLFLOW_TRACKING_TOKEN": "canary-token",
            "MLFLOW_TRACKING_USERNAME": "",
            "MLFLOW_TRACKING_PASSWORD": "",
        },
    ),
    Row(
        *(MLFLOW, 401, 401, b"who?", ["HTTP 401", "no login was sent: set MLFLOW_TRACKING_USERNAME"]),
        environ=NO_LOGIN,
    ),
    Row(MLFLOW, 401, 401, b'{"message": "a gateway says no"}', ["HTTP 401", "were refused", "a gateway"]),
    Row(MLFLOW, 403, 403, b"no", ["HTTP 403", "or it does not exist", "MLFLOW_TRACKING_USERNAME", "READ permission"]),
    Row(MLFLOW, 404, 404, said("RESOURCE_DOES_NOT_EXIST", "no m"), ["HTTP 404", "it does not exist: check the name"]),
    Row(MLFLOW, 407, 407, b"proxy", ["HTTP 407", "the proxy wants a login", "NO_PROXY"]),
    Row(MLFLOW, 500, 500, said("INTERNAL_ERROR", "the database is gone"), ["no usable answer", "is gone"], True),
    Row(MLFLOW, 500, 500, b"words of a 500", ["no usable answer from the tracking server", "words of a 500"], True),
    Row(MLFLOW, 501, 501, b"never", ["HTTP 501", "never"]),
    Row(MLFLOW, 503, 503, b"back soon", ["no usable answer from the tracking server http", "back soon"], True),
    Row(MLFLOW, 511, 511, PAGE, ["HTTP 511", "a page of HTML with the title 'Sign in & go on'"]),
    Row(
        *(MLFLOW, "--no-serve-artifacts", 503, b"disabled due to running with `--no-serve-artifacts`."),
        ["HTTP 503", "start it with --serve-artifacts", "disabled due to"],
    ),
    Row(MLFLOW, "Invalid Host header", 403, b"Invalid Host header - possible DNS rebinding", ["--allowed-hosts"]),
    Row(MLFLOW, "JSONDecodeError", 200, PAGE, ["a web page came", "'Sign in & go on'", "MLFLOW_TRACKING_URI"]),
    Row(S3, "NoSuchBucket", 404, code("NoSuchBucket"), ["HTTP 404", "the bucket does not exist", "says NoSuchBucket"]),
    Row(S3, "RequestTimeTooSkewed", 403, code("RequestTimeTooSkewed"), ["clock", "NTP", "says RequestTimeTooSkewed"]),
    Row(S3, "InvalidObjectState", 403, code("InvalidObjectState"), ["archived", "restore it"]),
    Row(S3, "ExpiredToken", 400, code("ExpiredToken"), ["expired", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"]),
    Row(
        *(S3, "ExpiredToken", 400, code("ExpiredToken"), ["renew AWS_ACCESS_KEY_ID", ", AWS_SESSION_TOKEN"]),
        environ={"AWS_SESSION_TOKEN": "canary-session"},
    ),
    Row(S3, "InvalidAccessKeyId", 403, code("InvalidAccessKeyId"), ["refused: check AWS_ACCESS_KEY_ID", "endpoint"]),
    Row(S3, "SignatureDoesNotMatch", 403, code("SignatureDoesNotMatch"), ["refused", "AWS_SECRET_ACCESS_KEY"]),
    Row(S3, "InvalidToken", 400, code("InvalidToken"), ["refused: check AWS_ACCESS_KEY_ID"]),
    Row(S3, "AuthorizationHeaderMalformed", 400, code("AuthorizationHeaderMalformed"), ["AWS_DEFAULT_REGION"]),
    Row(S3, "IllegalLocationConstraintException", 400, code("IllegalLocationConstraintException"), ["another region"]),
    Row(S3, 400, 400, code("Odd"), ["the store rejects the request", "MLFLOW_S3_ENDPOINT_URL", "says Odd"]),
    Row(S3, 401, 401, code("Odd"), ["the credentials were refused: check AWS_ACCESS_KEY_ID"]),
    Row(S3, 403, 403, code("AccessDenied"), ["READ permission for AWS_ACCESS_KEY_ID", "s3:ListBucket", "kms:Decrypt"]),
    Row(S3, 404, 404, code("Odd"), ["the object does not exist", "the bucket and the path"]),
    Row(
        S3,
        408,
        400,
        code("RequestTimeout"),
        ["no usable answer from its store, S3 at http", "RequestTimeout"],
        True,
    ),
    Row(S3, 503, 503, code("SlowDown"), ["no usable answer from its store, S3 at http", "says SlowDown"], True),
    Row(S3, 500, 500, code("InternalError"), ["no usable answer from its store, S3 at http"], True),
    Row(
        *(S3, "NoCredentialsError", 200, b"", ["there are no AWS credentials: set AWS_ACCESS_KEY_ID"]),
        environ={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nonexistent"},
    ),
    Row(
        *(S3, "PartialCredentialsError", 200, b"", ["there are no AWS credentials: set AWS_ACCESS_KEY_ID"]),
        environ={"AWS_SECRET_ACCESS_KEY": ""},
    ),
    Row(
        *(S3, "ProfileNotFound", 200, b"", ["AWS_PROFILE names no profile of AWS_CONFIG_FILE"]),
        environ={"AWS_PROFILE": "nobody", "AWS_ACCESS_KEY_ID": ""},
    ),
]


def fresh_clients() -> None:
    """Have MLflow and boto3 read the environment again."""
    import boto3
    from mlflow.store.artifact import s3_artifact_repo

    s3_artifact_repo._cached_get_s3_client.cache_clear()
    boto3.DEFAULT_SESSION = None


def resolved(row: Row, url: str, monkeypatch: pytest.MonkeyPatch) -> RoleError:
    """The error for a row, by a server at `url`."""
    environ = {"MLFLOW_TRACKING_URI": url, **LOGIN} if row.store == MLFLOW else {"MLFLOW_S3_ENDPOINT_URL": url, **KEYS}
    for name, value in {**AWS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", **environ, **row.environ}.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    fresh_clients()
    with pytest.raises(RoleError) as caught:
        resolve.resolve("mlflow-artifacts:/m" if row.store == MLFLOW else "s3://bucket/m")
    return caught.value


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_each_failure_has_its_line(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(row.status, row.body, "text/html" if row.body == PAGE else "application/json") as url:
        error = resolved(row, url, monkeypatch)
    assert isinstance(error, StoreUnreachable) is row.passes
    assert str(error).startswith("cannot read ")
    for words in row.words:
        assert words in str(error)
    foreign = "AWS_" if row.store == MLFLOW else "MLFLOW_TRACKING"
    assert foreign not in str(error)


@pytest.mark.parametrize("row", [row for row in ROWS if row.store == MLFLOW and row.status in (401, 403)], ids=str)
def test_a_registry_s_words_are_those_of_its_files(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry answers before any file is asked for: with another client of MLflow's, in the same words."""
    with answering(row.status, row.body) as url:
        files = resolved(row, url, monkeypatch)
        with pytest.raises(RoleError) as registry:
            resolve.resolve("models:/m/1")
    for words in row.words:
        assert words in str(files)
        assert words in str(registry.value)


# Errors of libraries that are not installed here, by the names of their packages.
_FOREIGN = [
    *[(GOOGLE, "google.api_core.exceptions", "Refused", {"code": status}) for status in (401, 403, 404)],
    (GOOGLE, "google.auth.exceptions", "DefaultCredentialsError", {}),
    *[(AZURE, "azure.core.exceptions", "HttpResponseError", {"status_code": status}) for status in (401, 403, 404)],
    *[(DATABRICKS, "databricks.sdk.errors", "Refused", {"status_code": status}) for status in (401, 403, 404)],
    (FTP, "ftplib", "error_perm", {}),
    (FTP, "paramiko.ssh_exception", "AuthenticationException", {}),
]


@pytest.mark.parametrize(("store", "module", "name", "attributes"), _FOREIGN)
def test_a_store_of_another_library(store: str, module: str, name: str, attributes: dict[str, Any]) -> None:
    error = type(name, (Exception,), {"__module__": module, **attributes})("words of it")
    failure = next(iter(attributes.values()), name)
    seen = explain(error, "gs://bucket/m")
    assert not isinstance(seen, StoreUnreachable)
    assert LINES[store][failure].partition("{")[0] in str(seen)
    assert "words of it" in str(seen)
    assert "MLFLOW" not in str(seen)


def test_a_passing_failure_of_another_library() -> None:
    error = type("ServiceUnavailable", (Exception,), {"__module__": "google.api_core.exceptions", "code": 503})("soon")
    assert isinstance(explain(error, "gs://bucket/m"), StoreUnreachable)


@pytest.mark.parametrize("name", ["PermanentRedirect", "Odd"])
def test_a_bucket_in_another_region(name: str) -> None:
    """A server that answers so to everything, boto3 asks without an end."""
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": name, "Message": "elsewhere"}, "ResponseMetadata": {"HTTPStatusCode": 301}}
    error = ClientError(answer, "ListObjectsV2")
    assert "set AWS_DEFAULT_REGION to the region of the bucket" in str(explain(error, "s3://bucket/m"))


def test_local_stores(tmp_path: Path) -> None:
    here = str(tmp_path / "there" / "MLmodel")
    for error, failure in (
        (FileNotFoundError(errno.ENOENT, "No such file", here), "FileNotFoundError"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", here), "NotADirectoryError"),
        (PermissionError(errno.EACCES, "Permission denied", here), "PermissionError"),
    ):
        seen = explain(error, str(tmp_path), "MLmodel")
        assert str(seen).startswith(f"cannot read MLmodel of {tmp_path}: {LINES[LOCAL][failure]}")
        assert here in str(seen)
        assert not isinstance(seen, StoreUnreachable)


def test_no_line_is_untried() -> None:
    tried = {(row.store, row.failure) for row in ROWS}
    tried |= {(store, next(iter(attributes.values()), name)) for store, _, name, attributes in _FOREIGN}
    tried |= {(LOCAL, failure) for failure in LINES[LOCAL]}
    # In tests of their own.
    tried |= {(S3, "PermanentRedirect"), (S3, 301)}
    tried |= {(MLFLOW, "Tunnel connection failed: 407"), (S3, "Tunnel connection failed: 407")}
    tried |= {(MLFLOW, "not in a valid JSON format"), (S3, "HTTPClientError")}
    assert {(store, failure) for store, lines in LINES.items() for failure in lines} <= tried


def test_a_page_in_the_place_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, PAGE, "text/html") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        with pytest.raises(RoleError, match=r"a web page came where MLflow's JSON belongs.* 'Sign in & go on'"):
            resolve.resolve("models:/m/1")


@pytest.mark.parametrize("uri", ["mlflow-artifacts:/m", "s3://bucket/m"])
def test_a_proxy_that_wants_a_login(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_error(407, "Proxy Authentication Required")

        def log_message(self, *_: object) -> None:
            pass

    with http_server(Proxy) as url:
        environ = {"MLFLOW_TRACKING_URI": "https://mlflow.internal", "MLFLOW_S3_ENDPOINT_URL": "https://s3.internal"}
        for name, value in {**AWS, **KEYS, **environ, "HTTPS_PROXY": url, "NO_PROXY": ""}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(RoleError, match="the proxy wants a login: give it in HTTPS_PROXY") as caught:
            resolve.resolve(uri)
    assert not isinstance(caught.value, StoreUnreachable)


def test_a_header_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are checked before; a key may also come from a file."""
    for name, value in {**AWS, **KEYS, "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key-id\n")
    fresh_clients()
    with pytest.raises(RoleError, match="the request cannot be sent: check AWS_ACCESS_KEY_ID") as caught:
        resolve.resolve("s3://bucket/m")
    assert not isinstance(caught.value, StoreUnreachable)


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        (b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", True),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False),
        (b"220 ftp.example ready\r\n", False),
    ],
)
def test_what_is_no_answer(answer: bytes, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that ends early passes; a server of another kind never answers."""

    class Odd(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(RoleError) as caught:
            resolve.resolve("mlflow-artifacts:/m")
        server.shutdown()
    assert isinstance(caught.value, StoreUnreachable) is passes, caught.value


def test_https_where_http_is_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, b"{}") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("http:", "https:"))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(RoleError, match="SSL") as caught:
            resolve.resolve("mlflow-artifacts:/m")
    assert not isinstance(caught.value, StoreUnreachable)


def test_long_words_are_cut() -> None:
    seen = str(explain(ValueError("x" * 100_000), "s3://bucket/m"))
    assert len(seen) < 2 * store_errors.MAX_SAID
    assert "100000 characters in all" in seen
    assert OTHER not in seen
