"""Role: the main container. Serves one MLflow model over HTTP.

Environment (empty means unset):
  MODEL_LOCAL_PATH        directory of the model, its parent, or `<dir>/model` where the model is in <dir> itself
  MLFLOW_MODEL_URI        where to download it from when MODEL_LOCAL_PATH is not set
  MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD
                          the MLflow server of that URI; MLflow's other variables apply as well
  HOST, PORT              where to listen, 0.0.0.0 and 8000; port 0 is any free one
  ROOT_PATH               the prefix under which a proxy shows this server, such as /models/iris
  MODEL_NAME              what to call the model in the log
  REQUEST_TIMEOUT_SECONDS how long a prediction may take, waiting included; by default MLflow's
                          MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT, else 60
  SERVING_MODEL_CONFIG    JSON object, the model_config of MLflow models that read one
  LOG_LEVEL, LOG_FORMAT, ENV, SERVICE_NAME
                          info; text or json (json unless ENV is local, dev or development); a name for each line

Exit codes: 0 stopped by SIGTERM or SIGINT; 1 the port is taken, or the model is not there, does not load, or fails on
its own input example; 2 bad settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import darwin_cache
import darwin_fetch
import darwin_model
import darwin_output
import darwin_protocols as protocols
from darwin_cells import InputError
from darwin_env import Reader
from darwin_log import Redactor, RoleError, log_settings, run_role
from darwin_model import Model, PredictionFailed, Refused
from darwin_protocols import Malformed, NotReady, Reply, TooSlow, Unsupported, Unwritable

T = TypeVar("T")

# A larger body is parsed beside the event loop, which must go on answering probes.
PARSE_ASIDE_BYTES = 64 * 1024

BACKLOG = 2048

logger = logging.getLogger("darwin.serve")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. One of `model_path` and `model_uri` is set; `model_path` wins."""

    model_path: Path | None
    model_uri: str
    model_name: str
    model_config: Mapping[str, Any]
    host: str
    port: int
    root_path: str
    request_timeout: float

    @classmethod
    def from_env(cls, read: Reader) -> Settings:
        """Raises `darwin_env.ConfigError` naming every bad variable."""
        path, uri = read.text("MODEL_LOCAL_PATH"), read.text("MLFLOW_MODEL_URI")
        darwin_fetch.check_access(read, "MLFLOW_MODEL_URI", "" if path else uri)
        if not path and not uri:
            read.problem("MODEL_LOCAL_PATH", "is not set, and MLFLOW_MODEL_URI neither", example="/models")
        root_path = read.text("ROOT_PATH").strip("/")
        timeout = read.number("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", 60, least=0.001)
        settings = cls(
            model_path=Path(path) if path else None,
            model_uri=uri,
            model_name=read.text("MODEL_NAME"),
            model_config=_model_config(read),
            host=read.text("HOST", "0.0.0.0"),  # noqa: S104 - a container is reached from outside
            port=read.integer("PORT", 8000, least=0, most=65535),
            root_path=f"/{root_path}" if root_path else "",
            request_timeout=read.number("REQUEST_TIMEOUT_SECONDS", timeout, least=0.001),
        )
        read.finish()
        return settings


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


class InferenceThread:
    """One thread that runs what it is given, in order. It never keeps the process from ending."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="inference", daemon=True).start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # whatever it is, the one waiting must hear of it
                    future.set_exception(error)


class Service:
    """The model behind the routes: absent until it has loaded and answered its own input example."""

    def __init__(self, request_timeout: float) -> None:
        self.request_timeout = request_timeout
        self.inference = InferenceThread()
        self.draining = False
        self.schema = Reply(503, b"")
        self._model: Model | None = None

    def use(self, model: Model) -> None:
        """From now on, answer with `model`."""
        # Once, for the input example can be large.
        self.schema = protocols.schema(model.plan, model.outputs, example_rows(model))
        self._model = model

    @property
    def model(self) -> Model:
        """Raises `NotReady` until there is one."""
        if self._model is None:
            raise NotReady("the model is still loading")
        return self._model

    async def predict(self, request: protocols.Request, write: Callable[[Any], bytes]) -> bytes:
        """The model's answer as `write` puts it. Raises what `Model.predict` does, `Unwritable` and `TooSlow`."""
        model = self.model
        future = self.inference.submit(lambda: write(model.predict(request.rows, request.params)))
        try:
            # Cancelling the wait also takes a job that has not begun off the queue.
            return await asyncio.wait_for(asyncio.wrap_future(future), self.request_timeout)
        except (asyncio.TimeoutError, TimeoutError):  # two classes until Python 3.11
            raise TooSlow(f"no answer within {self.request_timeout:g} seconds") from None


# Routes

# What went wrong was the client's or the model's doing, and has been told to the client.
EXPECTED = (InputError, Malformed, Unsupported, Refused, NotReady)

Handler = Callable[[HttpRequest], Awaitable[Response]]


def make_app(service: Service, root_path: str = "") -> ASGIApp:
    """The HTTP application. It works behind a proxy that strips `root_path` and behind one that doesn't."""

    async def predict(request: HttpRequest) -> Response:
        body, model = await request.body(), service.model
        parsed = await _parse(body, lambda: protocols.read_predict(body, model.plan, model.params))
        return Response(await service.predict(parsed, protocols.write_scores), media_type=protocols.JSON)

    async def invocations(request: HttpRequest) -> Response:
        body, model = await request.body(), service.model
        kind = request.headers.get("content-type")
        parsed = await _parse(body, lambda: protocols.read_invocations(body, kind, model.plan, model.params))
        return Response(await service.predict(parsed, protocols.write_predictions), media_type=protocols.JSON)

    async def schema(_: HttpRequest) -> Response:
        assert service.model
        return _response(service.schema)

    async def livez(_: HttpRequest) -> Response:
        return _json({"status": "alive"})

    async def ready(_: HttpRequest) -> Response:
        if service.draining:
            raise NotReady("the server is shutting down")
        assert service.model
        return _json({"status": "ready", "model_loaded": True})

    async def healthcheck(_: HttpRequest) -> Response:
        assert service.model
        return _json({"status": "SUCCESS", "message": "OK"})

    async def ping(_: HttpRequest) -> Response:
        assert service.model
        return Response("\n", media_type=protocols.JSON)

    async def version(_: HttpRequest) -> Response:
        return Response(darwin_model.mlflow_version(), media_type=protocols.TEXT)

    def darwin_failure(error: Exception) -> Reply:
        inputs = () if isinstance(error, NotReady) else service.model.plan.inputs
        return protocols.darwin_failure(error, inputs)

    routes: list[tuple[str, str, Handler, Callable[[Exception], Reply]]] = [
        ("POST", "/predict", predict, darwin_failure),
        ("GET", "/schema", schema, darwin_failure),
        ("GET", "/livez", livez, darwin_failure),
        ("GET", "/ready", ready, darwin_failure),
        ("GET", "/healthcheck", healthcheck, darwin_failure),
        ("GET", "/health", healthcheck, darwin_failure),
        ("POST", "/invocations", invocations, protocols.mlflow_failure),
        ("GET", "/ping", ping, protocols.mlflow_failure),
        ("GET", "/version", version, protocols.mlflow_failure),
    ]
    app = Starlette(
        routes=[Route(path, _speaking(handler, word), methods=[verb]) for verb, path, handler, word in routes],
        exception_handlers={HTTPException: _http_error},
    )

    async def rooted(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": root_path} if root_path else scope, receive, send)

    return rooted


def _speaking(handler: Handler, word: Callable[[Exception], Reply]) -> Handler:
    """`handler`, with every exception answered in its protocol's words."""

    async def handle(request: HttpRequest) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            if isinstance(error, TooSlow):
                logger.warning("%s: %s", request.url.path, error)
            elif not isinstance(error, EXPECTED):
                logger.error("%s failed: %s", request.url.path, error, exc_info=error)
            return _response(word(error))

    return handle


async def _parse(body: bytes, read: Callable[[], protocols.Request]) -> protocols.Request:
    return read() if len(body) <= PARSE_ASIDE_BYTES else await asyncio.to_thread(read)


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = protocols.dump({"detail": error.detail})
    return Response(body, error.status_code, error.headers, protocols.JSON)


def _json(body: Mapping[str, Any]) -> Response:
    return Response(protocols.dump(body), media_type=protocols.JSON)


def _response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, media_type=reply.media_type)


# Start-up


def example_rows(model: Model) -> Any:
    """The model's own input example, if it has one and our parsers take it."""
    if model.example is None:
        return None
    try:
        return protocols.read_invocations(model.example, protocols.JSON, model.plan, model.params).rows
    except (Malformed, InputError):
        return None


def self_test(model: Model) -> str:
    """Have `model` answer its own input example; say in a few words what was done. Raises `RoleError` if it can't."""
    if model.example is None:
        return "it has no input example to test it with"
    try:
        request = protocols.read_invocations(model.example, protocols.JSON, model.plan, model.params)
    except (Malformed, InputError) as error:
        logger.warning("the model's input example cannot be sent as a request: %s", error)
        request = None
    try:
        protocols.write_predictions(
            model.predict(request.rows, request.params) if request else model.predict_own_example()
        )
    except (Refused, PredictionFailed, Unwritable) as error:
        raise RoleError(f"the model in {model.directory} fails on its own input example: {error}") from error
    return "it answered its own input example"


def _manifest(directory: Path) -> darwin_cache.Manifest | None:
    """What `download.py` left word of, in an output or in the cache."""
    record = darwin_output.read(directory)
    return record.manifest if record else darwin_cache.manifest_of(directory)


def _altered(directory: Path) -> list[str]:
    """The files whose bytes, of the right number, are not those that were downloaded; reads all of them."""
    manifest = _manifest(directory)
    return manifest.altered(directory) if manifest else []


def check_whole(directory: Path) -> None:
    """Raise `RoleError` naming each file that is missing or has not the size that was downloaded."""
    manifest = _manifest(directory)
    try:
        damage = manifest.damage(directory) if manifest else []
    except OSError as error:
        raise RoleError(f"the model in {directory} cannot be read: {error}") from error
    if damage:
        raise RoleError(f"the model is damaged: {'; '.join(damage)}. Run download.py again, which replaces it")


def load(settings: Settings, directory: Path) -> Model:
    """Find, load and test the model; one that has only a URI is downloaded to `directory`. Raises `RoleError`."""
    path = settings.model_path
    if path is None:
        darwin_fetch.fetch_model(settings.model_uri, directory)
        path = directory
    found = darwin_model.find_model(path)
    check_whole(found)
    logger.info("loading the model in %s", found)
    try:
        model = darwin_model.load(found, settings.model_config)
    except RoleError as error:
        if altered := _altered(found):
            raise RoleError(f"{error}. {'; '.join(altered)}: delete {found} and run download.py again") from error
        raise
    outcome = self_test(model)
    logger.info("model %s is ready (%s): %s", settings.model_name or found, ", ".join(model.flavors), outcome)
    return model


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `RoleError` naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        raise RoleError(f"cannot listen on {_address(host, port)}: {error}") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, telling `service` as soon as a signal asks it to stop."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.draining = True
        super().handle_exit(sig, frame)


def serve(read: Reader, redact: Redactor) -> None:
    """Serve until a signal comes. Raises `RoleError` if the model, or the port, can't be had."""
    settings = Settings.from_env(read)
    log_settings(read.seen, redact)
    # Its INFO lines say again what ours say.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(_temporary_directory(settings)))
        service = Service(settings.request_timeout)
        config = uvicorn.Config(
            make_app(service, settings.root_path),
            loop="uvloop",
            http="httptools",
            lifespan="off",
            log_config=None,
            access_log=False,
            # A client that stops half-way through its request must not hold up the end.
            timeout_graceful_shutdown=math.ceil(settings.request_timeout) + 1,
        )
        server = Server(config, service)
        # Until uvicorn handles these itself, and afterwards, when it raises them again for whoever handled them before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.handle_exit)
        listener = stack.enter_context(bind(settings.host, settings.port))
        logger.info("listening on http://%s", _address(settings.host, listener.getsockname()[1]))

        def start() -> None:
            service.use(load(settings, directory))

        def started(loading: Future[None]) -> None:
            if loading.exception():
                server.should_exit = True

        loading = service.inference.submit(start)
        loading.add_done_callback(started)
        server.run(sockets=[listener])
        if loading.done() and (error := loading.exception()):
            raise error
        if not server.started:
            raise RoleError("the HTTP server did not start")
        logger.info("stopped")


@contextlib.contextmanager
def _temporary_directory(settings: Settings) -> Iterator[str]:
    if settings.model_path is not None:
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="darwin-model-", ignore_cleanup_errors=True) as directory:
        yield directory


def main(environ: Mapping[str, str] = os.environ) -> int:
    return run_role(serve, environ)


if __name__ == "__main__":
    sys.exit(main())
