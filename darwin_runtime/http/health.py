"""Health: whether the model has loaded, whether a request that comes now is answered, and why not.

The process is live while it answers at all. It is not ready while the model loads, when the server shuts down, and when
the model is stuck in one answer.
"""

from __future__ import annotations

from typing import NamedTuple

from darwin_runtime.engine.batching import Batcher
from darwin_runtime.errors import NotReady
from darwin_runtime.http.auth import AuthPolicy
from darwin_runtime.http.docs import Documents
from darwin_runtime.model.about import About
from darwin_runtime.model.model import Model
from darwin_runtime.model.self_test import example_rows
from darwin_runtime.schema.model_spec import ModelSpec


class Loaded(NamedTuple):
    """The model that answers, and what there is to know of it."""

    model: Model
    contract: ModelSpec
    batcher: Batcher
    about: About
    documents: Documents

    @classmethod
    def of(
        cls,
        model: Model,
        batcher: Batcher,
        about: About,
        *,
        name: str,
        server_version: str,
        features: bool,
        policy: AuthPolicy,
    ) -> Loaded:
        """`model`, called `name`, behind `batcher`. `features` and `policy` are those of `Documents`."""
        contract = model.contract(name, about.version)
        # Once, for the input example can be large.
        example = example_rows(model)
        documents = Documents.of(contract, example, about, server_version, features=features, policy=policy)
        return cls(model, contract, batcher, about, documents)


class Health:
    """The state of one process. `draining` is set when the server shuts down."""

    def __init__(self) -> None:
        self.draining = False
        self._loaded: Loaded | None = None

    def set_loaded(self, loaded: Loaded) -> None:
        """The model has loaded and answered its own input example."""
        self._loaded = loaded

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def keep_alive(self) -> bool:
        """Whether connections may stay open: not when another server is about to take over."""
        return self._loaded is not None and not self.draining

    @property
    def loaded(self) -> Loaded:
        """Raises `NotReady` until there is a model."""
        if self._loaded is None:
            raise NotReady("the model is still loading")
        return self._loaded

    def check_loaded(self) -> None:
        """Raise `NotReady` until there is a model."""
        _ = self.loaded

    def check_ready(self) -> None:
        """Raise `NotReady` unless a request that comes now would be answered."""
        if self.draining:
            raise NotReady("the server is shutting down")
        if stuck := self.loaded.batcher.stuck:
            raise NotReady(f"the model has been computing one answer for {stuck:.0f} s, longer than a request may take")
