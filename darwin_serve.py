"""Role: the main container. Serves one MLflow model over HTTP.

Environment (empty means unset):
  MODEL_LOCAL_PATH        directory of the model, its parent, or `<dir>/model` where the model is in <dir> itself
  MLFLOW_MODEL_URI        where to download it from when MODEL_LOCAL_PATH is not set
  MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD
                          the MLflow server of that URI; MLflow's other variables apply as well
  HOST, PORT              where to listen, 0.0.0.0 and 8000; port 0 is any free one
  ROOT_PATH               the prefix under which a proxy shows this server, such as /models/iris
  MODEL_NAME              what the model is called in URLs, metrics and the log; model
  PREDICT_METHOD          what the model is asked for, such as predict_proba, unless a request says otherwise
  FEATURE_STORE_URL, OFS_ADMIN_URL
                          where features are looked up for requests that name them by key
  REQUEST_TIMEOUT_SECONDS how long a prediction may take, waiting included; by default MLflow's
                          MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT, else 60
  WORKERS                 processes that predict; by default the container's CPU limit, rounded up
  BATCHING                auto, on or off: put requests that wait together; auto where the model's rows are independent
  MAX_BATCH_ROWS, MAX_QUEUE_ROWS
                          rows that go to the model at once, 256, and that may wait, 100000
  FAST_PATH               auto or off: call the model directly where that is proven to answer what MLflow answers
  VERIFY                  size, sha256 or off: how to compare the files with what was downloaded, before loading
  MAX_BODY_MB, MAX_ROWS   what one request may bring: 64 MiB of body, 1000000 rows
  MAX_HEADER_KB           how large a request's head may be, 32 KiB
  MAX_CONNECTIONS         connections that are served at the same time, for each worker; 1000
  RECEIVE_TIMEOUT_SECONDS, SEND_TIMEOUT_SECONDS
                          how long a client may take to send a request, and to read the answer; 60 each
  KEEP_ALIVE_SECONDS      how long a connection may stay open without a request; 75
  REQUIRE_SHA256          load only the model whose directory has this digest: see README
  DRAIN_SECONDS           how long requests are still taken after SIGTERM, while /ready says no; 5
  SERVING_MODEL_CONFIG    JSON object, the model_config of MLflow models that read one
  API_KEYS_FILE           a file with keys, one a line; then requests need one of them
  TLS_CERT_FILE, TLS_KEY_FILE
                          the certificate and key to serve HTTPS with, instead of HTTP
  TLS_CLIENT_CA_FILE      whose certificates clients need
  AUTH_EXEMPT             what needs neither key nor certificate: probes,metrics, one of them, or none
  CORS_ORIGINS            origins whose pages may ask from a browser, such as https://app.example, or *
  LOG_LEVEL, LOG_FORMAT, ENV, SERVICE_NAME
                          info; text or json (json unless ENV is local, dev or development); a name for each line

Exit codes: 0 stopped by SIGTERM or SIGINT; 1 the port is taken, or the model is not there, does not load, fails on its
own input example, or hangs; 2 bad settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from darwin_runtime.engine.processes import run_worker, signal_socket
from darwin_runtime.engine.workers import WorkerJob, supervise
from darwin_runtime.errors import RoleError
from darwin_runtime.http import auth, cors
from darwin_runtime.http import tls as tls_module
from darwin_runtime.http.acceptor import Acceptor
from darwin_runtime.http.connections import ConnectionLimiter, ConnectionLimits
from darwin_runtime.http.metrics import SharedMetrics, WorkerMetrics
from darwin_runtime.logs import log_settings
from darwin_runtime.redact import Redactor
from darwin_runtime.resources import cpu_limit, default_workers, keep_freed_buffers, share_cpus
from darwin_runtime.role import run_role
from darwin_runtime.settings import Reader
from darwin_runtime.storage import artifacts, digest, manifest, resolve
from darwin_runtime.storage.fetch import fetch_model

if TYPE_CHECKING:
    # At run time they are imported in functions, after the number of threads was set that numpy reads at import.
    from darwin_runtime.http.app import Service
    from darwin_runtime.model.model import Model

BACKLOG = 2048

# How long to wait for the request of a client that has just connected when this process stops accepting.
LINGER_SECONDS = 1.0

# What a process needs, beyond answering its last request and draining, to end.
SPARE_SECONDS = 5.0

# What a process has open besides its connections: libraries, the model's files, pipes.
SPARE_FILES = 512

# Of every answer: it is what it says it is, and nobody keeps it.
HEADERS = [("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]

# How `supervise` starts a worker that loads by itself: with this, its number, and the file descriptors of the listener,
# of what is counted, and of the channel.
WORKER = "--worker"

logger = logging.getLogger("darwin.serve")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. One of `model_path` and `model_uri` is set; `model_path` wins."""

    model_path: Path | None
    model_uri: str
    model_name: str
    method: str
    store_url: str
    store_admin_url: str
    model_config: Mapping[str, Any]
    host: str
    port: int
    root_path: str
    request_timeout: float
    workers: int
    batching: str
    batch_rows: int
    queue_rows: int
    fast_path: bool
    body_bytes: int
    rows: int
    head_bytes: int
    connections: int
    receive_seconds: float
    send_seconds: float
    keep_alive_seconds: float
    drain_seconds: float
    verify: str
    tls: tls_module.Context | None
    guard: auth.Guard | None
    origins: tuple[str, ...]
    required: str

    @classmethod
    def from_env(cls, read: Reader) -> Settings:
        """Raises `settings.ConfigError` naming every bad variable."""
        path, uri = read.text("MODEL_LOCAL_PATH"), read.text("MLFLOW_MODEL_URI")
        resolve.check_access(read, "MLFLOW_MODEL_URI", "" if path else uri)
        if not path and not uri:
            read.problem("MODEL_LOCAL_PATH", "is not set, and MLFLOW_MODEL_URI neither", example="/models")
        root_path = read.text("ROOT_PATH").strip("/")
        timeout = read.number("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", 60, minimum=0.001)
        tls = tls_module.from_env(read)
        settings = cls(
            model_path=Path(path) if path else None,
            model_uri=uri,
            model_name=_model_name(read),
            method=read.text("PREDICT_METHOD"),
            store_url=read.text("FEATURE_STORE_URL"),
            store_admin_url=read.text("OFS_ADMIN_URL"),
            model_config=_model_config(read),
            host=read.text("HOST", "0.0.0.0"),  # noqa: S104 - a container is reached from outside
            port=read.integer("PORT", 8000, minimum=0, maximum=65535),
            root_path=f"/{root_path}" if root_path else "",
            request_timeout=read.number("REQUEST_TIMEOUT_SECONDS", timeout, minimum=0.001),
            workers=read.integer("WORKERS", default_workers(), minimum=1),
            batching=read.choice("BATCHING", "auto", ("auto", "on", "off")),
            batch_rows=read.integer("MAX_BATCH_ROWS", 256, minimum=1),
            queue_rows=read.integer("MAX_QUEUE_ROWS", 100_000, minimum=1),
            fast_path=read.choice("FAST_PATH", "auto", ("auto", "off")) == "auto",
            body_bytes=round(read.number("MAX_BODY_MB", 64, minimum=0.001) * 1024**2),
            rows=read.integer("MAX_ROWS", 1_000_000, minimum=1),
            head_bytes=read.integer("MAX_HEADER_KB", 32, minimum=1) * 1024,
            connections=read.integer("MAX_CONNECTIONS", 1000, minimum=1),
            receive_seconds=read.number("RECEIVE_TIMEOUT_SECONDS", 60, minimum=0.001),
            send_seconds=read.number("SEND_TIMEOUT_SECONDS", 60, minimum=0.001),
            # Longer than the 60 s of common proxies: a connection that we close while they send on it fails a request.
            keep_alive_seconds=read.number("KEEP_ALIVE_SECONDS", 75, minimum=0.001),
            drain_seconds=read.number("DRAIN_SECONDS", 5, minimum=0),
            verify=read.choice("VERIFY", "size", manifest.VERIFY),
            tls=tls,
            guard=auth.from_env(read, certificates=tls is not None and tls.asks_certificate),
            origins=cors.from_env(read),
            required=digest.required(read),
        )
        urls = {"FEATURE_STORE_URL": settings.store_url, "OFS_ADMIN_URL": settings.store_admin_url}
        for name, url in urls.items():
            if any(urls.values()) and not url.startswith(("http://", "https://")):
                read.problem(name, "must be an http:// or https:// URL, like the other", example="http://features:8000")
        read.finish()
        return settings


def _model_config(read: Reader) -> dict[str, Any]:
    name = "SERVING_MODEL_CONFIG"
    text = read.raw(name)
    # It may hold a model's secrets, so neither the log nor an error shows it.
    read.seen[name] = "(set)" if text else ""
    try:
        config = json.loads(text or "{}")
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        read.problems.append(f"""{name}: must be a JSON object, for example {name}={{"temperature": 0.2}}""")
        return {}
    return config


def _model_name(read: Reader) -> str:
    name = read.text("MODEL_NAME", "model")
    if not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII):
        read.problem("MODEL_NAME", "is part of URLs: letters, digits, _, . and - only", example="iris")
    return name


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `RoleError` naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        raise RoleError(f"cannot listen on {_address(host, port)}: {error}") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which after SIGTERM goes on taking requests for `drain_seconds` while `service` says it is not ready.

    Where it is `one_of_many` at its port, it takes its part of the connections.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        drain_seconds: float,
        closed: Callable[[], None],
        *,
        one_of_many: bool = False,
    ) -> None:
        super().__init__(config)
        self.service = service
        self.one_of_many = one_of_many
        self.acceptors: list[Acceptor] = []
        self.closed = closed
        self.drain_seconds = drain_seconds
        self.stop_at = math.inf
        self.hung = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at SIGTERM once there is a model; stop at once at SIGINT and at a second signal."""
        drain = sig == signal.SIGTERM and self.drain_seconds and self.service.is_loaded and not self.service.draining
        self.service.draining = True
        if drain:
            logger.info("draining: requests are still taken for %g s", self.drain_seconds)
            self.stop_at = time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or time.monotonic() >= self.stop_at

    def give_up(self) -> None:
        """End, because the model does not."""
        self.hung = self.should_exit = self.service.draining = True

    def _protocol(self) -> asyncio.Protocol:
        """What uvicorn makes for each connection."""
        make: Any = self.config.http_protocol_class
        made: asyncio.Protocol = make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made

    async def _join(self, client: socket.socket) -> None:
        """Serve a connection that has been accepted. Raises what its handshake raises."""
        await asyncio.get_running_loop().connect_accepted_socket(self._protocol, client, ssl=self.config.ssl)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.one_of_many and sockets:
            await super().startup([])
            ahead = self.service.meter.has_more_connections
            self.acceptors = [Acceptor(listener, self._join, ahead) for listener in sockets]
        else:
            await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and answer also those who were accepted but whose request has not arrived yet."""
        # Others may serve those who wait to be accepted, if this one can't.
        able = self.service.is_loaded and not self.hung
        # Unless somebody has them, the system resets their connections when the port closes.
        waiting = [client for listener in sockets or () for client in _accepted(listener)] if able else []
        for server in self.servers:
            server.close()
        for acceptor in self.acceptors:
            acceptor.close()
        for listener in sockets or ():
            listener.close()
        self.closed()
        end = time.monotonic() + LINGER_SECONDS
        joining = asyncio.gather(*map(self._join, waiting), return_exceptions=True)
        with contextlib.suppress(asyncio.TimeoutError):  # who does not get to speak in time
            await asyncio.wait_for(joining, LINGER_SECONDS)
        while time.monotonic() < end:
            await asyncio.sleep(0.01)
            if all(getattr(connection, "cycle", True) for connection in self.server_state.connections):
                break
        await super().shutdown(sockets)
        self.service.access.flush()
        if self.service.store:
            self.service.store.close()


def _accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait at `listener`."""
    listener.setblocking(False)
    with contextlib.suppress(OSError):  # there are no more, or no files for more
        for _ in range(BACKLOG):
            yield listener.accept()[0]


def make_server(
    settings: Settings, board: SharedMetrics, number: int = 0, closed: Callable[[], None] = lambda: None
) -> Server:
    """A server without a model yet, which signals stop from now on. It calls `closed` once it accepts no more.

    What it counts is row `number` of `board`.
    """
    from darwin_runtime.engine.batching import BatchLimits
    from darwin_runtime.http.app import RequestLimits, Service, make_app
    from darwin_runtime.protocols.feature_store import FeatureStore

    limits = BatchLimits(settings.batch_rows, settings.queue_rows, settings.request_timeout)
    bounds = ConnectionLimits(
        settings.head_bytes, settings.connections, settings.receive_seconds, settings.send_seconds
    )
    store = FeatureStore(settings.store_url, settings.store_admin_url) if settings.store_url else None
    most = RequestLimits(settings.body_bytes, settings.rows, settings.send_seconds)
    service = Service(limits, settings.model_name, store, WorkerMetrics(board, number), most, settings.guard)
    app, tls = make_app(service, settings.root_path), settings.tls
    config = uvicorn.Config(
        cors.shared(app, settings.origins) if settings.origins else app,
        loop="darwin_runtime.http.tls:Loop",
        http=ConnectionLimiter(bounds, service.meter.refused, service.meter.connected).protocol(),
        ws="none",  # there is no route for it, and a library for it may come along with a model
        ssl_context_factory=(lambda *_: tls) if tls else None,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nothing here depends on who asks
        server_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]  # which is for a timer
        headers=HEADERS,
        # A client that stops half-way through its request must not hold up the end.
        timeout_graceful_shutdown=math.ceil(settings.request_timeout) + 1,
    )
    server = Server(config, service, settings.drain_seconds, closed, one_of_many=number > 0)
    # Until uvicorn handles these itself, and afterwards, when it raises them again for whoever handled them before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    return server


def run(server: Server, listener: socket.socket) -> None:
    """Serve until a signal comes. Raises `RoleError` if the model hangs."""
    server.run(sockets=[listener])
    if not server.started:
        raise RoleError("the HTTP server did not start")
    if server.hung:
        raise RoleError(f"the model did not answer within {2 * server.service.limits.timeout:g} s: it hangs")


def begin(server: Server, settings: Settings, get: Callable[[], Model]) -> Future[None]:
    """On its inference thread, have `server` use the model from `get`, once that has answered its own example."""
    from darwin_runtime.model import self_test
    from darwin_runtime.model.about import about_model

    def start() -> None:
        loaded, began = get(), time.monotonic()
        model = self_test.make_ready(loaded, settings.model_name, fast_path=settings.fast_path)
        batching = settings.batching == "on" or (settings.batching == "auto" and model.batchable)
        about = about_model(model, model.load_seconds + time.monotonic() - began)
        server.service.use(model, about, batching=batching, on_hang=server.give_up)
        gc.freeze()
        # A large body is ten thousand lists, none of them garbage yet: to look through them fourteen times, as Python
        # would, is a fifteenth of what it costs.
        gc.set_threshold(50_000)
        gc.enable()
        keep_freed_buffers()

    return server.service.inference.submit(start)


def fetch(settings: Settings, directory: Path) -> None:
    """Download a model that has only a URI to `directory`. Raises `RoleError`."""
    if settings.model_path is None:
        fetch_model(settings.model_uri, directory)


def load(settings: Settings, directory: Path) -> Model:
    """The model, after `fetch`; it is not run yet. Raises `RoleError`."""
    from darwin_runtime.model import self_test

    return self_test.load_checked(
        settings.model_path or directory,
        settings.model_config,
        settings.method,
        settings.verify,
        settings.required,
    )


def work(
    settings: Settings,
    listener: socket.socket,
    board: SharedMetrics,
    get: Callable[[], Model],
    number: int,
    ready: Callable[[], None],
) -> None:
    """Be worker `number`: serve the model from `get`, calling `ready` once it has answered its own example.

    Raises `RoleError`.
    """
    server = make_server(settings, board, number)
    begin(server, settings, get).result()
    ready()
    run(server, listener)


def serve_alone(settings: Settings, directory: Path) -> None:
    """Load and serve in this very process. Raises `RoleError`."""
    server = make_server(settings, SharedMetrics(1))
    with listening(settings) as listener:

        def get() -> Model:
            fetch(settings, directory)
            return load(settings, directory)

        def started(loading: Future[None]) -> None:
            if loading.exception():
                server.should_exit = True

        loading = begin(server, settings, get)
        loading.add_done_callback(started)
        run(server, listener)
        if loading.done() and (error := loading.exception()):
            raise error


def serve_together(settings: Settings, directory: Path) -> None:
    """Load once, and serve from several processes. Raises `RoleError`."""
    # What all need is imported once; and what it starts is there before there is a model to blame for it.
    from darwin_runtime.http import app as app_module  # noqa: F401

    board = SharedMetrics(settings.workers + 1)
    with signal_socket() as arriving, listening(settings) as listener:
        job = WorkerJob(
            listener=listener,
            placeholder=lambda closed: run(make_server(settings, board, closed=closed), listener),
            fetch=lambda: fetch(settings, directory),
            load=lambda: load(settings, directory),
            work=lambda model, number, ready: work(settings, listener, board, lambda: model, number, ready),
            command=[sys.executable, str(Path(__file__).resolve()), WORKER],
            environ={**os.environ, "MODEL_LOCAL_PATH": str(settings.model_path or directory)},
            files=[listener.fileno(), board.file],
            stop_seconds=settings.drain_seconds + settings.request_timeout + SPARE_SECONDS,
        )
        supervise(settings.workers, job, arriving)


def _allow_files(connections: int) -> None:
    """Have as many open files as that takes, or as many as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def serve(read: Reader, redact: Redactor) -> None:
    """Serve until a signal comes. Raises `RoleError` if the model, or the port, can't be had."""
    settings = Settings.from_env(read)
    log_settings(read.seen, redact)
    share_cpus(settings.workers, cpu_limit(), os.environ)
    # Those in the middle of a TLS handshake are not counted yet.
    _allow_files((4 if settings.tls else 2) * settings.connections)
    downloaded = contextlib.nullcontext(Path()) if settings.model_path else artifacts.scratch()
    with downloaded as directory:
        (serve_alone if settings.workers == 1 else serve_together)(settings, directory)
    logger.info("stopped")


def serve_as_worker(read: Reader, _: Redactor) -> None:
    """Be a worker that loads by itself, on behalf of `serve_together` in another process."""
    settings = Settings.from_env(read)
    number, listening_on, counts, told_through = map(int, sys.argv[2:])
    listener, channel = socket.socket(fileno=listening_on), socket.socket(fileno=told_through)
    listener.set_inheritable(False)
    board = SharedMetrics(settings.workers + 1, counts)
    body = partial(work, settings, listener, board, lambda: load(settings, Path()), number)
    sys.exit(run_worker(channel, body))


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    with bind(settings.host, settings.port) as listener:
        scheme = "https" if settings.tls else "http"
        logger.info("listening on %s://%s", scheme, _address(settings.host, listener.getsockname()[1]))
        if settings.tls:
            settings.tls.log_expiry()
        yield listener


def main(environ: Mapping[str, str] = os.environ) -> int:
    # Its INFO lines say again what ours say.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # What is imported and loaded stays: to look through it for garbage takes half a second of the start, and would stop
    # everything for a third of a second every now and then, were it not frozen before collection begins.
    gc.disable()
    return run_role(serve_as_worker if sys.argv[1:2] == [WORKER] else serve, environ)


if __name__ == "__main__":
    sys.exit(main())
