"""The endpoints: one method a route, and `ROUTES`, the table of all routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import MethodType
from typing import NamedTuple

from starlette.exceptions import HTTPException

from darwin_runtime.errors import NotFound
from darwin_runtime.http import metrics as metrics_module
from darwin_runtime.http.context import Answer, Endpoint, Handler, RequestContext
from darwin_runtime.http.inference import Inference
from darwin_runtime.http.service import VERSION, Service
from darwin_runtime.model.diagnose import mlflow_version
from darwin_runtime.protocols import base as protocols
from darwin_runtime.protocols import darwin, kserve_v1, mlflow_scoring, open_inference
from darwin_runtime.protocols.base import TEXT, Reply

DARWIN, MLFLOW, V1, V2, OTHER = "darwin", "mlflow", "kserve_v1", "kserve_v2", "other"

# The errors of all other routes are Darwin's, which show the inputs of the model's signature.
_RENDERERS = {V1: kserve_v1.render_error, V2: open_inference.render_error, MLFLOW: mlflow_scoring.render_error}


class Endpoints:
    """The answers of all routes. Those that predict return `Inference.answer` without awaiting it themselves."""

    def __init__(self, service: Service, root_path: str) -> None:
        self.service = service
        self.health = service.health
        self.root_path = root_path
        self.answer = Inference(service).answer

    def predict(self, context: RequestContext) -> Awaitable[Answer]:
        return self.answer(context, darwin, self.service.store)

    def invocations(self, context: RequestContext) -> Awaitable[Answer]:
        return self.answer(context, mlflow_scoring)

    def v1_predict(self, context: RequestContext) -> Awaitable[Answer]:
        self._check_name(context)
        return self.answer(context, kserve_v1)

    def v2_infer(self, context: RequestContext) -> Awaitable[Answer]:
        self._check_model(context)
        return self.answer(context, open_inference)

    async def schema(self, _: RequestContext) -> Reply:
        return self.health.loaded.documents.schema

    async def version(self, _: RequestContext) -> Reply:
        return Reply(200, mlflow_version().encode(), TEXT)

    async def v1_models(self, _: RequestContext) -> Reply:
        return protocols.reply(200, {"models": [self.service.name]})

    async def v1_model(self, context: RequestContext) -> Reply:
        if context.path("name").endswith(":predict"):
            raise HTTPException(405, headers={"Allow": "POST"})
        self._check_name(context)
        self.health.check_ready()
        return protocols.reply(200, {"name": self.service.name, "ready": True})

    async def v2_server(self, _: RequestContext) -> Reply:
        return open_inference.server_metadata(VERSION)

    async def v2_model(self, context: RequestContext) -> Reply:
        self._check_model(context)
        return self.health.loaded.documents.v2

    # For people

    async def root(self, context: RequestContext) -> Reply:
        """The page for browsers; else liveness, for which KServe's V1 clients take it."""
        return await (self.page if b"text/html" in context.headers.get(b"accept", b"") else self.livez)(context)

    async def page(self, _: RequestContext) -> Reply:
        return self.health.loaded.documents.page

    async def openapi(self, _: RequestContext) -> Reply:
        return self.health.loaded.documents.openapi(self.root_path)

    # For machines that ask all day

    async def livez(self, _: RequestContext) -> Reply:
        return protocols.reply(200, {"status": "alive"})

    async def ready(self, _: RequestContext) -> Reply:
        self.health.check_ready()
        return protocols.reply(200, {"status": "ready", "model_loaded": True})

    async def healthcheck(self, _: RequestContext) -> Reply:
        self.health.check_loaded()
        return protocols.reply(200, {"status": "SUCCESS", "message": "OK"})

    async def ping(self, _: RequestContext) -> Reply:
        self.health.check_loaded()
        return Reply(200, b"\n")

    async def v2_live(self, _: RequestContext) -> Reply:
        return protocols.reply(200, {"live": True})

    async def v2_ready(self, _: RequestContext) -> Reply:
        self.health.check_ready()
        return protocols.reply(200, {"ready": True})

    async def v2_model_ready(self, context: RequestContext) -> Reply:
        self._check_model(context)
        self.health.check_ready()
        return protocols.reply(200, {"name": self.service.name, "ready": True})

    async def metrics(self, context: RequestContext) -> Reply:
        known = self.health.loaded if self.health.is_loaded else None
        names = {"name": self.service.name, "version": "", "flavor": "", "digest": "", "fallback": ""}
        if known:
            names |= {"version": known.contract.version, "flavor": ",".join(known.model.flavors)}
            names |= {"digest": known.about.digest, "fallback": known.about.fallback}
        seconds = known.about.load_seconds if known else None
        accept = context.headers.get(b"accept", b"").decode("latin-1")
        shared = self.service.metrics.shared
        body, media_type = await asyncio.to_thread(metrics_module.exposition, shared, names, seconds, accept)
        return Reply(200, body, media_type)

    # Names, and errors

    def _check_name(self, context: RequestContext) -> None:
        """Raise `NotFound` unless the path has the name that the model is called here."""
        name, ours = context.path("name"), self.service.name
        if name != ours:
            raise NotFound(f"there is no model {name[:100]!r} here: it is called {ours!r} (MODEL_NAME)")

    def _check_model(self, context: RequestContext) -> None:
        """Raise `NotFound` unless the path has the model's name and, if any, its version."""
        self._check_name(context)
        version, known = context.scope["path_params"].get("version"), self.health.loaded.contract.version
        if version is not None and version != known:
            raise NotFound(
                f"there is no version {version[:100]!r} here: {f'it is {known!r}' if known else 'it has none'}"
            )

    def endpoint(self, protocol: str, handler: Handler, *, quiet: bool = False) -> Endpoint:
        """`handler` behind a route of `protocol`, which renders every error."""
        return Endpoint(handler, protocol, _RENDERERS.get(protocol, self._render_darwin_error), quiet)

    def _render_darwin_error(self, error: Exception) -> Reply:
        inputs = self.health.loaded.contract.input_schema.inputs if self.health.is_loaded else ()
        return darwin.render_error(error, inputs)

    def by_route(self) -> dict[tuple[str, str], Endpoint]:
        """The endpoint of each verb and path in `ROUTES`."""
        return {
            (route.verb, path): self.endpoint(route.protocol, MethodType(route.method, self), quiet=route.quiet)
            for route in ROUTES
            for path in route.paths
        }


class Route(NamedTuple):
    """`method` of `Endpoints` answers `verb` at `paths`; GET includes HEAD. Machines ask a `quiet` one all day."""

    verb: str
    paths: tuple[str, ...]
    method: Callable[[Endpoints, RequestContext], Awaitable[Answer]]
    protocol: str
    quiet: bool = False


_MODEL, _VERSION = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"

ROUTES = (
    Route("POST", ("/predict",), Endpoints.predict, DARWIN),
    Route("POST", ("/invocations",), Endpoints.invocations, MLFLOW),
    Route("POST", ("/v1/models/{name}:predict",), Endpoints.v1_predict, V1),
    Route("POST", (f"{_MODEL}/infer", f"{_VERSION}/infer"), Endpoints.v2_infer, V2),
    Route("GET", ("/schema",), Endpoints.schema, DARWIN),
    Route("GET", ("/version",), Endpoints.version, MLFLOW),
    Route("GET", ("/v1/models",), Endpoints.v1_models, V1),
    Route("GET", ("/v1/models/{name}",), Endpoints.v1_model, V1),
    Route("GET", ("/v2",), Endpoints.v2_server, V2),
    Route("GET", (_MODEL, _VERSION), Endpoints.v2_model, V2),
    Route("GET", ("/",), Endpoints.root, OTHER),
    Route("GET", ("/docs",), Endpoints.page, OTHER),
    Route("GET", ("/openapi.json",), Endpoints.openapi, OTHER),
    Route("GET", ("/livez",), Endpoints.livez, DARWIN, quiet=True),
    Route("GET", ("/ready",), Endpoints.ready, DARWIN, quiet=True),
    Route("GET", ("/healthcheck", "/health"), Endpoints.healthcheck, DARWIN, quiet=True),
    Route("GET", ("/ping",), Endpoints.ping, MLFLOW, quiet=True),
    Route("GET", ("/v2/health/live",), Endpoints.v2_live, V2, quiet=True),
    Route("GET", ("/v2/health/ready",), Endpoints.v2_ready, V2, quiet=True),
    Route("GET", (f"{_MODEL}/ready", f"{_VERSION}/ready"), Endpoints.v2_model_ready, V2, quiet=True),
    Route("GET", ("/metrics",), Endpoints.metrics, OTHER, quiet=True),
)
