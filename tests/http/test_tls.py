"""HTTPS from mounted files, replaced as the kubelet does it, and client certificates, in real handshakes."""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from darwin_runtime.errors import ConfigError
from darwin_runtime.http import server, tls
from darwin_runtime.http.settings import Settings
from darwin_runtime.settings import Reader
from tests.conftest import run_role, wait_until
from tests.support.models import IRIS, model_path
from tests.support.mounts import Mount
from tests.support.servers import Served, in_thread, serving

pytestmark = pytest.mark.usefixtures("serving_environment")

BODY = {"features": IRIS}
KEY = "correct-horse-battery-staple"
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)


class Party:
    """A CA, and what it issues, as files below `directory`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.ca = trustme.CA()
        self.pem = self.ca.cert_pem.bytes()
        (directory / "ca.crt").write_bytes(self.pem)

    def server(self) -> dict[str, bytes]:
        """A certificate for this machine, and its key, as the files of a TLS Secret."""
        issued = self.ca.issue_cert("127.0.0.1", "localhost")
        chain = b"".join(one.bytes() for one in issued.cert_chain_pems)
        return {"tls_crt": chain, "tls_key": issued.private_key_pem.bytes()}

    def client(self, name: str, **more: Any) -> tuple[str, str]:
        """The files of a client's certificate and key."""
        issued = self.ca.issue_cert(common_name=name, **more)
        cert, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        cert.write_bytes(issued.cert_chain_pems[0].bytes())
        key.write_bytes(issued.private_key_pem.bytes())
        return str(cert), str(key)

    @property
    def file(self) -> str:
        return str(self.directory / "ca.crt")


@pytest.fixture
def ours(tmp_path: Path) -> Party:
    return Party(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Party:
    return Party(tmp_path / "theirs")


def files(mount: Mount, client_ca: str = "") -> dict[str, Any]:
    """The settings for what is mounted."""
    more = {"TLS_CLIENT_CA_FILE": client_ca} if client_ca else {}
    return {"TLS_CERT_FILE": mount / "tls.crt", "TLS_KEY_FILE": mount / "tls.key", **more}


def trusting(ca: str, client: tuple[str, str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    if client:
        context.load_cert_chain(*client)
    return context


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return str(parts.hostname), int(parts.port or 0)


def connect(url: str, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
    return context.wrap_socket(
        socket.create_connection(address(url), timeout=60), server_hostname=address(url)[0], session=session
    )


def ask(connection: ssl.SSLSocket, path: str = "/ready") -> int:
    """The status of an answer, whose connection stays open."""
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = connection.recv(65536)
        if not part:
            raise ConnectionResetError("the server closed the connection")
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    [length] = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < length:
        body += connection.recv(65536)
    return int(answer[9:12])


def serials(url: str, ca: str) -> set[int]:
    """Those of the certificates that connections are shown which are open together, so that all workers have some."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(url, trusting(ca))) for _ in range(12)]
        shown = [connection.getpeercert(binary_form=True) or b"" for connection in connections]
    return {x509.load_der_x509_certificate(der).serial_number for der in shown}


def test_https(tmp_path: Path, ours: Party, theirs: Party) -> None:
    mount = Mount(tmp_path / "tls", **ours.server())
    with serving(model_path("iris"), WORKERS=1, options={"verify": ours.file}, **files(mount)) as served:
        assert served.url.startswith("https://127.0.0.1:")
        assert served.post("/predict", BODY).json() == {"scores": [1]}
        with pytest.raises(requests.exceptions.SSLError):
            served.get("/ready", verify=theirs.file)
        context = trusting(ours.file)
        context.set_alpn_protocols(["h2", "http/1.1"])
        with connect(served.url, context) as connection:
            assert connection.selected_alpn_protocol() == "http/1.1"
            assert connection.version() == "TLSv1.3"
            assert ask(connection) == 200
        old = trusting(ours.file)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with connect(served.url, old) as connection:
            assert connection.version() == "TLSv1.2"
        older = trusting(ours.file)
        older.set_ciphers("DEFAULT:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            older.minimum_version = older.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError, match=r"(?i)eof|protocol.version"):
            connect(served.url, older)
        # HTTP is not spoken at the same port.
        with pytest.raises(requests.ConnectionError):
            requests.get(served.url.replace("https", "http") + "/ready", timeout=60)
        log = served.log
    assert "listening on https://127.0.0.1:" in log
    assert f"the TLS certificate in {mount / 'tls.crt'} is valid until 3" in log
    assert "Traceback" not in log


def test_certificates_are_rotated_under_a_running_server(tmp_path: Path, ours: Party) -> None:
    first, second, third = ours.server(), ours.server(), ours.server()
    numbers = [x509.load_pem_x509_certificate(one["tls_crt"]).serial_number for one in (first, second, third)]
    mount = Mount(tmp_path / "tls", **first)
    with serving(model_path("iris"), WORKERS=2, options={"verify": ours.file}, **files(mount)) as served:
        assert serials(served.url, ours.file) == {numbers[0]}
        with connect(served.url, trusting(ours.file)) as connection:
            assert ask(connection) == 200
            mount.put(**second)
            wait_until(lambda: serials(served.url, ours.file) == {numbers[1]}, "the new certificate")
            assert ask(connection) == 200, "a connection of before goes on"
        # The new certificate has arrived, its key has not.
        mount.put(tls_crt=third["tls_crt"], tls_key=second["tls_key"])
        told = f"the key in {mount / 'tls.key'} (TLS_KEY_FILE) is not that of {mount / 'tls.crt'} (TLS_CERT_FILE)"
        wait_until(lambda: serials(served.url, ours.file) and told in served.log, "a word on that")
        assert serials(served.url, ours.file) == {numbers[1]}
        mount.put(**third)
        wait_until(lambda: serials(served.url, ours.file) == {numbers[2]}, "the third")
        log = served.log
    assert log.count(told) <= 2, "once for each worker"
    assert 2 <= log.count("the TLS files have changed: new connections are made with them") <= 4
    assert log.count(f"the TLS certificate in {mount / 'tls.crt'} is valid until 3") >= 3
    assert "Traceback" not in log


def test_an_expired_certificate_is_told(tmp_path: Path, ours: Party) -> None:
    issued = ours.ca.issue_cert("127.0.0.1", not_before=LONG_AGO, not_after=LONG_AGO + datetime.timedelta(days=9))
    mount = Mount(tmp_path / "tls", tls_crt=issued.cert_chain_pems[0].bytes(), tls_key=issued.private_key_pem.bytes())
    with serving(model_path("iris"), WORKERS=1, options={"verify": False}, wait=False, **files(mount)) as served:
        wait_until(lambda: "has expired, on 2020-01-10T00:00:00+00:00: clients refuse it" in served.log, "a word")
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            connect(served.url, trusting(ours.file))


@pytest.mark.parametrize("year", [1999, 2049, 2050, 2200])
def test_expiry_is_what_the_certificate_says(ours: Party, year: int) -> None:
    until = datetime.datetime(year, 2, 3, 4, 5, 6, tzinfo=datetime.timezone.utc)
    before = datetime.datetime(1990, 1, 1, tzinfo=datetime.timezone.utc)
    pem = ours.ca.issue_cert("x", not_before=before, not_after=until).cert_chain_pems[0].bytes()
    assert tls._expiry(ssl.PEM_cert_to_DER_cert(pem.decode())) == until


# Settings


def problems(**settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(Reader({"MODEL_LOCAL_PATH": "/models", **{name: str(v) for name, v in settings.items()}}))
    return list(caught.value.problems)


def test_files_that_can_not_be_used(tmp_path: Path, ours: Party, theirs: Party) -> None:
    good, other = ours.server(), theirs.server()
    key = serialization.load_pem_private_key(good["tls_key"], None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret-words"),
    )
    garbage = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    wrong: list[tuple[dict[str, bytes], str]] = [
        ({"tls_key": other["tls_key"]}, "is not that of"),
        ({"tls_key": encrypted}, "is encrypted: give one without a password"),
        ({"tls_key": b"nothing"}, "TLS_KEY_FILE: there is no private key in"),
        ({"tls_key": good["tls_key"][:100] + b"\n-----END PRIVATE KEY-----"}, "TLS_KEY_FILE"),
        ({"tls_crt": b""}, "TLS_CERT_FILE: there is no certificate in"),
        ({"tls_crt": garbage}, "TLS_CERT_FILE"),
        ({"tls_crt": good["tls_key"]}, "TLS_CERT_FILE: there is no certificate in"),
    ]
    for number, (changed, why) in enumerate(wrong):
        mount = Mount(tmp_path / str(number), **(good | changed))
        [problem] = problems(**files(mount))
        assert why in problem
        assert "for example TLS_CERT_FILE=/etc/darwin/tls/tls.crt TLS_KEY_FILE=" in problem
        assert good["tls_key"].decode()[40:60] not in problem
    mount = Mount(tmp_path / "good", **good)
    for content, why in ((None, "cannot read"), (b"", "there is no certificate"), (garbage, "TLS_CLIENT_CA_FILE")):
        if content is not None:
            (tmp_path / "ca.crt").write_bytes(content)
        [problem] = problems(**files(mount, client_ca=str(tmp_path / "ca.crt")))
        assert problem.startswith(f"TLS_CLIENT_CA_FILE: {'cannot read ' if content is None else ''}")
        assert why in problem


def test_files_that_belong_together(tmp_path: Path, ours: Party) -> None:
    mount = Mount(tmp_path / "tls", **ours.server())
    cert, key = files(mount).values()
    for given, missing in (
        ({"TLS_CERT_FILE": cert}, "TLS_KEY_FILE: is not set, and TLS_CERT_FILE needs it"),
        ({"TLS_KEY_FILE": key}, "TLS_CERT_FILE: is not set, and TLS_KEY_FILE needs it"),
        ({"TLS_CLIENT_CA_FILE": ours.file}, "TLS_CERT_FILE: is not set, and TLS_CLIENT_CA_FILE needs it"),
    ):
        [problem] = problems(**given)
        assert problem.startswith(missing)
    (mount / "tls.key").unlink()
    ended = run_role("darwin_serve.py", MODEL_LOCAL_PATH="/models", **files(mount))
    assert ended.code == 2
    assert f"TLS_KEY_FILE: cannot read {key}: No such file or directory" in ended.err


# Clients that do not play along


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("begun", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
def test_a_handshake_that_never_ends_is_ended(
    tmp_path: Path, ours: Party, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    assert server.HANDSHAKE_SECONDS <= 10
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 0.5)
    mount = Mount(tmp_path / "tls", **ours.server())
    context = tls.Context(tls.Files(mount / "tls.crt", mount / "tls.key"))
    options = {"loop": "darwin_runtime.http.server:Loop", "ssl_context_factory": lambda *_: context}
    with in_thread(nothing, **options) as url:
        with socket.create_connection(address(url), timeout=30) as connection:
            connection.sendall(begun)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
        # Whoever plays along is not hurt.
        assert requests.get(url.replace("http:", "https:"), verify=ours.file, timeout=30).status_code == 200


def test_it_ends_without_a_last_word_of_the_client(tmp_path: Path, ours: Party) -> None:
    mount = Mount(tmp_path / "tls", **ours.server())
    options = {"verify": ours.file}
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(serving(model_path("iris"), WORKERS=1, options=options, **files(mount)))
        connection = stack.enter_context(connect(served.url, trusting(ours.file)))
        assert ask(connection) == 200
        # It does not read, so it does not say goodbye; by default that is awaited for 30 s.
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(timeout=20)


# Client certificates


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> tuple[Party, Party]:
    directory = tmp_path_factory.mktemp("parties")
    return Party(directory / "ours"), Party(directory / "clients")


@pytest.fixture(scope="module")
def mutual(
    serving_environment: None, parties: tuple[Party, Party], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server that wants certificates of the second party."""
    servers, clients = parties
    mount = Mount(tmp_path_factory.mktemp("mutual") / "tls", **servers.server())
    options = {"verify": servers.file}
    with serving(
        model_path("iris"), WORKERS=2, MODEL_NAME="flowers", options=options, **files(mount, clients.file)
    ) as served:
        yield served


def test_with_a_certificate(mutual: Served, parties: tuple[Party, Party]) -> None:
    client = parties[1].client("client")
    assert mutual.post("/predict", BODY, cert=client).json() == {"scores": [1]}
    assert mutual.get("/docs", cert=client).status_code == 200
    assert mutual.get("/nowhere", cert=client).status_code == 404


@pytest.mark.parametrize(
    ("verb", "path", "shape"),
    [
        ("POST", "/predict", {"detail"}),
        ("POST", "/invocations", {"error_code", "message"}),
        ("POST", "/v1/models/flowers:predict", {"error"}),
        ("POST", "/v2/models/flowers/infer", {"error"}),
        ("GET", "/v2/models/flowers/ready", {"error"}),
        ("GET", "/schema", {"detail"}),
        ("GET", "/", {"detail"}),
        ("GET", "/openapi.json", {"detail"}),
        ("GET", "/nowhere", {"detail"}),
        ("DELETE", "/predict", {"detail"}),
    ],
)
def test_without_a_certificate_nothing_is_told(mutual: Served, verb: str, path: str, shape: set[str]) -> None:
    pem = "-----BEGIN CERTIFICATE-----"
    for headers in ({}, {"X-Forwarded-Client-Cert": pem, "X-SSL-Client-Verify": "SUCCESS", "Client-Cert": ":AA==:"}):
        answer = requests.request(
            verb, mutual.url + path, json=BODY, headers=headers, timeout=60, verify=mutual.options["verify"]
        )
        assert (answer.status_code, answer.json().keys()) == (403, shape)
        assert "a client certificate is needed" in answer.text
        assert "WWW-Authenticate" not in answer.headers
        assert not any(name in answer.text for name in ("flowers", "petal", "sklearn", "iris"))
    if path == "/invocations":
        assert answer.json()["error_code"] == "PERMISSION_DENIED"


def test_probes_need_no_certificate(mutual: Served) -> None:
    for path in ("/livez", "/ready", "/metrics", "/v2/health/ready"):
        assert mutual.get(path).status_code == 200


def handshake_fails(url: str, ca: str, client: tuple[str, str], version: ssl.TLSVersion) -> None:
    """A client of TLS 1.3 has finished before it hears what the server says to its certificate."""
    context = trusting(ca, client)
    context.maximum_version = version
    with pytest.raises((ssl.SSLError, ConnectionResetError)), connect(url, context) as connection:
        ask(connection, "/livez")


@pytest.mark.parametrize("version", VERSIONS)
def test_wrong_certificates_do_not_connect(
    mutual: Served, parties: tuple[Party, Party], version: ssl.TLSVersion
) -> None:
    servers, clients = parties
    expired = clients.client("expired", not_before=LONG_AGO, not_after=LONG_AGO + datetime.timedelta(days=1))
    to_come = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)
    early = clients.client("early", not_before=to_come)
    stranger = servers.client("stranger")  # of the CA that the server's own certificate has
    for client in (expired, early, stranger):
        handshake_fails(mutual.url, servers.file, client, version)
    good = trusting(servers.file, clients.client("good"))
    good.maximum_version = version
    with connect(mutual.url, good) as connection:
        assert [ask(connection, "/schema") for _ in range(3)] == [200] * 3
    assert "Traceback" not in mutual.log


def test_a_ca_that_was_replaced_is_no_longer_accepted(tmp_path: Path, ours: Party, theirs: Party) -> None:
    server, new = ours.server(), Party(tmp_path / "new")
    mount = Mount(tmp_path / "tls", ca_crt=theirs.pem, **server)
    old_client, new_client = theirs.client("old"), new.client("new")
    settings, sessions = files(mount, str(mount / "ca.crt")), []
    with serving(model_path("iris"), WORKERS=1, options={"verify": ours.file}, **settings) as served:
        for version in VERSIONS:
            context = trusting(ours.file, old_client)
            context.maximum_version = version
            with connect(served.url, context) as connection:
                assert ask(connection, "/schema") == 200
                session = connection.session
            with connect(served.url, context, session) as connection:
                assert (ask(connection, "/schema"), connection.session_reused) == (200, True)
                sessions.append((context, connection.session))
        mount.put(ca_crt=new.pem, **server)
        wait_until(lambda: served.get("/ready") and "TLS files have changed" in served.log, "a look at the files")
        assert served.post("/predict", BODY, cert=new_client).status_code == 200
        for version in VERSIONS:
            handshake_fails(served.url, ours.file, old_client, version)
        # Nor by what was agreed on before.
        for context, session in sessions:
            failing = pytest.raises((ssl.SSLError, ConnectionResetError))
            with failing, connect(served.url, context, session) as connection:
                ask(connection, "/livez")


def test_keys_and_certificates_are_both_needed(tmp_path: Path, ours: Party, theirs: Party) -> None:
    (tmp_path / "keys").write_text(KEY)
    mount, client = Mount(tmp_path / "tls", **ours.server()), theirs.client("client")
    settings = {**files(mount, theirs.file), "API_KEYS_FILE": tmp_path / "keys", "AUTH_EXEMPT": "probes"}
    key = {"Authorization": f"Bearer {KEY}"}
    with serving(model_path("iris"), WORKERS=1, options={"verify": ours.file}, **settings) as served:
        found = {
            (bool(more.get("cert")), bool(more.get("headers"))): served.get("/schema", **more).status_code
            for more in ({}, {"headers": key}, {"cert": client}, {"headers": key, "cert": client})
        }
        assert found == {(False, False): 403, (False, True): 403, (True, False): 401, (True, True): 200}
        assert [served.get(path).status_code for path in ("/livez", "/ready", "/metrics")] == [200, 200, 403]


def test_while_it_is_loading(tmp_path: Path, ours: Party, theirs: Party) -> None:
    entered, leave = tmp_path / "entered", tmp_path / "leave"
    config = json.dumps({"entered": str(entered), "leave": str(leave)})
    mount, client = Mount(tmp_path / "tls", **ours.server()), theirs.client("client")
    settings = {**files(mount, theirs.file), "SERVING_MODEL_CONFIG": config, "WORKERS": 2}
    with serving(model_path("slow_to_load"), wait=False, options={"verify": ours.file}, **settings) as served:
        wait_until(entered.exists, "loading")
        assert [served.get(path).status_code for path in ("/livez", "/ready", "/schema")] == [200, 503, 403]
        assert served.get("/schema", cert=client).status_code == 503
        leave.touch()
        wait_until(served.ready, "readiness")
        assert served.get("/v1/models", cert=client).status_code == 200
