"""The alerts of `deploy/monitoring` that one model alone never raises, as promtool evaluates them over time."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, program

RULES = ROOT / "deploy" / "monitoring" / "alerts.yaml"


def info(pod: str, values: str, version: str = "1", digest: str = "d", fallback: str = "false") -> dict[str, str]:
    """A pod's darwin_model_info, a sample a minute. `1x60` is an hour of ones, and `_x60` one without a sample."""
    labels = f'namespace="ml", pod="{pod}", version="{version}", digest="{digest}", fallback="{fallback}"'
    return {"series": f"darwin_model_info{{{labels}}}", "values": values}


def restarts(pod: str, values: str, container: str = "download") -> dict[str, str]:
    labels = f'namespace="ml", pod="{pod}", container="{container}"'
    return {"series": f"kube_pod_init_container_status_restarts_total{{{labels}}}", "values": values}


# The series that Prometheus scrapes, and the alerts that fire: (minute, alert, the pod or Deployment).
CASES: dict[str, tuple[list[dict[str, str]], list[tuple[int, str, str]]]] = {
    "an alias that moved": (
        [info("iris-5d6f-x2x4z", "1x90"), info("iris-5d6f-bb7kq", "1x90", version="2")],
        [(32, "DarwinVersionsMixed", "iris"), (90, "DarwinVersionsMixed", "iris")],
    ),
    "other bytes of one version": (
        [info("iris-5d6f-x2x4z", "1x90"), info("iris-5d6f-bb7kq", "1x90", digest="e")],
        [(90, "DarwinVersionsMixed", "iris")],
    ),
    "a pod that came later": (
        [info("iris-model-server-5d6f-x2x4z", "1x90"), info("iris-model-server-5d6f-bb7kq", "_x40 1x50", version="2")],
        [(32, "", ""), (75, "DarwinVersionsMixed", "iris-model-server")],
    ),
    "a rollout": (
        [info("iris-5d6f-x2x4z", "1x40 stale"), info("iris-7c8b-bb7kq", "_x20 1x70", version="2")],
        [(32, "", ""), (90, "", "")],
    ),
    "two models": (
        [info("iris-5d6f-x2x4z", "1x90"), info("wine-5d6f-bb7kq", "1x90", version="2")],
        [(90, "", "")],
    ),
    "pods of no Deployment": ([info("iris-0", "1x90"), info("wine-0", "1x90", version="2")], [(90, "", "")]),
    "a fall-back": (
        [info("iris-5d6f-x2x4z", "1x90", fallback="true"), info("iris-5d6f-bb7kq", "1x90")],
        [(2, "", ""), (10, "DarwinFallback", "iris-5d6f-x2x4z")],
    ),
    "a download that fails": (
        [restarts("iris-5d6f-x2x4z", "0x10 1x10 2x10 3x60"), restarts("iris-5d6f-bb7kq", "0x90")],
        [(8, "", ""), (25, "DarwinDownloadFails", "iris-5d6f-x2x4z")],
    ),
    "one restart, and those of other containers": (
        [restarts("iris-5d6f-x2x4z", "0x2 1x90"), restarts("iris-5d6f-bb7kq", "0+1x90", container="migrate")],
        [(4, "", ""), (90, "", "")],
    ),
}


# The labels of an alert, besides its severity and namespace, by the name of the pod or Deployment.
LABELS: dict[str, Callable[[str], dict[str, str]]] = {
    "DarwinVersionsMixed": lambda name: {"deployment": name},
    "DarwinFallback": lambda name: {"pod": name, "version": "1"},
    "DarwinDownloadFails": lambda name: {"pod": name, "container": "download"},
}


@pytest.mark.parametrize("case", CASES)
def test_an_alert_fires_when_it_says(case: str, tmp_path: Path) -> None:
    series, expectations = CASES[case]
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        # promtool compares them, too, and their words are no interface.
        del rule["annotations"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    tests = [
        {
            "eval_time": f"{minute}m",
            "alertname": alert,
            "exp_alerts": [{"exp_labels": {"severity": "warning", "namespace": "ml"} | labels(name)}]
            if alert == fires
            else [],
        }
        for minute, fires, name in expectations
        for alert, labels in LABELS.items()
    ]
    document = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": tests}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(document))
    command = [program("promtool", "prometheus"), "test", "rules", "test.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
