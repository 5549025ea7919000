"""Secrets as the kubelet mounts them: files are links through `..data`, which one rename turns to another directory."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat


class Mount:
    """A mounted Secret below `path`."""

    def __init__(self, path: Path, **files: bytes | str) -> None:
        """`files` by name, with _ for the dot."""
        self.path = path
        self._numbers = itertools.count()
        path.mkdir()
        self.put(**files)

    def put(self, **files: bytes | str) -> None:
        """Replace all files at once."""
        made = self.path / f"..2026_{next(self._numbers)}"
        made.mkdir()
        for name, content in files.items():
            (made / name.replace("_", ".")).write_bytes(content.encode() if isinstance(content, str) else content)
            link = self.path / name.replace("_", ".")
            if not link.is_symlink():
                link.symlink_to(f"..data/{link.name}")
        before = (self.path / "..data").resolve()
        turned = self.path / "..data_tmp"
        turned.symlink_to(made.name)
        turned.rename(self.path / "..data")
        if before.name != "..data":
            shutil.rmtree(before)

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def public_key(pem: bytes) -> bytes:
    """The key of a certificate, in DER, as what is pinned to it hashes it."""
    return (
        x509.load_pem_x509_certificate(pem).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
