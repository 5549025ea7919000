"""Everything inside uvicorn, httptools and uvloop that the server relies on, so that an upgrade fails here first."""

from __future__ import annotations

import ast
import asyncio
import inspect
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httptools
import pytest
import uvicorn
import uvloop
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from darwin_runtime.http import connections, server
from darwin_runtime.http.connections import Connection, ConnectionLimiter, Cycle
from darwin_runtime.http.settings import Settings
from darwin_runtime.settings import Reader

PROTOCOL = {
    *("app_state", "cycle", "flow", "headers", "loop", "parser", "pipeline", "scheme", "scope", "server_state"),
    *("timeout_keep_alive", "timeout_keep_alive_task", "transport", "url"),
    *("_unset_keepalive_if_required", "connection_lost", "connection_made", "on_body", "on_headers_complete"),
    *("on_message_complete", "shutdown", "timeout_keep_alive_handler"),
}
CYCLE = {
    *("default_headers", "disconnected", "flow", "keep_alive", "message_event", "on_response", "response_complete"),
    *("response_started", "scope", "send", "transport", "waiting_for_100_continue"),
}
SERVER = {
    *("config", "lifespan", "server_state", "servers", "should_exit"),
    *("handle_exit", "on_tick", "shutdown", "startup"),
}

# Of what those have for attributes.
OF_CYCLE = {"keep_alive", "more_body", "response_complete", "response_started"}
OF_FLOW = {"read_paused", "write_paused"}
OF_PARSER = {"feed_data", "get_http_version", "get_method", "should_keep_alive", "should_upgrade"}
OF_STATE = {"connections", "default_headers"}
OF_CONFIG = {"http_protocol_class", "ssl"}
OF_SERVER = {"run", "started"}
OF_LOOP = {"add_reader", "connect_accepted_socket", "create_server", "remove_reader"}

# What calls us.
CALLBACKS = {
    *("connection_made", "connection_lost", "data_received", "shutdown"),
    *("on_body", "on_chunk_header", "on_headers_complete", "on_message_complete"),
}


def used(module: Any, name: str) -> set[str]:
    """The names that a class uses of itself and does not define."""
    tree = ast.parse(Path(module.__file__).read_text())
    [cls] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    own = {node.name for node in cls.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    own |= {
        node.target.id for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    of_base, of_self = set[str](), set[str]()
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute):
            if ast.unparse(node.value) == "super()":
                of_base.add(node.attr)
            elif ast.unparse(node.value) == "self":
                of_self.add(node.attr)
    for init in cls.body:
        if isinstance(init, ast.FunctionDef) and init.name == "__init__":
            stored = [node for node in ast.walk(init) if isinstance(node, ast.Attribute)]
            own |= {node.attr for node in stored if isinstance(node.ctx, ast.Store)}
    return {each for each in of_base | (of_self - own) if not each.startswith("__")}


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [(connections, "Connection", PROTOCOL), (connections, "Cycle", CYCLE), (server, "Server", SERVER)],
)
def test_each_name_that_is_used_is_listed_here(module: Any, name: str, expected: set[str]) -> None:
    assert used(module, name) == expected


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def answer_ok(_: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def connected(act: Callable[[Connection, Transport], None], app: Any = answer_ok) -> Transport:
    """Have `act` on a connection as uvicorn makes it, until what it began has ended."""
    transport = Transport()

    async def run() -> None:
        settings = Settings.from_env(Reader({"MODEL_LOCAL_PATH": "/models"}))
        limiter = ConnectionLimiter(settings.limits.connection)
        config = server.make_config(app, limiter.protocol(), settings)
        config.load()
        state = ServerState()
        make: Any = config.http_protocol_class
        connection = make(config=config, server_state=state, app_state={})
        assert isinstance(connection, Connection)
        connection.connection_made(transport)
        act(connection, transport)
        await asyncio.gather(*state.tasks)
        connection.connection_lost(None)

    asyncio.run(run())
    return transport


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_uvicorn_has_them() -> None:
    def act(connection: Connection, _: Transport) -> None:
        # Which is there from a request's first byte on.
        assert {name for name in PROTOCOL if not hasattr(connection, name)} == {"url"}
        connection.data_received(GET)
        assert connection.url == b"/"
        assert {name for name in CYCLE | OF_CYCLE if not hasattr(connection.cycle, name)} == set()
        assert type(connection.flow) is FlowControl
        assert {name for name in OF_FLOW if not hasattr(connection.flow, name)} == set()
        assert {name for name in OF_PARSER if not hasattr(connection.parser, name)} == set()
        assert {name for name in OF_STATE if not hasattr(connection.server_state, name)} == set()
        assert connection in connection.server_state.connections

    assert connected(act).written == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"


def test_the_server_and_its_configuration_have_them() -> None:
    config = server.make_config(answer_ok, asyncio.Protocol, Settings.from_env(Reader({"MODEL_LOCAL_PATH": "/m"})))
    config.load()
    assert {name for name in OF_CONFIG if not hasattr(config, name)} == set()
    assert config.encoded_headers == [(name.lower().encode(), value.encode()) for name, value in server.HEADERS]
    loop = config.get_loop_factory()
    assert loop is server.Loop
    made = uvicorn.Server(config)
    # The others are there once it serves.
    assert {name for name in SERVER | OF_SERVER if not hasattr(made, name)} <= {"lifespan", "servers"}
    assert list(inspect.signature(uvicorn.Server.startup).parameters) == ["self", "sockets"]
    assert list(inspect.signature(uvicorn.Server.shutdown).parameters) == ["self", "sockets"]
    assert {name for name in OF_LOOP if not hasattr(uvloop.Loop, name)} == set()


def test_the_server_has_the_others_once_it_serves() -> None:
    async def run() -> None:
        config = uvicorn.Config(answer_ok, lifespan="off", log_config=None)
        config.load()
        made = uvicorn.Server(config)
        made.lifespan = config.lifespan_class(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await made.startup([listener])
            assert made.started
            [one] = made.servers
            one.close()
            assert made.lifespan.state == {}
            await made.startup([])
            assert made.servers == []
            assert not await made.on_tick(1)
            made.should_exit = True
            assert await made.on_tick(1)

    asyncio.run(run())


def test_what_we_put_in_their_place_is_called() -> None:
    """By asyncio, uvicorn and the parser."""
    called = set[str]()
    names = CALLBACKS - {"connection_made", "connection_lost", "shutdown"}

    class Noting(Connection):
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                called.add(name)
            return super().__getattribute__(name)

    def act(connection: Connection, _: Transport) -> None:
        connection.__class__ = Noting
        connection.parser = httptools.HttpRequestParser(connection)
        chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        connection.data_received(chunked)
        assert connection.cycle.__class__ is Cycle

    connected(act)
    assert called == names
    for name in CALLBACKS - {"on_chunk_header"}:
        assert hasattr(HttpToolsProtocol, name)
    # A class can take the other's place only while both are laid out alike.
    assert Cycle.__bases__ == (RequestResponseCycle,)


def test_each_request_has_a_copy_of_the_connection_s_state() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["state"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def act(connection: Connection, _: Transport) -> None:
        connection.app_state = {"client_certificate": True}
        connection.data_received(GET + GET)

    connected(act, app)
    assert seen == [{"client_certificate": True}] * 2
    assert seen[0] is not seen[1]


class Raising:
    """A protocol that refuses a request in the midst of its head."""

    def on_headers_complete(self) -> None:
        raise KeyError("refused")


def test_the_parser_tells_why_and_where_it_stopped() -> None:
    with pytest.raises(httptools.HttpParserError) as refused:
        httptools.HttpRequestParser(Raising()).feed_data(GET)
    assert isinstance(refused.value.__context__, KeyError)
    offer = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n"
    parser = httptools.HttpRequestParser(object())
    with pytest.raises(httptools.HttpParserUpgrade) as upgrade:
        parser.feed_data(offer + b"{}")
    assert upgrade.value.args == (len(offer),)
    assert not issubclass(httptools.HttpParserUpgrade, httptools.HttpParserError)
    assert (parser.get_method(), parser.get_http_version(), parser.should_upgrade()) == (b"POST", "1.1", True)
