"""TLS from mounted files that are replaced while the server runs, and client certificates if a CA is given for them.

Each connection is made with the context of its time. One that was loaded anew has its own session tickets, so that no
session of before a change, whose client was checked against the CA of then, goes on after it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from darwin_runtime.errors import UnusableFile
from darwin_runtime.http.reloading import ReloadingFile, content
from darwin_runtime.settings import Reader

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

logger = logging.getLogger("darwin.serve")


@dataclass(frozen=True)
class Files:
    """Where the server's certificate (its chain after it) and key are, and the CA of clients' certificates, if any."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def all(self) -> list[Path]:
        return [self.cert, self.key, *([self.client_ca] if self.client_ca else [])]


class Context(ssl.SSLContext):
    """What makes each connection with the newest usable `files`."""

    def __new__(cls, *_: Any) -> Context:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, files: Files) -> None:
        """Raises `UnusableFile`."""
        self.asks_certificate = files.client_ca is not None
        self.about = f"the TLS certificate in {files.cert}"
        self._newest = ReloadingFile(files.all, lambda: _load(files), self._renewed)

    def wrap_bio(self, *args: Any, **given: Any) -> ssl.SSLObject:
        return self._newest.value[0].wrap_bio(*args, **given)

    def _renewed(self, _: object) -> None:
        logger.info("the TLS files have changed: new connections are made with them")
        self.log_expiry()

    def log_expiry(self) -> None:
        """Say how long the server's certificate is valid."""
        _, expiry = self._newest.value
        if expiry < datetime.now(timezone.utc):
            logger.error("%s has expired, on %s: clients refuse it", self.about, expiry.isoformat())
        else:
            logger.info("%s is valid until %s", self.about, expiry.isoformat())


def _load(files: Files) -> tuple[ssl.SSLContext, datetime]:
    """A context with what is in `files`, and when the certificate expires. Raises `UnusableFile`."""
    pem = _text("TLS_CERT_FILE", files.cert)
    chain = _CERTIFICATE.findall(pem)
    if not chain:
        raise UnusableFile(f"TLS_CERT_FILE: there is no certificate in {files.cert}, in PEM")
    if "PRIVATE KEY-----" not in _text("TLS_KEY_FILE", files.key):
        raise UnusableFile(f"TLS_KEY_FILE: there is no private key in {files.key}, in PEM")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client of TLS 1.2 could have us do the expensive part of a handshake over and over.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])

    def refuse() -> str:  # else OpenSSL would ask at the terminal
        raise UnusableFile(f"TLS_KEY_FILE: the key in {files.key} is encrypted: give one without a password")

    try:
        context.load_cert_chain(files.cert, files.key, password=refuse)
        expiry = _expiry(ssl.PEM_cert_to_DER_cert(chain[0]))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UnusableFile(
                f"the key in {files.key} (TLS_KEY_FILE) is not that of {files.cert} (TLS_CERT_FILE)"
            ) from None
        raise UnusableFile(f"{files.cert} and {files.key} (TLS_CERT_FILE, TLS_KEY_FILE): {_reason(error)}") from None
    except (OSError, ValueError, IndexError) as error:
        raise UnusableFile(f"{files.cert} and {files.key} (TLS_CERT_FILE, TLS_KEY_FILE): {error}") from None
    if files.client_ca:
        authorities = _CERTIFICATE.findall(_text("TLS_CLIENT_CA_FILE", files.client_ca))
        if not authorities:
            raise UnusableFile(f"TLS_CLIENT_CA_FILE: there is no certificate in {files.client_ca}, in PEM")
        try:
            context.load_verify_locations(cadata="\n".join(authorities))
        except ssl.SSLError as error:
            raise UnusableFile(f"TLS_CLIENT_CA_FILE: {files.client_ca}: {_reason(error)}") from None
        # Probes of the kubelet have none; what else needs one, `auth.Guard` says.
        context.verify_mode = ssl.CERT_OPTIONAL
    return context, expiry


def _text(name: str, path: Path) -> str:
    return content(name, path).decode("latin-1")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "cannot be read").replace("_", " ").lower()


def _expiry(der: bytes) -> datetime:
    """When a certificate expires. Source: RFC 5280, 4.1, in DER."""

    def inside(at: int) -> tuple[int, int]:
        """Where the content of the element at `at` begins and ends."""
        length, at = der[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(der[at : at + size], "big"), at + size
        return at, at + length

    at, _ = inside(inside(0)[0])
    # The version may be left out; then come the serial number, the algorithm and the issuer.
    for _ in range(4 if der[at] == 0xA0 else 3):
        _, at = inside(at)
    _, at = inside(inside(at)[0])  # behind notBefore
    begin, end = inside(at)
    written = der[begin:end].decode("ascii")
    if der[at] == 0x17:  # UTCTime, of two digits for the year
        written = ("19" if written >= "50" else "20") + written
    return datetime.strptime(written, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc)


def peer_has_certificate(transport: asyncio.BaseTransport) -> bool:
    """Whether the client at the other end has shown a certificate that was found valid in the handshake."""
    connection = transport.get_extra_info("ssl_object")
    return connection is not None and bool(connection.getpeercert())


def from_env(read: Reader) -> Context | None:
    """What the settings TLS_... ask for, if they do."""
    cert, key, client_ca = read.text("TLS_CERT_FILE"), read.text("TLS_KEY_FILE"), read.text("TLS_CLIENT_CA_FILE")
    if not cert or not key:
        if cert or key or client_ca:
            missing = "TLS_KEY_FILE" if cert else "TLS_CERT_FILE"
            given = "TLS_CERT_FILE" if cert else "TLS_KEY_FILE" if key else "TLS_CLIENT_CA_FILE"
            example = "/etc/darwin/tls/tls.key" if cert else "/etc/darwin/tls/tls.crt"
            read.problem(missing, f"is not set, and {given} needs it", example=example)
        return None
    try:
        return Context(Files(Path(cert), Path(key), Path(client_ca) if client_ca else None))
    except UnusableFile as error:
        read.problems.append(
            f"{error}, for example TLS_CERT_FILE=/etc/darwin/tls/tls.crt TLS_KEY_FILE=/etc/darwin/tls/tls.key"
        )
        return None
