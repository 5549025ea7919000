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
    assert used_by(web, other, leases=leases) == InUse({A: {"web"}}, {"web-2": "cache"})
    assert usage.dead_leases([web, other], leases, 100) == [leases[1]]


FOREIGN = [UID.replace("0", letter) for letter in "def"]
DAY = 86400.0


def kept(pods: list[dict[str, Any]], *leases: Lease) -> str:
    """The first letters of the entries that count, after a check that exactly their leases stay."""
    found = used_by(*pods, leases=leases, names={}, listed=10 * DAY)
    assert not found.unmatched
    stays = {lease.key for lease in leases} - {lease.key for lease in usage.dead_leases(pods, leases, 10 * DAY)}
    assert stays == found.keys.keys()
    return "".join(sorted(key[0] for key in stays))


def with_uid(each: dict[str, Any], uid: str = UID, **spec: Any) -> dict[str, Any]:
    each["metadata"]["uid"] = uid
    each["spec"] |= spec
    return each


LONG = "a-deployment-with-a-name-of-very-considerable-length-5d6f7c8b9a-x2x4z"


@pytest.mark.parametrize(
    ("leases", "expected"),
    [
        # The kubelet of a virtual cluster's host knows another UID than the API server; or it is a predecessor's, and
        # the pod has not come to its own lease yet.
        ([("web-0", FOREIGN[0], A, 0)], "a"),
        ([("web-0", FOREIGN[0], A, 0), ("web-0", FOREIGN[0], B, 5 * DAY)], "ab"),
        # A static pod's UID is none that is seen.
        ([("web-0", "", A, 0), ("web-0", "", B, 5 * DAY)], "ab"),
        # A predecessor's UID, where the pod's own one is seen; and where it is not, which only shows by time.
        ([("web-0", FOREIGN[0], A, 0), ("web-0", UID, B, 1)], "b"),
        ([("web-0", FOREIGN[0], A, 5 * DAY), ("web-0", UID, B, 1)], "b"),
        ([("web-0", FOREIGN[0], A, 0), ("web-0", UID, B, 1), ("web-0", "", C, 0)], "bc"),
        ([("web-0", FOREIGN[0], A, 0), ("web-0", FOREIGN[1], B, 2 * DAY), ("web-0", "", C, 0)], "bc"),
        ([("web-0", FOREIGN[0], A, 0), ("web-0", FOREIGN[0], B, 2 * DAY), ("web-0", FOREIGN[1], C, 2 * DAY)], "abc"),
        # A predecessor that was deleted by force may go on for a while, and write the last lease.
        ([("web-0", FOREIGN[0], A, 3600), ("web-0", FOREIGN[1], B, 0)], "ab"),
        # Leases of others.
        ([("web-0", UID, A, 0), ("web-1", FOREIGN[0], B, 0), ("web", "", C, 0)], "a"),
    ],
)
def test_a_lease_counts_by_name_too(leases: list[tuple[str, str, str, float]], expected: str) -> None:
    assert kept([with_uid(pod("web-0"))], *(Lease(*lease) for lease in leases)) == expected


@pytest.mark.parametrize(
    "pods",
    [
        pytest.param([with_uid(pod(LONG))], id="cut"),
        pytest.param([with_uid(pod(LONG[:63]))], id="may be cut"),
        pytest.param([with_uid(pod(LONG[:62])), with_uid(pod("b"), "other", hostname=LONG[:62])], id="a host's"),
    ],
)
def test_where_pods_may_share_a_name_no_lease_is_a_predecessor_s(pods: list[dict[str, Any]]) -> None:
    name = pods[0]["metadata"]["name"][:63]
    assert kept(pods, Lease(name, FOREIGN[0], A, 0), Lease(name, FOREIGN[1], B, 5 * DAY)) == "ab"


def test_a_lease_of_a_listed_pod_is_that_pod_s_alone() -> None:
    """Also of one that has ended: by its name it would be the other's."""
    ended = with_uid(pod("web-1", phase="Failed"), hostname="model")
    lives = with_uid(pod("web-2"), FOREIGN[0], hostname="model")
    assert kept([ended, lives], Lease("model", UID, A, 0), Lease("model", FOREIGN[1], B, 0)) == "b"


@pytest.mark.parametrize(
    ("spec", "lease"),
    [
        ({"hostNetwork": True, "nodeName": "node-1"}, "node-1"),
        ({"hostNetwork": True, "nodeName": "node-1"}, "node-1.example.com"),
        ({"hostNetwork": True, "nodeName": "node-1.example.com"}, "NODE-1"),
        ({"hostname": "model", "subdomain": "models", "setHostnameAsFQDN": True}, "model.models.default.svc"),
        ({"subdomain": "models", "setHostnameAsFQDN": True}, "web-node-1.models.default.svc.cluster.local"),
        ({"containers": [{"name": "serve", "env": [{"name": "POD_NAME", "value": "mine"}]}]}, "mine"),
        ({}, "web-node-1"),
    ],
)
def test_a_static_pod_is_known_by_what_it_may_call_itself(spec: dict[str, Any], lease: str) -> None:
    """Its kubelet's UID is not seen, and the one of its mirror pod is another."""
    mirror = with_uid(pod("web-node-1"), **spec)
    mirror["metadata"]["annotations"] = {"kubernetes.io/config.hash": "0123456789abcdef0123456789abcdef"}
    assert kept([mirror], Lease(lease, "", A, 0), Lease("node-10", "", B, 0), Lease("web", FOREIGN[0], B, 0)) == "a"


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
    assert used_by(web) == InUse(unmatched={"web": "cache"})


def test_who_mounts_the_cache_is_known_from_this_pod() -> None:
    own = pod("cleanup-1", **CACHE)
    elsewhere = pod("elsewhere", claim="models", mount_path="/somewhere/else")
    database = pod("database", claim="data", mount_path="/model-cache")
    assert used_by(own, elsewhere, database) == InUse(unmatched={"elsewhere": "cache"})


def test_without_this_pod_the_mount_path_tells() -> None:
    assert used_by(pod("web", **CACHE), pod("database", claim="data", mount_path="/data")) == InUse(
        unmatched={"web": "cache"}
    )


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
    assert used_by(*pods).unmatched.keys() == ({"web"} if shared else set())


@pytest.mark.parametrize(
    ("kind", "one", "other", "same"),
    [
        ("persistentVolumeClaim", {"claimName": "models"}, {"claimName": "models", "readOnly": True}, True),
        ("persistentVolumeClaim", {"claimName": "models"}, {"claimName": "data"}, False),
        ("hostPath", {"path": "/srv/models"}, {"path": "/srv/models/", "type": "Directory"}, True),
        ("hostPath", {"path": "/srv/models"}, {"path": "/srv"}, True),
        ("hostPath", {"path": "/srv/models"}, {"path": "/"}, True),
        ("hostPath", {"path": "/srv/models"}, {"path": "/srv/models/.leases"}, True),
        ("hostPath", {"path": "/srv/models"}, {"path": "/srv/models-2"}, False),
        ("hostPath", {"path": "/srv/models"}, {"path": "/var/log"}, False),
        ("nfs", {"server": "files", "path": "/models"}, {"server": "files", "path": "/", "readOnly": True}, True),
        ("nfs", {"server": "files", "path": "/models"}, {"server": "files", "path": "/home"}, False),
        ("nfs", {"server": "files", "path": "/models"}, {"server": "others", "path": "/models"}, False),
        ("cephfs", {"monitors": ["m"], "path": "/a", "user": "x"}, {"monitors": ["m"], "path": "/a"}, True),
        (
            "csi",
            {"driver": "nfs", "volumeAttributes": {"server": "files", "mountOptions": "hard"}},
            {"driver": "nfs", "fsType": "nfs", "volumeAttributes": {"server": "files"}},
            True,
        ),
    ],
)
def test_which_volumes_are_the_same(kind: str, one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    pods = [pod(name, **CACHE) for name in ("cleanup-1", "web")]
    for each, source in zip(pods, (one, other), strict=True):
        each["spec"]["volumes"] = [{"name": "cache", kind: source}]
    assert used_by(*pods).unmatched == ({"web": "cache"} if same else {})


def mounting(name: str, *mounts: dict[str, Any], kind: str = "containers", **container: Any) -> dict[str, Any]:
    """A pod of one container that mounts the claim `models`; each mount says how."""
    each = pod(name, claim="models")
    where = [{"name": "cache", "mountPath": "/model-cache", **mount} for mount in mounts]
    each["spec"] |= {"initContainers": [], "containers": [], kind: [{"name": "c", "volumeMounts": where, **container}]}
    return each


@pytest.mark.parametrize(
    ("own", "mounts", "overlaps"),
    [
        ({}, [{}], True),
        ({"subPath": "cache"}, [{}], True),
        ({"subPath": "cache"}, [{"subPath": "cache"}], True),
        ({"subPath": "cache"}, [{"subPath": "./cache//"}], True),
        ({"subPath": "cache/"}, [{"subPath": "cache/deeper"}], True),
        ({"subPath": "a/cache"}, [{"subPath": "a"}], True),
        ({"subPath": "a/cache"}, [{"subPath": "a/../b"}], True),
        ({"subPath": "a/../b"}, [{"subPath": "c"}], True),
        ({}, [{"subPath": "another"}], True),
        ({"subPath": "cache"}, [{"subPath": "another"}], False),
        ({"subPath": "cache"}, [{"subPath": "cache-2"}], False),
        ({"subPath": "a/cache"}, [{"subPath": "a/another"}], False),
        ({"subPath": "cache"}, [{"subPath": "another"}, {"subPath": "cache", "mountPath": "/x"}], True),
        ({"subPath": "cache"}, [], False),
        # A variable may be anything.
        ({"subPath": "cache"}, [{"subPathExpr": "$(TEAM)/cache"}], True),
        ({"subPath": "cache"}, [{"subPathExpr": "ca$(TEAM)"}], True),
        ({"subPath": "cache"}, [{"subPathExpr": "cache/$(TEAM)"}], True),
        ({"subPath": "cache"}, [{"subPathExpr": "another/$(TEAM)"}], False),
        ({"subPath": "cache"}, [{"subPathExpr": "another"}], False),
        ({"subPathExpr": "$(NAMESPACE)/cache"}, [{"subPath": "another"}], True),
        ({"subPathExpr": "teams/$(NAMESPACE)/cache"}, [{"subPath": "another"}], False),
        # The cache may be below what is mounted.
        ({"mountPath": "/"}, [{"mountPath": "/"}], True),
        ({"mountPath": "/"}, [{"subPath": "model-cache"}], True),
        ({"mountPath": "/"}, [{"subPath": "another"}], False),
        ({"mountPath": "model-cache/"}, [{"subPath": "another", "mountPath": "/model-cache"}], True),
    ],
)
def test_only_a_mount_that_overlaps_the_cache_counts(
    own: dict[str, Any], mounts: list[dict[str, Any]], overlaps: bool
) -> None:
    pods = [mounting("cleanup-1", own), mounting("web", *mounts)]
    assert used_by(*pods).unmatched == ({"web": "cache"} if overlaps else {})


def test_every_kind_of_container_may_mount_it() -> None:
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        assert used_by(mounting("web", {}, kind=kind)).unmatched == {"web": "cache"}
    device: dict[str, Any] = {"volumeMounts": [], "volumeDevices": [{"name": "cache", "devicePath": "/dev/xvda"}]}
    assert used_by(mounting("cleanup-1", {"subPath": "a"}), mounting("web", **device)).unmatched == {"web": "cache"}


def test_a_debug_container_counts_until_it_ends() -> None:
    debugged = mounting("web", {}, kind="ephemeralContainers")
    for state, unmatched in (("running", {"web": "cache"}), ("terminated", {})):
        debugged["status"]["ephemeralContainerStatuses"] = [{"name": "c", "state": {state: {}}}]
        assert used_by(mounting("cleanup-1", {}), debugged).unmatched == unmatched


def test_a_mount_hides_what_another_has_there() -> None:
    own = mounting("cleanup-1", {"mountPath": "/"}, {"name": "inner"})
    own["spec"]["volumes"] += [{"name": "inner", "hostPath": {"path": "/srv"}}]
    host = pod("host", **CACHE)
    host["spec"]["volumes"] = [{"name": "cache", "hostPath": {"path": "/srv"}}]
    assert used_by(own, host, mounting("web", {})).unmatched == {"host": "cache"}


def test_a_link_to_the_cache_is_another_way_to_it(tmp_path: Path) -> None:
    (tmp_path / "volume" / "v1" / "cache").mkdir(parents=True)
    (tmp_path / "volume" / "current").symlink_to("v1")
    own = mounting("cleanup-1", {"mountPath": f"{tmp_path}/volume"})
    pods = [own, *(mounting(path, {"subPath": f"{path}/cache"}) for path in ("v1", "current", "v2"))]
    found = usage.in_use(pods, [], {}, 100, "cleanup-1", tmp_path / "volume" / "current" / "cache")
    assert found.unmatched.keys() == {"v1", "current"}


def test_without_this_pod_places_are_those_of_the_others() -> None:
    pods = [mounting("web", {"subPath": "cache"}), mounting("logs", {"subPath": "logs", "mountPath": "/logs"})]
    assert used_by(*pods, mounting("backup", {"mountPath": "/all"})).unmatched.keys() == {"web", "backup"}


def test_a_subdirectory_of_a_mount_is_mounted_too() -> None:
    own = pod("cleanup-1", claim="models", mount_path="/")
    assert used_by(own, pod("web", claim="models", mount_path="/")).unmatched.keys() == {"web"}


@pytest.mark.parametrize(
    "reference",
    [
        {"mounts": [{"subPath": f"models/{A}/model"}]},
        {"args": ["--model", f"/model-cache/{A}/model"]},
        {"command": ["sh", "-c", f"exec serve /model-cache/{A}/model"]},
    ],
)
def test_an_entry_is_named_by_a_mount_or_a_command_too(reference: dict[str, Any]) -> None:
    own, mounts = mounting("cleanup-1", {"subPath": "models"}), reference.pop("mounts", [{}])
    assert used_by(own, mounting("web", *mounts, **reference)) == InUse({A: {"web"}})


@pytest.mark.parametrize(
    ("container", "cleans"),
    [
        ({"command": ["python", "/app/cleanup.py"]}, True),
        ({"args": ["python", "cleanup.py"]}, True),
        ({"command": ["python"], "args": ["/scripts/cleanup_cache.py"]}, True),
        ({"command": ["sh", "-c", "sleep 60; python '/app/cleanup.py' && echo done"]}, True),
        ({"command": ["sh", "-c", "python /app/cleanup.py; exec python /app/darwin_serve.py"]}, False),
        ({"command": ["sh", "-c", "python /app/cleanup.py; python my_job.py"]}, False),
        ({"command": ["python", "/app/cleanup.py.d/serve"]}, False),
        ({"command": ["python", "my_cleanup.py"]}, False),
        ({"env": [{"name": "NEXT", "value": "cleanup.py"}]}, False),
        ({"command": ["/bin/mine"], "image": "tools:1"}, True),
        ({"command": ["/bin/mine"], "image": "tools:2"}, False),
        ({"command": ["/bin/mine"], "image": "tools:1", "env": [{"name": "TASK", "value": "serve"}]}, False),
        ({"image": "tools:1"}, False),
        ({}, False),
    ],
)
def test_another_cleanup_uses_nothing(container: dict[str, Any], cleans: bool) -> None:
    """By its script, or because it runs just what this pod does."""
    own, other = mounting("cleanup-1", {}, command=["/bin/mine"], image="tools:1"), mounting("other", {}, **container)
    other["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"  # it hangs
    assert used_by(own, other).unmatched == ({} if cleans else {"other": "cache"})
    other["spec"]["initContainers"] = [{"name": "d", "volumeMounts": [{"name": "cache", "mountPath": "/x"}]}]
    assert used_by(own, other).unmatched == {"other": "cache"}


def test_of_a_pod_with_several_programs_it_is_not_known_which_one_cleans() -> None:
    pods = [mounting(name, {}, command=["/bin/mine"], image="tools:1") for name in ("cleanup-1", "other")]
    for each in pods:
        each["spec"]["containers"] *= 2
    assert used_by(*pods).unmatched == {"other": "cache"}


def test_pods_of_one_host_s_name_are_not_all_this_one() -> None:
    pods = [with_uid(mounting(name, {}), f"uid-{name}", hostname="cleanup-1") for name in ("one", "two")]
    assert used_by(*pods).unmatched.keys() == {"one", "two"}
    assert used_by(*pods, mounting("cleanup-1", {})).unmatched.keys() == {"one", "two"}


POD_NAME = {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
DOWNLOAD: dict[str, Any] = {
    "command": ["python", "/app/download.py"],
    "env": [POD_NAME, {"name": "STORAGE_STRATEGY", "value": "pvc"}],
}


@pytest.mark.parametrize(
    ("change", "uses_nothing"),
    [
        ({}, True),
        ({"command": ["python", "/scripts/download_model.py"]}, False),
        ({"env": [POD_NAME, {"name": "STORAGE_STRATEGY", "value": "emptydir"}]}, False),
        ({"env": [POD_NAME], "envFrom": [{"configMapRef": {"name": "x"}}]}, False),
        ({"env": [{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]}, False),
    ],
)
def test_a_download_leases_before_it_uses_anything(change: dict[str, Any], uses_nothing: bool) -> None:
    """So a pod that never starts keeps nothing, nor one whose download always fails; one that serves keeps all."""
    waits = mounting("web", {}, kind="initContainers", **(DOWNLOAD | change))
    waits["spec"]["containers"] = [{"name": "serve", "volumeMounts": [{"name": "cache", "mountPath": "/model-cache"}]}]
    own, anything = mounting("cleanup-1", {}), {"web": "cache"}
    waits["status"]["phase"] = "Pending"
    assert used_by(own, waits).unmatched == ({} if uses_nothing else anything)
    waits["status"]["phase"] = "Running"
    assert used_by(own, waits).unmatched == anything
    job = mounting("web", {}, **(DOWNLOAD | change))
    assert used_by(own, job).unmatched == ({} if uses_nothing else anything)
    first = {"name": "unknown", "volumeMounts": [{"name": "cache", "mountPath": "/model-cache"}]}
    waits["spec"]["initContainers"].insert(0, first)
    waits["status"]["phase"] = "Pending"
    assert used_by(own, waits).unmatched == anything


def test_dead_leases() -> None:
    leases = [Lease(name, "", A, written) for name, written in [("gone", 0), ("ended", 0), ("web", 0), ("new", 200)]]
    pods = [pod("web"), pod("ended", phase="Succeeded")]
    assert [lease.pod for lease in usage.dead_leases(pods, leases, 100)] == ["gone", "ended"]
