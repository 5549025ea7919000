"""An HTTP proxy in front of the tracking server that can spoil answers: what networks and stores do to downloads."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

import requests

from tests.conftest import http_server

Fault = Callable[["_Handler", requests.Response], None]


@dataclass
class Proxy:
    """`faults` are used up in order, one for each request whose path matches the pattern beside it."""

    uri: str
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, path: str, part: str) -> Fault | None:
        with self.lock:
            self.paths.append(path)
            self.ranges += [part] if part else []
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
        fault = self.proxy.fault(self.path, self.headers.get("Range", ""))
        with contextlib.suppress(ConnectionError):
            (fault or passed_on)(self, answer)


def passed_on(handler: _Handler, answer: requests.Response) -> None:
    _send(handler, answer.status_code, answer, answer.content)


def status(code: int) -> Fault:
    return lambda handler, answer: _send(handler, code, answer, b"spoiled")


def cut_short(handler: _Handler, answer: requests.Response) -> None:
    """Half the body and an orderly end: without Content-Length no client can tell."""
    _send(handler, answer.status_code, answer, answer.content[: len(answer.content) // 2], framed=False)


def cut_short_of_its_length(handler: _Handler, answer: requests.Response) -> None:
    _send(handler, answer.status_code, answer, answer.content[: len(answer.content) // 2], size=len(answer.content))


def dropped(handler: _Handler, answer: requests.Response) -> None:
    """The connection breaks before an answer."""
    handler.close_connection = True


def flipped_bit(handler: _Handler, answer: requests.Response) -> None:
    """Of a gateway that tells its store's checksum."""
    spoiled = bytearray(answer.content)
    spoiled[len(spoiled) // 2] ^= 1
    md5 = base64.b64encode(hashlib.md5(answer.content, usedforsecurity=False).digest()).decode()
    _send(handler, answer.status_code, answer, bytes(spoiled), Content_MD5=md5)


def stalled(handler: _Handler, answer: requests.Response) -> None:
    """Half the body, and then nothing, until the client goes away."""
    half = answer.content[: len(answer.content) // 2]
    _send(handler, answer.status_code, answer, half, size=len(answer.content))
    handler.connection.settimeout(60)
    handler.connection.recv(1)


def range_ignored(handler: _Handler, answer: requests.Response) -> None:
    """The whole file, whatever part of it was asked for."""
    headers = {name: value for name, value in answer.request.headers.items() if name != "Range"}
    whole = requests.get(answer.url, headers=headers, timeout=60)
    _send(handler, 200, whole, whole.content)


def redirected(handler: _Handler, answer: requests.Response) -> None:
    """To the same place, where it is answered the next time."""
    _send(handler, 307, answer, b"", Location=handler.path)


def signed_out(handler: _Handler, answer: requests.Response) -> None:
    """What a gateway shows a browser whose session has ended, with a 200."""
    _send(handler, 200, answer, b"<html>Please sign in</html>")


_PASSED_ON = ("Content-Type", "ETag", "Content-Range", "Accept-Ranges")


def _send(
    handler: _Handler,
    code: int,
    answer: requests.Response,
    body: bytes,
    *,
    framed: bool = True,
    size: int | None = None,
    **headers: str,
) -> None:
    handler.send_response(code)
    for name in _PASSED_ON:
        if name in answer.headers:
            handler.send_header(name, answer.headers[name])
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    if framed:
        handler.send_header("Content-Length", str(len(body) if size is None else size))
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()
    handler.close_connection = True


@contextlib.contextmanager
def proxying(upstream: str) -> Iterator[Proxy]:
    """A proxy in front of `upstream`, on a free port."""
    handler = type("Handler", (_Handler,), {"upstream": upstream})
    with http_server(handler) as uri:
        proxy = handler.proxy = Proxy(uri)  # type: ignore[attr-defined]
        yield proxy
