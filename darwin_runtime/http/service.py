"""The service: one model behind all routes, with the limits, the figures and the guard that they share."""

from __future__ import annotations

from collections.abc import Callable

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.engine.batching import Batcher
from darwin_runtime.engine.inference_thread import InferenceThread
from darwin_runtime.http.auth import AuthPolicy, Guard
from darwin_runtime.http.health import Health, Loaded
from darwin_runtime.http.metrics import SharedMetrics, WorkerMetrics
from darwin_runtime.http.settings import RequestLimits, default_limits
from darwin_runtime.model.about import About
from darwin_runtime.model.model import Model
from darwin_runtime.protocols.feature_store import FeatureStore

VERSION = "0.1.0"


class Service:
    """The model behind the routes: absent until it has loaded and answered its own input example.

    `name` is what protocols with names call the model, `store` where features can be looked up, if anywhere, and
    `guard` says who may ask, if not everybody. With `names_version` each prediction has the header `X-Model-Version`.
    """

    def __init__(
        self,
        batch_limits: BatchLimits,
        name: str = "model",
        store: FeatureStore | None = None,
        metrics: WorkerMetrics | None = None,
        request_limits: RequestLimits | None = None,
        guard: Guard | None = None,
        *,
        names_version: bool = False,
    ) -> None:
        self.batch_limits = batch_limits
        self.request_limits = request_limits or default_limits().request
        # Of answers that are being sent, all of those that are large.
        self.unsent = 0
        self.name = name
        self.store = store
        self.metrics = metrics or WorkerMetrics(SharedMetrics(1), 0)
        self.guard = guard
        self.names_version = names_version
        # Of each prediction's answer.
        self.model_headers: list[tuple[bytes, bytes]] = []
        self.health = Health()
        self.inference_thread = InferenceThread()
        # Called when the model hangs.
        self.on_hang: Callable[[], None] = lambda: None
        # Called when the server ends, the last first.
        self.on_close: list[Callable[[], None]] = [store.close] if store else []

    def use(
        self,
        model: Model,
        about: About | None = None,
        *,
        batching: bool = False,
        on_hang: Callable[[], None] = lambda: None,
    ) -> None:
        """From now on, answer with `model`; `on_hang` is the `Batcher`'s."""
        self.on_hang = on_hang
        batcher = Batcher(
            model.predict,
            self.inference_thread,
            self.batch_limits,
            batching=batching,
            on_hang=on_hang,
            watcher=self.metrics,
        )
        loaded = Loaded.of(
            model,
            batcher,
            about or About(),
            name=self.name,
            server_version=VERSION,
            features=self.store is not None,
            policy=self.guard.policy if self.guard else AuthPolicy(),
        )
        version = loaded.about.version.encode("ascii", "ignore")
        self.model_headers = [(b"x-model-version", version)] if self.names_version and version else []
        self.health.set_loaded(loaded)

    def close(self) -> None:
        """The server has ended: write and close what is open."""
        for close in reversed(self.on_close):
            close()
