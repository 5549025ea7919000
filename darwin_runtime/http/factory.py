"""The factory that puts a server together from its settings."""

from __future__ import annotations

import signal
from collections.abc import Callable

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.http.app import make_app
from darwin_runtime.http.connections import ConnectionLimiter
from darwin_runtime.http.metrics import SharedMetrics, WorkerMetrics
from darwin_runtime.http.server import Server, make_config
from darwin_runtime.http.service import Service
from darwin_runtime.http.settings import Settings
from darwin_runtime.protocols.feature_store import FeatureStore


def make_server(
    settings: Settings, metrics: SharedMetrics, number: int = 0, closed: Callable[[], None] = lambda: None
) -> Server:
    """A server without a model yet, which signals stop from now on. It calls `closed` once it accepts no more.

    What it counts is row `number` of `metrics`.
    """
    service = Service(
        BatchLimits(settings.batch_rows, settings.queue_rows, settings.request_timeout),
        settings.model_name,
        FeatureStore(settings.store_url, settings.store_admin_url) if settings.store_url else None,
        WorkerMetrics(metrics, number),
        settings.limits.request,
        settings.guard,
        names_version=settings.version_header,
    )
    limiter = ConnectionLimiter(settings.limits.connection, service.metrics.refused, service.metrics.connected)
    app = make_app(service, settings.root_path, settings.origins)
    config = make_config(app, limiter.protocol(), settings)
    server = Server(config, service, settings.drain_seconds, closed, one_of_many=number > 0)
    # Until uvicorn handles these itself, and afterwards, when it raises them again for whoever handled them before.
    for stopping in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping, server.handle_exit)
    return server
