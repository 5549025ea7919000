"""Log lines without secrets, as text or JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
import time

from darwin_runtime.redact import Redactor, set_redactor
from darwin_runtime.settings import Reader

# Of a terminal and of what takes log lines apart; of lines, LF alone is what we end them with.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")

logger = logging.getLogger("darwin")


class TextFormatter(logging.Formatter):
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


class JsonFormatter(TextFormatter):
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


def set_up_logging(read: Reader) -> None:
    """Send all logging to stderr as LOG_LEVEL, LOG_FORMAT, ENV and SERVICE_NAME say, without secrets.

    Where one of them is unreadable, that is one of `read.problems`, and its default is used. Libraries log at INFO at
    most: their DEBUG lines hold whole requests.
    """
    level = read.choice("LOG_LEVEL", "info", ("debug", "info", "warning", "error", "critical"))
    # Any environment but a developer's is read by machines.
    local = read.text("ENV", "local").lower() in ("local", "dev", "development")
    style = read.choice("LOG_FORMAT", "text" if local else "json", ("text", "json"))
    service = read.text("SERVICE_NAME")

    redact = Redactor(read.environ)
    set_redactor(redact)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(redact, service) if style == "json" else TextFormatter(redact))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.getLevelName(level.upper()), logging.INFO))
    logger.setLevel(level.upper())
    logging.captureWarnings(True)
    # They log each retry and each login, in words that name no setting. The lines of this runtime do.
    for client in ("urllib3", "botocore", "boto3", "s3transfer"):
        logging.getLogger(client).setLevel(logging.INFO if level == "debug" else logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of stores in databases: each migration step


def format_bytes(size: float) -> str:
    """A number of bytes for people: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
