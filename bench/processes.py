"""Processes on one core, which end together with all that they started."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import BUILD, ROOT
from bench.machine import SERVER_CORE

# What every process gets, servers and limits alike, and nothing else of this shell's environment.
_KEPT = ("HOME", "LANG", "TMPDIR")
_QUIET = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "BENTOML_DO_NOT_TRACK": "True"}

DEADLINE_SECONDS = 120

# For ending when asked to, before being ended.
_PATIENCE_SECONDS = 10

# Between two looks at whether a server is ready. Shorter ones would slow its start, which is measured.
_PAUSE_SECONDS = 0.02


class Failed(Exception):
    """A server did not start, or did not do what it should. The message says what was seen, in one line."""


def environ(python: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The variables for a process of the environment in which `python` is."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**kept, **_QUIET, "PATH": path, **extra}


def on_core(core: int, command: Sequence[str | Path]) -> list[str]:
    return ["taskset", "--cpu-list", str(core), *map(str, command)]


@contextlib.contextmanager
def running(command: Sequence[str | Path], env: Mapping[str, str], log: str) -> Iterator[subprocess.Popen[bytes]]:
    """`command` on the server's core, writing to build/bench/logs/<log>.log; it and what it started end afterwards."""
    file = log_file(log)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as output:
        process = subprocess.Popen(
            on_core(SERVER_CORE, command), env=env, cwd=BUILD, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def log_file(log: str) -> Path:
    return BUILD / "logs" / f"{log}.log"


def family(leader: int) -> dict[int, str]:
    """`leader` and what it started, however far removed: process and start time, which no other process shares."""
    everybody = {int(entry.name): stat for entry in Path("/proc").glob("[0-9]*") if (stat := _stat(int(entry.name)))}
    found = {leader} & everybody.keys()
    while more := {process for process, (parent, _) in everybody.items() if parent in found} - found:
        found |= more
    return {process: everybody[process][1] for process in found}


def _stat(process: int) -> tuple[int, str] | None:
    """Parent and start time; none of a process that has ended."""
    try:
        # The name, in parentheses, may hold anything. What follows it begins with state and parent.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[1]), fields[19])


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    # Looked up before the first signal: who loses its parent is no longer found below it.
    members = family(process.pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for member in _alive(members):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, number)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while _alive(members) and time.monotonic() < deadline:
            process.poll()  # else it would stay a zombie
            time.sleep(0.02)
    process.wait()


def _alive(members: Mapping[int, str]) -> list[int]:
    stats = {member: _stat(member) for member in members}
    return [member for member, started in members.items() if (stat := stats[member]) and stat[1] == started]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_ready(process: subprocess.Popen[bytes], port: int, path: str, log: str) -> None:
    """Return as soon as `path` is answered with 200. Raises `Failed` if the process ends or takes too long."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not answers(port, path):
        if process.poll() is not None:
            raise Failed(f"it ended with exit code {process.returncode}: {_last_words(log)}")
        if time.monotonic() > deadline:
            raise Failed(f"it was not ready after {DEADLINE_SECONDS} s: {_last_words(log)}")
        time.sleep(_PAUSE_SECONDS)


def answers(port: int, path: str) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return request(port, "GET", path)[0] == 200
    return False


def request(
    port: int, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of the answer, over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECONDS)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _last_words(log: str) -> str:
    file = log_file(log)
    lines = file.read_text(errors="replace").split("\n")
    return f"{next((line for line in reversed(lines) if line.strip()), 'nothing')} ({file.relative_to(ROOT)})"
