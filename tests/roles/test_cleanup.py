"""The cache CronJob: its plan by example, its deeds as a process against a real API server."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

import cleanup
from cleanup import GIB, Decision, Settings
from darwin_runtime.settings import Reader
from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import references
from darwin_runtime.storage.cache import DAY, Cache, Entry
from darwin_runtime.storage.usage import InUse
from tests.conftest import ROOT, Finished, clean_environ, http_server, program
from tests.storage.test_usage import CACHE
from tests.support import apiserver, prepared, storage
from tests.support.apiserver import ApiServer, pod

A, B, C, D = (letter * 64 for letter in "abcd")


def settings(**environ: object) -> Settings:
    return Settings.from_env(Reader({"POD_NAME": "cleanup-1", **{name: str(value) for name, value in environ.items()}}))


# The plan


def entry(key: str, days: float, gib: float = 1) -> Entry:
    return Entry(key, int(gib * GIB), days * DAY, f"models:/{key[0]}/1")


def removed(decisions: list[Decision]) -> list[str]:
    return [decision.entry.key[0] for decision in decisions if decision.remove]


@pytest.mark.parametrize(
    ("environ", "used", "expected"),
    [
        ({}, {}, "cd"),
        ({"TTL_DAYS": 0.5}, {}, "bcd"),
        ({"TTL_DAYS": 0}, {}, "abcd"),
        ({"TTL_DAYS": 100}, {}, ""),
        ({}, {C: {"web"}}, "d"),
        ({"TTL_DAYS": 100, "MAX_SIZE_GB": 2.5}, {}, "cd"),
        ({"TTL_DAYS": 100, "MAX_SIZE_GB": 2.5}, {D: {"web"}}, "bc"),
        ({"TTL_DAYS": 100, "MAX_SIZE_GB": 4}, {}, ""),
        ({"TTL_DAYS": 100, "MAX_SIZE_GB": 3.5}, {}, "d"),
        ({"TTL_DAYS": 100, "MAX_SIZE_GB": 3}, {}, "cd"),
        ({"TTL_DAYS": 100, "MAX_SIZE_GB": 3, "LOW_WATERMARK_PERCENT": 100}, {}, "d"),
        ({"TTL_DAYS": 100, "MAX_SIZE_GB": 3.5, "LOW_WATERMARK_PERCENT": 0}, {}, "abcd"),
        ({"TTL_DAYS": 100, "MAX_SIZE_GB": 0.1}, {key: {"web"} for key in (A, B, C, D)}, ""),
        ({"TTL_DAYS": 9, "MAX_SIZE_GB": 3.5}, {}, "d"),
    ],
)
def test_plan(environ: dict[str, object], used: dict[str, set[str]], expected: str) -> None:
    entries = [entry(A, 0), entry(B, 1), entry(C, 8), entry(D, 30)]
    assert "".join(removed(cleanup.plan(entries, InUse(used), settings(**environ)))) == expected


def test_an_unmatched_pod_pins_everything() -> None:
    decisions = cleanup.plan([entry(D, 30)], InUse(unmatched={"mystery": "cache"}), settings(MAX_SIZE_GB=0.1))
    assert removed(decisions) == []
    assert "mystery" in decisions[0].reason


def test_every_decision_says_why() -> None:
    entries = [entry(A, 0), entry(B, 1), entry(C, 8), entry(D, 30)]
    reasons = [d.reason for d in cleanup.plan(entries, InUse({A: {"web"}}), settings(MAX_SIZE_GB=1))]
    assert reasons == [
        "in use by web",
        "least recently used, to come below 90% of MAX_SIZE_GB=1",
        "unused for TTL_DAYS=7",
        "unused for TTL_DAYS=7",
    ]


# The process


def publish(cache: Cache, key: str, days: float = 0, size: int = 1000) -> None:
    uri, used = f"models:/{key[0]}/1", time.time() - days * DAY
    storage.publish(cache, key, b"x" * size, uri=uri, last_used=used)


_MAIN = "import os, pathlib, sys; sys.path.insert(0, sys.argv[1]); import cleanup; "
_MAIN += "sys.exit(cleanup.main(os.environ, pathlib.Path(sys.argv[2])))"


def clean(cache: Path, api: ApiServer | None = None, **environ: object) -> Finished:
    access = {**api.environ, "GRACE_SECONDS": 0} if api else {"GRACE_SECONDS": 0}
    directory = api.directory if api else cache / "no-service-account"
    done = prepared.run("-c", _MAIN, ROOT, directory, env=clean_environ(**{**access, "CACHE_PATH": cache, **environ}))
    return Finished(done.returncode, done.stdout, done.stderr)


def lease(cache: Cache, name: str, key: str, uid: str = "") -> None:
    """A lease written well before any listing."""
    before = set((cache.root / ".leases").iterdir())
    cache.lease(name, "/models", key, uid)
    [new] = set((cache.root / ".leases").iterdir()) - before
    os.utime(new, (0, 0))


def keys(cache: Cache) -> str:
    return "".join(sorted(name[0] for name in os.listdir(cache.root) if cache_module.is_key(name)))


def test_removes_exactly_what_is_expired_and_free(cache: Cache, api: ApiServer) -> None:
    for key, days in [(A, 30), (B, 30), (C, 1)]:
        publish(cache, key, days)
    lease(cache, "web", A)
    api.pods = [pod("web", phase="Pending", **CACHE)]
    done = clean(cache.root, api)
    assert done.code == 0, done.err
    assert keys(cache) == "ac"
    assert not list((cache.root / ".trash").iterdir())
    assert "in use by web (models:/a/1)" in done.err
    assert "unused for TTL_DAYS=7 (models:/b/1)" in done.err
    assert "removed 1 of 3 entries: 1000 B of 2.9 KiB freed" in done.last
    assert api.requests[0].path == "/api/v1/namespaces/default/pods"


def test_a_dry_run_only_tells(cache: Cache, api: ApiServer) -> None:
    publish(cache, B, 30)
    lease(cache, "gone", B)
    done = clean(cache.root, api, DRY_RUN="true")
    assert done.code == 0, done.err
    assert keys(cache) == "b"
    assert len(cache.leases()) == 1
    assert "DRY_RUN, would remove 1 of 1 entries" in done.last
    assert clean(cache.root, api).code == 0
    assert keys(cache) == ""
    assert cache.leases() == []


def test_by_size_the_least_recently_used_goes(cache: Cache, api: ApiServer) -> None:
    for key, days in [(A, 3), (B, 1), (C, 2)]:
        publish(cache, key, days, size=100_000)
    done = clean(cache.root, api, MAX_SIZE_GB=150_000 / GIB)
    assert done.code == 0, done.err
    assert keys(cache) == "b"


def test_being_in_use_is_being_used(cache: Cache, api: ApiServer) -> None:
    publish(cache, A, 30)
    lease(cache, "web", A)
    api.pods = [pod("web")]
    assert clean(cache.root, api).code == 0
    [found], _ = cache.entries(cache.now())
    assert found.idle < DAY, "or it would expire the moment its pod ends"


@pytest.mark.parametrize("when", ["planning", "executing"])
def test_nothing_is_removed_when_pods_can_not_be_listed(when: str, cache: Cache, api: ApiServer) -> None:
    publish(cache, B, 30)
    api.faults = [apiserver.ok] * (when == "executing") + [apiserver.forbidden()]
    done = clean(cache.root, api)
    assert done.code == 1
    assert keys(cache) == "b"
    assert cache.damage(B) == []
    assert not list((cache.root / ".trash").iterdir())
    assert "kind: Role" in done.err
    assert "namespace: default" in done.err
    assert "Traceback" not in done.err


def test_outside_a_cluster_nothing_is_removed(cache: Cache) -> None:
    publish(cache, B, 30)
    done = clean(cache.root)
    assert done.code == 1
    assert keys(cache) == "b"
    assert "run this in a pod" in done.last


def test_a_namespace_without_pods_is_a_mistake(cache: Cache, api: ApiServer) -> None:
    publish(cache, B, 30)
    done = clean(cache.root, api, NAMESPACE="defualt")
    assert done.code == 1
    assert keys(cache) == "b"
    assert "NAMESPACE=defualt has no pods" in done.last


def test_a_pod_that_comes_late_keeps_its_entry(cache: Cache, api: ApiServer) -> None:
    publish(cache, B, 30)

    def late(handler: Any) -> None:
        api.pods = [pod("late", **CACHE)]
        cache.lease("late", "/models", B)
        assert cache.has(B)
        apiserver.ok(handler)

    api.faults = [apiserver.ok, late]
    done = clean(cache.root, api)
    assert done.code == 0, done.err
    assert keys(cache) == "b"
    assert cache.damage(B) == []
    assert f"kept {B}: in use by late" in done.err
    assert done.last.endswith("removed 0 of 1 entries, 1 spared: 0 B of 1000 B freed")


def test_a_pod_that_comes_after_the_last_look_keeps_its_entry(cache: Cache, api: ApiServer) -> None:
    """Which no listing shows: the pod sees that the removal is announced, and vetoes it."""
    publish(cache, B, 30)
    writes = cache.leases

    def late(handler: Any) -> None:
        # Old enough to be of before the listing, as it looks to the cleanup; and its pod isn't listed.
        cache.lease("late", "/models", B)
        there = cache.fingerprint(B)
        assert there
        assert cache.veto_removals(B, there)
        [written] = writes()
        os.utime(cache.root / ".leases" / written.name, (0, 0))
        apiserver.ok(handler)

    api.faults = [apiserver.ok, late]
    done = clean(cache.root, api)
    assert done.code == 0, done.err
    assert keys(cache) == "b"
    assert f"kept {B}: a pod has just come to use it" in done.err
    assert not list((cache.root / ".trash").iterdir())


def test_an_entry_named_without_a_lease_comes_back(cache: Cache, api: ApiServer) -> None:
    publish(cache, B, 30)

    def late(handler: Any) -> None:
        api.pods = [pod("late", env={"MODEL_LOCAL_PATH": f"/model-cache/{B}/model"}, **CACHE)]
        apiserver.ok(handler)

    api.faults = [apiserver.ok, apiserver.ok, late]
    done = clean(cache.root, api)
    assert done.code == 0, done.err
    assert keys(cache) == "b"
    assert cache.damage(B) == []
    assert f"restored {B}: in use by late" in done.err
    assert done.last.endswith("removed 0 of 1 entries, 1 restored: 0 B of 1000 B freed")


def test_a_pod_whose_uid_is_not_the_api_server_s_keeps_its_entry_and_lease(cache: Cache, api: ApiServer) -> None:
    for key in (A, B):
        publish(cache, key, 30)
        lease(cache, "web" if key == A else "gone", key, uid="01234567-89ab-cdef-0123-456789abcdef")
    api.pods = [pod("cleanup-1", **CACHE), pod("web", **CACHE)]
    done = clean(cache.root, api, POD_NAME="cleanup-1")
    assert done.code == 0, done.err
    assert keys(cache) == "a"
    assert [one.pod for one in cache.leases()] == ["web"]
    assert "dropping the lease of gone, which is gone" in done.err


def test_a_pod_that_uses_no_entry_keeps_none(cache: Cache, api: ApiServer) -> None:
    """A pod with another directory of the volume, and a cleanup that hangs."""
    publish(cache, B, 30)
    here: dict[str, Any] = {"claim": "models", "mount_path": str(cache.root)}
    own, hangs = (pod(name, deleted="2026-01-01T00:00:00Z", **here) for name in ("cleanup-1", "cleanup-0"))
    other = pod("another-app", claim="models", mount_path="/data")
    for each, inside in ((own, "cache"), (hangs, "cache"), (other, "another-app")):
        each["spec"]["initContainers"] = []
        each["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = inside
    hangs["spec"]["containers"][0]["command"] = ["python", "/app/cleanup.py"]
    api.pods = [own, hangs, other]
    done = clean(cache.root, api, POD_NAME="cleanup-1")
    assert done.code == 0, done.err
    assert keys(cache) == ""


def test_a_pod_that_may_use_any_entry_is_named_with_its_volume(cache: Cache, api: ApiServer) -> None:
    publish(cache, B, 30)
    api.pods = [pod("backup", claim="models", mount_path=str(cache.root))]
    done = clean(cache.root, api)
    assert done.code == 0, done.err
    assert keys(cache) == "b"
    assert "pod backup mounts the cache, in its volume cache, and names no entry, so every entry is kept; " in done.err
    assert "name the key of its entry in an annotation, mount another subPath, or delete the pod" in done.err


def set_aside(cache: Cache, key: str) -> Path:
    """The entry in the trash, as a cleanup leaves it that was killed."""
    removal = cache.announce(key)
    assert cache.commit(removal)
    cache.cancel(removal)
    return removal.trash


def test_what_an_earlier_run_left_in_the_trash(cache: Cache, api: ApiServer) -> None:
    for key in (A, B):
        publish(cache, key)
        set_aside(cache, key)
    lease(cache, "web", A)
    api.pods = [pod("web", **CACHE)]
    assert clean(cache.root, api).code == 0
    assert keys(cache) == "a"
    assert not list((cache.root / ".trash").iterdir())


def test_what_another_cleanup_has_announced_is_its_own(cache: Cache, api: ApiServer) -> None:
    publish(cache, B, 30)
    cache.commit(cache.announce(B))
    assert clean(cache.root, api).code == 0
    assert len(list((cache.root / ".trash").iterdir())) == 2


def test_a_half_deleted_entry_never_comes_back(cache: Cache, api: ApiServer) -> None:
    """What a cleanup leaves that was killed while it deleted, and a pod that waits for its download of the same."""
    publish(cache, A)
    (set_aside(cache, A) / "model" / "MLmodel").unlink()
    lease(cache, "web", A)
    api.pods = [pod("web", **CACHE)]
    assert clean(cache.root, api).code == 0
    assert keys(cache) == ""
    assert not list((cache.root / ".trash").iterdir())

    api.faults = [apiserver.ok, apiserver.forbidden()]
    publish(cache, B)
    (set_aside(cache, B) / "model" / "MLmodel").unlink()
    assert clean(cache.root, api).code == 1
    assert keys(cache) == ""


def test_aliases_and_refs_go_with_their_entry(cache: Cache, api: ApiServer) -> None:
    publish(cache, A)
    publish(cache, B, 30)
    references.set_alias(cache, C, A)
    references.set_alias(cache, D, B)
    references.set_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/a/1", A)
    references.set_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/b/1", B)
    for path in (cache.root / C, cache.root / D, *(cache.root / ".refs").iterdir()):
        os.utime(path, (0, 0), follow_symlinks=False)
    assert clean(cache.root, api).code == 0
    assert references.aliases(cache) == {C: A}
    assert references.find_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/a/1") is not None
    assert references.find_ref(cache, {"MLFLOW_TRACKING_URI": "http://mlflow"}, "models:/b/1") is None


def test_strangers_are_left_alone_and_listed(cache: Cache, api: ApiServer) -> None:
    (cache.root / "notes").mkdir()
    (cache.root / B / "model").mkdir(parents=True)
    done = clean(cache.root, api, TTL_DAYS=0)
    assert done.code == 0, done.err
    assert (cache.root / "notes").is_dir()
    assert (cache.root / B / "model").is_dir()
    assert "notes is not an entry" in done.err


def test_an_empty_directory(tmp_path: Path) -> None:
    done = clean(tmp_path)
    assert done.code == 0
    assert "nothing to do" in done.last


def test_not_a_cache(tmp_path: Path, api: ApiServer) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / B).mkdir()
    (tmp_path / "link").symlink_to("home")
    for path in (tmp_path / "home", tmp_path / "link", tmp_path / "absent", Path("/")):
        done = clean(path, api)
        assert done.code == 2, done.err
        assert f"CACHE_PATH={path}" in done.last
    assert (tmp_path / "home" / B).is_dir()


def test_all_bad_settings_at_once(tmp_path: Path) -> None:
    bad: dict[str, object] = {"TTL_DAYS": "week", "MAX_SIZE_GB": "-1", "DRY_RUN": "perhaps", "GRACE_SECONDS": "soon"}
    done = clean(tmp_path, None, **bad, LOW_WATERMARK_PERCENT="101")
    assert done.code == 2
    for name in (*bad, "LOW_WATERMARK_PERCENT"):
        assert f"bad configuration: {name}=" in done.err


# What it says of itself


def test_the_result_is_a_line_of_json(cache: Cache, api: ApiServer) -> None:
    publish(cache, A)
    publish(cache, B, 30)
    (cache.root / "notes").mkdir()
    lease(cache, "web", A)
    api.pods = [pod("web", **CACHE)]
    done = clean(cache.root, api)
    result = json.loads(done.out)
    assert result.pop("seconds") > 0
    assert result == {
        "success": 1,
        "dry_run": 0,
        "entries": 2,
        "bytes": 2000,
        "entries_in_use": 1,
        "unknown": 1,
        "removed": 1,
        "freed": 1000,
        "spared": 0,
        "restored": 0,
        "failed": 0,
    }
    api.faults = [apiserver.forbidden()]
    assert json.loads(clean(cache.root, api).out)["success"] == 0


def test_the_result_as_metrics_in_a_file(cache: Cache, api: ApiServer, tmp_path: Path) -> None:
    promtool = program("promtool", "prometheus")
    publish(cache, B, 30)
    file = tmp_path / "cleanup.prom"
    assert clean(cache.root, api, METRICS_TEXTFILE=file).code == 0
    text = file.read_text()
    assert "darwin_model_cache_cleanup_freed_bytes 1000.0\n" in text
    assert "darwin_model_cache_cleanup_success 1.0\n" in text
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    api.faults = [apiserver.forbidden()]
    assert clean(cache.root, api, METRICS_TEXTFILE=file).code == 1
    assert "darwin_model_cache_cleanup_success 0.0\n" in file.read_text()
    assert "entries" not in file.read_text(), "what is not known is not told"


def test_the_result_at_a_pushgateway(cache: Cache, api: ApiServer) -> None:
    pushed: list[tuple[str, str, str]] = []
    credentials: list[str | None] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            pushed.append((self.path, self.headers["Content-Type"], body))
            credentials.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http_server(Gateway) as address:
        assert clean(cache.root, api, PUSHGATEWAY_URL=address).code == 0
        host = address.removeprefix("http://")
        assert clean(cache.root, api, PUSHGATEWAY_URL=host).code == 0
        assert clean(cache.root, api, PUSHGATEWAY_URL=f"http://user:hunter%2022@{host}").code == 0
    assert credentials == [None, None, f"Basic {base64.b64encode(b'user:hunter 22').decode()}"]
    path, kind, body = pushed[0]
    assert path == "/metrics/job/darwin_model_cache_cleanup"
    assert kind.startswith("text/plain; version=0.0.4")
    assert "darwin_model_cache_entries 0.0\n" in body

    done = clean(cache.root, api, PUSHGATEWAY_URL=address, METRICS_TEXTFILE="/absent/cleanup.prom")
    assert done.code == 0, "the cache is clean all the same"
    assert f"cannot push to PUSHGATEWAY_URL={address}" in done.err
    assert "cannot write METRICS_TEXTFILE=/absent/cleanup.prom" in done.err
    done = clean(cache.root, api, PUSHGATEWAY_URL="http://user:hunter22@[gateway")
    assert done.code == 0
    assert "cannot push to PUSHGATEWAY_URL=" in done.err
    assert "hunter22" not in done.err
