"""The HTTP server: uvicorn's, with our way to listen, to accept, to drain and to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop
from starlette.types import ASGIApp

from darwin_runtime.errors import RoleError
from darwin_runtime.http.acceptor import Acceptor
from darwin_runtime.http.settings import Settings

if TYPE_CHECKING:
    # It imports numpy, which reads the number of threads at import, and that is not set yet where this is imported.
    from darwin_runtime.http.service import Service

BACKLOG = 2048

# How long to wait for the request of a client that has just connected when this process stops accepting.
LINGER_SECONDS = 1.0

# How long a client may take for the handshake; and for what is left of an answer, and its last word, when we close.
HANDSHAKE_SECONDS = 10.0
GOODBYE_SECONDS = 10.0

# What a process has open besides its connections: libraries, the model's files, pipes.
SPARE_FILES = 512

# Of every answer: it is what it says it is, and nobody keeps it.
HEADERS = [("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]

logger = logging.getLogger("darwin.serve")


# Listening


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """A listening socket, with a log line for it. Raises `RoleError` naming the address."""
    with bind(settings.host, settings.port) as listener:
        scheme = "https" if settings.tls else "http"
        logger.info("listening on %s://%s", scheme, _address(settings.host, listener.getsockname()[1]))
        if settings.tls:
            settings.tls.log_expiry()
        yield listener


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


def allow_files(connections: int) -> None:
    """Have as many open files as that takes, or as many as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


# Serving


class Loop(uvloop.Loop):
    """uvloop's, with less patience for TLS clients than it has by default, which is 60 s and 30 s."""

    async def create_server(self, *args: Any, **given: Any) -> Any:
        return await super().create_server(*args, **(given | _patience(given.get("ssl"))))

    async def connect_accepted_socket(self, *args: Any, **given: Any) -> Any:
        return await super().connect_accepted_socket(*args, **(given | _patience(given.get("ssl"))))


def _patience(context: ssl.SSLContext | None) -> dict[str, Any]:
    return {"ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": GOODBYE_SECONDS} if context else {}


def make_config(app: ASGIApp, http: type[asyncio.Protocol], settings: Settings) -> uvicorn.Config:
    """uvicorn's configuration, for `app` and connections of `http`."""
    tls = settings.tls
    return uvicorn.Config(
        app,
        loop=f"{Loop.__module__}:{Loop.__qualname__}",
        http=http,
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
        health = self.service.health
        drain = sig == signal.SIGTERM and self.drain_seconds and health.is_loaded and not health.draining
        health.draining = True
        if drain:
            logger.info("draining: requests are still taken for %g s", self.drain_seconds)
            self.stop_at = time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or time.monotonic() >= self.stop_at

    def give_up(self) -> None:
        """End, because the model does not."""
        self.hung = self.should_exit = self.service.health.draining = True

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
            ahead = self.service.metrics.has_more_connections
            self.acceptors = [Acceptor(listener, self._join, ahead) for listener in sockets]
        else:
            await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and answer also those who were accepted but whose request has not arrived yet."""
        # Others may serve those who wait to be accepted, if this one can't.
        able = self.service.health.is_loaded and not self.hung
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
        self.service.close()


def _accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait at `listener`."""
    listener.setblocking(False)
    with contextlib.suppress(OSError):  # there are no more, or no files for more
        for _ in range(BACKLOG):
            yield listener.accept()[0]


def run(server: Server, listener: socket.socket) -> None:
    """Serve until a signal comes. Raises `RoleError` if the model hangs."""
    server.run(sockets=[listener])
    if not server.started:
        raise RoleError("the HTTP server did not start")
    if server.hung:
        raise RoleError(f"the model did not answer within {2 * server.service.batch_limits.timeout:g} s: it hangs")
