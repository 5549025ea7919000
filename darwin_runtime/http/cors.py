"""Which pages of other origins may ask from a browser. Source: https://fetch.spec.whatwg.org/#http-cors-protocol."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from darwin_runtime.settings import Reader

# As browsers send it: lower case, and neither a path nor a slash at its end.
_ORIGIN = re.compile(r"https?://([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])(:\d{1,5})?")
_DEFAULT_PORT = re.compile(r"http://.*:80|https://.*:443")

ASKED_WITH = (
    "Authorization",
    "Content-Type",
    "Inference-Header-Content-Length",
    "X-Request-ID",
    "traceparent",
    "Accept",
)
TOLD = ("X-Request-ID", "Retry-After", "Inference-Header-Content-Length", "WWW-Authenticate")


def from_env(read: Reader) -> tuple[str, ...]:
    """The origins in CORS_ORIGINS; none by default."""
    name = "CORS_ORIGINS"
    origins = [origin.strip() for origin in read.text(name).split(",") if origin.strip()]
    for origin in origins:
        if origin == "*":
            if len(origins) > 1:
                read.problem(name, "* stands for every origin, and alone", example="*")
        elif not _ORIGIN.fullmatch(origin) or _DEFAULT_PORT.fullmatch(origin):
            why = f"{origin!r} is no origin, which has a scheme, a host and, unless it is the usual one, a port, alone"
            read.problem(name, why, example="https://app.example,http://localhost:3000")
    return tuple(origins)


def shared(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """`app`, which pages of `origins` may ask, with a key if they have one; browsers add none by themselves."""
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=("GET", "POST"), allow_headers=ASKED_WITH, expose_headers=TOLD
    )
