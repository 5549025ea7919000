"""JSON as clients write it: with NaN and Infinity, which Python's and other libraries put where a number is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import orjson

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(body: bytes, check: Callable[[Any], None] = lambda _: None) -> Any:
    """The value in `body`. Its NaN and Infinity are floats, and a value that may have such goes through `check`.

    Raises `ValueError`, `RecursionError`, or what `check` does.
    """
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
    check(value)
    return value
