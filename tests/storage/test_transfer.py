"""Files on their way from a store to the disk: what is kept, what is refused, what is said meanwhile."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import urllib3

from darwin_runtime.errors import DamagedDownload, RoleError, StoreUnreachable
from darwin_runtime.storage import artifacts, parts, progress, store_errors
from darwin_runtime.storage import transfer as transfer_module
from darwin_runtime.storage.artifacts import RemoteFile, Source
from darwin_runtime.storage.attempts import Deadline, RetryPolicy
from darwin_runtime.storage.parts import Part
from darwin_runtime.storage.progress import format_progress
from darwin_runtime.storage.transfer import Transfer
from tests.conftest import http_server, wait_until

BODY = bytes(range(256)) * 4096


def transfer(
    source: Source, directory: Path, *, retries: int = 0, seconds: float = 60, shared: bool = False
) -> Transfer:
    retry, deadline = RetryPolicy(retries, 0.001), Deadline(seconds)
    return Transfer(source, directory / "model", directory / "parts", retry, deadline, shared=shared)


# From a store that only downloads


@dataclass
class Local:
    """A store of files that are made by a function."""

    sizes: Mapping[str, int | None]
    write: Callable[[str, str], object]

    def list(self, directory: str = "") -> tuple[list[RemoteFile], list[str]]:
        assert not directory
        return [RemoteFile(name, size) for name, size in self.sizes.items()], []

    def open(self, path: str, offset: int) -> None:
        return None

    def download(self, path: str, local: str) -> None:
        self.write(path, local)


def source_of(sizes: Mapping[str, int | None], write: Callable[[str, str], object], **identity: str) -> Source:
    return Source("models:/m/2", identity, list(sizes.items()), Local(sizes, write))


def half_way(tmp_path: Path, seen: Callable[[], bool]) -> None:
    """Transfer a file of 1000 bytes whose second half comes only once `seen`."""

    def write(_: str, local: str) -> None:
        with Path(local).open("wb", buffering=0) as file:
            file.write(b"x" * 500)
            wait_until(seen, "progress")
            file.write(b"x" * 500)

    assert transfer(source_of({"MLmodel": 1000}, write), tmp_path).run()[0].size == 1000


def test_progress_tells_percent_rate_and_time_left() -> None:
    assert format_progress(1_000_000, 4_000_000, 0, 2.0) == "25% of 3.8 MiB, 0.5 MB/s, ETA 6 s"
    assert format_progress(3_000_000, 4_000_000, 2_000_000, 2.0) == "75% of 3.8 MiB, 0.5 MB/s, ETA 2 s"
    assert format_progress(0, 4_000_000, 0, 2.0) == "0% of 3.8 MiB, 0.0 MB/s, ETA unknown"


def test_progress_is_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.01)
    half_way(tmp_path, lambda: "50% of 1000 B" in caplog.text)
    assert "downloading 1 files, 1000 B" in caplog.text
    assert "downloaded 1000 B in" in caplog.text


def test_progress_is_one_rewriting_line_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    os.set_blocking(master, False)
    told = bytearray()

    def seen() -> bool:
        with contextlib.suppress(BlockingIOError):
            told.extend(os.read(master, 4096))
        return b"50% of 1000 B" in told

    with open(slave, "w") as terminal:  # noqa: PTH123 - a descriptor has no path
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(progress, "TERMINAL_PROGRESS_SECONDS", 0.01)
        half_way(tmp_path, seen)
        monkeypatch.undo()
        wait_until(lambda: seen() and told.endswith(b"\r\x1b[K"), "the line's end, of which nothing is left")
    os.close(master)
    assert told.startswith(b"\r\x1b[K")
    assert b"\n" not in told


def test_a_registered_model_s_own_meta_file_is_replaced(tmp_path: Path) -> None:
    """A model that was downloaded from one registry and logged to another brings the file along."""

    def write(path: str, local: str) -> None:
        Path(local).write_text(f"of the source: {path}")

    names = ["MLmodel", "registered_model_meta"]
    source = source_of(dict.fromkeys(names), write, name="m", version="2")
    arrived = transfer(source, tmp_path).run()
    assert sorted(file.path for file in arrived) == names
    meta = (tmp_path / "model" / "registered_model_meta").read_text()
    assert meta == "model_name: m\nmodel_version: '2'\n"


@pytest.mark.parametrize("size", [3, 5])
def test_what_is_not_as_long_as_listed_is_not_taken(size: int, tmp_path: Path) -> None:
    source = source_of({"MLmodel": 4}, lambda _, local: Path(local).write_bytes(b"x" * size))
    with pytest.raises(
        DamagedDownload, match=f"MLmodel of models:/m/2 arrived with {size} bytes instead of the 4 listed"
    ):
        transfer(source, tmp_path, retries=1).run()
    assert list((tmp_path / "model").iterdir()) == []


def test_one_failure_stops_the_rest(tmp_path: Path) -> None:
    asked: list[str] = []

    def write(path: str, local: str) -> None:
        asked.append(path)
        raise RoleError("refused")

    with pytest.raises(RoleError, match="refused"):
        transfer(source_of({f"file-{number}": 1 for number in range(500)}, write), tmp_path).run()
    assert len(asked) < 100


def test_a_full_disk_is_not_the_store_s_fault(tmp_path: Path) -> None:
    def write(_path: str, _local: str) -> None:
        with store_errors.explained("models:/m/2"):
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                raise RuntimeError("MLflow's words") from error

    with pytest.raises(OSError, match="No space left"):
        transfer(source_of({"MLmodel": 1}, write), tmp_path, retries=3).run()


def test_time_is_bounded(tmp_path: Path) -> None:
    source = source_of({"MLmodel": 1}, lambda *_: None)
    with pytest.raises(RoleError, match="cannot list models:/m/2 within -1 s: no answer in time"):
        transfer(source, tmp_path, seconds=-1).run()


def test_a_store_s_own_library_can_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(transfer_module, "END_SECONDS", 0.01)
    ended = threading.Event()
    source = source_of({"MLmodel": 1}, lambda *_: ended.wait())
    with pytest.raises(RoleError, match=r"models:/m/2: not done within DOWNLOAD_TIMEOUT_SECONDS=0\.5"):
        transfer(source, tmp_path, seconds=0.5).run()
    ended.set()


def test_what_a_store_s_own_library_left_is_no_part(tmp_path: Path) -> None:
    """It writes pieces in any order: the file has its full size, and holes, from the start."""
    (tmp_path / "parts").mkdir()
    name = hashlib.sha256(b"MLmodel").hexdigest()[:32]
    for left in (f"{name}..0", f"{name}..0.ebC4BdcB", f"{name}..ebC4BdcB", f"{name}.0123456789abcdef"):
        (tmp_path / "parts" / left).write_bytes(bytes(7))
    (tmp_path / "parts" / f"{name}.0123456789abcdef.7").symlink_to(tmp_path / "parts" / f"{name}..0")
    source = source_of({"MLmodel": 7}, lambda _, local: Path(local).write_bytes(b"brought"))
    transfer(source, tmp_path).run()
    assert (tmp_path / "model" / "MLmodel").read_bytes() == b"brought"
    assert list((tmp_path / "parts").iterdir()) == []


def test_what_this_runtime_keeps_beside_a_model_is_no_part_of_it(tmp_path: Path) -> None:
    source = source_of({"MLmodel": 1, ".darwin-output.json": 1}, lambda _, local: Path(local).write_bytes(b"x"))
    assert [file.path for file in transfer(source, tmp_path).run()] == ["MLmodel"]


def test_what_is_there_is_not_brought_again(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "deep" / "whole").write_bytes(b"whole")
    (model / "short").write_bytes(b"sho")
    (model / "strange").write_bytes(b"strange")
    (tmp_path / "elsewhere").write_bytes(b"link!")
    (model / "link").symlink_to(tmp_path / "elsewhere")
    asked: list[str] = []

    def write(path: str, local: str) -> None:
        asked.append(path)
        Path(local).write_bytes(b"brought")

    source = source_of({"deep/whole": 5, "short": 7, "link": 7}, write)
    found = transfer(source, tmp_path).run()
    assert sorted(asked) == ["link", "short"]
    assert found[0].sha256 == hashlib.sha256(b"whole").hexdigest()
    assert (tmp_path / "elsewhere").read_bytes() == b"link!"
    assert not (model / "strange").exists()
    assert not (model / "link").is_symlink()


# From a store that can be asked for the rest of a file

Answer = Callable[["_Handler", int], None]


@dataclass
class Served:
    """A file over HTTP. `answers` are used up in order, with the offset asked for; then it is answered as it should."""

    url: str = ""
    etag: str = '"v1"'
    answers: list[Answer] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def list(self, directory: str = "") -> tuple[list[RemoteFile], list[str]]:
        return [RemoteFile("MLmodel", len(BODY))], []

    def open(self, path: str, offset: int) -> urllib3.BaseHTTPResponse:
        with store_errors.explained("models:/m/2"):
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            return urllib3.request("GET", f"{self.url}/{path}", headers=headers, preload_content=False, timeout=5)

    def download(self, path: str, local: str) -> None:
        raise AssertionError


class _Handler(BaseHTTPRequestHandler):
    served: Served

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        assert asked
        offset = int(asked[1])
        self.served.offsets.append(offset)
        answer = self.served.answers.pop(0) if self.served.answers else whole
        with contextlib.suppress(ConnectionError):
            answer(self, offset)

    def send(self, code: int, body: bytes, offset: int = 0, *, framed: bool = True, **headers: str) -> None:
        self.send_response(code)
        given = {"ETag": self.served.etag, **self.served.headers, **headers}
        if code == 206:
            given.setdefault("Content-Range", f"bytes {offset}-{len(BODY) - 1}/{len(BODY)}")
        for name, value in given.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        if framed:
            self.send_header("Content-Length", str(len(BODY) - offset))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def whole(handler: _Handler, offset: int) -> None:
    handler.send(206 if offset else 200, BODY[offset:], offset)


def cut(size: int, *, framed: bool = True) -> Answer:
    """An answer of which only so many bytes come; without a length, no client can tell."""
    return lambda handler, offset: handler.send(
        206 if offset else 200, BODY[offset : offset + size], offset, framed=framed
    )


def flipped(handler: _Handler, offset: int) -> None:
    body = bytearray(BODY[offset:])
    body[len(body) // 2] ^= 1
    handler.send(206 if offset else 200, bytes(body), offset)


def ignored_range(handler: _Handler, offset: int) -> None:
    handler.send(200, BODY)


def changed(handler: _Handler, offset: int) -> None:
    """The store has another file of the same name by now."""
    handler.send(206 if offset else 200, BODY[offset:], offset, ETag='"v2"')


def wrong_range(handler: _Handler, offset: int) -> None:
    handler.send(206, BODY[:10], Content_Range=f"bytes 0-9/{len(BODY)}")


def unsatisfiable(handler: _Handler, offset: int) -> None:
    handler.send(416, b"", len(BODY))


def longer(handler: _Handler, offset: int) -> None:
    handler.send(200, BODY + b"more", framed=False)


@contextmanager
def serving(*answers: Answer, **given: str) -> Iterator[Served]:
    served = Served(answers=list(answers), **given)  # type: ignore[arg-type]
    with http_server(type("Handler", (_Handler,), {"served": served})) as served.url:
        yield served


def brought(served: Served, directory: Path, *, retries: int = 3, shared: bool = False) -> None:
    """Transfer it, and compare every byte."""
    source = Source("models:/m/2", {}, [("MLmodel", len(BODY))], served)
    [file] = transfer(source, directory, retries=retries, shared=shared).run()
    assert (directory / "model" / "MLmodel").read_bytes() == BODY
    assert (file.size, file.sha256) == (len(BODY), hashlib.sha256(BODY).hexdigest())
    assert list((directory / "parts").iterdir()) == []


HALF = len(BODY) // 2


@pytest.mark.parametrize(
    ("answers", "offsets"),
    [
        ([cut(HALF)], [0, HALF]),
        ([cut(HALF, framed=False)], [0, HALF]),
        ([cut(1000), cut(1000), cut(1000)], [0, 1000, 2000, 3000]),
        ([cut(HALF), ignored_range], [0, HALF]),
        ([cut(HALF), changed, changed], [0, HALF, 0]),
        ([cut(HALF), wrong_range], [0, HALF, 0]),
        ([cut(HALF), unsatisfiable], [0, HALF, 0]),
        ([longer], [0, 0]),
    ],
)
def test_it_goes_on_where_it_broke_off_if_it_is_the_same_file(
    answers: list[Answer], offsets: list[int], tmp_path: Path
) -> None:
    with serving(*answers) as served:
        brought(served, tmp_path)
    assert served.offsets == offsets


@pytest.mark.parametrize("etag", ["", 'W/"v1"'])
def test_without_a_strong_validator_it_begins_anew(etag: str, tmp_path: Path) -> None:
    with serving(cut(HALF), etag=etag) as served:
        brought(served, tmp_path)
    assert served.offsets == [0, 0]


def test_another_run_goes_on_and_never_writes_to_the_same_file(tmp_path: Path) -> None:
    with serving(cut(HALF)) as served:
        with pytest.raises(StoreUnreachable):
            brought(served, tmp_path, retries=0)
        [part] = (tmp_path / "parts").iterdir()
        with part.open("ab") as zombie:  # of a pod that is not dead after all
            brought(served, tmp_path, shared=True)
            zombie.write(b"late")
    assert served.offsets == [0, HALF]
    assert (tmp_path / "model" / "MLmodel").read_bytes() == BODY


@contextmanager
def left_by_another_run(directory: Path, *answers: Answer, size: int = HALF) -> Iterator[tuple[Served, Path]]:
    """A server that gives the start of the file and then `answers`, and that start, on disk."""
    with serving(cut(size), *answers) as served:
        with pytest.raises(StoreUnreachable):
            brought(served, directory, retries=0)
        [part] = (directory / "parts").iterdir()
        assert part.name.endswith(f".{size}")
        yield served, part
        assert served.answers == []


@pytest.mark.parametrize("shared", [False, True])
def test_another_run_goes_on(shared: bool, tmp_path: Path) -> None:
    with left_by_another_run(tmp_path) as (served, _):
        brought(served, tmp_path, shared=shared)
    assert served.offsets == [0, HALF]


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_never_put_on_disk_for_good_is_not_counted_on(shared: bool, tmp_path: Path) -> None:
    """The machine that wrote it may have crashed, and another one finds holes."""
    with left_by_another_run(tmp_path) as (served, part):
        with part.open("ab") as file:
            file.write(bytes(HALF))
        brought(served, tmp_path, shared=shared)
    assert served.offsets == [0, HALF]


@pytest.mark.parametrize(("answers", "offsets"), [([], [0, len(BODY) - 1]), ([changed] * 2, [0, len(BODY) - 1, 0])])
def test_the_store_is_asked_whether_a_part_that_is_all_there_is_the_same_file(
    answers: list[Answer], offsets: list[int], tmp_path: Path
) -> None:
    with left_by_another_run(tmp_path, *answers) as (served, part):
        part.write_bytes(BODY if not answers else bytes(len(BODY)))
        part.rename(part.with_suffix(f".{len(BODY)}"))
        brought(served, tmp_path)
    assert served.offsets == offsets


def test_what_has_arrived_is_put_on_disk_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(transfer_module, "LOOK_SECONDS", 0.01)
    parts = tmp_path / "parts"

    def in_two(handler: _Handler, offset: int) -> None:
        handler.send(200, BODY[:HALF])
        wait_until(lambda: any(path.name.endswith(f".{HALF}") for path in parts.iterdir()), "a part on disk")
        handler.wfile.write(BODY[HALF:])

    with serving(in_two) as served:
        brought(served, tmp_path)
    assert served.offsets == [0]


def _sha256(body: bytes) -> str:
    return base64.b64encode(hashlib.sha256(body).digest()).decode()


CHECKSUMS = [
    {"Repr-Digest": f"sha-256=:{_sha256(BODY)}:"},
    {"Digest": f"SHA-256={_sha256(BODY)}"},
    {"Content-MD5": base64.b64encode(hashlib.md5(BODY, usedforsecurity=False).digest()).decode()},
]


@pytest.mark.parametrize("checksum", CHECKSUMS)
def test_a_flipped_bit_is_noticed_where_the_store_gives_a_checksum(checksum: dict[str, str], tmp_path: Path) -> None:
    with serving(flipped) as served:
        served.headers = checksum
        brought(served, tmp_path)
    assert served.offsets == [0, 0]


@pytest.mark.parametrize("checksum", CHECKSUMS[:2])
def test_a_flipped_bit_in_the_rest_is_noticed_too(checksum: dict[str, str], tmp_path: Path) -> None:
    with serving(cut(HALF), flipped) as served:
        served.headers = checksum
        brought(served, tmp_path)
    assert served.offsets == [0, HALF, 0]


def test_a_flipped_bit_is_noticed_though_the_connection_breaks_after_it(tmp_path: Path) -> None:
    def never_ended(handler: _Handler, offset: int) -> None:
        body = bytes([BODY[0] ^ 1]) + BODY[1:]
        handler.protocol_version = "HTTP/1.1"
        handler.send(200, b"%x\r\n%b\r\n" % (len(body), body), framed=False, Transfer_Encoding="chunked")

    with serving(never_ended) as served:
        served.headers = CHECKSUMS[0]
        brought(served, tmp_path)
    assert served.offsets[-1] == 0


@pytest.mark.parametrize("checksum", CHECKSUMS)
def test_a_rest_is_not_taken_without_the_checksum_that_was_told_of_the_whole(
    checksum: dict[str, str], tmp_path: Path
) -> None:
    def half(handler: _Handler, offset: int) -> None:
        served.headers = checksum
        handler.send(200, bytes([BODY[0] ^ 1]) + BODY[1:HALF])
        served.headers = {}

    with serving(half) as served:
        brought(served, tmp_path)
    assert served.offsets[-1] == 0


def test_always_flipped_is_never_taken(tmp_path: Path) -> None:
    with serving(*[flipped] * 3) as served:
        served.headers = CHECKSUMS[0]
        with pytest.raises(DamagedDownload, match="checksum"):
            brought(served, tmp_path, retries=2)
    assert list((tmp_path / "model").iterdir()) == []


def test_an_encoded_body_is_decoded(tmp_path: Path) -> None:
    import gzip

    body = gzip.compress(BODY)

    def encoded(handler: _Handler, offset: int) -> None:
        handler.send(200, body, framed=False, Content_Encoding="gzip")

    with serving(encoded) as served:
        brought(served, tmp_path)
    assert served.offsets == [0]


def test_a_quick_store_is_read_in_large_chunks_to_the_end_and_its_connection_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "GATHER_SECONDS", 1e6)  # the test's machine may be slow
    size = 5 * artifacts.CHUNK_BYTES + 100
    bodies = {"large": os.urandom(size), "small": b"end", "MLmodel": b"x"}
    connections = set()
    lengths = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            connections.add(self.client_address)
            body = bodies[self.path[1:]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for start in range(0, len(body), 1 << 14):
                self.wfile.write(body[start : start + (1 << 14)])
                time.sleep(0.001)  # or all would be there at once

        def log_message(self, *_: object) -> None:
            pass

    class Store(Served):
        def open(self, path: str, offset: int) -> urllib3.BaseHTTPResponse:
            with store_errors.explained("models:/m/2"):
                return pool.request("GET", f"/{path}", preload_content=False)

        def list(self, directory: str = "") -> tuple[list[RemoteFile], list[str]]:
            return [RemoteFile(name, len(body)) for name, body in bodies.items()], []

    add = Part.add

    def counting(part: Any, target: Any, chunk: bytes) -> None:
        lengths.append(len(chunk))
        add(part, target, chunk)

    monkeypatch.setattr(Part, "add", counting)
    with http_server(Handler) as url:
        pool = urllib3.connection_from_url(url, maxsize=1, block=True, timeout=5, retries=False)
        source = Source("models:/m/2", {}, [(name, len(body)) for name, body in bodies.items()], Store())
        transfer(source, tmp_path, retries=0).run()
        pool.close()
    assert {name: (tmp_path / "model" / name).read_bytes() for name in bodies} == bodies
    assert len(connections) == 1
    # Small packets may fill what the kernel holds before they are a whole chunk.
    assert sum(length >= artifacts.CHUNK_BYTES / 2 for length in lengths) >= 3


def test_a_store_that_trickles_has_stalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "STALL_SECONDS", 0.05)
    ended = threading.Event()

    def trickling(handler: _Handler, offset: int) -> None:
        handler.send(200, BODY[:1])
        while not ended.wait(0.01):
            handler.wfile.write(b"x")

    with serving(trickling) as served:
        with pytest.raises(StoreUnreachable, match="MLmodel of models:/m/2 has stalled"):
            brought(served, tmp_path, retries=0)
        ended.set()
