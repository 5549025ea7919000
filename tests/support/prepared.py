"""Python processes forked from a prepared one, which has imported MLflow and our modules: they start in milliseconds.

`start("download.py", env=...)` takes the rest of a command line that begins with `python`: a script, `-m` and a module,
or `-c` and code. Arguments, environment, working directory, umask, limits, signals, open files and exit code are those
of a fresh process, as `test_prepared.py` compares. Two things differ: modules are imported already, and the pools of
BLAS and OpenMP have one thread. A test of the start itself runs `python`.

    python -m tests.support.prepared KIND FD     the prepared process, which listens at the socket FD
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import inspect
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn, cast

import coverage

from darwin_runtime import mlflow_import

ROOT = Path(__file__).parents[2]

# A message has an environment, some code and three descriptors in it.
MAX_MESSAGE_BYTES = 128 * 1024

# A test process may have changed these after the prepared process began.
LIMITS = (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)

# Threads of these pools do not survive a fork.
THREADS = ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR", "VECLIB_MAXIMUM")

# The roles import these when they need them.
MODULES = {
    "init": (
        *("cleanup", "mlflow.tracking", "tests.support.killing", "mlflow.store.artifact.http_artifact_repo"),
        *("mlflow.store.artifact.mlflow_artifacts_repo", "mlflow.store.artifact.models_artifact_repo"),
    ),
    "serve": (
        *("darwin_runtime.http.factory", "darwin_runtime.model.self_test", "mlflow.pyfunc", "mlflow.sklearn"),
        *("skops.io", "sklearn.linear_model", "uvicorn.protocols.http.httptools_impl", "uvloop"),
    ),
}


# In the test


class Process:
    """A running fork, with what tests use of `subprocess.Popen`. Its pipes, where it has any, are read as text."""

    def __init__(self, status: IO[bytes], stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self._status = status
        self._ended = threading.Lock()
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None
        line = status.readline()
        assert line, "the prepared process has ended"
        self.pid = int(line)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the signal. Raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        with self._ended:
            if self.returncode is None:
                with selectors.DefaultSelector() as selector:
                    selector.register(self._status, selectors.EVENT_READ)
                    if not selector.select(timeout):
                        raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
                self.returncode = int(self._status.readline())
                self._status.close()
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in (self.stdout, self.stderr):
            if pipe:
                pipe.close()
        self.wait()


def start(*command: object, env: Mapping[str, str], stdout: int | None = None, stderr: int | None = None) -> Process:
    """Start `python` with this command. `stdout` and `stderr` are `subprocess.PIPE`, a descriptor, or those of here."""
    kind = "serve" if any("darwin_serve" in str(part) for part in command) else "init"
    with contextlib.ExitStack() as stack:
        status, there = os.pipe()
        stack.callback(os.close, there)
        ours: list[IO[str] | None] = []
        theirs = [there]
        for standard, wanted in ((1, stdout), (2, stderr)):
            if wanted == subprocess.PIPE:
                end, there = os.pipe()
                stack.callback(os.close, there)
                ours.append(os.fdopen(end, encoding="utf-8", errors="replace"))
                theirs.append(there)
            else:
                ours.append(None)
                theirs.append(standard if wanted is None else wanted)
        mask = os.umask(0)
        os.umask(mask)
        message = {
            "command": [str(part) for part in command],
            "env": dict(env),
            "cwd": str(Path.cwd()),
            "umask": mask,
            "limits": [resource.getrlimit(limit) for limit in LIMITS],
        }
        socket.send_fds(_template(kind), [json.dumps(message).encode()], theirs)
    return Process(os.fdopen(status, "rb"), *ours)


def run(*command: object, env: Mapping[str, str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `python` with this command to its end, as `subprocess.run` does."""
    with start(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        read: list[list[str]] = [[], []]
        pipes = cast("list[IO[str]]", [process.stdout, process.stderr])
        readers = [threading.Thread(target=lines.extend, args=(pipe,)) for lines, pipe in zip(read, pipes, strict=True)]
        for reader in readers:
            reader.start()
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            for reader in readers:
                reader.join(timeout)
    return subprocess.CompletedProcess(list(map(str, command)), code, *("".join(lines) for lines in read))


def uncovered(environ: Mapping[str, str]) -> dict[str, str]:
    """This environment for a process of which no coverage is measured: it repeats, at length, what others show."""
    return {name: value for name, value in environ.items() if name != "COVERAGE_PROCESS_CONFIG"}


@functools.cache
def _template(kind: str) -> socket.socket:
    """The socket of a prepared process of this kind, which lives as long as this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE_BYTES)
    environ = uncovered(os.environ) | {f"{name}_NUM_THREADS": "1" for name in THREADS}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.prepared", kind, str(theirs.fileno())],
            env=environ | {"PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )

    def end() -> None:
        ours.close()
        process.wait(timeout=60)

    atexit.register(end)
    return ours


# In the prepared process


def _prepare(kind: str) -> None:
    """Import what the roles of this kind import by and by."""
    importlib.import_module("darwin_serve" if kind == "serve" else "download")
    if kind == "serve":
        from darwin_runtime.model.load import SERVING

        mlflow_import.prepare(SERVING)
    else:
        mlflow_import.prepare(tables=False)
    for name in MODULES[kind]:
        importlib.import_module(name)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    # jemalloc, which PyArrow brings, starts its own thread anew in a fork.
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, f"{threads}: a fork has only one of them"


def _serve(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for each message. Returns in a fork its message and files, and in this process, at its end, None."""
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # The test decides what follows from Ctrl+C; a shell that starts tests in the background has it ignored.
    inherited = signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, int] = {}
    with woken, wake, selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is woken:
                    woken.recv(4096)
                    _report_ended(running)
                    continue
                text, files, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 3)
                if not text:
                    for pid in running:
                        os.kill(pid, signal.SIGKILL)
                    return None
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, inherited)
                    return json.loads(text), files
                running[pid] = files[0]
                os.write(files[0], b"%d\n" % pid)
                for file in files[1:]:
                    os.close(file)


def _report_ended(running: dict[int, int]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            file = running.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # the test did not wait for it
                os.write(file, b"%d\n" % os.waitstatus_to_exitcode(status))
            os.close(file)


def _become(message: dict[str, Any], files: list[int]) -> None:
    """Be as a fresh process is."""
    for standard, file in enumerate(files[1:], start=1):
        os.dup2(file, standard)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    os.chdir(message["cwd"])
    os.umask(message["umask"])
    for limit, bounds in zip(LIMITS, message["limits"], strict=True):
        resource.setrlimit(limit, bounds)
    os.environ.clear()
    os.environ.update(message["env"])
    time.tzset()
    tempfile.tempdir = None
    if "COVERAGE_PROCESS_CONFIG" in os.environ:
        coverage.process_startup(force=True)


def _run(command: list[str]) -> None:
    """Run what follows `python` on a command line."""
    how, *rest = command
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif how == "-m":
        sys.argv = rest
        sys.path[0] = str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = str(Path(how).resolve().parent)
        runpy.run_path(how, run_name="__main__")


def _exit_code(command: list[str]) -> int:
    """Run the command; return the exit code of a process of its own, or minus the signal that would end it."""
    try:
        _run(command)
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            return ended.code or 0
        sys.stderr.write(f"{ended.code}\n")
        return 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(code: int) -> NoReturn:
    """End as Python does, without the 100 ms in which it takes imported modules apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _main() -> None:
    kind, file = sys.argv[1:]
    with socket.socket(fileno=int(file)) as control:
        _prepare(kind)
        # Coverage asks for the stack when it starts in a fork. The first answer takes 50 ms, later ones take 5.
        inspect.stack()
        # A collection in a fork would copy all that is here, and none of it is garbage.
        gc.collect()
        gc.freeze()
        forked = _serve(control)
    if forked:
        message, files = forked
        _become(message, files)
        _end(_exit_code(message["command"]))


if __name__ == "__main__":
    _main()
