"""Connections that take too much: of bytes, of time, of places. Each on a raw socket, against the role itself."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from darwin_runtime.http.connections import MAX_PIPELINED
from tests.conftest import wait_until
from tests.http.test_protocol import BODIES, shape
from tests.support.models import IRIS, model_path
from tests.support.servers import Served, serving
from tests.support.wire import Wire

BODY = json.dumps({"features": IRIS}).encode()
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GOOD = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)

MAX_BODY = 1024 * 1024


@pytest.fixture(scope="module")
def role() -> Iterator[Served]:
    with serving(
        model_path("iris"), WORKERS=1, MAX_BODY_MB=1, MAX_HEADER_KB=8, MAX_ROWS=100, RECEIVE_TIMEOUT_SECONDS=1
    ) as served:
        yield served
        assert served.post("/predict", {"features": IRIS}).status_code == 200
        assert "Traceback" not in served.log


@pytest.fixture
def wire(role: Served) -> Iterator[Wire]:
    wire = Wire(role.url)
    with wire.socket:
        yield wire


def answers(text: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", text)]


# Packets


def test_an_answer_comes_in_one_piece(wire: Wire) -> None:
    for request in [GOOD, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"] * 10:
        wire.send(request)
        head, _, body = wire.socket.recv(65536).partition(b"\r\n\r\n")
        assert b"\r\ncontent-length: %d" % len(body) in head
        assert json.loads(body)


@pytest.mark.parametrize("start", [b"GET /livez HTTP/1.0", b"GET /livez HTTP/1.1\r\nConnection: close"])
def test_an_answer_after_which_the_connection_ends(wire: Wire, start: bytes) -> None:
    wire.send(start, b"\r\nHost: x\r\n\r\n")
    head, _, body = wire.rest().partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    assert json.loads(body) == {"status": "alive"}


def test_what_is_asked_with_head_has_no_body(wire: Wire) -> None:
    wire.send(b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n", GOOD)
    assert re.fullmatch(rb"HTTP/1.1 200 .*?content-length: 18.*?\r\n\r\nHTTP/1.1 200 .*", wire.until(b"}"), re.DOTALL)


# Bytes


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(role: Served, path: str, chunked: bool) -> None:
    body = b" " * (MAX_BODY + 1)
    answer = role.post(path, data=iter([body]) if chunked else body)
    assert answer.status_code == 413, answer.text
    assert "larger than 1048576 bytes (MAX_BODY_MB)" in shape(path, answer)
    assert answer.headers["Connection"] == "close"


def test_the_largest_body_is_read(role: Served) -> None:
    body = BODY + b" " * (MAX_BODY - len(BODY))
    assert role.post("/predict", data=body).status_code == 200
    assert role.post("/predict", data=iter([body[:1000], body[1000:]])).status_code == 200


def test_a_body_without_end_is_cut_off(wire: Wire) -> None:
    wire.send(HEAD, b"Transfer-Encoding: chunked\r\n\r\n")
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        wire.send(*[b"10000\r\n" + b" " * 0x10000 + b"\r\n"] * 1000)


@pytest.mark.parametrize("length", [str(10 * MAX_BODY), "9" * 19], ids=["much", "absurd"])
def test_what_is_told_to_be_far_too_large_is_not_waited_for(wire: Wire, length: str) -> None:
    wire.send(HEAD, b"Content-Length: %s\r\n\r\n" % length.encode())
    assert answers(wire.rest()) == [413]


def test_what_arrives_at_the_same_time_is_bounded() -> None:
    with (
        serving(model_path("iris"), WORKERS=1, MAX_BODY_MB=1, RECEIVE_TIMEOUT_SECONDS=600) as served,
        contextlib.ExitStack() as held,
    ):
        body = BODY + b" " * (MAX_BODY - len(BODY))
        unfinished = [Wire(served.url) for _ in range(3)]
        for wire in unfinished:
            held.enter_context(wire.socket)
            wire.send(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % MAX_BODY, body[:-1])
        # All of it has been read once probes are answered after it.
        served.get("/livez")
        for wire in unfinished:
            wire.send(body[-1:])
        assert sorted(answers(wire.rest())[0] for wire in unfinished) == [200, 200, 503]
        assert served.post("/predict", data=body).status_code == 200


def test_a_client_that_asks_first_is_spared_sending(wire: Wire) -> None:
    wire.send(HEAD, b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1))
    answer = wire.rest()
    assert answers(answer) == [413]
    assert b"100 Continue" not in answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 10_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 300_000,
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 3000,
        b"GET /livez?" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"x" * 300_000,
    ],
    ids=["a value", "a value without end", "names", "a URL", "a URL without end"],
)
def test_a_head_that_is_too_large(wire: Wire, head: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        wire.send(head)
    answer = wire.rest()
    assert answers(answer) == [431]
    assert b"larger than 8192 bytes (MAX_HEADER_KB)" in answer


def test_a_head_may_come_in_one_piece_with_a_large_body(role: Served, wire: Wire) -> None:
    body = BODY + b" " * 200_000
    request = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    wire.send(request, GOOD, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answers(wire.rest()) == [200, 200, 200]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("padding", [0, 100_000], ids=["parsed at once", "parsed aside"])
def test_more_rows_than_are_allowed(role: Served, path: str, padding: int) -> None:
    values = list(IRIS.values())
    bodies: dict[str, Any] = {
        "/predict": {"features": [IRIS] * 101},
        "/invocations": {"dataframe_records": [IRIS] * 101},
        "/v1/models/model:predict": {"instances": [IRIS] * 101},
        "/v2/models/model/infer": {
            "inputs": [{"name": "x", "shape": [101, 4], "datatype": "FP64", "data": values * 101}]
        },
    }
    if path == "/predict":
        pytest.skip("one row is all that Darwin's own protocol takes")
    answer = role.post(path, data=json.dumps(bodies[path]) + " " * padding)
    assert answer.status_code == 413, answer.text
    assert "101 rows are more than 100 (MAX_ROWS)" in shape(path, answer)


# Time


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /livez", HEAD])
@pytest.mark.parametrize("before", [b"", GOOD])
def test_a_head_that_does_not_arrive(wire: Wire, before: bytes, sent: bytes) -> None:
    if before and not sent:
        pytest.skip("that is another setting's time")
    wire.send(before)
    if before:
        wire.until(b"}")
    wire.send(sent)
    assert answers(wire.rest()) == ([408] if sent else [])


@pytest.mark.parametrize("framing", [b"Content-Length: 5000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{"])
@pytest.mark.parametrize("path", [b"/predict", b"/livez", b"/nowhere"])
def test_a_body_that_does_not_arrive(wire: Wire, path: bytes, framing: bytes) -> None:
    wire.send(HEAD.replace(b"/predict", path), framing.replace(b"5000000", b"50"))
    assert answers(wire.rest()) == {b"/predict": [408], b"/livez": [405], b"/nowhere": [404]}[path]


def test_a_byte_now_and_then_does_not_keep_a_connection(wire: Wire) -> None:
    def drip() -> bool:
        wire.send(b"x")
        return False

    wire.send(b"GET /livez HTTP/1.1\r\nHost: ")
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        wait_until(drip, "the end of the connection")


def test_a_connection_between_requests_has_its_own_time(role: Served) -> None:
    with serving(model_path("iris"), WORKERS=1, KEEP_ALIVE_SECONDS=3, RECEIVE_TIMEOUT_SECONDS=0.1) as served:
        wire = Wire(served.url)
        with wire.socket:
            wire.send(GOOD)
            wire.until(b"}")
            wire.socket.settimeout(1)
            with pytest.raises(TimeoutError):  # it is still open, long after the time of a request
                wire.socket.recv(1)
            wire.socket.settimeout(60)
            assert wire.rest() == b""


# Its answer is of some 6 MB, more than the system takes from the server before the client does.
LARGE = json.dumps(
    {
        "dataframe_split": {"columns": list(IRIS), "data": [list(IRIS.values())] * 100_000},
        "params": {"predict_method": "predict_proba"},
    }
).encode()
LARGE_HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
ASK_LARGE = LARGE_HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(LARGE), LARGE)


def was_reset(wire: Wire) -> bool:
    """Whether the other end has ended the connection for good; we need not read for that."""
    return wire.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


@pytest.mark.parametrize("more", [b"", b"GET /li"])
def test_an_answer_that_nobody_reads(more: bytes) -> None:
    with serving(model_path("iris"), WORKERS=1, SEND_TIMEOUT_SECONDS=1, RECEIVE_TIMEOUT_SECONDS=1) as served:
        deaf = [Wire(served.url, receive_buffer=4096) for _ in range(5)]
        for wire in deaf:
            wire.send(ASK_LARGE + more)
        for wire in deaf:
            wait_until(partial(was_reset, wire), "the reset")
            wire.socket.close()
        assert served.post("/predict", {"features": IRIS}).status_code == 200
        # It was not told again and again that it was late.
        assert 'status="408"' not in served.get("/metrics").text


def test_who_reads_slowly_gets_all_of_a_large_answer() -> None:
    with serving(model_path("iris"), WORKERS=1, SEND_TIMEOUT_SECONDS=5, KEEP_ALIVE_SECONDS=0.1) as served:
        slow, usual = Wire(served.url, receive_buffer=4096), Wire(served.url)
        for wire in (slow, usual):
            wire.send(LARGE_HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(LARGE), LARGE))
        _head, _, expected = usual.rest().partition(b"\r\n\r\n")
        assert len(expected) > 5_000_000
        assert slow.rest().partition(b"\r\n\r\n")[2] == expected
        for wire in (slow, usual):
            wire.socket.close()


def test_who_has_something_to_read_does_not_make_room() -> None:
    with serving(model_path("iris"), WORKERS=1, MAX_CONNECTIONS=4, SEND_TIMEOUT_SECONDS=2) as served:
        files = Path(f"/proc/{served.process.pid}/fd")
        before = len(list(files.iterdir()))
        deaf = []
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # there are too many
            for _ in range(20):
                deaf.append(Wire(served.url, receive_buffer=4096))
                deaf[-1].send(ASK_LARGE)
        assert len(list(files.iterdir())) - before <= 2 * 4 + 1
        wait_until(lambda: len(list(files.iterdir())) <= before, "the end of all")
        for wire in deaf:
            wire.socket.close()


def test_a_connection_whose_answer_came_first_is_not_kept_for_good() -> None:
    with serving(model_path("iris"), WORKERS=1, KEEP_ALIVE_SECONDS=0.5) as served:
        wire = Wire(served.url)
        wire.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        wire.until(b"}")
        wire.send(b"late")
        assert wire.rest() == b""
        wire.socket.close()


# Places


def test_more_connections_than_are_served() -> None:
    with (
        serving(model_path("iris"), WORKERS=1, MAX_CONNECTIONS=4, RECEIVE_TIMEOUT_SECONDS=600) as served,
        contextlib.ExitStack() as held,
    ):
        served.post("/predict", {"features": IRIS})
        for _ in range(4):
            wire = Wire(served.url)
            held.enter_context(wire.socket)
            wire.send(HEAD)  # so that it is not idle

        refused = None

        def crowded() -> bool:
            nonlocal refused
            refused = served.post("/predict", {"features": IRIS})
            return refused.status_code == 503

        wait_until(crowded, "a refusal")
        assert refused is not None
        assert refused.headers["Retry-After"] == "1"
        assert refused.headers["Connection"] == "close"
        assert "too many requests" in refused.text
        # Else kubelet would end a pod that does what it can.
        assert served.get("/livez").status_code == 200
        assert served.get("/ready").status_code == 200
        assert "darwin_requests_rejected_total 0" not in served.get("/metrics").text
        more = [Wire(served.url) for _ in range(12)]
        wait_until(lambda: any(_is_closed(wire.socket) for wire in more), "the end of some")
        for wire in more:
            wire.socket.close()
        held.close()
        wait_until(lambda: served.post("/predict", {"features": IRIS}).status_code == 200, "room again")


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_connections_that_are_idle_make_room() -> None:
    with serving(model_path("iris"), WORKERS=1, MAX_CONNECTIONS=4, KEEP_ALIVE_SECONDS=600) as served:
        idle = [Wire(served.url) for _ in range(4)]
        for wire in idle:
            wire.send(GOOD)
            wire.until(b"}")
            if wire is idle[0]:
                # The server's clock counts milliseconds.
                for _ in range(20):
                    idle[3].send(GOOD)
                    idle[3].until(b"}")
        for _ in range(20):
            assert served.post("/predict", {"features": IRIS}).status_code == 200
        assert idle[0].rest() == b""  # the first was idle for longest
        for wire in idle:
            wire.socket.close()


def test_there_are_files_for_as_many_connections_as_are_allowed() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 1024:
        pytest.skip("this system allows too few open files")
    with serving(model_path("iris"), WORKERS=1, MAX_CONNECTIONS=700) as served:
        assert resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)[0] >= min(hard, 1400)


def test_what_one_connection_may_ask_at_once(wire: Wire) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        wire.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 5000)
    got = answers(wire.rest())
    assert set(got) == {200}
    assert 1 <= len(got) <= MAX_PIPELINED + 1


# Another protocol


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("pieces", ["together", "apart"])
def test_a_client_that_offers_http_2(wire: Wire, framing: str, pieces: str) -> None:
    """As Java's own does in its first request on a connection, which must not cost it its body, nor let that be one."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    body = BODY + b"\r\nGET /livez HTTP/1.1\r\nHost: smuggled\r\n\r\n"
    good = b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    bad = b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    if framing == "chunks":
        good = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
        bad = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for rest in (good, bad, good):
        if pieces == "apart":
            first, _, second = (HEAD + offer + rest).partition(b"\r\n\r\n")
            wire.send(first, b"\r\n\r\n")
            wire.send(second)
        else:
            wire.send(HEAD + offer + rest)
    wire.send(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answers(wire.rest()) == [200, 422, 200, 200]


@pytest.mark.parametrize(
    "start",
    [
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
    ids=["a proxy's", "HTTP/2", "TLS", "HTTP/0.9", "nonsense"],
)
def test_what_is_no_http_1(wire: Wire, start: bytes) -> None:
    wire.send(start, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = wire.rest()
    assert answers(answer) == [400]
    assert b"\r\nconnection: close\r\n" in answer
    assert b"\r\nserver:" not in answer.lower()


def test_an_invalid_request_does_not_spoil_the_answer_before_it(wire: Wire) -> None:
    wire.send(GOOD + b"nonsense\r\n\r\n")
    assert answers(wire.rest()) in ([200], [200, 400])


def test_bad_requests_are_counted_and_not_logged(role: Served, wire: Wire) -> None:
    wire.send(b"nonsense\r\n\r\n")
    wire.rest()
    assert re.search(r'darwin_requests_total\{protocol="other",status="400"\} [1-9]', role.get("/metrics").text)
    assert "nonsense" not in role.log
    assert "Invalid HTTP" not in role.log
