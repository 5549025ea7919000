"""The settings of the main container, read from the environment, with their defaults."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from darwin_runtime.http import auth, cors
from darwin_runtime.http import tls as tls_module
from darwin_runtime.resources import default_workers
from darwin_runtime.settings import Reader
from darwin_runtime.storage import access, digest, manifest


class RequestLimits(NamedTuple):
    """What one request may bring, and how long its client may take to read a piece of the answer."""

    body_bytes: int
    rows: int
    send_seconds: float


class ConnectionLimits(NamedTuple):
    """What one connection may take: bytes of a head, and seconds to send a request and to read an answer.

    Beyond `max_connections`, only probes get another answer than 503. Beyond twice that, connections are closed.
    """

    head_bytes: int
    max_connections: int
    receive_seconds: float
    send_seconds: float


class Limits(NamedTuple):
    """What clients may take of the server."""

    request: RequestLimits
    connection: ConnectionLimits

    @classmethod
    def from_env(cls, read: Reader) -> Limits:
        body_bytes = round(read.number("MAX_BODY_MB", 64, minimum=0.001) * 1024**2)
        rows = read.integer("MAX_ROWS", 1_000_000, minimum=1)
        head_bytes = read.integer("MAX_HEADER_KB", 32, minimum=1) * 1024
        max_connections = read.integer("MAX_CONNECTIONS", 1000, minimum=1)
        receive_seconds = read.number("RECEIVE_TIMEOUT_SECONDS", 60, minimum=0.001)
        send_seconds = read.number("SEND_TIMEOUT_SECONDS", 60, minimum=0.001)
        return cls(
            RequestLimits(body_bytes, rows, send_seconds),
            ConnectionLimits(head_bytes, max_connections, receive_seconds, send_seconds),
        )


def default_limits() -> Limits:
    """The limits where the environment sets none."""
    return Limits.from_env(Reader({}))


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. One of `model_path` and `model_uri` is set; `model_path` wins."""

    model_path: Path | None
    model_uri: str
    model_name: str
    method: str
    store_url: str
    store_admin_url: str
    model_config: Mapping[str, Any]
    host: str
    port: int
    root_path: str
    request_timeout: float
    workers: int
    batching: str
    batch_rows: int
    queue_rows: int
    fast_path: bool
    limits: Limits
    keep_alive_seconds: float
    drain_seconds: float
    verify: str
    tls: tls_module.Context | None
    guard: auth.Guard | None
    origins: tuple[str, ...]
    required: str
    version_header: bool

    @classmethod
    def from_env(cls, read: Reader) -> Settings:
        """Raises `ConfigError` naming every bad variable."""
        path, uri = read.text("MODEL_LOCAL_PATH"), read.text("MLFLOW_MODEL_URI")
        access.check_access(read, "MLFLOW_MODEL_URI", "" if path else uri)
        if not path and not uri:
            read.problem("MODEL_LOCAL_PATH", "is not set, and MLFLOW_MODEL_URI neither", example="/models")
        root_path = read.text("ROOT_PATH").strip("/")
        timeout = read.number("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", 60, minimum=0.001)
        tls = tls_module.from_env(read)
        settings = cls(
            model_path=Path(path) if path else None,
            model_uri=uri,
            model_name=_model_name(read),
            method=read.text("PREDICT_METHOD"),
            store_url=read.text("FEATURE_STORE_URL"),
            store_admin_url=read.text("OFS_ADMIN_URL"),
            model_config=_model_config(read),
            host=read.text("HOST", "0.0.0.0"),  # noqa: S104 - a container is reached from outside
            port=read.integer("PORT", 8000, minimum=0, maximum=65535),
            root_path=f"/{root_path}" if root_path else "",
            request_timeout=read.number("REQUEST_TIMEOUT_SECONDS", timeout, minimum=0.001),
            workers=read.integer("WORKERS", default_workers(), minimum=1),
            batching=read.choice("BATCHING", "auto", ("auto", "on", "off")),
            batch_rows=read.integer("MAX_BATCH_ROWS", 256, minimum=1),
            queue_rows=read.integer("MAX_QUEUE_ROWS", 100_000, minimum=1),
            fast_path=read.choice("FAST_PATH", "auto", ("auto", "off")) == "auto",
            limits=Limits.from_env(read),
            # Longer than the 60 s of common proxies: a connection that we close while they send on it fails a request.
            keep_alive_seconds=read.number("KEEP_ALIVE_SECONDS", 75, minimum=0.001),
            drain_seconds=read.number("DRAIN_SECONDS", 5, minimum=0),
            verify=read.choice("VERIFY", "size", manifest.VERIFY),
            tls=tls,
            guard=auth.from_env(read, certificates=tls is not None and tls.asks_certificate),
            origins=cors.from_env(read),
            required=digest.required(read),
            version_header=read.flag("MODEL_VERSION_HEADER", False),
        )
        settings._check_store(read)
        read.finish()
        return settings

    def _check_store(self, read: Reader) -> None:
        urls = {"FEATURE_STORE_URL": self.store_url, "OFS_ADMIN_URL": self.store_admin_url}
        for name, url in urls.items():
            if any(urls.values()) and not url.startswith(("http://", "https://")):
                read.problem(name, "must be an http:// or https:// URL, like the other", example="http://features:8000")


def _model_config(read: Reader) -> dict[str, Any]:
    name = "SERVING_MODEL_CONFIG"
    text = read.raw(name)
    # It may hold a model's secrets, so neither the log nor an error shows it.
    read.seen[name] = "(set)" if text else ""
    try:
        config = json.loads(text or "{}")
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        read.problems.append(f"""{name}: must be a JSON object, for example {name}={{"temperature": 0.2}}""")
        return {}
    return config


def _model_name(read: Reader) -> str:
    name = read.text("MODEL_NAME", "model")
    if not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII):
        read.problem("MODEL_NAME", "is part of URLs: letters, digits, _, . and - only", example="iris")
    return name
