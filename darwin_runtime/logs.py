"""What a role says and how it ends: log lines without secrets, the termination message, the exit code."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

from darwin_runtime.errors import ConfigError, RoleError
from darwin_runtime.settings import Reader

DONE, FAILED, BAD_CONFIGURATION = 0, 1, 2

TERMINATION_LOG = Path("/dev/termination-log")

# Kubernetes shows at most 4096 bytes of a termination message.
TERMINATION_LIMIT = 4096

_SECRET_NAME = re.compile(
    r"PASSW(OR)?D|PASSPHRASE|SECRET|CREDENTIAL|CONNECTION_STRING|_(PWD|PASS)$|(API|ACCESS|ACCOUNT|PRIVATE)_?KEY"
    r"|(^|_)(TOKEN|SAS)(_|$)",
    re.IGNORECASE,
)
# A variable's value that is a URI, or one of which the scheme was left out, with a login in it.
_LOGIN = re.compile(
    r"(?:[\w+.-]+://(?P<user>[^/\s:@]*)|(?P<bare>[^/\s:@]+)(?=:[^/])):(?P<password>\S+)@[^\s@/]+(?:/\S*)?"
)
_URI_NAME = re.compile(r"(URI|URL|PROXY)$", re.IGNORECASE)
# JSON whose strings may be secrets, whatever they are called in it.
_JSON_NAME = "SERVING_MODEL_CONFIG"
# Up to the last @ of the authority: passwords may hold any other character, quotes included.
_USERINFO = re.compile(r"(?<=://)[^/\s]+(?=@)")
_SIGNED_QUERY = re.compile(
    r"((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AccountKey|sig"
    r"|(?:token|password|passwd|secret(?:[_-]?access)?(?:[_-]?key)?|api[_-]?key))(?:=|%3D))[^&;\s'\"]+",
    re.IGNORECASE,
)
# Of a terminal and of what takes log lines apart; of lines, LF alone is what we end them with.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_AUTHORIZATION = re.compile(r"((?:Basic|Bearer)(?:\s+|%20|\+))[A-Za-z0-9+/._~=%-]{6,}", re.IGNORECASE)
_MASK = "***"

# What a model says of its input may hold all of it. To look through a megabyte for secrets takes a third of a second.
LONGEST = 64 * 1024

logger = logging.getLogger("darwin")


def mask_uri(text: str) -> str:
    """`text` with the credentials and signatures in its URIs masked."""
    return _SIGNED_QUERY.sub(rf"\1{_MASK}", _USERINFO.sub(_MASK, text))


def _is_secret(name: str) -> bool:
    """Whether the variable of that name holds a secret, and not only says where one is."""
    return bool(_SECRET_NAME.search(name)) and not name.upper().endswith(("_FILE", "_PATH"))


class Redactor:
    """Replaces secrets in text: credentials in URIs, signatures, auth headers, and the values of secret variables."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        values: set[str] = set()
        for name, value in environ.items():
            value = value.strip()
            # A value of a few characters would blank out half of every line, and protects nothing.
            if _is_secret(name) and len(value) >= 4:
                values |= _forms(value)
            if (login := _LOGIN.fullmatch(value)) and (login["bare"] is None or _URI_NAME.search(name)):
                values |= _login_forms(login["user"] or login["bare"] or "", login["password"])
        values |= _login_forms(environ.get("MLFLOW_TRACKING_USERNAME", ""), environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        for text in _strings(environ.get(_JSON_NAME, "")):
            values |= _forms(text) if len(text) >= 8 else set()
        ordered = sorted(values, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def __call__(self, text: str) -> str:
        if len(text) > LONGEST:
            # Some more is looked at, so that no secret is told in part because its end is cut off.
            return f"{self(text[:LONGEST])[: LONGEST // 2]}... ({len(text)} characters in all)"
        text = mask_uri(text)
        text = _AUTHORIZATION.sub(rf"\1{_MASK}", text)
        return self._values.sub(_MASK, text) if self._values else text


def _forms(value: str) -> set[str]:
    """How a secret may be written: as it is, quoted for a URI, in base64, and in JSON's or Python's quotes."""
    raw = os.fsencode(value)  # whatever bytes the environment has
    quoted = {urllib.parse.quote(raw, safe=""), urllib.parse.quote(raw), urllib.parse.quote_plus(raw)}
    quoted |= {re.sub("%..", lambda found: found[0].lower(), text) for text in quoted}
    coded = {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
    return {value, *quoted, *coded, json.dumps(value)[1:-1], repr(value)[1:-1]}


def _login_forms(user: str, password: str) -> set[str]:
    """How the login may be written that an authorization header or a URI, where it is quoted, has."""
    if len(password) < 4:
        return set()
    found: set[str] = set()
    for plain in {password, urllib.parse.unquote(password)}:
        found |= _forms(plain)
        for name in {user, urllib.parse.unquote(user)}:
            found |= _forms(f"{name}:{plain}")
    return found


def _strings(text: str) -> list[str]:
    """Every string in some JSON, but for the names; the text itself where it is none."""
    try:
        waiting = [json.loads(text or "null")]
    except (ValueError, RecursionError):
        return [text]
    found = []
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, (list, dict)):
            waiting += one.values() if isinstance(one, dict) else one
    return found


_hide: Callable[[str], str] = Redactor({})


def hide(text: str) -> str:
    """`text` without the secrets of this process, for whoever is told it by another way than the log."""
    return _hide(text)


class _Formatter(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_msec_format = "%s.%03dZ"
    default_time_format = "%Y-%m-%dT%H:%M:%S"

    def __init__(self, redact: Redactor) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.redact = redact

    def format(self, record: logging.LogRecord) -> str:
        # What a model says of its input may hold what its client wrote: that must not look like a line of ours.
        text = self.redact(super().format(record)).replace("\n", "\n  ")
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class JsonFormatter(_Formatter):
    def __init__(self, redact: Redactor, service: str) -> None:
        super().__init__(redact)
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": self.redact(record.getMessage()),
        }
        if self.service:
            line["service"] = self.service
        if record.exc_info:
            line["exception"] = self.redact(self.formatException(record.exc_info))
        return json.dumps(line, default=str)


def set_up(read: Reader) -> Redactor:
    """Send all logging to stderr as LOG_LEVEL, LOG_FORMAT, ENV and SERVICE_NAME say; return the redactor in use.

    Where one of them is unreadable, that is one of `read.problems`, and its default is used. Libraries log at INFO at
    most: their DEBUG lines hold whole requests.
    """
    level = read.choice("LOG_LEVEL", "info", ("debug", "info", "warning", "error", "critical"))
    # Any environment but a developer's is read by machines.
    local = read.text("ENV", "local").lower() in ("local", "dev", "development")
    style = read.choice("LOG_FORMAT", "text" if local else "json", ("text", "json"))
    service = read.text("SERVICE_NAME")

    global _hide
    redact = _hide = Redactor(read.environ)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(redact, service) if style == "json" else _Formatter(redact))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.getLevelName(level.upper()), logging.INFO))
    logger.setLevel(level.upper())
    logging.captureWarnings(True)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of stores in databases: each migration step
    return redact


def log_settings(seen: Mapping[str, object], redact: Redactor) -> None:
    """One line with every effective setting, secrets masked."""
    shown = {name: _MASK if value and _is_secret(name) else value for name, value in seen.items()}
    logger.info("settings: %s", redact(" ".join(f"{name}={value}" for name, value in shown.items())))


def format_bytes(size: float) -> str:
    """A number of bytes for people: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


Body = Callable[[Reader, Redactor], None]


def run_role(body: Body, environ: Mapping[str, str]) -> int:
    """Run one role and return its exit code; the last error also goes to the pod's termination message.

    `body` reads its settings from the `Reader` it is given, which may hold problems already, and calls its `finish`.
    """
    # A core file would have all that is in memory, the environment and the model with it. Children inherit this.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    read = Reader(environ)
    redact = set_up(read)
    before = signal.signal(signal.SIGTERM, _terminated)
    hooks = sys.excepthook, threading.excepthook
    # What nobody catches would be printed as it is.
    sys.excepthook = lambda *raised: logger.critical("not expected by anybody", exc_info=raised)
    threading.excepthook = lambda raised: logger.error(
        "in thread %s: %r", raised.thread and raised.thread.name, raised.exc_value, exc_info=raised.exc_value
    )
    try:
        body(read, redact)
    except ConfigError as error:
        for problem in error.problems:
            logger.error("bad configuration: %s", problem)
        return _end(BAD_CONFIGURATION, redact(str(error)))
    except RoleError as error:
        logger.error("%s", error)
        logger.debug("raised from here", exc_info=error)
        return _end(FAILED, redact(str(error)))
    except Exception as error:  # the last line of defence: a role never dies without saying why
        logger.exception("unexpected %s: %s", type(error).__name__, error)
        return _end(FAILED, redact(f"unexpected {type(error).__name__}: {error}"))
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.excepthook, threading.excepthook = hooks
    return DONE


def leave(code: int) -> NoReturn:
    """End the process at once, whatever threads are left that wait for an answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _terminated(number: int, _frame: FrameType | None) -> None:
    # The first process of a container ignores what it does not handle. What roles do is safe to stop at any point, so
    # nothing, such as a transfer that hangs, is waited for.
    os.write(2, b"stopped by SIGTERM\n")
    os._exit(128 + number)


def _end(code: int, message: str) -> int:
    # Kubernetes mounts this file; it must not be created anywhere else.
    if TERMINATION_LOG.exists():
        try:
            TERMINATION_LOG.write_bytes(message.encode()[:TERMINATION_LIMIT])
        except OSError as error:
            logger.debug("cannot write %s: %s", TERMINATION_LOG, error)
    return code
