"""/metrics: clean for promtool, scraped by a real Prometheus, and adding up over workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.http.app import make_app
from darwin_runtime.http.metrics import SharedMetrics, WorkerMetrics, exposition
from darwin_runtime.http.service import Service
from tests.conftest import ROOT, free_port, program, wait_until
from tests.http.test_protocol import BODIES
from tests.support.models import IRIS, model_path
from tests.support.servers import Served, in_thread, serving

MONITORING = ROOT / "deploy" / "monitoring"


def figures(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def figure(served: Served, name: str, /, **labels: str) -> float:
    return figures(served.get("/metrics").text).get((name, frozenset(labels.items())), 0.0)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(model_path("iris"), fresh=True, WORKERS=3, MODEL_NAME="iris") as served:
        yield served


def test_promtool_finds_nothing_to_complain_of(served: Served) -> None:
    promtool = program("promtool", "prometheus")
    served.post("/predict", BODIES["/predict"])
    for text in (served.get("/metrics").text, _never_asked()):
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _never_asked() -> str:
    with in_thread(make_app(Service(BatchLimits()))) as url:
        answer = requests.get(url + "/metrics", timeout=60)
    assert answer.status_code == 200
    return answer.text


def test_a_thousand_requests_add_up(served: Served) -> None:
    before = figures(served.get("/metrics").text)
    paths = [*BODIES]

    def ask(number: int) -> None:
        path = paths[number % 4]
        body = {} if number % 10 == 0 else BODIES[path]
        served.post(path.replace("models/model", "models/iris"), body)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(1000)))
    after = figures(served.get("/metrics").text)

    def grown(name: str, /, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return after.get(key, 0.0) - before.get(key, 0.0)

    for number, protocol in enumerate(["darwin", "mlflow", "kserve_v1", "kserve_v2"]):
        bad = sum(1 for each in range(1000) if each % 4 == number and each % 10 == 0)
        refused = "422" if protocol == "darwin" else "400"
        assert grown("darwin_requests_total", protocol=protocol, status="200") == 250 - bad
        assert grown("darwin_requests_total", protocol=protocol, status=refused) == bad
        assert grown("darwin_request_duration_seconds_count", protocol=protocol) == 250
        assert grown("darwin_request_duration_seconds_bucket", protocol=protocol, le="+Inf") == 250
        assert grown("darwin_request_duration_seconds_sum", protocol=protocol) > 0
    for stage in ("queue", "inference", "encode"):
        assert grown("darwin_request_stage_duration_seconds_count", stage=stage) == 900
    assert grown("darwin_batch_rows_sum") == 900
    assert 1 <= grown("darwin_batch_rows_count") <= 900
    assert after["darwin_requests_in_progress", frozenset()] == after["darwin_queued_rows", frozenset()] == 0


def test_what_there_is_to_know_of_the_process(served: Served) -> None:
    assert figure(served, "darwin_model_info", name="iris", version="", flavor="sklearn", digest="", fallback="") == 1
    assert figure(served, "darwin_workers") == 3
    assert 0 < figure(served, "darwin_model_load_seconds") < 600
    for worker in "123":
        assert 2**20 < figure(served, "darwin_worker_memory_bytes", worker=worker) < 2**33


def test_openmetrics_for_those_who_ask(served: Served) -> None:
    answer = served.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_counts_outlive_a_worker_and_what_it_was_doing_does_not(tmp_path: Path) -> None:
    with serving(model_path("waiting"), WORKERS=2, LOG_LEVEL="info") as served:
        for number in range(20):
            done = {"entered": str(tmp_path / f"in{number}"), "leave": str(ROOT)}
            assert served.post("/predict", {"features": done}).status_code == 200
        assert figure(served, "darwin_requests_total", protocol="darwin", status="200") == 20
        entered = tmp_path / "entered"
        stuck = {"entered": str(entered), "leave": str(tmp_path / "never")}

        def ask() -> None:
            with pytest.raises(requests.ConnectionError):
                served.post("/predict", {"features": stuck})

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(entered.exists, "a prediction that never ends")
        assert figure(served, "darwin_requests_in_progress") == 1
        pids = {int(pid) for pid in re.findall(r"worker \d+ \(pid (\d+)\) is ready", served.log)}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        asking.join(60)
        wait_until(lambda: len(re.findall(r"\) is ready", served.log)) == 4, "new workers")
        wait_until(served.ready, "readiness")
        assert figure(served, "darwin_requests_in_progress") == 0
        assert figure(served, "darwin_requests_total", protocol="darwin", status="200") == 20
        assert figure(served, "darwin_workers") == 2
        assert figure(served, "darwin_worker_starts_total") >= 4


def test_rejected_requests_are_counted(tmp_path: Path) -> None:
    with serving(model_path("waiting"), WORKERS=1, MAX_QUEUE_ROWS=1) as served, ThreadPoolExecutor(3) as threads:
        leave = tmp_path / "leave"

        def ask(name: str) -> int:
            features = {"entered": str(tmp_path / name), "leave": str(leave)}
            return served.post("/predict", {"features": features}).status_code

        first = threads.submit(ask, "first")
        wait_until((tmp_path / "first").exists, "the first prediction")
        second = threads.submit(ask, "second")
        wait_until(lambda: figure(served, "darwin_queued_rows") == 1, "a row that waits")
        assert ask("third") == 503
        assert figure(served, "darwin_requests_rejected_total") == 1
        leave.touch()
        assert (first.result(60), second.result(60)) == (200, 200)
        wait_until(lambda: figure(served, "darwin_queued_rows") == 0, "nothing that waits")


def test_a_status_of_no_row_of_its_own() -> None:
    shared = SharedMetrics(1)
    metrics = WorkerMetrics(shared, 0)
    metrics.began()
    metrics.ended("other", 418, 100.0)
    body, _ = exposition(shared, {"name": "m"}, None, "")
    found = figures(body.decode())
    assert found["darwin_requests_total", frozenset({("protocol", "other"), ("status", "other")})] == 1
    assert found["darwin_request_duration_seconds_bucket", frozenset({("protocol", "other"), ("le", "60.0")})] == 0
    assert not any(name == "darwin_model_load_seconds" for name, _ in found)


# What is in deploy/


@pytest.fixture(scope="module")
def prometheus(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that scrapes the role, with the rules that are deployed."""
    binary, home = program("prometheus", "prometheus"), tmp_path_factory.mktemp("prometheus")
    target = served.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yaml")],
        "scrape_configs": [{"job_name": "darwin", "static_configs": [{"targets": [target]}]}],
    }
    (home / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(binary, f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/data"),
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, (home / "log").read_text()
        try:
            return requests.get(f"{url}/-/ready", timeout=5).ok
        except requests.ConnectionError:
            return False

    try:
        wait_until(ready, "Prometheus")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def query(url: str, expression: str) -> Any:
    answer = requests.get(f"{url}/api/v1/query", params={"query": expression}, timeout=60).json()
    assert answer["status"] == "success", (expression, answer)
    return answer["data"]["result"]


def test_prometheus_scrapes_it(served: Served, prometheus: str) -> None:
    served.post("/predict", {"features": IRIS})
    now = figure(served, "darwin_requests_total", protocol="darwin", status="200")
    expression = 'darwin_requests_total{protocol="darwin",status="200"}'
    wait_until(lambda: [float(each["value"][1]) for each in query(prometheus, expression)] == [now], "a scrape")
    assert query(prometheus, "up")[0]["value"][1] == "1"


def test_the_alert_rules_are_good_ones(prometheus: str) -> None:
    done = subprocess.run(
        [program("promtool", "prometheus"), "check", "rules", MONITORING / "alerts.yaml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    def healths() -> set[str]:
        groups = requests.get(f"{prometheus}/api/v1/rules", timeout=60).json()["data"]["groups"]
        return {rule["health"] for group in groups for rule in group["rules"]}

    wait_until(lambda: healths() == {"ok"}, "the rules' evaluation")


def test_the_dashboard_asks_for_what_there_is(served: Served, prometheus: str) -> None:
    served.post("/predict", {"features": IRIS})
    wait_until(lambda: query(prometheus, "darwin_workers"), "a scrape")
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    exposed = set(re.findall(r"^# TYPE (\w+)", served.get("/metrics").text, re.MULTILINE))
    for expression in [*expressions, *_alerts()]:
        query(
            prometheus, expression.replace("$__rate_interval", "1m").replace("$namespace", ".*").replace("$pod", ".*")
        )
        for name in re.findall(r"darwin_\w+", expression):
            assert name in exposed or re.sub(r"_(bucket|sum|count)$", "", name) in exposed, name


def _alerts() -> list[str]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_meters_of_several_processes_do_not_disturb_each_other() -> None:
    shared = SharedMetrics(3)
    workers = [WorkerMetrics(shared, number) for number in range(3)]

    for number, metrics in enumerate(workers):
        metrics.began()
        metrics.batch(number)
        metrics.stages(0.1, 0.2, 0.3)
    totals = figures(exposition(shared, {"name": "m"}, 1.5, "")[0].decode())
    assert totals["darwin_requests_in_progress", frozenset()] == 3
    assert totals["darwin_batch_rows_sum", frozenset()] == 3
    assert totals["darwin_request_stage_duration_seconds_sum", frozenset({("stage", "encode")})] == pytest.approx(0.9)
    workers[1] = WorkerMetrics(shared, 1)
    totals = figures(exposition(shared, {"name": "m"}, 1.5, "")[0].decode())
    assert totals["darwin_requests_in_progress", frozenset()] == 2


@pytest.mark.parametrize("version", ["abc", "", "-1", "1.0.0.0.0", "9" * 50])
def test_a_version_that_is_none(served: Served, version: str) -> None:
    accept = f"application/openmetrics-text;version={version}"
    assert served.get("/metrics", headers={"Accept": accept}).status_code == 200


def test_load_time_is_that_of_loading_whoever_is_asked(served: Served) -> None:
    assert {figure(served, "darwin_model_load_seconds") > 0.3 for _ in range(20)} == {True}
