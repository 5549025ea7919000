"""Who gets in: requests with a key from a mounted file, and connections with a client certificate.

Sources: RFC 9110, 11 (401, 403, WWW-Authenticate, Basic in RFC 7617); RFC 6750 (Bearer). A key that is not known is a
401 like none at all, for only then does a browser ask its user again; a missing certificate is a 403, for nothing that
could be added to the request would help.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from starlette.types import Scope

from darwin_runtime.errors import Forbidden, Unauthorized, UnusableFile
from darwin_runtime.http.reloading import ReloadingFile, content
from darwin_runtime.settings import Reader

# Every one of them is compared with, for each request.
MAX_KEYS = 1000

# What the server's side of the connection puts into the scope's state, if the client has shown a valid certificate.
CERTIFIED = "client_certificate"

# What can be left open. Of the model, probes tell nothing; readiness routes with its name in them do.
EXEMPTIBLE = {
    "probes": frozenset(
        {"/livez", "/ready", "/healthcheck", "/health", "/ping", "/v2/health/live", "/v2/health/ready"}
    ),
    "metrics": frozenset({"/metrics"}),
}

_KEY = re.compile(rb"[!-~]{16,}")
_REALM = 'realm="model server"'

logger = logging.getLogger("darwin.serve")


class AuthPolicy(NamedTuple):
    """What a request to any path but the `exempt` ones needs."""

    key: bool = False
    certificate: bool = False
    exempt: frozenset[str] = frozenset()


class Guard:
    """Tells whether a request may be answered, by its headers and its connection alone."""

    def __init__(self, keys: Keys | None, *, certificates: bool, exempt: frozenset[str]) -> None:
        self.policy = AuthPolicy(keys is not None, certificates, exempt)
        self._keys = keys

    def refusal(self, scope: Scope, headers: Mapping[bytes, bytes], path: str) -> Forbidden | Unauthorized | None:
        """What is wrong with a request to `path`, if anything is."""
        policy = self.policy
        if path in policy.exempt:
            return None
        if policy.certificate and not scope.get("state", {}).get(CERTIFIED):
            return Forbidden("a client certificate is needed: connect with one of the CA that this server trusts")
        if self._keys is None:
            return None
        given = headers.get(b"authorization")
        if given is None:
            return Unauthorized(
                "an API key is needed: send it as Authorization: Bearer <key>, or as the password of Basic",
                _challenges(""),
            )
        key = _offered(given)
        if key is not None and self._keys.is_valid(key):
            return None
        return Unauthorized("this API key is not valid", _challenges(', error="invalid_token"'))


def _challenges(error: str) -> tuple[tuple[str, str], ...]:
    return ("WWW-Authenticate", f"Bearer {_REALM}{error}"), ("WWW-Authenticate", f'Basic {_REALM}, charset="UTF-8"')


def _offered(authorization: bytes) -> bytes | None:
    """The key in the header, if that can be read."""
    scheme, _, credentials = authorization.partition(b" ")
    scheme, credentials = scheme.lower(), credentials.strip()
    if scheme == b"bearer":
        return credentials
    if scheme != b"basic":
        return None
    try:
        _, colon, password = base64.b64decode(credentials, validate=True).partition(b":")
    except binascii.Error:
        return None
    return password if colon else None


class Keys:
    """The keys in the file at `path`, which may change. Only their digests are kept."""

    def __init__(self, path: Path) -> None:
        """Raises `UnusableFile`, also if there is no key, or if a line is none."""
        digests, bad = _parse(path)
        if bad:
            raise UnusableFile(
                f"API_KEYS_FILE: line {bad[0]} of {path} is no key, which is 16 printable ASCII characters or more, "
                "without spaces"
            )
        if not digests:
            raise UnusableFile(f"API_KEYS_FILE: there is no key in {path}")
        self._digests = ReloadingFile([path], lambda: _parse(path), lambda parsed: self._renewed(path, *parsed))

    def is_valid(self, key: bytes) -> bool:
        """Whether `key` is one of them, in a time that does not tell which, or how much of one it is."""
        digest = hashlib.sha256(key).digest()
        known = False
        for each in self._digests.value[0]:
            known |= hmac.compare_digest(each, digest)
        return known

    @staticmethod
    def _renewed(path: Path, digests: tuple[bytes, ...], bad: list[int]) -> None:
        if bad:
            # A key that was taken out is no longer valid, whatever else has happened to the file.
            logger.error("API_KEYS_FILE: %s has changed, and line %d of it is no key; the others apply", path, bad[0])
        if digests:
            logger.info("API_KEYS_FILE: %s has changed: %d keys are valid from now on", path, len(digests))
        else:
            logger.error("API_KEYS_FILE: there is no key left in %s: nobody is let in", path)


def _parse(path: Path) -> tuple[tuple[bytes, ...], list[int]]:
    """The digests of the keys in a file, and the numbers of the lines that are no keys. Raises `UnusableFile`."""
    digests: dict[bytes, None] = {}
    bad: list[int] = []
    for number, line in enumerate(content("API_KEYS_FILE", path).split(b"\n"), 1):
        line = line.strip()
        if _KEY.fullmatch(line) and not line.startswith(b"#"):
            digests[hashlib.sha256(line).digest()] = None
        elif line and not line.startswith(b"#"):
            bad.append(number)
    if len(digests) > MAX_KEYS:
        raise UnusableFile(f"API_KEYS_FILE: {path} has {len(digests)} keys, more than {MAX_KEYS}")
    return tuple(digests), bad


def from_env(read: Reader, *, certificates: bool) -> Guard | None:
    """The guard that API_KEYS_FILE and AUTH_EXEMPT ask for; `certificates` tells whether clients need one."""
    keys = None
    if path := read.text("API_KEYS_FILE"):
        if not path.startswith("/"):
            # Who sets the key itself by mistake is not to find it in the log.
            read.problems.append(
                "API_KEYS_FILE: must be the absolute path of a file, not a key, "
                "for example API_KEYS_FILE=/etc/darwin/keys/api-keys"
            )
        else:
            try:
                keys = Keys(Path(path))
            except UnusableFile as error:
                read.problems.append(f"{error}, for example API_KEYS_FILE=/etc/darwin/keys/api-keys")
    groups = [group.strip().lower() for group in read.text("AUTH_EXEMPT", "probes,metrics").split(",")]
    if groups == ["none"]:
        groups = []
    if not EXEMPTIBLE.keys() >= set(groups):
        read.problem("AUTH_EXEMPT", f"must be some of {', '.join(EXEMPTIBLE)}, or none", example="probes,metrics")
        groups = []
    if keys is None and not certificates:
        return None
    return Guard(keys, certificates=certificates, exempt=frozenset().union(*(EXEMPTIBLE[group] for group in groups)))
