"""What a role says and how it ends: log lines without secrets, the termination message, the exit code."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import signal
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

from darwin_env import ConfigError, Reader

DONE, FAILED, BAD_CONFIGURATION = 0, 1, 2

TERMINATION_LOG = Path("/dev/termination-log")

# Kubernetes shows at most 4096 bytes of a termination message.
TERMINATION_LIMIT = 4096

_SECRET_NAME = re.compile(
    r"PASSW(OR)?D|SECRET|CREDENTIAL|CONNECTION_STRING|_PWD$|(API|ACCESS|ACCOUNT|PRIVATE)_?KEY|(^|_)(TOKEN|SAS)(_|$)",
    re.IGNORECASE,
)
# Up to the last @ of the authority: passwords may hold any other character, quotes included.
_USERINFO = re.compile(r"(?<=://)[^/\s]+(?=@)")
_SIGNED_QUERY = re.compile(
    r"((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AccountKey|sig"
    r"|[\w-]*(?:token|password|secret|api[_-]?key))=)[^&;\s'\"]+",
    re.IGNORECASE,
)
# Of a terminal and of what takes log lines apart; of lines, LF alone is what we end them with.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_AUTHORIZATION = re.compile(r"((?:Basic|Bearer)\s+)[A-Za-z0-9+/._~=-]{6,}")
_MASK = "***"

logger = logging.getLogger("darwin")


class RoleError(Exception):
    """An anticipated failure. The message says what happened, to what, and what to do; retrying the role may help."""


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
                values |= {value, urllib.parse.quote(value, safe=""), base64.b64encode(value.encode()).decode()}
        user, password = environ.get("MLFLOW_TRACKING_USERNAME", ""), environ.get("MLFLOW_TRACKING_PASSWORD", "")
        if password:
            values.add(base64.b64encode(f"{user}:{password}".encode()).decode())
        ordered = sorted(values, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def __call__(self, text: str) -> str:
        text = mask_uri(text)
        text = _AUTHORIZATION.sub(rf"\1{_MASK}", text)
        return self._values.sub(_MASK, text) if self._values else text


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

    redact = Redactor(read.environ)
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


def human(size: float) -> str:
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
    read = Reader(environ)
    redact = set_up(read)
    before = signal.signal(signal.SIGTERM, _terminated)
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
