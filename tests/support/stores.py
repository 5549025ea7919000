"""Stores of a test's own: as much of an MLflow server, and of S3, as downloads need."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.conftest import http_server

MLMODEL = b"flavors:\n  python_function:\n    loader_module: x\n"
API = "/api/2.0/mlflow-artifacts/artifacts"
AWS = {"AWS_ACCESS_KEY_ID": "an-access-key-id", "AWS_SECRET_ACCESS_KEY": "a-very-secret-access-key"}
AWS |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}

Hook = Callable[["Handler", str, Mapping[str, str]], object]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: Any = b"", **headers: str) -> bool:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return True

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def mlflow(files: Mapping[str, bytes], hook: Hook = lambda *_: None) -> Iterator[str]:
    """The URL of an MLflow server with these files; `hook` may answer instead."""

    class Server(Handler):
        def do_GET(self) -> None:
            at, query = unquote(urlsplit(self.path).path), dict(parse_qsl(urlsplit(self.path).query))
            if hook(self, at, query):
                return
            if at == API:
                inside = f"{query.get('path', '').strip('/')}/".lstrip("/")
                names = [name[len(inside) :] for name in files if name.startswith(inside)]
                found: dict[str, Any] = {name.split("/")[0]: {"is_dir": True} for name in names if "/" in name}
                found |= {
                    name: {"is_dir": False, "file_size": len(files[inside + name])} for name in names if "/" not in name
                }
                self.answer(200, {"files": [{"path": name, **rest} for name, rest in found.items()]})
            elif at.removeprefix(f"{API}/") in files:
                self.answer(200, files[at.removeprefix(f"{API}/")])
            else:
                self.answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": at})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

    with http_server(Server) as url:
        yield url


@contextlib.contextmanager
def s3(files: Mapping[str, bytes], hook: Hook = lambda *_: None) -> Iterator[str]:
    """The URL of an S3 whose bucket holds these files; `hook` may answer instead."""

    class Server(Handler):
        def do_GET(self) -> None:
            query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
            key = unquote(urlsplit(self.path).path)[1:].partition("/")[2]
            if hook(self, key, query):
                return
            if not key and self.command == "HEAD":
                self.answer(200, x_amz_bucket_region="us-east-1")
            elif "list-type" in query:
                names = [name for name in files if name.startswith(inside := query.get("prefix", ""))]
                inner = {name[: name.index("/", len(inside)) + 1] for name in names if "/" in name[len(inside) :]}
                direct = [name for name in names if "/" not in name[len(inside) :]]
                items = "".join(f"<Contents><Key>{n}</Key><Size>{len(files[n])}</Size></Contents>" for n in direct)
                items += "".join(f"<CommonPrefixes><Prefix>{one}</Prefix></CommonPrefixes>" for one in sorted(inner))
                text = (
                    f"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
                )
                self.answer(200, text.encode())
            elif key in files:
                self.answer(200, files[key], ETag='"x"', Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT")
            else:
                self.answer(404, b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>")

        do_HEAD = do_GET  # noqa: N815

    with http_server(Server) as url:
        yield url
