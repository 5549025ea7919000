"""A role as a process: its exit code, SIGTERM, and the pod's termination message."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

from darwin_runtime.errors import ConfigError, RoleError
from darwin_runtime.logs import set_up_logging
from darwin_runtime.redact import MASK, hide, is_secret
from darwin_runtime.settings import Reader

TERMINATION_LOG = Path("/dev/termination-log")

# Kubernetes shows at most 4096 bytes of a termination message.
MAX_TERMINATION_BYTES = 4096

logger = logging.getLogger("darwin")

# What SIGTERM has to do before the process ends.
_at_sigterm: list[Callable[[], object]] = []

RoleBody = Callable[[Reader], None]


def run_role(body: RoleBody, environ: Mapping[str, str]) -> int:
    """Run one role and return its exit code; the last error also goes to the pod's termination message.

    `body` reads its settings from the `Reader` it is given, which may hold problems already, and calls its `finish`.
    """
    # A core file would have all that is in memory, the environment and the model with it. Children inherit this.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    read = Reader(environ)
    set_up_logging(read)
    before = signal.signal(signal.SIGTERM, _terminated)
    hooks = sys.excepthook, threading.excepthook
    # What nobody catches would be printed as it is.
    sys.excepthook = lambda *raised: logger.critical("not expected by anybody", exc_info=raised)
    threading.excepthook = lambda raised: logger.error(
        "in thread %s: %r", raised.thread and raised.thread.name, raised.exc_value, exc_info=raised.exc_value
    )
    try:
        body(read)
    except ConfigError as error:
        for problem in error.problems:
            logger.error("bad configuration: %s", problem)
        return _fail(error.exit_code, str(error))
    except RoleError as error:
        logger.error("%s", error)
        logger.debug("raised from here", exc_info=error)
        return _fail(error.exit_code, str(error))
    except Exception as error:  # the last line of defence: a role never dies without saying why
        logger.exception("unexpected %s: %s", type(error).__name__, error)
        return _fail(RoleError.exit_code, f"unexpected {type(error).__name__}: {error}")
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.excepthook, threading.excepthook = hooks
    return 0


def log_settings(read: Reader) -> None:
    """Log one line with every effective setting; secrets are masked."""
    shown = {name: MASK if value and is_secret(name) else value for name, value in read.seen.items()}
    logger.info("settings: %s", " ".join(f"{name}={value}" for name, value in shown.items()))


def leave(code: int) -> NoReturn:
    """End the process at once, whatever threads are left that wait for an answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def at_sigterm(action: Callable[[], object]) -> Iterator[None]:
    """Have `action` called if SIGTERM ends the process within the block. It may raise, and must not wait."""
    _at_sigterm.append(action)
    try:
        yield
    finally:
        _at_sigterm.remove(action)


def _terminated(number: int, _frame: FrameType | None) -> None:
    # The first process of a container ignores what it does not handle. What roles do is safe to stop at any point, so
    # nothing, such as a transfer that hangs, is waited for.
    for action in _at_sigterm:
        with contextlib.suppress(Exception):
            action()
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, "stopped by SIGTERM", (), None)
    # Past the handler's stream, which may be at another line.
    os.write(2, f"{logging.getLogger().handlers[0].format(record)}\n".encode())
    os._exit(128 + number)


def write_termination(message: str) -> None:
    """Show `message` as the container's termination message, without secrets."""
    # Kubernetes mounts this file; it must not be created anywhere else.
    if TERMINATION_LOG.exists():
        try:
            TERMINATION_LOG.write_bytes(hide(message).encode()[:MAX_TERMINATION_BYTES])
        except OSError as error:
            logger.debug("cannot write %s: %s", TERMINATION_LOG, error)


def _fail(code: int, message: str) -> int:
    write_termination(message)
    return code
