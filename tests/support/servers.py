"""Real servers for tests: the role as a subprocess, and any ASGI application on uvicorn in a thread."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import uvicorn

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.http.app import make_app
from darwin_runtime.http.service import Service
from darwin_runtime.model.about import about_model
from darwin_runtime.model.load import load_model
from darwin_runtime.model.model import Model
from tests.conftest import ROOT, clean_environ, wait_until
from tests.support import prepared
from tests.support.models import model_path

_LISTENING = re.compile(r'listening on (https?://[^\s"]+)')


@dataclass
class Served:
    """The role, running. `lines` is its log so far, `options` what requests to it need besides."""

    process: subprocess.Popen[str] | prepared.Process
    reader: threading.Thread
    url: str = ""
    lines: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=60, **(self.options | options))

    def post(self, path: str, json: Any = None, **options: Any) -> requests.Response:
        return requests.post(self.url + path, json=json, timeout=60, **(self.options | options))

    def listening(self) -> bool:
        """Whether the log says where it listens; `url` is then known."""
        assert self.process.poll() is None, f"the server ended:\n{self.log}"
        found = _LISTENING.search(self.log)
        self.url = found[1] if found else ""
        return bool(found)

    def ready(self) -> bool:
        assert self.process.poll() is None, f"the server ended:\n{self.log}"
        return self.get("/ready").status_code == 200

    def stop(self) -> int:
        """Ask it to end, wait until it has, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self.reader.join(timeout=60)
        return code


@contextlib.contextmanager
def serving(
    path: Path | None = None,
    *,
    wait: bool = True,
    code: int = 0,
    options: dict[str, Any] | None = None,
    fresh: bool = False,
    **env: object,
) -> Iterator[Served]:
    """`darwin_serve.py` on a free port, ready to predict; it must end with `code` when asked to.

    With `wait=False` it may still be loading, and only has to listen. `options` are what requests to it need besides.
    It is forked from a prepared process, unless it has to be a `fresh` one.
    """
    if path is not None:
        env["MODEL_LOCAL_PATH"] = path
    environ = clean_environ(**{"HOST": "127.0.0.1", "PORT": 0, "DRAIN_SECONDS": 0, **env})
    script = ROOT / "darwin_serve.py"
    process: subprocess.Popen[str] | prepared.Process
    if fresh:
        process = subprocess.Popen([sys.executable, script], env=environ, stderr=subprocess.PIPE, text=True)
    else:
        process = prepared.start(script, env=environ, stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
    reader.start()
    served = Served(process, reader, lines=lines, options=options or {})
    try:
        wait_until(served.listening, "listening")
        if wait:
            wait_until(served.ready, "readiness")
        yield served
        assert served.stop() == code, served.log
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(timeout=60)
        process.stderr.close()


@contextlib.contextmanager
def switching(limits: BatchLimits | None = None, **options: Any) -> Iterator[Callable[[str], str]]:
    """Our application in this process: call what is yielded with the model it is to answer with, for its URL."""
    service = Service(limits or BatchLimits(), **options)
    models: dict[str, Model] = {}
    with in_thread(make_app(service)) as url:

        def switch(kind: str) -> str:
            if kind not in models:
                models[kind] = load_model(model_path(kind))
            service.use(models[kind], about_model(models[kind]))
            return url

        yield switch


@contextlib.contextmanager
def in_thread(app: Any, **options: Any) -> Iterator[str]:
    """`app` on a real uvicorn in a thread of this process, with `options` of its; yields its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    usual = {"loop": "uvloop", "http": "httptools", "lifespan": "off", "log_config": None, "access_log": False}
    server = uvicorn.Server(uvicorn.Config(app, **(usual | options)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, "uvicorn")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()
