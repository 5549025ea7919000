"""The right model in the right place: teams, endpoints, registries and stores that share one cache or one output."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from tests.conftest import Finished, free_port, http_server
from tests.support.storage import download
from tests.support.stores import API, AWS, MLMODEL, Handler, Hook, mlflow, s3


def attempt(home: Path, **settings: object) -> Finished:
    usual = {"MAX_RETRIES": 0, "BACKOFF_SECONDS": 0, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 0}
    done = download(home, **{**usual, **settings})
    assert "Traceback" not in done.err
    return done


def team_of(home: Path) -> str:
    return (home / "models" / "team").read_text()


# Of one name, of one size, and not the same

TEAMS = ("team-a", "team-b")


def _team(name: str) -> dict[str, bytes]:
    return {"m/MLmodel": MLMODEL, "m/team": name.encode()}


def workspaces(handler: Handler, at: str, _query: Mapping[str, str]) -> object:
    """One server, whose answers differ by workspace and are of the same names, times and sizes."""
    team = handler.headers.get("X-MLFLOW-WORKSPACE")
    version = {"name": "m", "version": "1", "creation_timestamp": 1, "source": "mlflow-artifacts:/m", "status": "READY"}
    if at.endswith(("/registered-models/alias", "/model-versions/get")):
        return handler.answer(200, {"model_version": version})
    if at.endswith("/registered-models/get"):
        return handler.answer(200, {"registered_model": {"name": "m"}})
    if at.endswith("/get-download-uri"):
        return handler.answer(200, {"artifact_uri": version["source"]})
    if at.endswith("/server-info"):
        return handler.answer(200, {"workspaces_enabled": True, "store_type": "SqlStore"})
    if at == f"{API}/m/team":
        return handler.answer(200, str(team).encode())
    return None


@contextlib.contextmanager
def by_workspace() -> Iterator[list[dict[str, str]]]:
    with mlflow(_team(TEAMS[0]), workspaces) as url:
        yield [
            {"MODEL_URI": "models:/m@champion", "MLFLOW_TRACKING_URI": url, "MLFLOW_WORKSPACE": team} for team in TEAMS
        ]


@contextlib.contextmanager
def by_tracking_server() -> Iterator[list[dict[str, str]]]:
    with mlflow(_team(TEAMS[0])) as first, mlflow(_team(TEAMS[1])) as second:
        yield [{"MODEL_URI": "mlflow-artifacts:/m", "MLFLOW_TRACKING_URI": url} for url in (first, second)]


@contextlib.contextmanager
def by_registry() -> Iterator[list[dict[str, str]]]:
    """One tracking server with the files, and two registries with versions of the same name."""
    files = {f"{team}/{name}": body for team in TEAMS for name, body in (("MLmodel", MLMODEL), ("team", team.encode()))}

    def registry(team: str) -> Hook:
        def hook(handler: Handler, at: str, query: Mapping[str, str]) -> object:
            if at.endswith("/get-download-uri"):
                return handler.answer(200, {"artifact_uri": f"mlflow-artifacts:/{team}"})
            return workspaces(handler, at, query)

        return hook

    with mlflow(files) as tracking, mlflow({}, registry(TEAMS[0])) as one, mlflow({}, registry(TEAMS[1])) as other:
        usual = {"MODEL_URI": "models:/m@champion", "MLFLOW_TRACKING_URI": tracking}
        yield [{**usual, "MLFLOW_REGISTRY_URI": url} for url in (one, other)]


@contextlib.contextmanager
def by_endpoint(variable: str) -> Iterator[list[dict[str, str]]]:
    with s3(_team(TEAMS[0])) as first, s3(_team(TEAMS[1])) as second:
        yield [{**AWS, "MODEL_URI": "s3://bucket/m", variable: url} for url in (first, second)]


PLACES: dict[str, Callable[[], contextlib.AbstractContextManager[list[dict[str, str]]]]] = {
    "workspace": by_workspace,
    "tracking": by_tracking_server,
    "registry": by_registry,
    "MLFLOW_S3_ENDPOINT_URL": lambda: by_endpoint("MLFLOW_S3_ENDPOINT_URL"),
    "AWS_ENDPOINT_URL_S3": lambda: by_endpoint("AWS_ENDPOINT_URL_S3"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("strategy", ["pvc", "emptydir"])
def test_nobody_gets_the_model_of_another_place(place: str, strategy: str, tmp_path: Path) -> None:
    """Neither from the cache that they share, nor from an output that another has used, nor when nobody answers."""
    shared = {"STORAGE_STRATEGY": strategy, "CACHE_PATH": tmp_path / "cache"}
    with PLACES[place]() as (first, second):
        for team, environ in zip(TEAMS, (first, second), strict=True):
            for home in (tmp_path / team, tmp_path / "one-output"):
                done = attempt(home, **shared, **environ, POD_NAME=team)
                assert done.code == 0, done.err
                assert team_of(home) == team
    # The servers are gone. The second one's model is at the output that both have used.
    done = attempt(tmp_path / "one-output", **shared, **first)
    if strategy == "pvc":
        assert (done.code, team_of(tmp_path / "one-output")) == (0, TEAMS[0]), done.err
        assert "FALLING BACK" in done.err
    else:
        assert done.code == 1, "the output holds the model of another place"
    done = attempt(tmp_path / TEAMS[1], **shared, **second)
    assert (done.code, team_of(tmp_path / TEAMS[1])) == (0, TEAMS[1]), done.err


# Names in a store


@pytest.mark.parametrize("name", ["m//x", "m/./x", "m/../x", "m/a//b", "m/a/./b", "m/x/"])
def test_a_name_that_no_directory_has_is_not_left_out(name: str, tmp_path: Path) -> None:
    with s3({"m/MLmodel": MLMODEL, name: b"1"}) as url:
        done = attempt(tmp_path, MODEL_URI="s3://bucket/m", MLFLOW_S3_ENDPOINT_URL=url, **AWS)
    assert done.code == 1
    assert "nothing was downloaded" in done.last
    assert not (tmp_path / "models" / "MLmodel").exists()


ODD = {"data/data": b"1", "part#2.bin": b"2", "100%.txt": b"3", "what?": b"4", "a b+c&d": b"5", ".darwin-mine": b"6"}


@pytest.mark.parametrize("store", ["mlflow", "s3", "local"])
def test_odd_names_arrive(store: str, tmp_path: Path) -> None:
    files = {"m/MLmodel": MLMODEL, **{f"m/{name}": body for name, body in ODD.items()}}
    if store == "s3":
        # XML has no plain `&`.
        del files["m/a b+c&d"]
    for name, body in files.items():
        (tmp_path / "store" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / name).write_bytes(body)
    with mlflow(files) as server, s3(files) as bucket:
        environ = {
            "mlflow": {"MODEL_URI": "mlflow-artifacts:/m", "MLFLOW_TRACKING_URI": server},
            "s3": {"MODEL_URI": "s3://bucket/m", "MLFLOW_S3_ENDPOINT_URL": bucket, **AWS},
            "local": {"MODEL_URI": str(tmp_path / "store" / "m")},
        }[store]
        done = attempt(tmp_path, **environ)
    assert done.code == 0, done.err
    for name, body in files.items():
        assert (tmp_path / "models" / name.removeprefix("m/")).read_bytes() == body


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize("store", ["mlflow", "s3"])
def test_the_file_that_failed_is_named(store: str, status: int, tmp_path: Path) -> None:
    def no(handler: Handler, at: str, _query: Mapping[str, str]) -> object:
        if not at.endswith("part-2.bin") or handler.command == "HEAD":
            return False
        return handler.answer(status, b"<Error><Code>Odd</Code><Message>words of the store</Message></Error>")

    files = {"m/MLmodel": MLMODEL, "m/data/part-1.bin": b"1", "m/data/part-2.bin": b"2"}
    with mlflow(files, no) as server, s3(files, no) as bucket:
        environ = {
            "mlflow": {"MODEL_URI": "mlflow-artifacts:/m", "MLFLOW_TRACKING_URI": server},
            "s3": {"MODEL_URI": "s3://bucket/m", "MLFLOW_S3_ENDPOINT_URL": bucket, **AWS},
        }[store]
        done = attempt(tmp_path, **environ)
    assert done.code == 1
    assert f"cannot read data/part-2.bin of {environ['MODEL_URI']}: " in done.last
    assert "words of the store" in done.last
    assert not (tmp_path / "models" / "MLmodel").exists()


# Ways to the server


@pytest.mark.parametrize("login", ["", "user:pass-word@"])
def test_a_proxy_of_plain_http(login: str, tmp_path: Path) -> None:
    seen: set[str | None] = set()
    with mlflow({"m/MLmodel": MLMODEL, "m/a.bin": b"a", "m/b.bin": b"b"}) as server:

        class Proxy(Handler):
            def do_GET(self) -> None:  # noqa: N802
                seen.add(self.headers.get("Proxy-Authorization"))
                target = urlsplit(self.path)
                assert target.netloc == "mlflow.internal:5000"
                up = http.client.HTTPConnection(urlsplit(server).netloc)
                up.request("GET", target._replace(scheme="", netloc="").geturl())
                got = up.getresponse()
                self.answer(got.status, got.read())

        with http_server(Proxy) as proxy:
            done = attempt(
                tmp_path,
                MODEL_URI="mlflow-artifacts:/m",
                MLFLOW_TRACKING_URI="http://mlflow.internal:5000",
                HTTP_PROXY=proxy.replace("://", f"://{login}"),
            )
    assert done.code == 0, done.err
    assert (tmp_path / "models" / "b.bin").read_bytes() == b"b"
    assert len(seen) == 1
    assert (None in seen) is not bool(login)


@pytest.mark.parametrize("store", ["file", "s3"])
def test_unity_catalog(store: str, tmp_path: Path) -> None:
    """Its repositories bring no files themselves: they name a store, and lend the credentials for it."""
    (tmp_path / "store").mkdir()
    files = {"MLmodel": MLMODEL, "weights.bin": b"w" * 50}
    for name, body in files.items():
        (tmp_path / "store" / name).write_bytes(body)
    where = {"file": f"file://{tmp_path / 'store'}", "s3": "s3://bucket/m"}[store]

    def catalog(handler: Handler, at: str, _query: Mapping[str, str]) -> object:
        if at.endswith("/temporary-model-version-credentials"):
            lent = {"access_key_id": "lent-id", "secret_access_key": "lent-key", "session_token": "lent-token"}
            return handler.answer(200, {"aws_temp_credentials": lent})
        if at.startswith("/api/2.1/unity-catalog/models/"):
            found = {"catalog_name": "cat", "schema_name": "sch", "model_name": "iris", "version": 1, "source": where}
            found |= {"storage_location": where, "run_id": "r", "status": "READY", "created_at": 1, "updated_at": 1}
            return handler.answer(200, found)
        return None

    with mlflow({}, catalog) as server, s3({f"m/{name}": body for name, body in files.items()}) as bucket:
        environ = {"MLFLOW_TRACKING_URI": server, "MLFLOW_REGISTRY_URI": f"uc:{server}"}
        done = attempt(tmp_path, MODEL_URI="models:/cat.sch.iris/1", MLFLOW_S3_ENDPOINT_URL=bucket, **environ)
    assert done.code == 0, done.err
    assert (tmp_path / "models" / "weights.bin").read_bytes() == files["weights.bin"]


# Mistakes in the settings


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that could be meant for certificates, by what is in them."""
    home = tmp_path_factory.mktemp("pem")
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1")
    contents = {
        "ca": ca.cert_pem.bytes(),
        "certificate": issued.cert_chain_pems[0].bytes(),
        "both": issued.private_key_and_cert_chain_pem.bytes(),
        "text": b"no PEM\n",
        "empty": b"",
    }
    for name, content in contents.items():
        (home / name).write_bytes(content)
    return {name: home / name for name in (*contents, "missing")}


NOT_A_CA = ("text", "empty", "missing")
FILES = [
    *[(name, kind) for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE") for kind in NOT_A_CA],
    *[("MLFLOW_TRACKING_SERVER_CERT_PATH", kind) for kind in NOT_A_CA],
    *[("MLFLOW_TRACKING_CLIENT_CERT_PATH", kind) for kind in (*NOT_A_CA, "certificate", "ca")],
]
ONE_LINE = [
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"),
    *("MLFLOW_S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    *("MLFLOW_TRACKING_TOKEN", "MLFLOW_REGISTRY_URI", "MLFLOW_WORKSPACE", "HTTP_PROXY", "HTTPS_PROXY"),
]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A cache that holds a model of S3, and the settings by which it is found again."""
    home = tmp_path_factory.mktemp("cached")
    with s3({"m/MLmodel": MLMODEL, "m/team": b"old"}) as url:
        environ = {**AWS, "MODEL_URI": "s3://bucket/m", "MLFLOW_S3_ENDPOINT_URL": url, "STORAGE_STRATEGY": "pvc"}
        assert attempt(home, **environ).code == 0
        yield home, environ


def _is_a_bad_setting(done: Finished, variable: str) -> None:
    assert done.code == 2, done.err
    assert f"bad configuration: {variable}" in done.last
    assert "trying again" not in done.err
    assert "FALLING BACK" not in done.err


@pytest.mark.parametrize(("variable", "kind"), FILES)
def test_a_bad_file_is_no_outage(
    variable: str, kind: str, pems: dict[str, Path], cached: tuple[Path, dict[str, str]]
) -> None:
    home, environ = cached
    done = attempt(home, **{**environ, variable: pems[kind], "MAX_RETRIES": 2})
    _is_a_bad_setting(done, f"{variable}={pems[kind]}: the file ")
    assert (home / "models" / "team").read_text() == "old", "nothing that was placed before is touched"


@pytest.mark.parametrize("variable", ONE_LINE)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_end_is_no_outage(variable: str, end: str, cached: tuple[Path, dict[str, str]]) -> None:
    home, environ = cached
    value = environ.get(variable, "http://127.0.0.1:1/canary-value")
    done = attempt(home, **{**environ, variable: value + end, "MAX_RETRIES": 2})
    _is_a_bad_setting(done, f"{variable} holds a line end")
    assert "printf" in done.last
    assert "canary" not in done.last
    assert (home / "models" / "team").read_text() == "old"


def test_good_files_are_taken(pems: dict[str, Path], cached: tuple[Path, dict[str, str]]) -> None:
    home, environ = cached
    good = {"REQUESTS_CA_BUNDLE": pems["ca"], "MLFLOW_TRACKING_CLIENT_CERT_PATH": pems["both"]}
    assert attempt(home, **{**environ, **good}).code == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": "", "AWS_EC2_METADATA_DISABLED": "true"},
        {"HTTP_PROXY": "http://", "NO_PROXY": ""},
        {"AWS_PROFILE": "nobody"},
    ],
)
def test_what_is_no_outage_does_not_fall_back(changed: dict[str, str], cached: tuple[Path, dict[str, str]]) -> None:
    home, environ = cached
    done = attempt(home, **{**environ, **changed, "MAX_RETRIES": 1})
    assert done.code == 1, done.err
    assert "FALLING BACK" not in done.err
    assert "trying again" not in done.err


def test_an_outage_falls_back(cached: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    home, environ = cached
    proxy = f"http://127.0.0.1:{free_port()}"
    done = attempt(home, **{**environ, "HTTP_PROXY": proxy, "OUTPUT_PATH": tmp_path / "models"})
    assert done.code == 0, done.err
    assert "FALLING BACK" in done.err


def test_an_archive_is_no_model(tmp_path: Path) -> None:
    done = attempt(
        tmp_path, MODEL_URI="https://example.com/models/iris.tar.gz", MLFLOW_TRACKING_URI="http://mlflow:5000"
    )
    assert done.code == 2
    assert "archives and web directories cannot be read" in done.last


def test_advice_is_a_setting_that_is_taken(tmp_path: Path) -> None:
    """A registry's URI has no path of a directory in it."""

    def registry(handler: Handler, at: str, query: Mapping[str, str]) -> object:
        return not at.startswith(API) and workspaces(handler, at, query)

    with mlflow({"m/inner/MLmodel": MLMODEL}, registry) as url:
        done = attempt(tmp_path, MODEL_URI="models:/m/1", MLFLOW_TRACKING_URI=url)
        assert "there is one at inner/MLmodel, register a version with that directory as its source" in done.last
        done = attempt(tmp_path, MODEL_URI="mlflow-artifacts:/m", MLFLOW_TRACKING_URI=url)
        assert "ask for mlflow-artifacts:/m/inner" in done.last
        assert attempt(tmp_path, MODEL_URI="mlflow-artifacts:/m/inner", MLFLOW_TRACKING_URI=url).code == 0
