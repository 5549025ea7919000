"""An HTTP proxy in front of the tracking server that can spoil answers: what networks and stores do to downloads."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

Fault = Callable[["_Handler", requests.Response], None]


@dataclass
class Proxy:
    """`faults` are used up in order, one for each request whose path matches the pattern beside it."""

    uri: str
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            self.paths.append(path)
            for index, (pattern, fault) in enumerate(self.faults):
                if re.search(pattern, path):
                    del self.faults[index]
                    return fault
        return None

    def downloads(self) -> list[str]:
        """The paths of the files asked for so far."""
        return [path for path in self.paths if "/mlflow-artifacts/artifacts/" in path]


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    upstream: str

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        pass

    def do_GET(self) -> None:
        self._forward("GET")

    def do_POST(self) -> None:
        self._forward("POST")

    def _forward(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        with requests.Session() as session:
            session.trust_env = False
            answer = session.request(method, self.upstream + self.path, data=body, headers=headers, timeout=60)
        fault = self.proxy.fault(self.path)
        (fault or passed_on)(self, answer)


def passed_on(handler: _Handler, answer: requests.Response) -> None:
    _send(handler, answer.status_code, answer, answer.content, framed=True)


def status(code: int) -> Fault:
    return lambda handler, answer: _send(handler, code, answer, b"spoiled", framed=True)


def cut_short(handler: _Handler, answer: requests.Response) -> None:
    """Half the body and an orderly end: without Content-Length no client can tell."""
    _send(handler, answer.status_code, answer, answer.content[: len(answer.content) // 2], framed=False)


def dropped(handler: _Handler, answer: requests.Response) -> None:
    """The connection breaks before an answer."""
    handler.close_connection = True


def _send(handler: _Handler, code: int, answer: requests.Response, body: bytes, *, framed: bool) -> None:
    handler.send_response(code)
    handler.send_header("Content-Type", answer.headers.get("Content-Type", "application/octet-stream"))
    if framed:
        handler.send_header("Content-Length", str(len(body)))
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(ConnectionError):
        handler.wfile.write(body)


@contextlib.contextmanager
def proxying(upstream: str) -> Iterator[Proxy]:
    """A proxy in front of `upstream`, on a free port."""
    handler = type("Handler", (_Handler,), {"upstream": upstream})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    handler.proxy = proxy  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
