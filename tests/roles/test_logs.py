from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from darwin_runtime import role
from darwin_runtime.errors import ConfigError, RoleError
from darwin_runtime.logs import set_up_logging
from darwin_runtime.redact import MAX_CHARACTERS, Redactor
from darwin_runtime.role import log_settings, run_role
from darwin_runtime.settings import Reader

PASSWORD = "correct horse/battery?"
ENVIRON = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": PASSWORD, "AWS_SECRET_ACCESS_KEY": "abcd1234"}


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    logging.captureWarnings(False)


@pytest.mark.parametrize(
    "text",
    [
        f"password is {PASSWORD}",
        "quoted: correct%20horse%2Fbattery%3F",
        f"Authorization: Basic {base64.b64encode(f'ann:{PASSWORD}'.encode()).decode()}",
        "key abcd1234",
    ],
)
def test_values_of_secret_variables_are_masked(text: str) -> None:
    masked = Redactor(ENVIRON)(text)
    assert "***" in masked
    assert not any(secret in masked for secret in (PASSWORD, "battery", "abcd1234", "YW5u"))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql://ann:secret@db/mlflow", "postgresql://***@db/mlflow"),
        ("http://ann:p@ss'w\"rd@h/p, next", "http://***@h/p, next"),
        ("https://b/k?X-Goog-Signature=0ab1&x=1", "https://b/k?X-Goog-Signature=***&x=1"),
        ("Endpoint=x;AccountKey=abc==;y", "Endpoint=x;AccountKey=***;y"),
        ("https://b/k?X-Amz-Signature=0ab1&x=1", "https://b/k?X-Amz-Signature=***&x=1"),
        ("https://b/k?sig=0ab1", "https://b/k?sig=***"),
        ("Authorization: Bearer eyJhbGciOi.x.y", "Authorization: Bearer ***"),
        ("models:/iris@champion at https://h/p?q=1", "models:/iris@champion at https://h/p?q=1"),
    ],
)
def test_secrets_are_known_by_their_form(text: str, masked: str) -> None:
    assert Redactor({})(text) == masked


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_CONNECTION_STRING", "DB_PWD", "X_API_KEY", "MLFLOW_TRACKING_TOKEN"]
)
def test_secret_variables_are_known_by_name(name: str) -> None:
    assert Redactor({name: "/va/lue+1\n"})("is /va/lue+1.") == "is ***."


def test_ordinary_variables_are_not_masked() -> None:
    environ = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
        "MAX_SIZE_GB": "1000",
        "PWD": "/app",
        "TOKENIZERS_PARALLELISM": "false",
    }
    text = " ".join(environ.values())
    assert Redactor(environ)(text) == text


def test_settings_are_one_masked_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(Reader(ENVIRON))
    seen: dict[str, object] = {
        "HOST": "::",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "MLFLOW_TRACKING_URI": "http://a:b@h",
    }
    log_settings(Reader({}, seen=seen))
    line = capsys.readouterr().err.strip()
    assert line.endswith("settings: HOST=:: MLFLOW_TRACKING_PASSWORD=*** MLFLOW_TRACKING_URI=http://***@h")


def test_json_lines_where_machines_read(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(Reader({"ENV": "production", "SERVICE_NAME": "iris", **ENVIRON}))
    try:
        raise ValueError(PASSWORD)
    except ValueError:
        logging.getLogger("darwin").exception("failed with %s", PASSWORD)
    line = json.loads(capsys.readouterr().err)
    assert line["level"] == "ERROR"
    assert line["service"] == "iris"
    assert line["message"] == "failed with ***"
    assert "ValueError: ***" in line["exception"]


@pytest.mark.parametrize(
    ("environ", "json_lines"),
    [
        ({}, False),
        ({"ENV": "dev"}, False),
        ({"ENV": "prod", "LOG_FORMAT": "text"}, False),
        ({"LOG_FORMAT": "json"}, True),
    ],
)
def test_format(environ: Mapping[str, str], json_lines: bool, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(Reader(environ))
    logging.getLogger("darwin").info("hello")
    assert capsys.readouterr().err.startswith("{") is json_lines


def test_libraries_stay_quiet_at_debug(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(Reader({"LOG_LEVEL": "DEBUG"}))
    logging.getLogger("urllib3").debug("a whole request")
    logging.getLogger("darwin.fetch").debug("ours")
    err = capsys.readouterr().err
    assert "ours" in err
    assert "a whole request" not in err


def _raise(error: Exception) -> role.RoleBody:
    def body(_read: Reader) -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RoleError(f"no model at x with {PASSWORD}"), 1, "no model at x with ***"),
        (ConfigError(["PORT: bad", "HOST: bad"]), 2, "bad configuration: PORT: bad; HOST: bad"),
        (ZeroDivisionError("odd"), 1, "unexpected ZeroDivisionError: odd"),
    ],
)
def test_how_a_role_ends(
    error: Exception,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(role, "TERMINATION_LOG", log)
    assert run_role(_raise(error), ENVIRON) == code
    assert log.read_text() == message
    assert PASSWORD not in capsys.readouterr().err


def test_no_termination_log_is_made_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(role, "TERMINATION_LOG", tmp_path / "termination-log")
    assert run_role(_raise(RoleError("x")), {}) == 1
    assert not list(tmp_path.iterdir())


def test_a_bad_log_level_is_told_with_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    def body(read: Reader) -> None:
        read.integer("PORT", 8000, minimum=0)
        read.finish()

    assert run_role(body, {"LOG_LEVEL": "loud", "PORT": "x"}) == 2
    err = capsys.readouterr().err
    assert "LOG_LEVEL='loud'" in err
    assert "PORT='x'" in err


def test_no_line_looks_like_one_of_ours_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    forged = "no\n2026-01-31T12:00:00.000Z INFO darwin: all is well\r\x1b[2J\x85\u2028"
    for style in ("text", "json"):
        set_up_logging(Reader({"LOG_FORMAT": style}))
        try:
            raise ValueError(forged)
        except ValueError as error:
            logging.getLogger("darwin").error("it failed: %s", error, exc_info=error)
    lines = capsys.readouterr().err.split("\n")
    assert [line for line in lines if line.startswith("20")] == lines[:1]
    assert "\\r\\x1b[2J\\x85\\u2028" in lines[1]
    assert all(line.isprintable() for line in lines)
    *_, told, end = lines
    assert (end, json.loads(told)["message"]) == ("", f"it failed: {forged}")


@pytest.mark.parametrize("piece", ["a", "://", "a@", "token", "Bearer ", "secret_access_", "-"])
def test_a_long_text_is_cut_and_not_pored_over(piece: str) -> None:
    redact = Redactor({"SOME_TOKEN": "abcdefgh-ijkl"})
    text = redact("see abcdefgh-ijkl " + piece * 10_000_000)
    assert text.startswith("see *** ")
    assert text.endswith(f"... ({18 + len(piece) * 10_000_000} characters in all)")
    assert len(text) < MAX_CHARACTERS
    # Nor is a part of a secret shown because the rest was cut off.
    for ahead in range(MAX_CHARACTERS - 20, MAX_CHARACTERS + 5):
        assert "abcdefg" not in redact("x" * ahead + "abcdefgh-ijkl" + "x" * 100)
