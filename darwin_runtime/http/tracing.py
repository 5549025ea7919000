"""Which request is which: X-Request-ID and W3C Trace Context, accepted, passed on and returned.

Source: https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

_ID = re.compile(rb"[\w.:/+=@~-]{1,128}", re.ASCII)
_PARENT = re.compile(rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})")


class Trace(NamedTuple):
    """`request_id` is the client's, or ours; `parent` is the traceparent, if there is one, with us as the parent."""

    request_id: str
    parent: str = ""

    @property
    def trace_id(self) -> str:
        return self.parent[3:35]

    @property
    def headers(self) -> dict[str, str]:
        """What those who are asked on behalf of the request are told."""
        return {"X-Request-ID": self.request_id} | ({"traceparent": self.parent} if self.parent else {})


class Tracer:
    """Gives requests their `Trace`. One for each process, for ids must not be those of another."""

    def __init__(self) -> None:
        self._prefix = os.urandom(6).hex()
        self._numbers = itertools.count()

    def trace(self, headers: Mapping[bytes, bytes]) -> Trace:
        """Of a request with these headers. Ids that are no ids, by their length or letters, are not taken over."""
        given, parent = headers.get(b"x-request-id"), headers.get(b"traceparent")
        request_id = given.decode() if given and _ID.fullmatch(given) else f"{self._prefix}{next(self._numbers):08x}"
        found = _PARENT.fullmatch(parent) if parent else None
        if not found:
            return Trace(request_id)
        return Trace(request_id, f"00-{found[1].decode()}-{os.urandom(8).hex()}-{found[2].decode()}")
