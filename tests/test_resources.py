"""The UID of the pod, as the kubelet's mounts show it."""

from __future__ import annotations

from pathlib import Path

from darwin_runtime import resources

MOUNTS = """1 0 0:1 / / ro - overlay overlay rw
2 1 254:1 /var/lib/kubelet/pods/01234567-89ab-cdef-0123-456789abcdef/etc-hosts /etc/hosts rw - ext4 /dev/vda1 rw
"""


def test_a_pod_s_uid(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert resources.pod_uid(mounts) == "01234567-89ab-cdef-0123-456789abcdef"
    mounts.write_text(MOUNTS.partition("\n")[0])
    assert resources.pod_uid(mounts) == ""
    assert resources.pod_uid(tmp_path / "absent") == ""
