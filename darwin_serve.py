"""Role: the main container. Serves one MLflow model over HTTP.

Environment (empty means unset; README has the defaults, `darwin_runtime/http/settings.py` reads it):
  MODEL_LOCAL_PATH        directory of the model, its parent, or `<dir>/model` where the model is in <dir> itself
  MLFLOW_MODEL_URI        where to download it from when MODEL_LOCAL_PATH is not set
  MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD
                          the MLflow server of that URI; MLflow's other variables apply as well
  HOST, PORT              where to listen; port 0 is any free one
  ROOT_PATH               the prefix under which a proxy shows this server, such as /models/iris
  MODEL_NAME              the model's name in URLs, metrics and the log
  MODEL_VERSION_HEADER    whether the answer of a prediction has the header X-Model-Version
  PREDICT_METHOD          the model's method, such as predict_proba, for requests that name none
  FEATURE_STORE_URL, OFS_ADMIN_URL
                          where features are looked up for requests that name them by key
  REQUEST_TIMEOUT_SECONDS how long a prediction may take, waiting included; else MLflow's own
                          MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
  WORKERS                 processes that predict
  BATCHING                auto, on or off: put requests that wait together; auto where the model's rows are independent
  MAX_BATCH_ROWS, MAX_QUEUE_ROWS
                          rows that go to the model at once, and that may wait
  FAST_PATH               auto or off: call the model directly where that is proven to answer what MLflow answers
  VERIFY                  size, sha256 or off: how to compare the files with what was downloaded, before loading
  MAX_BODY_MB, MAX_ROWS   the most that one request may bring
  MAX_HEADER_KB           how large a request's head may be
  MAX_CONNECTIONS         connections that are served at the same time, for each worker
  RECEIVE_TIMEOUT_SECONDS, SEND_TIMEOUT_SECONDS
                          how long a client may take to send a request, and to read the answer
  KEEP_ALIVE_SECONDS      how long a connection may stay open without a request
  REQUIRE_SHA256          load only the model whose directory has this digest: see README
  DRAIN_SECONDS           how long requests are still answered after SIGTERM, while /ready returns 503
  SERVING_MODEL_CONFIG    JSON object, the model_config of MLflow models that read one
  API_KEYS_FILE           a file with keys, one a line; then requests need one of them
  TLS_CERT_FILE, TLS_KEY_FILE
                          the certificate and key to serve HTTPS with, instead of HTTP
  TLS_CLIENT_CA_FILE      the CA whose certificates clients need
  AUTH_EXEMPT             paths that need neither key nor certificate: probes,metrics, one of them, or none
  CORS_ORIGINS            origins whose pages may ask from a browser, such as https://app.example, or *
  LOG_LEVEL, LOG_FORMAT, ENV, SERVICE_NAME
                          level; text or json (json unless ENV is local, dev or development); a name for each line

Exit codes: 0 stopped by SIGTERM or SIGINT; 1 the port is taken, or the model is not there, does not load, fails on its
own input example, or hangs; 2 bad settings.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from darwin_runtime.engine.processes import run_worker, signal_socket
from darwin_runtime.engine.workers import WorkerJob, supervise
from darwin_runtime.http.metrics import SharedMetrics
from darwin_runtime.http.server import Server, allow_files, listening, run
from darwin_runtime.http.settings import Settings
from darwin_runtime.resources import cpu_limit, keep_freed_buffers, share_cpus
from darwin_runtime.role import log_settings, run_role
from darwin_runtime.storage import disk
from darwin_runtime.storage.fetch import fetch_model

if TYPE_CHECKING:
    # numpy reads the number of threads at import, and that is set first. So functions import this, the factory and the
    # self-test at run time.
    from darwin_runtime.model.model import Model
    from darwin_runtime.settings import Reader

# What a process needs, beyond answering its last request and draining, to end.
SPARE_SECONDS = 5.0

# How `supervise` starts a worker that loads by itself: with this, its number, and the file descriptors of the listener,
# of what is counted, and of the channel.
WORKER = "--worker"

logger = logging.getLogger("darwin.serve")


def begin(server: Server, settings: Settings, get: Callable[[], Model]) -> Future[None]:
    """On its inference thread, have `server` use the model from `get`, once that has answered its own example."""
    from darwin_runtime.model import self_test
    from darwin_runtime.model.about import about_model

    def start() -> None:
        loaded, began = get(), time.monotonic()
        model = self_test.make_ready(loaded, settings.model_name, fast_path=settings.fast_path)
        batching = settings.batching == "on" or (settings.batching == "auto" and model.batchable)
        seconds = model.load_seconds + time.monotonic() - began
        about = about_model(model, seconds, settings.model_path or model.directory)
        server.service.use(model, about, batching=batching, on_hang=server.give_up)
        gc.freeze()
        # A large body is ten thousand lists, none of them garbage yet: to look through them fourteen times, as Python
        # would, is a fifteenth of what it costs.
        gc.set_threshold(50_000)
        gc.enable()
        keep_freed_buffers()

    return server.service.inference_thread.submit(start)


def fetch(settings: Settings, directory: Path) -> None:
    """Download a model that has only a URI to `directory`. Raises `RoleError`."""
    if settings.model_path is None:
        fetch_model(settings.model_uri, directory)


def load(settings: Settings, directory: Path) -> Model:
    """The model, after `fetch`; it is not run yet. Raises `RoleError`."""
    from darwin_runtime.model import self_test

    return self_test.load_checked(
        settings.model_path or directory,
        settings.model_config,
        settings.method,
        settings.verify,
        settings.required,
    )


def work(
    settings: Settings,
    listener: socket.socket,
    metrics: SharedMetrics,
    get: Callable[[], Model],
    number: int,
    ready: Callable[[], None],
) -> None:
    """Be worker `number`: serve the model from `get`, calling `ready` once it has answered its own example.

    Raises `RoleError`.
    """
    from darwin_runtime.http.factory import make_server

    server = make_server(settings, metrics, number)
    begin(server, settings, get).result()
    ready()
    run(server, listener)


def serve_alone(settings: Settings, directory: Path) -> None:
    """Load and serve in this very process. Raises `RoleError`."""
    from darwin_runtime.http.factory import make_server

    server = make_server(settings, SharedMetrics(1))
    with listening(settings) as listener:

        def get() -> Model:
            fetch(settings, directory)
            return load(settings, directory)

        def started(loading: Future[None]) -> None:
            if loading.exception():
                server.should_exit = True

        loading = begin(server, settings, get)
        loading.add_done_callback(started)
        run(server, listener)
        if loading.done() and (error := loading.exception()):
            raise error


def serve_together(settings: Settings, directory: Path) -> None:
    """Load once, and serve from several processes. Raises `RoleError`."""
    # What all need is imported once; and what it starts is there before there is a model to blame for it.
    from darwin_runtime.http.factory import make_server

    metrics = SharedMetrics(settings.workers + 1)
    with signal_socket() as arriving, listening(settings) as listener:
        job = WorkerJob(
            listener=listener,
            placeholder=lambda closed: run(make_server(settings, metrics, closed=closed), listener),
            fetch=lambda: fetch(settings, directory),
            load=lambda: load(settings, directory),
            work=lambda model, number, ready: work(settings, listener, metrics, lambda: model, number, ready),
            command=[sys.executable, str(Path(__file__).resolve()), WORKER],
            environ={**os.environ, "MODEL_LOCAL_PATH": str(settings.model_path or directory)},
            files=[listener.fileno(), metrics.file],
            stop_seconds=settings.drain_seconds + settings.request_timeout + SPARE_SECONDS,
        )
        supervise(settings.workers, job, arriving)


def serve(read: Reader) -> None:
    """Serve until a signal comes. Raises `RoleError` if the model, or the port, can't be had."""
    settings = Settings.from_env(read)
    log_settings(read)
    share_cpus(settings.workers, cpu_limit(), os.environ)
    # Those in the middle of a TLS handshake are not counted yet.
    allow_files((4 if settings.tls else 2) * settings.limits.connection.max_connections)
    downloaded = contextlib.nullcontext(Path()) if settings.model_path else disk.scratch()
    with downloaded as directory:
        (serve_alone if settings.workers == 1 else serve_together)(settings, directory)
    logger.info("stopped")


def serve_as_worker(read: Reader) -> None:
    """Be a worker that loads by itself, on behalf of `serve_together` in another process."""
    settings = Settings.from_env(read)
    number, listening_on, counts, told_through = map(int, sys.argv[2:])
    listener, channel = socket.socket(fileno=listening_on), socket.socket(fileno=told_through)
    listener.set_inheritable(False)
    metrics = SharedMetrics(settings.workers + 1, counts)
    body = partial(work, settings, listener, metrics, lambda: load(settings, Path()), number)
    sys.exit(run_worker(channel, body))


def main(environ: Mapping[str, str] = os.environ) -> int:
    # Its INFO lines say again what ours say.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # What is imported and loaded stays: to look through it for garbage takes half a second of the start, and would stop
    # everything for a third of a second every now and then, were it not frozen before collection begins.
    gc.disable()
    return run_role(serve_as_worker if sys.argv[1:2] == [WORKER] else serve, environ)


if __name__ == "__main__":
    sys.exit(main())
