"""Secrets in text, and their masks: credentials in URIs, signatures, auth headers, the values of secret variables."""

from __future__ import annotations

import base64
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping

_SECRET_NAME = re.compile(
    r"PASSW(OR)?D|PASSPHRASE|SECRET|CREDENTIAL|CONNECTION_STRING|_(PWD|PASS)$|(API|ACCESS|ACCOUNT|PRIVATE)_?KEY"
    r"|(^|_)(TOKEN|SAS)(_|$)",
    re.IGNORECASE,
)
# A variable's value that is a URI, or one of which the scheme was left out, with a login in it.
_LOGIN = re.compile(
    r"(?:[\w+.-]+://(?P<user>[^/\s:@]*)|(?P<bare>[^/\s:@]+)(?=:[^/])):(?P<password>\S+)@[^\s@/]+(?:/\S*)?"
)
_URI_NAME = re.compile(r"(URI|URL|PROXY)$", re.IGNORECASE)
# JSON whose strings may be secrets, whatever they are called in it.
_JSON_NAME = "SERVING_MODEL_CONFIG"
# Up to the last @ of the authority: passwords may hold any other character, quotes included.
_USERINFO = re.compile(r"(?<=://)[^/\s]+(?=@)")
_SIGNED_QUERY = re.compile(
    r"((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AccountKey|sig"
    r"|(?:token|password|passwd|secret(?:[_-]?access)?(?:[_-]?key)?|api[_-]?key))(?:=|%3D))[^&;\s'\"]+",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(r"((?:Basic|Bearer)(?:\s+|%20|\+))[A-Za-z0-9+/._~=%-]{6,}", re.IGNORECASE)
MASK = "***"

# What a model says of its input may hold all of it. To look through a megabyte for secrets takes a third of a second.
MAX_CHARACTERS = 64 * 1024


def mask_uri(text: str) -> str:
    """`text` with the credentials and signatures in its URIs masked."""
    return _SIGNED_QUERY.sub(rf"\1{MASK}", _USERINFO.sub(MASK, text))


def is_secret(name: str) -> bool:
    """Whether the variable of that name holds a secret, and not only says where one is."""
    return bool(_SECRET_NAME.search(name)) and not name.upper().endswith(("_FILE", "_PATH"))


class Redactor:
    """Replaces secrets in text: credentials in URIs, signatures, auth headers, and the values of secret variables."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        values: set[str] = set()
        for name, value in environ.items():
            value = value.strip()
            # A value of a few characters would blank out half of every line, and protects nothing.
            if is_secret(name) and len(value) >= 4:
                values |= _forms(value)
            if (login := _LOGIN.fullmatch(value)) and (login["bare"] is None or _URI_NAME.search(name)):
                values |= _login_forms(login["user"] or login["bare"] or "", login["password"])
        values |= _login_forms(environ.get("MLFLOW_TRACKING_USERNAME", ""), environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        for text in _json_strings(environ.get(_JSON_NAME, "")):
            values |= _forms(text) if len(text) >= 8 else set()
        ordered = sorted(values, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def __call__(self, text: str) -> str:
        if len(text) > MAX_CHARACTERS:
            # Some more is looked at, so that no secret is told in part because its end is cut off.
            return f"{self(text[:MAX_CHARACTERS])[: MAX_CHARACTERS // 2]}... ({len(text)} characters in all)"
        text = mask_uri(text)
        text = _AUTHORIZATION.sub(rf"\1{MASK}", text)
        return self._values.sub(MASK, text) if self._values else text


def _forms(value: str) -> set[str]:
    """How a secret may be written: as it is, quoted for a URI, in base64, and in JSON's or Python's quotes."""
    raw = os.fsencode(value)  # whatever bytes the environment has
    quoted = {urllib.parse.quote(raw, safe=""), urllib.parse.quote(raw), urllib.parse.quote_plus(raw)}
    quoted |= {re.sub("%..", lambda found: found[0].lower(), text) for text in quoted}
    coded = {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
    return {value, *quoted, *coded, json.dumps(value)[1:-1], repr(value)[1:-1]}


def _login_forms(user: str, password: str) -> set[str]:
    """How the login may be written that an authorization header or a URI, where it is quoted, has."""
    if len(password) < 4:
        return set()
    found: set[str] = set()
    for plain in {password, urllib.parse.unquote(password)}:
        found |= _forms(plain)
        for name in {user, urllib.parse.unquote(user)}:
            found |= _forms(f"{name}:{plain}")
    return found


def _json_strings(text: str) -> list[str]:
    """Every string in some JSON, but for the names; the text itself where it is none."""
    try:
        waiting = [json.loads(text or "null")]
    except (ValueError, RecursionError):
        return [text]
    found = []
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, (list, dict)):
            waiting += one.values() if isinstance(one, dict) else one
    return found


_redact: Callable[[str], str] = Redactor({})


def set_redactor(redact: Redactor) -> None:
    """Have `hide` redact with `redact` from now on."""
    global _redact
    _redact = redact


def hide(text: str) -> str:
    """`text` without the secrets of this process, for readers of anything else than the log."""
    return _redact(text)
