"""A Kubernetes API server of the tests' own: real HTTPS on a free local port, as much of it as listing pods needs.

    with ApiServer(tmp_path / "serviceaccount") as api:
        api.pods = [pod("web-1", env={"MODEL_URI": "models:/iris/1"}, claim="model-cache")]
        api.faults = [ok, expired()]
        with Client.in_cluster(api.environ, api.directory) as client: ...
        assert api.requests[0].query == {"limit": "500"}

`api.directory` then holds the service account's `token`, `ca.crt` and `namespace`, and `api.environ` the two variables
that Kubernetes sets, so that a subprocess can be pointed at the server too.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import trustme

Pod = dict[str, Any]


class Certificate(NamedTuple):
    """PEM: the server's key and certificate chain, and the CA that clients are told to trust."""

    chain: bytes
    ca: bytes


@dataclass(frozen=True)
class Request:
    """One request as it came. `path` is still quoted and without its query, header names are in lower case."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]


def issue(*names: str) -> Certificate:
    """A certificate for these host names or addresses, by a CA made for it."""
    ca = trustme.CA()
    return Certificate(ca.issue_cert(*names).private_key_and_cert_chain_pem.bytes(), ca.cert_pem.bytes())


def service_account(directory: Path, ca: bytes, *, token: str = "first-token", namespace: str = "default") -> None:
    """Write what the kubelet mounts into every container."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "token").write_text(token)
    (directory / "ca.crt").write_bytes(ca)
    (directory / "namespace").write_text(namespace)


class ApiServer:
    """Serves `pods` to whoever presents `token`. Every attribute may be changed while it runs."""

    def __init__(
        self,
        directory: Path,
        *,
        host: str = "127.0.0.1",
        certificate: Certificate | None = None,
        namespace: str = "default",
    ) -> None:
        self.directory = directory
        self.pods: Sequence[Pod] = []
        self.page_size: int | None = None
        """Pods per page if that is fewer than the client asks for."""
        self.empty_page_before: int | None = None
        """Serve a page without pods, to be continued, before the pod of this index (not 0)."""
        self.faults: list[Fault] = []
        """What answers the next requests instead; taken from the front."""
        self.requests: list[Request] = []
        self.connections = 0
        self.closing = threading.Event()
        self.certificate = certificate or issue(host)
        self._lists: dict[str, tuple[list[Pod], int, bool]] = {}
        self._server = _Server(self, host)
        self.token = "first-token"
        service_account(directory, self.certificate.ca, token=self.token, namespace=namespace)

    def __enter__(self) -> ApiServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"https://[{host!s}]:{port}" if ":" in str(host) else f"https://{host!s}:{port}"

    @property
    def environ(self) -> dict[str, str]:
        host, port = self._server.server_address[:2]
        return {"KUBERNETES_SERVICE_HOST": str(host), "KUBERNETES_SERVICE_PORT": str(port)}

    def rotate(self, token: str) -> None:
        """Accept this token only, and write it where the client finds it, as the kubelet does."""
        self.token = token
        (self.directory / "token").write_text(token)

    def remember(self, pods: Sequence[Pod], start: int, *, now_empty: bool = False) -> str:
        """A continue token for the rest of this list."""
        token = f"continue-{len(self._lists)}"
        self._lists[token] = list(pods), start, now_empty
        return token

    def page(self, namespace: str, limit: int, token: str) -> dict[str, Any]:
        """The PodList for one request: later pages are of the moment of their first, as the real server's are."""
        if token:
            pods, start, empty = self._lists[token]
        else:
            pods, start, empty = [pod for pod in self.pods if pod["metadata"]["namespace"] == namespace], 0, False
        end = start if empty else start + min(limit or len(pods), self.page_size or len(pods))
        metadata: dict[str, Any] = {"resourceVersion": "4711"}
        if end < len(pods):
            now_empty = not empty and end == self.empty_page_before
            metadata |= {
                "continue": self.remember(pods, end, now_empty=now_empty),
                "remainingItemCount": len(pods) - end,
            }
        return {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": pods[start:end]}


class _Server(socketserver.ThreadingTCPServer):
    def __init__(self, api: ApiServer, host: str) -> None:
        self.api = api
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.open: set[socket.socket] = set()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile() as file:
            file.write(api.certificate.chain)
            file.flush()
            self.context.load_cert_chain(file.name)
        super().__init__((host, 0), Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        plain, address = self.socket.accept()
        self.api.connections += 1
        # The handshake is left to the connection's own thread, lest a silent client keep the others waiting.
        connection = self.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        self.open.add(connection)
        return connection, address

    def close_request(self, request: Any) -> None:
        self.open.discard(request)
        super().close_request(request)

    def hang_up(self) -> None:
        """End the connections that clients keep open, so that their threads end."""
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up or refuse the certificate are what some tests are about; the client's side tells."""


class Handler(BaseHTTPRequestHandler):
    """One connection. A fault gets it to answer one request: `reply`, or whatever a connection allows."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: in two it would wait 40 ms for the client's delayed ACK
    server: _Server
    connection: ssl.SSLSocket

    def setup(self) -> None:
        super().setup()
        self.connection.do_handshake()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        pass

    def do_GET(self) -> None:
        api, parts = self.server.api, urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query))
        headers = {name.lower(): value for name, value in self.headers.items()}
        api.requests.append(Request(parts.path, self.query, headers))
        answer = api.faults.pop(0) if api.faults else ok
        answer(self)

    def reply(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


Fault = Callable[[Handler], None]
"""Answers one request in the place of `ok`; a test can write its own."""


def ok(handler: Handler) -> None:
    """The honest answer."""
    api = handler.server.api
    root, _, rest = urlsplit(handler.path).path.partition("/namespaces/")
    namespace, _, resource = rest.partition("/")
    if handler.headers["Authorization"] != f"Bearer {api.token}":
        status(401, "Unauthorized", "Unauthorized")(handler)
    elif (root, resource) != ("/api/v1", "pods"):
        status(404, "NotFound", "the server could not find the requested resource")(handler)
    else:
        page = api.page(unquote(namespace), int(handler.query.get("limit", 0)), handler.query.get("continue", ""))
        reply(json.dumps(page))(handler)


def reply(
    body: str, code: int = 200, kind: str = "application/json", headers: Mapping[str, str] | None = None
) -> Fault:
    """Any answer at all."""
    return lambda handler: handler.reply(code, body.encode(), {"Content-Type": kind, **(headers or {})})


def status(
    code: int,
    reason: str,
    message: str,
    *,
    details: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    http: int | None = None,
) -> Fault:
    """A Status object that says `code`, under the HTTP status `http` if that is another."""
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": metadata or {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        **({"details": details} if details else {}),
        "code": code,
    }
    return reply(json.dumps(body), http or code, headers=headers)


def unauthorized() -> Fault:
    return status(401, "Unauthorized", "Unauthorized")


def forbidden() -> Fault:
    who = 'User "system:serviceaccount:default:default" cannot list resource "pods" in API group ""'
    return status(403, "Forbidden", f'pods is forbidden: {who} in the namespace "default"', details={"kind": "pods"})


def expired() -> Fault:
    """410 in the middle of a list. Like the real server it offers a token for the rest as it is by now."""

    def answer(handler: Handler) -> None:
        api = handler.server.api
        _, start, _ = api._lists.get(handler.query.get("continue", ""), ([], 0, False))
        message = "The provided continue parameter is too old to display a consistent list result."
        status(410, "Expired", message, metadata={"continue": api.remember(api.pods, start)})(handler)

    return answer


def throttled(header: str | None = None, seconds: int | None = None) -> Fault:
    """429, asking to wait in the Retry-After header, in the Status's details, or in neither."""
    return status(
        429,
        "TooManyRequests",
        "Too many requests, please try again later.",
        details=None if seconds is None else {"retryAfterSeconds": seconds},
        headers=None if header is None else {"Retry-After": header},
    )


def unavailable() -> Fault:
    return status(503, "ServiceUnavailable", "the server is currently unable to handle the request")


def redirect(url: str) -> Fault:
    return reply("", 302, headers={"Location": url})


def truncated(handler: Handler) -> None:
    """Half of the body promised, then the end of the connection."""
    handler.reply(200, b'{"kind": "PodList", ', {"Content-Length": "1000"})
    handler.close_connection = True


def reset(handler: Handler) -> None:
    """The connection is reset instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for file in (handler.rfile, handler.wfile, handler.connection):
        file.close()
    raise ConnectionResetError


def silence(handler: Handler) -> None:
    """No answer for as long as the server runs."""
    handler.server.api.closing.wait()
    handler.close_connection = True


def pod(
    name: str,
    *,
    phase: str = "Running",
    namespace: str = "default",
    annotations: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    init_env: Mapping[str, str] | None = None,
    claim: str | None = None,
    mount_path: str = "/model-cache",
    owner: tuple[str, str] | None = None,
    deleted: str | None = None,
) -> Pod:
    """A Pod with a main container (`env`) and an init container (`init_env`), as the API server lists it.

    With `claim` both mount that PersistentVolumeClaim at `mount_path`, the main container read-only. `owner` is
    (kind, name), `deleted` the deletionTimestamp of a pod that is terminating.
    """
    mount = {"name": "cache", "mountPath": mount_path}
    mounts = [mount] if claim else []
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "uid": f"uid-of-{name}",
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    if annotations:
        metadata["annotations"] = dict(annotations)
    if owner:
        kind, owner_name = owner
        metadata["ownerReferences"] = [
            {
                "apiVersion": "apps/v1",
                "kind": kind,
                "name": owner_name,
                "uid": f"uid-of-{owner_name}",
                "controller": True,
            }
        ]
    if deleted:
        metadata |= {"deletionTimestamp": deleted, "deletionGracePeriodSeconds": 30}
    spec = {
        "initContainers": [_container("download", init_env, mounts)],
        "containers": [_container("serve", env, [mount | {"readOnly": True} for mount in mounts])],
        "volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": claim}}] if claim else [],
        "serviceAccountName": "default",
    }
    return {"metadata": metadata, "spec": spec, "status": {"phase": phase}}


def _container(name: str, env: Mapping[str, str] | None, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    variables = [{"name": key, "value": value} for key, value in (env or {}).items()]
    # Like the real server, which leaves out what is empty.
    return {"name": name, "image": "darwin-serve-runtime:test"} | {
        key: value for key, value in {"env": variables, "volumeMounts": mounts}.items() if value
    }
