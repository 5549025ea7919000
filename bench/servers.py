"""Who is measured: this server, its peers, and the HTTP stack alone. How each is started, asked, and set up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench import BUILD, ROOT, envs, processes, wire
from bench.samples import MODELS
from bench.wire import Format

PEERS = ROOT / "bench" / "peers"


@dataclass(frozen=True)
class Target:
    """What to serve and where."""

    model: str
    port: int

    @property
    def directory(self) -> str:
        return str(MODELS / self.model)


@dataclass(frozen=True)
class Started:
    """A server's first process, its port, and what returns once it is ready, or raises `processes.Failed`."""

    leader: int
    port: int
    wait: Callable[[], None]


@dataclass(frozen=True)
class Server:
    """How to start it and ask it.

    `command` follows the environment's interpreter. `packages` are those whose versions a reader wants to know.
    """

    title: str
    env: str
    packages: Sequence[str]
    settings: str
    command: Callable[[Target], Sequence[str]]
    ready: str
    formats: Mapping[str, Format]
    environ: Callable[[Target], Mapping[str, str]] = field(default=lambda _: {})

    @contextlib.contextmanager
    def serving(self, model: str) -> Iterator[int]:
        """The port at which it serves `model`, ready to predict. Raises `processes.Failed`."""
        with self.starting(model) as started:
            started.wait()
            yield started.port

    @contextlib.contextmanager
    def starting(self, model: str, **extra: str) -> Iterator[Started]:
        """It, about to serve `model`; `extra` are further variables of its environment."""
        target = Target(model, processes.free_port())
        python = envs.python(self.env)
        env = processes.environ(python, {**self.environ(target), **extra})
        log = f"{self.title}-{model}".replace(", ", "-")
        with processes.running([python, *self.command(target)], env, log) as process:
            yield Started(process.pid, target.port, lambda: processes.wait_ready(process, target.port, self.ready, log))


def _script(env: str, name: str) -> str:
    return str(envs.python(env).with_name(name))


def _litserve(*batching: str) -> Callable[[Target], Sequence[str]]:
    return lambda target: (str(PEERS / "litserve_server.py"), target.directory, str(target.port), *batching)


def _ours(target: Target) -> Mapping[str, str]:
    return {
        "MODEL_LOCAL_PATH": target.directory,
        "HOST": "127.0.0.1",
        "PORT": str(target.port),
        "WORKERS": "1",
        "LOG_LEVEL": "info",
    }


def _mlserver(target: Target) -> dict[str, str]:
    return {
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_HTTP_PORT": str(target.port),
        "MLSERVER_GRPC_PORT": str(processes.free_port()),
        "MLSERVER_METRICS_ENDPOINT": "",
        "MLSERVER_DEBUG": "false",
        "MLSERVER_PARALLEL_WORKERS": "0",
        "MLSERVER_MODEL_NAME": "model",
        "MLSERVER_MODEL_IMPLEMENTATION": "mlserver_sklearn.SKLearnModel",
        "MLSERVER_MODEL_URI": f"{target.directory}.joblib",
        "PYTHONPATH": str(PEERS),  # for what of the model is code
    }


def _start_mlserver(_: Target) -> Sequence[str]:
    return (_script("mlserver", "mlserver"), "start", str(MODELS))


OURS = "ours"
QUIET = "ours-quiet"
ECHO = "echo"

SERVERS = {
    OURS: Server(
        "Darwin Serve Runtime",
        "ours",
        (
            *("mlflow-skinny", "starlette", "uvicorn", "uvloop", "httptools", "orjson"),
            *("scikit-learn", "lightgbm", "xgboost-cpu", "numpy", "pandas"),
        ),
        "`WORKERS=1`, otherwise as it comes: with an access log and metrics",
        lambda _: (str(ROOT / "darwin_serve.py"),),
        "/ready",
        {"json": wire.MLFLOW_JSON, "csv": wire.MLFLOW_CSV},
        _ours,
    ),
    QUIET: Server(
        "Darwin Serve Runtime, no access log",
        "ours",
        ("mlflow-skinny",),
        "the same with `LOG_LEVEL=warning`",
        lambda _: (str(ROOT / "darwin_serve.py"),),
        "/ready",
        {"json": wire.MLFLOW_JSON},
        lambda target: {**_ours(target), "LOG_LEVEL": "warning"},
    ),
    "mlflow": Server(
        "MLflow",
        "mlflow",
        ("mlflow", "uvicorn", "uvloop", "httptools"),
        "`mlflow models serve --env-manager local --workers 1`, with uvloop and httptools installed and no access log; "
        "`dataframe_split` JSON, or CSV",
        lambda target: (
            *(_script("mlflow", "mlflow"), "models", "serve", "--model-uri", target.directory),
            *("--host", "127.0.0.1", "--port", str(target.port), "--env-manager", "local", "--workers", "1"),
        ),
        "/ping",
        {"json": wire.MLFLOW_JSON, "csv": wire.MLFLOW_CSV},
        lambda _: {"UVICORN_ACCESS_LOG": "false"},
    ),
    "mlserver": Server(
        "MLServer",
        "mlserver",
        ("mlserver", "mlserver-sklearn"),
        "`parallel_workers=0` (the model in the server's process), `debug=false` (no access log), no metrics; the "
        "same estimator as a joblib file in the scikit-learn runtime, on arrays; V2 JSON",
        _start_mlserver,
        "/v2/models/model/ready",
        {"json": wire.V2_JSON},
        _mlserver,
    ),
    "mlserver-batching": Server(
        "MLServer, batching",
        "mlserver",
        ("mlserver", "mlserver-sklearn"),
        "the same with `max_batch_size=32`, `max_batch_time=0.005`",
        _start_mlserver,
        "/v2/models/model/ready",
        {"json": wire.V2_JSON},
        lambda target: (
            _mlserver(target) | {"MLSERVER_MODEL_MAX_BATCH_SIZE": "32", "MLSERVER_MODEL_MAX_BATCH_TIME": "0.005"}
        ),
    ),
    "litserve": Server(
        "LitServe",
        "litserve",
        ("litserve", "mlflow-skinny"),
        "one API server and one worker, `fast_queue=True`; `mlflow.pyfunc.load_model(...).get_raw_model()` on arrays; "
        "a JSON list",
        _litserve(),
        "/health",
        {"json": wire.LITSERVE_JSON},
    ),
    "litserve-batching": Server(
        "LitServe, batching",
        "litserve",
        ("litserve", "mlflow-skinny"),
        "the same with `max_batch_size=32`, `batch_timeout=0.01`",
        _litserve("32", "0.01"),
        "/health",
        {"json": wire.LITSERVE_JSON},
    ),
    "bentoml": Server(
        "BentoML",
        "bentoml",
        ("bentoml", "mlflow-skinny"),
        "`workers=1`, adaptive batching with `max_batch_size=32`, no access log, no metrics; "
        "`mlflow.pyfunc.load_model(...).get_raw_model()` on arrays; a JSON list of lists",
        lambda target: (
            *(_script("bentoml", "bentoml"), "serve", "bentoml_server:Classifier", "--working-dir", str(PEERS)),
            *("--host", "127.0.0.1", "--port", str(target.port)),
        ),
        "/readyz",
        {"json": wire.BENTOML_JSON},
        lambda target: {"MODEL": target.directory, "BENTOML_HOME": str(BUILD / "bentoml")},
    ),
    ECHO: Server(
        "echo",
        "ours",
        ("starlette", "uvicorn", "uvloop", "httptools"),
        "a limit: Starlette on uvicorn (uvloop, httptools, no access log), sending the body back",
        lambda target: (str(PEERS / "echo_server.py"), str(target.port)),
        "/ready",
        {"json": wire.Format("/invocations", wire.JSON, wire.MLFLOW_JSON.write, lambda _: [])},
    ),
}
