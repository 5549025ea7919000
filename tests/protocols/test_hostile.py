"""Attacks over HTTP on a real server: each is refused as its protocol words it, or the connection is closed.

Never is there a 5xx, a second answer to what is one request, a header or log line of the attacker's, a stack trace, or
memory out of proportion; and a good request that follows is answered.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.models import IRIS, NESTED_ROW, model_path
from tests.support.servers import Served, serving
from tests.support.wire import Answer, Wire

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")


GOOD = json.dumps({"features": IRIS}).encode()
VERSION = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


def post(head: bytes = b"", body: bytes = GOOD, path: bytes = b"/predict", *, length: bool = True) -> bytes:
    size = b"Content-Length: %d\r\n" % len(body) if length else b""
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%b%b\r\n%b" % (path, size, head, body)


def get(target: bytes, head: bytes = b"", verb: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    return b"%b %b %b\r\nHost: x\r\n%b\r\n" % (verb, target, version, head)


def chunked(chunks: bytes, head: bytes = b"Transfer-Encoding: chunked\r\n") -> bytes:
    return b"POST /predict HTTP/1.1\r\nHost: x\r\n%b\r\n%b" % (head, chunks)


SIZE = len(GOOD)
CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (SIZE, GOOD)


# Servers


def peak(served: Served) -> int:
    """Bytes of memory at most since `forget_peak`."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    [kib] = re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(kib) * 1024


def forget_peak(served: Served) -> int:
    """What it has now."""
    Path(f"/proc/{served.process.pid}/clear_refs").write_text("5")
    return peak(served)


@contextlib.contextmanager
def unharmed(served: Served, most: int = 100 * 1024 * 1024) -> Iterator[None]:
    """The server has grown by less than `most` bytes in between, and answers a good request."""
    before = forget_peak(served)
    yield
    with Wire(served.url) as wire:
        wire.send_apart(VERSION)
        answer = wire.answer()
        assert answer
        assert answer.status == 200
    assert peak(served) - before < most


def check_log(served: Served) -> None:
    """Each line is one of JSON, none tells of a failure."""
    assert len(served.lines) > 3
    for line in served.lines:
        told = json.loads(line)
        assert told["level"] in ("INFO", "WARNING"), line
        assert "exception" not in told
        assert told.get("status", 0) < 500, line


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[str], Served]]:
    """The role as it answers with a model of that kind, each started once; its log is looked at in the end."""
    running: dict[str, Served] = {}
    with contextlib.ExitStack() as stack:

        def start(kind: str) -> Served:
            if kind not in running:
                running[kind] = stack.enter_context(serving(model_path(kind), WORKERS=1, ENV="prod"))
            return running[kind]

        yield start
    for served in running.values():
        check_log(served)


# Where one request ends and the next begins

AMBIGUOUS = {
    "both lengths": post(b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n" + VERSION),
    "both lengths, the other way round": chunked(b"0\r\n\r\n", b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
    "two lengths": post(b"Content-Length: 0\r\n"),
    "two equal lengths": post(b"Content-Length: %d\r\n" % SIZE),
    "a list of lengths": post(b"Content-Length: %d, %d\r\n" % (SIZE, SIZE), length=False),
    "a length with a sign": post(b"Content-Length: +%d\r\n" % SIZE, length=False),
    "a negative length": post(b"Content-Length: -1\r\n", length=False),
    "a hexadecimal length": post(b"Content-Length: 0x10\r\n", length=False),
    "a length beyond 64 bits": post(b"Content-Length: 18446744073709551617\r\n", length=False),
    "an empty length": post(b"Content-Length:\r\n", length=False),
    "a length in two words": post(b"Content-Length: 1 0\r\n", length=False),
    "a length in other digits": post(b"Content-Length: \xd9\xa1\r\n", length=False),
    "a space before the colon": post(b"Content-Length : %d\r\n" % SIZE, length=False),
    "a space before the other colon": post(b"Transfer-Encoding : chunked\r\n"),
    "an encoding that is none": post(b"Transfer-Encoding: xchunked\r\n", length=False),
    "an encoding in quotes": post(b'Transfer-Encoding: "chunked"\r\n', length=False),
    "an encoding after a tab of another kind": post(b"Transfer-Encoding: \x0bchunked\r\n", length=False),
    "an empty encoding": post(b"Transfer-Encoding:\r\n"),
    "not chunked in the end": post(b"Transfer-Encoding: chunked, identity\r\n", length=False),
    "identity": post(b"Transfer-Encoding: identity\r\n", length=False),
    "chunked twice": chunked(CHUNK, b"Transfer-Encoding: chunked, chunked\r\n"),
    "two encodings": chunked(CHUNK, b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
    "a folded encoding": chunked(CHUNK, b"Transfer-Encoding:\r\n chunked\r\n"),
    "a chunk with 0x": chunked(b"0x" + CHUNK),
    "a chunk with a sign": chunked(b"+" + CHUNK),
    "a negative chunk": chunked(b"-1\r\n" + GOOD + b"\r\n0\r\n\r\n"),
    "a chunk after a space": chunked(b" " + CHUNK),
    "a chunk before a space": chunked(CHUNK.replace(b"\r\n", b" \r\n", 1)),
    "a chunk beyond 64 bits": chunked(b"1%016x\r\n%b\r\n0\r\n\r\n" % (SIZE, GOOD)),
    "a chunk of no size": chunked(b"\r\n" + GOOD + b"\r\n0\r\n\r\n"),
    "a chunk longer than it says": chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (SIZE - 2, GOOD)),
    "a chunk ended by LF": chunked(CHUNK.replace(b"\r\n", b"\n", 1)),
    "chunk data ended by LF": chunked(b"%x\r\n%b\n0\r\n\r\n" % (SIZE, GOOD)),
    "a chunk extension with LF": chunked(CHUNK.replace(b"\r\n", b";a\n\r\n", 1)),
    "last chunk ended by LF": chunked(b"%x\r\n%b\r\n0\n\n" % (SIZE, GOOD)),
    "a length in the trailer": chunked(b"%x\r\n%b\r\n0\r\nContent-Length: 5\r\n\r\n" % (SIZE, GOOD)),
    "an encoding in the trailer": chunked(b"%x\r\n%b\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n" % (SIZE, GOOD)),
    "LF only": post().replace(b"\r\n", b"\n"),
    "one LF": post(b"A: b\nContent-Length: 0\r\n"),
    "CR only": post(b"A: b\rContent-Length: 0\r\n"),
    "two CR": get(b"/version").replace(b"x\r\n", b"x\r\r\n"),
    "a folded header": post(b"A: b\r\n c\r\n"),
    "a folded first header": get(b"/version").replace(b"Host", b" Host"),
    "NUL in a header": post(b"A: b\0c\r\n"),
    "NUL in a name": post(b"A\0: b\r\n"),
    "no name": post(b": b\r\n"),
    "no colon": post(b"A\r\n"),
    "a name beyond ASCII": post(b"\xc3\xa4: b\r\n"),
    "an id with a line break": post(b"X-Request-ID: a\r\n\tSet-Cookie: b\r\n"),
    "NUL in the target": get(b"/\0"),
    "a target beyond ASCII": get(b"/\xff\xfe"),
    "a space in the target": get(b"/ver sion"),
    "a tab in the target": get(b"/ver\tsion"),
    "no path": get(b"http://x"),
    "an authority": get(b"x:80"),
    "a proxy's verb": get(b"x:80", verb=b"CONNECT"),
    "a verb that is none": get(b"/version", verb=b"FOO"),
    "a verb in lower case": get(b"/version", verb=b"get"),
    "a long verb": get(b"/version", verb=b"A" * 10_000),
    "HTTP/0.9": b"GET /version\r\n\r\n",
    "HTTP/2.0 in the old form": get(b"/version", version=b"HTTP/2.0"),
    "HTTP/1.2": get(b"/version", version=b"HTTP/1.2"),
    "HTTP/3": get(b"/version", version=b"HTTP/3"),
    "HTTP/01.1": get(b"/version", version=b"HTTP/01.1"),
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "TLS": bytes.fromhex("160301006c0100006803035f") + bytes(90),
    "NULs": bytes(100),
    "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_what_is_no_request_is_refused_and_ends_the_connection(server: Callable[[str], Served], what: str) -> None:
    served = server("iris")
    with unharmed(served), Wire(served.url) as wire:
        wire.send_apart(AMBIGUOUS[what] + VERSION)
        assert wire.answers() in ([400], [])


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_nothing_that_comes_later_is_taken_for_a_request(server: Callable[[str], Served], what: str) -> None:
    served = server("iris")
    with Wire(served.url) as wire:
        wire.send_apart(AMBIGUOUS[what], VERSION)
        assert wire.answers() in ([400], [])


# What is one request, or several, and how they are answered; `None` for a connection that is then closed.
CLEAR: dict[str, tuple[bytes, list[int | None]]] = {
    "a request as a body": (post(body=VERSION), [422]),
    "a request as the body of one that is not read": (post(body=VERSION, path=b"/nothing"), [404]),
    "a request as the body of a GET": (get(b"/version", b"Content-Length: %d\r\n" % len(VERSION)) + VERSION, [200]),
    "a request as a chunk": (chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(VERSION), VERSION)), [422]),
    "several at once": (VERSION + post() + VERSION, [200, 200, 200]),
    "empty lines first": (b"\r\n\r\n" + VERSION, [200]),
    "after the last": (get(b"/version", b"Connection: close\r\n") + VERSION, [200, None]),
    "after one of HTTP/1.0": (get(b"/version", version=b"HTTP/1.0") + VERSION, [200, None]),
    "after one of HTTP/1.0 that stays": (
        get(b"/version", b"Connection: keep-alive\r\n", version=b"HTTP/1.0") + VERSION,
        [200, None],
    ),
    "chunks of HTTP/1.0": (chunked(CHUNK).replace(b"HTTP/1.1", b"HTTP/1.0") + VERSION, [200, None]),
    "another protocol's version": (get(b"/version", version=b"RTSP/1.0") + VERSION, [200, None]),
    "a length between tabs": (post(b"Content-Length:\t%d\t\r\n" % SIZE, length=False), [200]),
    "a length that is none": (post(b"Content_Length: 0\r\n"), [200]),
    "an encoding in another case": (chunked(CHUNK, b"tRANSFER-eNCODING: ChUnKeD\r\n"), [200]),
    "chunk extensions": (chunked(CHUNK.replace(b"\r\n", b';a="b";c\r\n', 1)), [200]),
    "a chunk with zeros before": (chunked(b"0" * 100 + CHUNK), [200]),
    "header bytes beyond ASCII": (post(b"A: \xff\xfe\r\nX-Request-ID: \xff\r\ntraceparent: \xff\r\n"), [200]),
    "a whole URL": (post(path=b"http://elsewhere/predict"), [200]),
    "a fragment": (get(b"/version#x"), [200]),
    "a long query": (get(b"/version?" + b"a=%00%0d%0a&" * 1000), [200]),
    "an escaped letter": (get(b"/%76ersion"), [200]),
    "above the root": (get(b"/../version") + get(b"/%2e%2e/%2e%2e/etc/passwd"), [404, 404]),
    "an escaped slash": (get(b"/%2fversion") + get(b"/v2%2f..%2fversion"), [404, 404]),
    "two slashes": (get(b"//version") + get(b"//elsewhere/version"), [404, 404]),
    "a backslash": (get(b"/\\version"), [404]),
    "NUL, escaped": (get(b"/%00") + get(b"/version%00"), [404, 404]),
    "a header, escaped": (get(b"/version%0d%0aSet-Cookie:%20a=b") + get(b"/version%0a"), [404, 404]),
    "no escape": (get(b"/%zz%"), [404]),
    "no UTF-8, escaped": (get(b"/%ff%fe") + get(b"/v1/models/%ff%fe"), [404, 404]),
    "names of models": (get(b"/v1/models/%0d%0aA:b") + get(b"/v2/models/%22%3cscript%3e/ready"), [404, 404]),
    "a star": (get(b"*", verb=b"OPTIONS") + get(b"*"), [404, 404]),
    "verbs of others": (
        b"".join(get(b"/predict", verb=verb) for verb in (b"TRACE", b"PROPFIND", b"SOURCE")),
        [405] * 3,
    ),
    "an expectation that nobody has": (post(b"Expect: 200-maybe\r\n"), [200]),
    "an expectation of what is not there": (get(b"/nothing", b"Expect: 100-continue\r\n"), [404]),
    "an id that would be a header": (get(b"/version", b"X-Request-ID: a%0d%0aSet-Cookie: b\r\n"), [200]),
    "an id that would be a line": (get(b"/version", b"X-Request-ID: 1 INFO darwin: all is well\r\n"), [200]),
    "a trace that would be a header": (get(b"/version", b"traceparent: 00-" + b"a" * 32 + b"%0d%0a\r\n"), [200]),
    "unusual media types": (post(b"Content-Type: a/b;charset=UTF-7\r\n", path=b"/invocations"), [415]),
    "a charset": (post(b'Content-Type: application/json; charset="utf-16"\r\n', path=b"/invocations"), [415]),
    "a media type of signs": (post(b"Content-Type: ;;;=\x80\r\n", path=b"/invocations"), [415]),
    "an encoding of the content": (post(b"Content-Encoding: br, gzip\r\n"), [415]),
    "what may not be accepted": (post(b"Accept: \xff/\xff;q=nan, text/csv;q=-1\r\n"), [406]),
    "a hundred headers": (post(b"".join(b"A%d: b\r\n" % index for index in range(100))), [200]),
}


@pytest.mark.parametrize("what", CLEAR)
def test_each_request_has_one_answer(server: Callable[[str], Served], what: str) -> None:
    served = server("iris")
    raw, statuses = CLEAR[what]
    with unharmed(served), Wire(served.url) as wire:
        wire.send_apart(raw)
        for status in statuses:
            answer = wire.answer()
            assert (answer and answer.status) == status
        if statuses[-1] is not None:
            # What follows is answered next: nothing else was taken for a request.
            wire.send_apart(get(b"/version", b"X-Request-ID: the-next\r\n"))
            answer = wire.answer()
            assert answer
            assert (answer.status, answer.headers["x-request-id"]) == (200, "the-next")


OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "anything": b"Connection: keep-alive, upgrade\r\nUpgrade: a/1, b/2\r\n",
}


@pytest.mark.parametrize("offer", OFFERS)
def test_another_protocol_is_declined(server: Callable[[str], Served], offer: str) -> None:
    served = server("iris")
    with unharmed(served), Wire(served.url) as wire:
        wire.send_apart(get(b"/version", OFFERS[offer]))
        answer = wire.answer()
        assert answer
        assert answer.status == 200


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("apart", [False, True])
def test_a_body_is_a_body_also_where_another_protocol_is_offered(
    server: Callable[[str], Served], offer: str, apart: bool
) -> None:
    served = server("iris")
    for body, status in ((GOOD, 200), (VERSION, 422)):
        for whole in (
            post(OFFERS[offer], body),
            chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), b"Transfer-Encoding: chunked\r\n" + OFFERS[offer]),
        ):
            head, _, rest = whole.partition(b"\r\n\r\n")
            with unharmed(served), Wire(served.url) as wire:
                wire.send_apart(*([head + b"\r\n\r\n", rest] if apart else [whole]))
                first = wire.answer()
                wire.send_apart(get(b"/version", b"X-Request-ID: the-next\r\n"))
                second = wire.answer()
                assert first
                assert second
                assert (first.status, second.headers["x-request-id"]) == (status, "the-next")


def test_what_follows_a_proxy_s_verb_is_no_request(server: Callable[[str], Served]) -> None:
    served = server("iris")
    for target in (b"/predict", b"x:80"):
        with Wire(served.url) as wire:
            wire.send_apart(get(target, b"Content-Length: %d\r\n" % len(VERSION), verb=b"CONNECT"), VERSION)
            assert wire.answers() in ([400], [405], [])


def test_trailers_are_no_headers(server: Callable[[str], Served]) -> None:
    served = server("iris")
    trailer = b"X-Request-ID: trailed\r\nContent-Encoding: gzip\r\nAccept: text/csv\r\nExpect: 100-continue\r\n"
    with Wire(served.url) as wire:
        wire.send_apart(chunked(b"%x\r\n%b\r\n0\r\n%b\r\n" % (SIZE, GOOD, trailer)))
        answer = wire.answer()
        assert answer
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert answer.headers["x-request-id"] != "trailed"


BESIDE = {
    "an endless trailer": b"%x\r\n%b\r\n0\r\nA: " % (SIZE, GOOD),
    "many trailers": b"%x\r\n%b\r\n0\r\n" % (SIZE, GOOD),
    "an endless extension": b"%x;" % SIZE,
    "long extensions": b"",
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_comes_beside_a_body_has_an_end(server: Callable[[str], Served], what: str) -> None:
    served = server("iris")
    more = {"many trailers": b"A: b\r\n", "long extensions": b"1;%b\r\nx\r\n" % (b"x" * 500)}.get(what, b"x")

    def pour(wire: Wire) -> None:
        wire.socket.sendall(chunked(BESIDE[what]))
        for _ in range(200):
            wire.socket.sendall(more * (2**18 // len(more)))

    with unharmed(served, 20 * 1024 * 1024), Wire(served.url) as wire, pytest.raises(ConnectionError):
        pour(wire)


def test_chunks_may_be_small(server: Callable[[str], Served]) -> None:
    body = GOOD + b" " * 100_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\nA: b\r\n\r\n"
    with Wire(server("iris").url) as wire:
        wire.send_apart(chunked(chunks) + VERSION)
        answers = [wire.answer(), wire.answer()]
        assert [answer and answer.status for answer in answers] == [200, 200]


# Bodies

DEEP = 100_000


def shape(path: str, answer: Answer) -> None:
    """Assert that an error has the form of its protocol."""
    if answer.status == 200:
        return
    assert 400 <= answer.status < 500, answer
    if answer.headers["content-type"].startswith("text/plain"):
        assert answer.status == 415
        return
    body = json.loads(answer.body)
    wanted = {"/predict": {"detail"}, "/invocations": {"error_code", "message"}}.get(path, {"error"})
    assert body.keys() == wanted, answer


# `X` is where something hostile goes.
PLACES: dict[str, list[bytes]] = {
    "/predict": [
        *(b"X", b'{"features":X}', b'{"features":[X]}', b'{"features":{"a":X,"extra":X}}'),
        *(b'{"features":{"a":1},"params":X}', b'{"features":{"a":1},"params":{"predict_method":X}}'),
        *(b'{"feature_group":X,"ofs_keys":X}', b'{"feature_group":"a","ofs_keys":{"a":X}}', b'{"features":ROW}'),
    ],
    "/invocations": [
        *(b"X", b'{"dataframe_records":X}', b'{"dataframe_records":[X]}', b'{"dataframe_records":[{"a":X}]}'),
        *(b'{"dataframe_split":X}', b'{"dataframe_split":{"columns":X,"data":[[1]]}}'),
        *(b'{"dataframe_split":{"columns":["a",X],"data":[[1,2]]}}', b'{"dataframe_split":{"data":[[X]]}}'),
        *(b'{"dataframe_split":{"columns":["a"],"data":[[1]],"index":X}}', b'{"dataframe_split":{"data":X}}'),
        *(b'{"inputs":X}', b'{"instances":X}', b'{"inputs":{"a":X}}', b'{"inputs":[[X]],"params":X}'),
        *(b'{"messages":X}', b'{"prompt":X,"stream":X}', b'{"inputs":ROW}'),
    ],
    "/v1/models/model:predict": [
        *(b"X", b'{"instances":X}', b'{"inputs":X}', b'{"instances":[X]}', b'{"instances":[{"a":X}],"parameters":X}'),
        b'{"instances":ROW}',
    ],
    "/v2/models/model/infer": [
        *(b"X", b'{"inputs":X}', b'{"inputs":[X]}', b'{"inputs":[TENSOR],"id":X}', b'{"inputs":[TENSOR],"outputs":X}'),
        *(b'{"inputs":[TENSOR],"outputs":[{"name":X}]}', b'{"inputs":[TENSOR],"parameters":X}'),
        b'{"inputs":[TENSOR],"outputs":[{"name":"a","parameters":X}]}',
        b'{"inputs":[{"name":X,"shape":[1],"datatype":"FP64","data":[1]}]}',
        b'{"inputs":[{"name":"a","shape":X,"datatype":"FP64","data":[1]}]}',
        b'{"inputs":[{"name":"a","shape":[1],"datatype":X,"data":[1]}]}',
        b'{"inputs":[{"name":"a","shape":[1],"datatype":"FP64","data":X}]}',
        b'{"inputs":[{"name":"a","shape":[1],"datatype":"FP16","data":[X]}]}',
        b'{"inputs":[{"name":"a","shape":[1],"datatype":"BYTES","data":[X]}]}',
        b'{"inputs":[{"name":"a","shape":[1],"datatype":"FP64","parameters":X}]}',
        b'{"inputs":[{"name":"a","shape":[1],"datatype":"FP64","parameters":{"binary_data_size":X}}]}',
    ],
}

TENSOR = b'{"name":"a","shape":[1],"datatype":"FP64","data":[1]}'

NASTY: dict[str, bytes] = {
    "brackets": b"[" * DEEP,
    "braces": b'{"a":' * DEEP,
    "closed brackets": b"[" * DEEP + b"]" * DEEP,
    "as deep as can be read": b"[" * 1000 + b"]" * 1000,
    "nearly as deep": b'{"a":' * 900 + b"1" + b"}" * 900,
    "deeper than can be written": b"[" * 300 + b"]" * 300,
    "beyond doubles": b"1e400",
    "a hundred thousand digits": b"1" * 100_000,
    "as many digits as can be read": b"9" * 308,
    "an integer beyond 64 bits": b"-9223372036854775809",
    "minus zero": b"-0",
    "small": b"1e-400",
    **{text: text.encode() for text in ("NaN", "nan", "Infinity", "-Infinity", "inf", "1e", "0x10", "01", "+1", ".5")},
    "a lone surrogate": b'"\\ud800"',
    "two surrogates the wrong way round": b'"\\udc00\\ud800"',
    "NUL": b'"\\u0000"',
    "a NUL byte": b'"\0"',
    "no UTF-8": b'"\xff\xfe"',
    "UTF-8 that is too long": b'"\xc0\xaf"',
    "a BOM": b'\xef\xbb\xbf"x"',
    "line breaks": b'"\\r\\nSet-Cookie: a=b\\u2028\\u0085"',
    "a long text": b'"' + b"x" * 1_000_000 + b'"',
    "a long name": b'{"' + b"x" * 1_000_000 + b'":1}',
    "the same key twice": b'{"a":1,"a":"x","a":[1]}',
    "a hundred thousand names": b"{%b}" % b",".join(b'"k%d":1' % index for index in range(100_000)),
    "a hundred thousand values": b"[%b]" % b",".join([b"1"] * 100_000),
    "a hundred thousand rows": b"[%b]" % b",".join([b"{}"] * 100_000),
    "lists of several lengths": b"[[1],[1,2],[[1]],1]",
    "everything": b'[null,true,1,1.5,"x",[],{},[[]],{"a":{}}]',
    # The second parser, which takes NaN, has the bounds of the first.
    "brackets after NaN": b"[NaN," + b"[" * DEEP,
    "braces after NaN": b'[NaN,{"a":' + b'{"a":' * DEEP,
    "as deep as can be read, with NaN": b"[" * 900 + b"NaN" + b"]" * 900,
    "deeper than can be written, with NaN": b"[" * 300 + b"NaN" + b"]" * 300,
    "a hundred thousand digits after NaN": b"[NaN," + b"1" * 100_000 + b"]",
    "beyond doubles, with NaN": b"[NaN,1e400,-1e400]",
    "half of a pair of surrogates after NaN": b'[NaN,"\\ud800"]',
    "no UTF-8 after NaN": b'[NaN,"\xff\xfe"]',
    "NUL after NaN": b'[NaN,"\\u0000"]',
    "the same key twice, with NaN": b'{"a":NaN,"a":Infinity,"a":NaN}',
    "a hundred thousand times NaN": b"[%b]" % b",".join([b"NaN"] * 100_000),
    "a hundred thousand infinities": b"[%b]" % b",".join([b"-Infinity"] * 100_000),
    "a hundred thousand names of NaN": b"{%b}" % b",".join(b'"NaN%d":NaN' % index for index in range(100_000)),
    "a product that overflows": b"[4611686018427387904,4611686018427387904]",
    "a product of 0": b"[4294967296,4294967296,0]",
    "a negative length": b"[-1,-1]",
    "as many lengths as fit": b"[" + b",".join([b"1"] * 100) + b"]",
}

KINDS = {
    "iris": IRIS,
    "nested": NESTED_ROW,
    "untyped_answers": {"form": "text"},
    "tensors": {"image": [[1, 2], [3, 4]], "weight": [3]},
}


def exchange(served: Served, path: str, body: bytes, head: bytes = b"") -> Answer:
    with Wire(served.url) as wire:
        wire.send_apart(post(head, body, path.encode()))
        answer = wire.answer()
        assert answer
        return answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PLACES)
def test_nasty_values_anywhere(server: Callable[[str], Served], kind: str, path: str) -> None:
    served = server(kind)
    row = json.dumps(KINDS[kind]).encode()
    with unharmed(served, 300 * 1024 * 1024):
        for place in PLACES[path]:
            for what, value in NASTY.items():
                if len(value) > 500_000 and kind in ("nested", "tensors"):
                    continue  # as with the others
                body = place.replace(b"TENSOR", TENSOR).replace(b"ROW", row).replace(b"X", value)
                answer = exchange(served, path, body, b"Content-Type: application/json\r\n")
                assert answer.status < 500, (place, what, answer)
                shape(path, answer)


CSV_TYPE = b"Content-Type: text/csv\r\n"

# A million small parts.
MANY: dict[str, tuple[str, bytes, bytes]] = {
    "rows of JSON": ("/predict", b'{"features":[' + b"{}," * 10**6 + b"{}]}", b""),
    "lists of JSON": ("/invocations", b'{"inputs":[' + b"[1]," * 10**6 + b"[1]]}", b""),
    "instances": ("/v1/models/model:predict", b'{"instances":[' + b'{"a":1},' * 10**6 + b"1]}", b""),
    "values of a tensor": (
        "/v2/models/model/infer",
        b'{"inputs":[{"name":"a","shape":[1000001],"datatype":"INT8","data":[' + b"1," * 10**6 + b"1]}]}",
        b"",
    ),
    "tensors": (
        "/v2/models/model/infer",
        b'{"inputs":[%b]}' % b",".join(TENSOR.replace(b"a", b"%d" % index, 1) for index in range(100_000)),
        b"",
    ),
    "lines of CSV": ("/invocations", b"a\n" + b"x\n" * 10**6, CSV_TYPE),
    "empty lines of CSV": ("/invocations", b"\n" * 10**6, CSV_TYPE),
    "columns of CSV": ("/invocations", b"a," * 10**6 + b"\n" + b"1," * 10**6, CSV_TYPE),
    "columns of CSV after a blank line": ("/invocations", b" \n\n" + b"a," * 10**6 + b"\n" + b"1," * 10**6, CSV_TYPE),
    "columns of CSV after a quoted line": (
        "/invocations",
        b'"\n",' + b"a," * 10**6 + b"\n1," + b"1," * 10**6,
        CSV_TYPE,
    ),
    "more columns of CSV than are named": ("/invocations", b"a\n" + b"1," * 10**6, CSV_TYPE),
    "quotes of CSV": ("/invocations", b'"' * (10**6 + 1), CSV_TYPE),
    "NULs of CSV": ("/invocations", b"\0" * 10**6, CSV_TYPE),
    "signs of four bytes": ("/invocations", b"a\n" + "\U0001f600".encode() * 10**6, CSV_TYPE),
    "integers that hash alike": (
        "/invocations",
        b'{"dataframe_split":{"columns":[%b],"data":[[1]]}}'
        % b",".join(b"%d" % (index * (2**61 - 1)) for index in range(1, 50_000)),
        b"",
    ),
    "names that would hash alike as integers": (
        "/predict",
        b'{"features":{%b}}' % b",".join(b'"%d":1' % (index * (2**61 - 1)) for index in range(50_000)),
        b"",
    ),
    "names that differ at the end": (
        "/predict",
        b'{"features":{%b}}' % b",".join(b'"%0100d":1' % index for index in range(50_000)),
        b"",
    ),
}


@pytest.mark.parametrize("kind", ["iris", "untyped_answers"])
@pytest.mark.parametrize("what", MANY)
def test_a_million_of_anything(server: Callable[[str], Served], kind: str, what: str) -> None:
    served = server(kind)
    path, body, head = MANY[what]
    # An empty object is 64 bytes of memory, and two of the body.
    with unharmed(served, 100 * 1024 * 1024 + 120 * len(body)):
        answer = exchange(served, path, body, head)
        assert answer.status < 500
        shape(path, answer)


def zipped(body: bytes) -> bytes:
    return gzip.compress(body, 9)


BOMB = zipped(bytes(50 * 1024 * 1024))

BOMBS: dict[str, tuple[bytes, bytes, set[int]]] = {
    "gzip": (b"gzip", BOMB, {413}),
    "deflate": (b"deflate", zlib.compress(bytes(50 * 1024 * 1024), 9), {413}),
    "gzip called deflate": (b"deflate", BOMB, {413}),
    "gzip in gzip": (b"gzip", zipped(BOMB), {400, 422}),
    "gzip in gzip, as told": (b"gzip, gzip", zipped(BOMB), {415}),
    "a thousand members": (b"gzip", zipped(bytes(10**5)) * 1000, {400, 413, 422}),
    "more after it": (b"gzip", zipped(GOOD) + bytes(10**6), {400, 422}),
    "less than all": (b"gzip", zipped(GOOD)[:-1], {400, 422}),
    "another checksum": (b"gzip", zipped(GOOD)[:-8] + bytes(8), {400, 422}),
    "a long name": (b"gzip", b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * 10**6, {400, 422}),
    "a dictionary": (b"deflate", b"\x78\xbb\0\0\0\0", {400, 422}),
    "nothing": (b"gzip", b"", {400, 422}),
    "a bare stream": (b"deflate", zlib.compress(GOOD)[2:-4], {400, 422}),
}


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.parametrize("path", PLACES)
def test_bombs(server: Callable[[str], Served], path: str, what: str) -> None:
    served = server("iris")
    encoding, body, statuses = BOMBS[what]
    with unharmed(served):
        answer = exchange(served, path, body, b"Content-Encoding: %b\r\n" % encoding)
        assert answer.status in statuses
        shape(path, answer)


def test_many_bombs_at_once(server: Callable[[str], Served]) -> None:
    served = server("iris")
    with unharmed(served, 400 * 1024 * 1024), ThreadPoolExecutor(16) as threads:
        asked = [threads.submit(exchange, served, "/predict", BOMB, b"Content-Encoding: gzip\r\n") for _ in range(32)]
        assert {answer.result().status for answer in asked} <= {413, 503}
    # Of those that had to wait for their turn, none stays behind.
    assert exchange(served, "/predict", GOOD).status == 200


# V2's binary extension

ONE = b'{"inputs":[{"name":"a","shape":[1,4],"datatype":"FP64","parameters":{"binary_data_size":32}}]}'
LENGTH = b"Inference-Header-Content-Length: "

LIES: dict[str, tuple[bytes, bytes]] = {
    **{
        f"a length of {length[:30].decode('latin-1')!r}": (LENGTH + length + b"\r\n", ONE + bytes(32))
        for length in (
            *(b"-1", b"+5", b"0", b"1", b"0x10", b"1e3", b"99999", b"9" * 19, b"9" * 5000, b"", b"x", b"\xd9\xa1"),
            *(b"%d" % (len(ONE) - 1), b"%d" % (len(ONE) + 1), b"1_0", b"%d, %d" % (len(ONE), len(ONE))),
        )
    },
    **{
        f"a size of {size.decode()}": (
            LENGTH + b"%d\r\n" % len(body := ONE.replace(b":32}", b":%b}" % size)),
            body + bytes(32),
        )
        for size in (b"-1", b"31", b"33", b"0", b"4611686018427387904", b"1e400", b"32.0", b"true", b'"32"', b"[32]")
    },
    **{
        f"a shape of {made.decode()}": (
            LENGTH + b"%d\r\n" % len(body := ONE.replace(b"[1,4]", made)),
            body + bytes(32),
        )
        for made in (
            *(
                b"[4611686018427387904,4611686018427387904]",
                b"[9223372036854775807,2]",
                b"[-1,-4]",
                b"[0]",
                b"[]",
                b"{}",
            ),
            *(b"[4294967296,4294967296,0]", b"[1.0,4]", b"[true,4]", b'["1",4]', b"null", b"4", b"[[1,4]]"),
        )
    },
    "text that says it is longer": (
        LENGTH + b"%d\r\n" % len(body := ONE.replace(b"FP64", b"BYTES").replace(b"[1,4]", b"[1]")),
        body + b"\xff\xff\xff\xff" + bytes(28),
    ),
    "more than was said": (LENGTH + b"%d\r\n" % len(ONE), ONE + bytes(33)),
    "less than was said": (LENGTH + b"%d\r\n" % len(ONE), ONE + bytes(31)),
}


@pytest.mark.parametrize("kind", ["iris", "untyped_answers", "tensors"])
@pytest.mark.parametrize("what", LIES)
def test_lies_about_lengths(server: Callable[[str], Served], kind: str, what: str) -> None:
    served = server(kind)
    head, body = LIES[what]
    with unharmed(served):
        answer = exchange(served, "/v2/models/model/infer", body, head)
        assert 400 <= answer.status < 500, answer
        shape("/v2/models/model/infer", answer)


def test_the_same_without_lies(server: Callable[[str], Served]) -> None:
    answer = exchange(server("iris"), "/v2/models/model/infer", ONE + bytes(32), LENGTH + b"%d\r\n" % len(ONE))
    assert answer.status == 200


# What is written down

FORGED = {
    "a path": get(b"/a%0a2026-01-31T12:00:00.000Z%20INFO%20darwin:%20forged"),
    "a path of control signs": get(b"/%1b[2Jforged%00%7f%e2%80%a8%c2%85"),
    "an id": get(b"/schema", b"X-Request-ID: a 2026 INFO forged\r\n"),
    "a name of a model": get(b"/v1/models/a%0aforged"),
    "a long path": get(b"/" + b"forged" * 1000),
    "a body": post(body=b'{"features":{"a\\nforged":1}}'),
    "a feature group": post(body=b'{"feature_group":"a\\nforged","ofs_keys":{"a":"\\nforged"}}'),
    "a verb": get(b"/schema", verb=b"PURGE"),
}


@pytest.mark.parametrize("style", ["text", "json"])
def test_log_lines_are_ours(style: str) -> None:
    with serving(model_path("iris"), WORKERS=1, LOG_FORMAT=style) as served:
        for raw in FORGED.values():
            with Wire(served.url) as wire:
                wire.send_apart(raw)
                assert wire.answer()
    lines = served.log.split("\n")
    assert lines.pop() == ""
    told = [line for line in lines if "darwin.access" in line]
    assert len(told) == len(FORGED)
    for line in lines:
        assert line.isprintable()
        assert len(line) < 4096
        if style == "json":
            assert json.loads(line)["level"] in ("INFO", "WARNING")
        else:
            assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING) [\w.]+: ", line), line


def test_the_hash_of_text_has_a_key_of_its_own_in_each_process() -> None:
    """So that nobody can know names that collide; nothing of ours may take that away."""
    for file in ("Dockerfile", *map(str, (ROOT / "deploy").rglob("*.yaml"))):
        assert not re.search(r"(ENV|name:) *PYTHONHASHSEED", (ROOT / file).read_text()), file
