"""A file system of the test's own (FUSE): a directory under another path, where some operations are not supported.

    with mounted(directory, at, symlink="EPERM", chmod="ENOSYS", utime="EOPNOTSUPP", fsyncdir="EINVAL"): ...

Object stores and file servers refuse like that, and no file system that a test can mount does. A process of its own
speaks the kernel's protocol (`/usr/include/linux/fuse.h`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import absent, wait_until
from tests.support.prepared import ROOT

_CODES = """
1 lookup, 3 getattr, 4 setattr, 5 readlink, 6 symlink, 9 mkdir, 10 unlink, 11 rmdir, 12 rename, 14 open, 15 read,
16 write, 17 statfs, 18 release, 20 fsync, 25 flush, 26 init, 27 opendir, 28 readdir, 29 releasedir, 30 fsyncdir,
35 create"""
CODES = {name: int(code) for code, name in (one.split() for one in _CODES.split(","))}
FORGET, INTERRUPT, BATCH_FORGET = 2, 36, 42

# The bits of what SETATTR sets.
ATTRIBUTES = {"chmod": 0x1, "utime": 0x30 | 0x180}

ROOT_ID = 1
MAX_WRITE_BYTES = 128 << 10


@contextmanager
def mounted(backing: Path, where: Path, **refused: str) -> Iterator[Path]:
    """`backing` mounted at `where`; each operation that `refused` names fails with the error it names."""
    if os.geteuid() or not Path("/dev/fuse").exists():
        absent("only root may mount file systems, and /dev/fuse is needed")
    for path in (backing, where):
        path.mkdir(exist_ok=True)
    errors = [f"{name}={code}" for name, code in refused.items()]
    process = subprocess.Popen([sys.executable, "-m", "tests.support.fuse", backing, where, *errors], cwd=ROOT)
    try:
        wait_until(lambda: where.is_mount() or process.poll() is not None, "the mount")
        if process.poll() is not None:
            absent("file systems can't be mounted here (FUSE)")
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=False)
        process.wait(timeout=60)


class FileSystem:
    """Replies to the kernel's requests, one after another."""

    def __init__(self, backing: str, refused: dict[str, int]) -> None:
        self.backing = backing
        self.paths = {ROOT_ID: ""}
        self.operations = {code: getattr(self, name) for name, code in CODES.items()}
        self.refused = {CODES[name]: number for name, number in refused.items() if name in CODES}
        self.unset = {bits: refused[name] for name, bits in ATTRIBUTES.items() if name in refused}

    def serve(self, device: int) -> None:
        while True:
            try:
                request = os.read(device, MAX_WRITE_BYTES + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return  # unmounted
                if error.errno != errno.ENOENT:  # its caller is gone
                    raise
                continue
            _, code, unique, node = struct.unpack_from("<IIQQ", request)
            if code in (FORGET, INTERRUPT, BATCH_FORGET):
                continue  # these have no reply
            number, body = 0, b""
            try:
                if code in self.refused:
                    raise OSError(self.refused[code], "refused")
                if code not in self.operations:
                    raise OSError(errno.ENOSYS, "unknown")
                body = self.operations[code](node, request[40:])
            except OSError as error:
                number = error.errno or errno.EIO
            os.write(device, struct.pack("<IiQ", 16 + len(body), -number, unique) + body)

    def at(self, node: int, name: bytes = b"") -> str:
        return os.path.normpath(f"{self.backing}/{self.paths[node]}/{os.fsdecode(name)}")

    def attributes(self, found: os.stat_result, node: int) -> bytes:
        times = [int(one) for one in (found.st_atime, found.st_mtime, found.st_ctime)]
        parts = [one % 10**9 for one in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)]
        owner = (found.st_mode, found.st_nlink, found.st_uid, found.st_gid, 0, 4096, 0)
        return struct.pack("<6Q3I7I", node, found.st_size, found.st_blocks, *times, *parts, *owner)

    def entry(self, parent: int, name: bytes) -> bytes:
        path = self.at(parent, name)
        found = os.lstat(path)
        # A number that the root has not; the kernel asks again at each use, since nothing is valid for any time.
        node = found.st_ino + ROOT_ID
        self.paths[node] = os.path.relpath(path, self.backing)
        return struct.pack("<4Q2I", node, 0, 0, 0, 0, 0) + self.attributes(found, node)

    def init(self, _: int, body: bytes) -> bytes:
        major, minor, _, _ = struct.unpack_from("<4I", body)
        return struct.pack("<4I2H2I2H8I", major, min(minor, 31), 0, 0, 12, 10, MAX_WRITE_BYTES, 1, 0, 0, *[0] * 8)

    def flush(self, _: int, _body: bytes) -> bytes:
        return b""

    releasedir = fsyncdir = flush

    def opendir(self, _: int, _body: bytes) -> bytes:
        return bytes(16)  # a handle that means nothing

    def lookup(self, node: int, body: bytes) -> bytes:
        return self.entry(node, body.rstrip(b"\0"))

    def getattr(self, node: int, _: bytes) -> bytes:
        return struct.pack("<Q2I", 0, 0, 0) + self.attributes(os.lstat(self.at(node)), node)

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode = struct.unpack_from("<2I6Q4I", body)
        path = self.at(node)
        for bits, number in self.unset.items():
            if valid & bits and not valid & 0x8:
                raise OSError(number, "refused")
        if valid & 0x1:
            os.chmod(path, stat.S_IMODE(mode))  # noqa: PTH101
        if valid & 0x8:
            os.truncate(path, size)
        if valid & 0x180:
            os.utime(path, follow_symlinks=False)
        elif valid & 0x30:
            times = (atime * 10**9 + atime_ns, mtime * 10**9 + mtime_ns)
            os.utime(path, ns=times, follow_symlinks=False)
        return self.getattr(node, b"")

    def readlink(self, node: int, _: bytes) -> bytes:
        return os.fsencode(os.readlink(self.at(node)))  # noqa: PTH115

    def symlink(self, node: int, body: bytes) -> bytes:
        name, target = body.rstrip(b"\0").split(b"\0")
        os.symlink(target, os.fsencode(self.at(node, name)))  # noqa: PTH211
        return self.entry(node, name)

    def mkdir(self, node: int, body: bytes) -> bytes:
        name = body[8:].rstrip(b"\0")
        os.mkdir(self.at(node, name), struct.unpack_from("<I", body)[0])  # noqa: PTH102
        return self.entry(node, name)

    def unlink(self, node: int, body: bytes) -> bytes:
        os.unlink(self.at(node, body.rstrip(b"\0")))  # noqa: PTH108
        return b""

    def rmdir(self, node: int, body: bytes) -> bytes:
        os.rmdir(self.at(node, body.rstrip(b"\0")))  # noqa: PTH106
        return b""

    def rename(self, node: int, body: bytes) -> bytes:
        names = body[8:].rstrip(b"\0").split(b"\0")
        old, new = self.at(node, names[0]), self.at(struct.unpack_from("<Q", body)[0], names[1])
        os.rename(old, new)  # noqa: PTH104
        before, after = (os.path.relpath(path, self.backing) for path in (old, new))
        for inner, path in self.paths.items():
            if path == before or path.startswith(f"{before}/"):
                self.paths[inner] = after + path[len(before) :]
        return b""

    def open(self, node: int, body: bytes) -> bytes:
        flags = struct.unpack_from("<I", body)[0] & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        return struct.pack("<Q2I", os.open(self.at(node), flags & ~os.O_APPEND), 0, 0)

    def create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<2I", body)
        name = body[16:].rstrip(b"\0")
        descriptor = os.open(self.at(node, name), (flags | os.O_CREAT) & ~os.O_APPEND, mode)
        return self.entry(node, name) + struct.pack("<Q2I", descriptor, 0, 0)

    def read(self, _: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<2QI", body)
        return os.pread(handle, size, offset)

    def write(self, _: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<2QI", body)
        return struct.pack("<2I", os.pwrite(handle, body[40 : 40 + size], offset), 0)

    def release(self, _: int, body: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def fsync(self, _: int, body: bytes) -> bytes:
        os.fsync(struct.unpack_from("<Q", body)[0])
        return b""

    def statfs(self, _: int, _body: bytes) -> bytes:
        found = os.statvfs(self.backing)
        counts = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return struct.pack("<5Q4I24x", *counts, found.f_bsize, 255, found.f_frsize, 0)

    def readdir(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", body)
        listed = b""
        for number, name in enumerate(sorted(os.listdir(self.at(node)))[offset:], start=offset + 1):
            encoded = os.fsencode(name)
            one = struct.pack("<2Q2I", 1, number, len(encoded), 0) + encoded
            one += bytes(-len(one) % 8)
            if len(listed) + len(one) > size:
                break
            listed += one
        return listed


def main(backing: str, where: str, *refused: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"test", os.fsencode(where), b"fuse", 0, options.encode()):
        sys.exit(os.strerror(ctypes.get_errno()))
    numbers = {name: getattr(errno, code) for name, code in (one.split("=") for one in refused)}
    FileSystem(backing, numbers).serve(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
