"""No secret leaves a role: not by its log, an answer, a metric, a file, or a command line; whatever goes wrong."""

from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from darwin_runtime.redact import Redactor
from tests.conftest import ROOT, Finished, clean_environ, free_port, run_role
from tests.roles.test_cleanup import clean
from tests.storage.test_hostile_registry import Registry, _Handler, registry
from tests.support.apiserver import ApiServer
from tests.support.models import model_path
from tests.support.servers import Served, serving

USER = "ann"


def canary(name: str) -> str:
    """A secret that has to be quoted wherever it is put."""
    return f"c4nary {name}/+?é\\'end"


def quoted(name: str) -> str:
    return urllib.parse.quote(canary(name), safe="")


def login(name: str, host: str = "127.0.0.1:1") -> str:
    return f"{USER}:{quoted(name)}@{host}"


SECRETS: dict[str, Any] = {
    **{name: canary(name) for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DB_PASS")},
    **{name: canary(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")},
    "MLFLOW_TRACKING_USERNAME": USER,
    "FEATURE_STORE_URL": f"http://{login('FEATURE_STORE_URL')}/store",
    "OFS_ADMIN_URL": f"http://{login('OFS_ADMIN_URL')}/admin",
    "HTTP_PROXY": f"http://{login('HTTP_PROXY')}",
    "HTTPS_PROXY": f"http://{login('HTTPS_PROXY')}",
    "NO_PROXY": "127.0.0.1",
    "SERVING_MODEL_CONFIG": json.dumps({"api_key": canary("api_key"), "of": [{"an": canary("inner")}]}),
}
NAMES: tuple[str, ...] = (
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DB_PASS", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    *("AWS_SESSION_TOKEN", "FEATURE_STORE_URL", "OFS_ADMIN_URL", "HTTP_PROXY", "HTTPS_PROXY", "api_key", "inner"),
    *("MLFLOW_TRACKING_URI", "MODEL_URI", "PUSHGATEWAY_URL"),
)


def forms(name: str) -> Iterator[bytes]:
    """What a leak could look like."""
    plain = canary(name)
    for text in (plain, f"{USER}:{plain}", quoted(name), f"{USER}:{quoted(name)}"):
        yield from (base64.b64encode(text.encode()), base64.urlsafe_b64encode(text.encode()), text.encode())
        yield from (json.dumps(text)[1:-1].encode(), repr(text)[1:-1].encode())
    yield from (
        urllib.parse.quote(plain).encode(),
        urllib.parse.quote_plus(plain).encode(),
        quoted(name).lower().encode(),
    )
    yield f"c4nary {name}".encode()
    yield f"c4nary%20{name}".encode()


FORMS = {form: name for name in NAMES for form in forms(name)}


def leaked(*places: str | bytes) -> set[str]:
    """The names of the secrets that can be found."""
    found = [place.encode(errors="surrogateescape") if isinstance(place, str) else place for place in places]
    return {name for form, name in FORMS.items() if any(form in place for place in found)}


def files_below(directory: Path) -> list[bytes]:
    """What is in files, and what they are called."""
    found = [path for path in directory.rglob("*") if path.is_file()]
    return [os.fsencode(path) for path in directory.rglob("*")] + [path.read_bytes() for path in found]


def echo(code: int, challenge: str = "") -> Any:
    """A server that says whatever it was sent, as it came and decoded."""

    def answer(handler: _Handler) -> None:
        sent = handler.headers.get("Authorization", "").rpartition(" ")[2]
        try:
            decoded = base64.b64decode(sent).decode()
        except ValueError:
            decoded = sent
        body = f"{handler.path} {handler.headers} {sent} {decoded} {urllib.parse.quote(decoded)}"
        handler.send(code, body.encode(errors="replace"), **({"WWW_Authenticate": challenge} if challenge else {}))

    return answer


CASES = ["success", "401", "500", "nobody", "no TLS", "untrusted", "s3", "database", "signed"]


def case(name: str, embedded: bool, running: Registry, api: ApiServer) -> dict[str, str]:
    """The settings of a failure, or none, with the login in the URI or beside it."""
    hosts = {"nobody": f"127.0.0.1:{free_port()}", "untrusted": api.url.removeprefix("https://")}
    host = hosts.get(name, running.url.removeprefix("http://"))
    scheme = "https" if name in ("no TLS", "untrusted") else "http"
    if name in ("401", "500"):
        running.answers[""] = echo(int(name), 'Basic realm="mlflow"')
    uri = f"{scheme}://{login('MLFLOW_TRACKING_URI', host) if embedded else host}"
    found = {"MLFLOW_TRACKING_URI": uri, "MODEL_URI": "models:/m/1"}
    if name == "s3":
        running.answers[""] = echo(403 if embedded else 500)
        return {**found, "MODEL_URI": "s3://bucket/m", "MLFLOW_S3_ENDPOINT_URL": running.url}
    if name == "database":
        return {**found, "MLFLOW_TRACKING_URI": f"postgresql://{login('MLFLOW_TRACKING_URI')}/mlflow"}
    if name == "signed":
        query = f"X-Amz-Signature={quoted('MODEL_URI')}&sig={quoted('MODEL_URI')}&my_token={quoted('MODEL_URI')}"
        return {**found, "MODEL_URI": f"http://{login('MODEL_URI', host)}/api/2.0/mlflow-artifacts/artifacts/m?{query}"}
    return found


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server whose certificate nobody trusts."""
    with ApiServer(tmp_path_factory.mktemp("api"), namespace="default") as running:
        yield running


QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": 0, "MAX_RETRIES": 0, "AWS_MAX_ATTEMPTS": 1, "LOG_LEVEL": "debug"}


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_of_a_download(name: str, embedded: bool, api: ApiServer, tmp_path: Path) -> None:
    with registry() as running:
        settings = {**SECRETS, **QUICK, **case(name, embedded, running, api)}
        if embedded:  # or MLflow would take what is beside it
            settings = {
                key: value for key, value in settings.items() if not key.startswith("MLFLOW_TRACKING_") or "URI" in key
            }
        done = run_role(
            "download.py",
            **settings,
            OUTPUT_PATH=tmp_path / "models",
            CACHE_PATH=tmp_path / "cache",
            STORAGE_STRATEGY="pvc",
            LOG_FORMAT="json" if embedded else "text",
            DEPLOYMENT_NAME="d",
        )
        sent = [authorization for _, authorization in running.seen if authorization]
    assert done.code == (0 if name == "success" else 1), done.err
    assert sent or name in ("nobody", "no TLS", "untrusted", "database"), "there was a secret to leak"
    assert leaked(done.out, done.err, *files_below(tmp_path)) == set()


@pytest.mark.parametrize("name", ["401", "500", "nobody", "untrusted"])
def test_of_a_server_that_can_not_be_had_its_model(name: str, api: ApiServer) -> None:
    with registry() as running:
        given = case(name, True, running, api)
        settings = {**SECRETS, **QUICK, **given, "MLFLOW_MODEL_URI": given["MODEL_URI"]}
        settings |= {"MLFLOW_TRACKING_PASSWORD": "", "MLFLOW_TRACKING_TOKEN": "", "PORT": 0, "HOST": "127.0.0.1"}
        if name in ("nobody", "500"):
            settings["MLFLOW_MODEL_URI"] = (
                f"http://{login('MODEL_URI', '127.0.0.1:1')}:bad/api/2.0/mlflow-artifacts/artifacts/x"
            )
        done = run_role("darwin_serve.py", **settings)
    assert done.code == 1, done.err
    assert leaked(done.out, done.err) == set()


def cmdlines(served: Served) -> Iterator[bytes]:
    """Of the role and all its children."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(served.process.pid) in ((process / "stat").read_text().split()[3], process.name):
                yield (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue


@pytest.mark.parametrize("workers", [1, 2])
def test_of_a_server(workers: int, tmp_path: Path) -> None:
    with serving(
        model_path("iris"), fresh=True, WORKERS=workers, LOG_LEVEL="debug", TMPDIR=tmp_path, **SECRETS
    ) as served:
        answers = [
            served.get(path)
            for path in (
                "/",
                "/docs",
                "/openapi.json",
                "/schema",
                "/metrics",
                "/v2",
                "/v2/models/model",
                "/ready",
                "/no",
            )
        ]
        bodies: list[Any] = [{"feature_group": "users", "ofs_keys": {"user_id": 42}}, {}, []]
        answers += [served.post(path, json=body) for path in ("/predict", "/invocations") for body in bodies]
        told = [f"{answer.headers} {answer.text}" for answer in answers]
        commands = list(cmdlines(served))
        children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
        cores = [resource.prlimit(pid, resource.RLIMIT_CORE) for pid in (served.process.pid, *map(int, children))]
    assert any(answer.status_code == 502 for answer in answers), "the feature store was asked"
    assert len(commands) >= workers
    assert leaked(served.log, *told, *commands, *files_below(tmp_path)) == set()
    assert len(cores) >= workers
    assert set(cores) == {(0, 0)}


def test_what_a_model_raises_names_no_secret_to_clients(tmp_path: Path) -> None:
    """A model that means to tell can write where it wants; but libraries put URIs in their words."""
    import mlflow

    from tests.support.models import BASE, REQUIREMENTS, save

    def predict(self: Any, context: Any, model_input: Any) -> Any:
        import os

        raise RuntimeError(
            f"cannot reach {os.environ['FEATURE_STORE_URL']} with {os.environ['MLFLOW_TRACKING_PASSWORD']}"
        )

    def build(path: Path) -> None:
        kind = type("Model", (BASE,), {"predict": predict})
        mlflow.pyfunc.save_model(path, python_model=kind(), **REQUIREMENTS)

    with serving(save(build, tmp_path / "m"), WORKERS=1, **SECRETS) as served:
        answers = [
            served.post("/predict", json={"features": {"a": 1}}),
            served.post("/invocations", json={"inputs": [1]}),
            served.post("/v1/models/model:predict", json={"instances": [1]}),
        ]
    assert all("cannot reach" in answer.text for answer in answers)
    assert leaked(served.log, *(answer.text for answer in answers)) == set()


@pytest.mark.parametrize("scheme", ["", "http://"])
@pytest.mark.parametrize("code", [0, 200, 401, 500])
def test_of_a_cleanup(code: int, scheme: str, tmp_path: Path) -> None:
    with registry() as running, ApiServer(tmp_path / "api", namespace="default") as own:
        running.answers[""] = echo(code)
        host = running.url.removeprefix("http://") if code else f"127.0.0.1:{free_port()}"
        (tmp_path / "cache").mkdir()
        push = f"{scheme}{login('PUSHGATEWAY_URL', host)}"
        done: Finished = clean(
            tmp_path / "cache",
            own,
            PUSHGATEWAY_URL=push,
            METRICS_TEXTFILE=tmp_path / "x.prom",
            LOG_LEVEL="debug",
            **SECRETS,
        )
    assert done.code == 0, done.err
    assert ("cannot push" in done.err) == (code != 200)
    assert leaked(done.out, done.err, *files_below(tmp_path / "cache"), (tmp_path / "x.prom").read_bytes()) == set()


_RAISE = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
from darwin_runtime import role

def body(read):
    def fail():
        raise ValueError(os.environ["MLFLOW_TRACKING_PASSWORD"])
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    fail()

sys.exit(role.run_role(body, os.environ))
"""


def test_what_nobody_catches_is_masked_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RAISE, ROOT], env=clean_environ(**SECRETS), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("ValueError: ***") >= 2
    assert leaked(done.stdout, done.stderr) == set()


def test_a_role_leaves_no_core_file() -> None:
    script = "import os, resource; from darwin_runtime.role import run_role; "
    script += "run_role(lambda *_: print(resource.getrlimit(4)), os.environ)"
    wanted = subprocess.run(
        ["sh", "-c", 'ulimit -c unlimited 2>/dev/null; exec "$0" -c "$1"', sys.executable, script],
        cwd=ROOT, env=clean_environ(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert resource.RLIMIT_CORE == 4
    assert wanted.stdout == "(0, 0)\n"


@pytest.mark.parametrize(
    ("environ", "text", "masked"),
    [
        ({"MODEL_URI": "models:/iris@champion"}, "models:/iris@champion is /iris", "models:/iris@champion is /iris"),
        ({"IMAGE": "localhost:5000/serve@sha256:0"}, "localhost:5000/serve", "localhost:5000/serve"),
        ({"PUSHGATEWAY_URL": "me:s3cr3t@push:9091"}, "me:s3cr3t@push:9091", "***@push:9091"),
        ({"SERVING_MODEL_CONFIG": '{"mode": "fast"}'}, "mode fast", "mode fast"),
        ({"SERVING_MODEL_CONFIG": '{"k": "not json'}, 'it is {"k": "not json', "it is ***"),
        ({"X_TOKEN": "\udcff\udcfe-token"}, "is \udcff\udcfe-token", "is ***"),
        ({}, "https://b/k%3FX-Amz-Signature%3Dabc%26x", "https://b/k%3FX-Amz-Signature%3D***"),
        ({}, "authorization: basic%20YW5uOng=", "authorization: basic%20***"),
    ],
)
def test_forms(environ: Mapping[str, str], text: str, masked: str) -> None:
    assert Redactor(environ)(text) == masked
