"""JSON as clients write it: with NaN and Infinity, which Python's and other libraries put where a number is missing."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(body: bytes) -> Any:
    """The value in `body`, whose NaN and Infinity are floats. Raises `ValueError` or `RecursionError`."""
    # The fast parser is strict. Only a body that it refuses pays for another one.
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        if b"NaN" not in body and b"Infinity" not in body:
            raise
    text = body.decode()
    value = json.loads(text)
    if _SURROGATE.search(text):
        # Python reads half of a pair of surrogates, which is no text: to encode one raises.
        json.dumps(value, ensure_ascii=False).encode()
    return value
