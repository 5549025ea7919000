"""Which pods use which entries, by example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from darwin_runtime.storage import references, usage
from darwin_runtime.storage.cache import Lease
from darwin_runtime.storage.usage import InUse
from tests.support.apiserver import pod

A, B, C = (letter * 64 for letter in "abc")

CACHE: dict[str, Any] = {"claim": "models", "mount_path": "/model-cache"}


def used_by(
    *pods: dict[str, Any], leases: tuple[Lease, ...] = (), names: dict[str, str] | None = None, listed: float = 100
) -> InUse:
    known = {A: A, B: B} if names is None else names
    return usage.in_use(pods, leases, known, listed, "cleanup-1", Path("/model-cache"))


@pytest.mark.parametrize("phase", ["Pending", "Running", "Unknown"])
def test_a_lease_counts_while_its_pod_lives(phase: str) -> None:
    lease = Lease("web", "", A, 0)
    assert used_by(pod("web", phase=phase), leases=(lease,)).keys == {A: {"web"}}


def test_a_terminating_pod_lives() -> None:
    lease = Lease("web", "", A, 0)
    dying = pod("web", deleted="2026-01-01T00:00:00Z")
    assert used_by(dying, leases=(lease,)).keys == {A: {"web"}}


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_ended_uses_nothing(phase: str) -> None:
    lease = Lease("web", "", A, 0)
    assert used_by(pod("web", phase=phase, **CACHE), leases=(lease,)) == InUse()


def test_a_lease_newer_than_the_listing_counts() -> None:
    assert used_by(leases=(Lease("new", "", A, 101),)).keys == {A: {"new"}}
    assert used_by(leases=(Lease("old", "", A, 99),)).keys == {}


def test_a_long_pod_name_is_cut_in_its_host_name() -> None:
    name = "a-deployment-with-a-name-of-very-considerable-length-5d6f7c8b9a-x2x4z"
    lease = Lease(name[:63], "", A, 0)
    assert used_by(pod(name, **CACHE), leases=(lease,)) == InUse({A: {name}})


UID = "01234567-89ab-cdef-0123-456789abcdef"


def test_a_lease_with_a_uid_is_of_that_pod_alone() -> None:
    """Pods may share a host name, and one that comes again has its name again."""
    web, other = pod("web", **CACHE), pod("web-2", **CACHE)
    web["metadata"]["uid"], web["spec"]["hostname"], other["spec"]["hostname"] = UID, "model", "model"
    leases = (Lease("model", UID, A, 0), Lease("web", UID.replace("0", "f"), B, 0))
    assert used_by(web, other, leases=leases) == InUse({A: {"web"}}, {"web-2"})
    assert usage.dead_leases([web, other], leases, 100) == [leases[1]]


def test_a_pod_may_be_called_as_its_host() -> None:
    named, on_host = pod("web", **CACHE), pod("proxy", **CACHE)
    named["spec"]["hostname"] = "model"
    on_host["spec"] |= {"hostNetwork": True, "nodeName": "node-1"}
    leases = (Lease("model", "", A, 0), Lease("node-1", "", B, 0))
    assert used_by(named, on_host, leases=leases) == InUse({A: {"web"}, B: {"proxy"}})
    assert usage.dead_leases([named, on_host], leases, 100) == []


@pytest.mark.parametrize(
    "reference",
    [
        {"env": {"MODEL_LOCAL_PATH": f"/model-cache/{A}/model"}},
        {"init_env": {"WHATEVER": A}},
        {"annotations": {"example.com/model": f"key={A}"}},
    ],
)
def test_a_reference_counts(reference: dict[str, Any]) -> None:
    assert used_by(pod("web", **reference, **CACHE)) == InUse({A: {"web"}})


def test_an_alias_counts() -> None:
    alias = references.make_alias("shop", "models:/m/1")
    names = {A: A, alias: A}
    chart = pod("chart", env={"MODEL_LOCAL_PATH": f"/model-cache/{alias}/model"}, **CACHE)
    ours = pod("ours", init_env={"DEPLOYMENT_NAME": "shop", "MODEL_URI": "models:/m/1"}, **CACHE)
    assert used_by(chart, ours, names=names) == InUse({A: {"chart", "ours"}})


def test_a_checksum_is_no_reference() -> None:
    web = pod("web", annotations={"checksum/config": C}, **CACHE)
    assert used_by(web) == InUse(unmatched={"web"})


def test_who_mounts_the_cache_is_known_from_this_pod() -> None:
    own = pod("cleanup-1", **CACHE)
    elsewhere = pod("elsewhere", claim="models", mount_path="/somewhere/else")
    database = pod("database", claim="data", mount_path="/model-cache")
    assert used_by(own, elsewhere, database) == InUse(unmatched={"elsewhere"})


def test_without_this_pod_the_mount_path_tells() -> None:
    assert used_by(pod("web", **CACHE), pod("database", claim="data", mount_path="/data")) == InUse(unmatched={"web"})


@pytest.mark.parametrize(
    ("source", "shared"),
    [
        ({"nfs": {"server": "files", "path": "/models"}}, True),
        ({"csi": {"driver": "d", "volumeAttributes": {"share": "models"}}}, True),
        ({"azureFile": {"shareName": "models"}}, True),
        ({"hostPath": {"path": "/srv/models"}}, True),
        ({"emptyDir": {}}, False),
    ],
)
def test_any_volume_that_pods_can_share_counts(source: dict[str, Any], shared: bool) -> None:
    pods = [pod(name, **CACHE) for name in ("cleanup-1", "web")]
    for each in pods:
        each["spec"]["volumes"] = [{"name": "cache", **source}]
    assert used_by(*pods).unmatched == ({"web"} if shared else set())


def test_mounting_it_read_only_is_mounting_it() -> None:
    web = pod("web", **CACHE)
    web["spec"]["volumes"][0]["persistentVolumeClaim"]["readOnly"] = True
    assert used_by(pod("cleanup-1", **CACHE), web).unmatched == {"web"}


def test_a_subdirectory_of_a_mount_is_mounted_too() -> None:
    own = pod("cleanup-1", claim="models", mount_path="/")
    assert used_by(own, pod("web", claim="models", mount_path="/")).unmatched == {"web"}


def test_dead_leases() -> None:
    leases = [Lease(name, "", A, written) for name, written in [("gone", 0), ("ended", 0), ("web", 0), ("new", 200)]]
    pods = [pod("web"), pod("ended", phase="Succeeded")]
    assert [lease.pod for lease in usage.dead_leases(pods, leases, 100)] == ["gone", "ended"]
