"""The shared model cache: its layout on disk, with its entries, leases and trash.

    <root>/
      CACHEDIR.TAG                         marks the directory as a cache; nothing is removed where it is missing
      <key>/                               a published entry, complete from the moment it has this name
        model/                             the MLflow model, MLmodel at its root
        manifest.json                      where it came from, and every file's size and sha256
        last_used                          its mtime is the last time someone needed the entry
      <alias> -> <key>                     a name that can be computed without asking MLflow
      .leases/<pod>.<uid>.<whose>.<key>.<random>
                                           a pod's OUTPUT_PATH uses <key>; empty, so that it fits on a full volume
      .refs/<digest>.json                  (place, model URI) -> the key it last resolved to
      .pins/                               the pins of rollouts: a cache of their own, see `pins`
      .locks/<key>                         who is downloading it; the mtime is the downloader's heartbeat
      .staging/<key>.<random>/             a download under way
        model/                             its files that have arrived whole
        parts/                             those that have not
      .trash/<key>.<random>.planned        says that <key> is about to be moved to the name without `.planned`
      .trash/<key>.<random>                an entry moved aside; or, put there by a pod before it could be, a veto:
                                           an empty file
      .trash/<random>.doomed/              being deleted

Nothing here relies on file locks or on the clocks of two machines agreeing: an entry appears by one rename, disappears
by one rename, and ages are differences of mtimes that the file server gave.

No entry is taken from a pod that has leased it. Who removes announces it, then lists the leases, then renames; who
replaces a damaged one announces it, then looks whether it still is, then renames. Who uses an entry writes its lease,
looks, vetoes what is announced, and looks again. So whoever announces after the veto sees the lease, or a whole entry;
and before it, the veto takes the name that the entry is to be renamed to: one of the two comes first, the other fails.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darwin_runtime.errors import NotACache, NotRegularFile
from darwin_runtime.logs import format_bytes
from darwin_runtime.storage import disk
from darwin_runtime.storage.manifest import MANIFEST_BYTES, Manifest

TAG_NAME = "CACHEDIR.TAG"
TAG_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"  # https://bford.info/cachedir/
_TAG = f"{TAG_SIGNATURE}\n# MLflow models shared between pods; cleanup.py removes entries that no pod uses.\n"

KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")

MANIFEST, MODEL, PARTS, LAST_USED = "manifest.json", "model", "parts", "last_used"
LEASES, REFS, LOCKS, STAGING, TRASH, PINS = ".leases", ".refs", ".locks", ".staging", ".trash", ".pins"
INNER = LEASES, REFS, LOCKS, STAGING, TRASH, PINS
_PLANNED, _DOOMED = ".planned", ".doomed"
_LEASE = re.compile(r"(?P<pod>.+)\.(?P<uid>[0-9a-f-]{36}|-)\.[0-9a-f]{16}\.(?P<key>[0-9a-f]{64})\.[0-9a-f]{16}")

# By a rename onto something that is there, in the words of one file system or another.
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)

# No lock and no ref is larger.
MAX_NOTE_BYTES = 1 << 16

# What nobody has touched for this long belongs to the dead: a download, a lock, an announcement.
DAY = 86400.0
ABANDONED_SECONDS = DAY


@dataclass(frozen=True)
class Lease:
    """A pod's claim on an entry; `written` is when, in seconds since the epoch by the file server's clock.

    `pod` is the first 63 characters of the pod's name; `uid` is empty where the pod could not tell.
    """

    pod: str
    uid: str
    key: str
    written: float
    name: str = ""


@dataclass(frozen=True)
class Entry:
    """A published entry; `idle` is the time since it was last needed, in seconds, by the file server's clock.

    `version` is that of a registered model, else empty.
    """

    key: str
    bytes: int
    idle: float
    model_uri: str
    version: str = ""

    @property
    def columns(self) -> tuple[str, str, str]:
        """The key's beginning, the size and the idle time, for a table of entries."""
        return self.key[:12], format_bytes(self.bytes), f"{self.idle / DAY:.1f} d"


@dataclass(frozen=True)
class Removal:
    """An entry's announced move to `trash`."""

    key: str
    trash: Path

    @property
    def plan(self) -> Path:
        return self.trash.with_name(self.trash.name + _PLANNED)


def model_of(entry: Path) -> Path:
    """Where the model is in an entry, published or staged."""
    return entry / MODEL


def parts_of(staging: Path) -> Path:
    """Where a download under way keeps files that have not arrived whole."""
    return staging / PARTS


def manifest_of(model: Path) -> Manifest | None:
    """The manifest of the entry whose model is in the directory `model`; None where that is no entry of a cache."""
    try:
        return _manifest(model.parent)
    except (OSError, ValueError):
        return None


def damage_of(model: Path, verify: str) -> list[str] | None:
    """What is wrong with the entry whose model is in the directory `model`, see `Cache.damage`; None where that is no
    entry of a cache, as where the scripts of Darwin's chart put a model into a directory with a name like a key."""
    if verify == "off":
        return []
    entry = model.parent
    if is_key(entry.name) and any(os.path.lexists(entry / name) for name in (MANIFEST, LAST_USED)):
        return _damage(entry, verify)
    manifest = manifest_of(model)  # an entry that is mounted under another name
    return differences(manifest, entry, verify) if manifest else None


def make_key(identity: Mapping[str, str], listing: Sequence[tuple[str, int | None]]) -> str:
    """The key of a model: 64 hex digits over its resolved identity and its files' (path, size)."""
    content = json.dumps([sorted(identity.items()), sorted(listing, key=lambda file: file[0])], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def is_key(name: str) -> bool:
    return KEY.fullmatch(name) is not None


class Cache:
    """A cache directory. Use `prepare` to write to it, `find` to look after an existing one."""

    def __init__(self, root: Path, inner: Sequence[str] = INNER) -> None:
        """`inner` are the directories of its own that it has."""
        self.root = root
        self.inner = inner

    @classmethod
    def prepare(cls, root: Path, inner: Sequence[str] = INNER) -> Cache:
        """Make `root` a cache if it is not one yet. Raises `NotACache`, and `OSError` where it can't be made."""
        cache = cls(root, inner)
        disk.share_with_group(root)
        root.mkdir(parents=True, exist_ok=True)
        if not cache.is_tagged():
            disk.write_atomically(root / TAG_NAME, _TAG)
        for name in inner:
            (root / name).mkdir(exist_ok=True)
        cache._check_inside()
        return cache

    @classmethod
    def find(cls, root: Path, inner: Sequence[str] = INNER) -> Cache | None:
        """The cache at `root`; None when the directory is empty. Raises `NotACache` for anything else."""
        if root.is_symlink():
            raise NotACache(f"{root} is a symbolic link; give the directory it points to ({root.resolve()})")
        if not root.is_dir():
            raise NotACache(f"{root} is not a directory; mount the cache's volume there")
        if root.resolve() == Path("/"):
            raise NotACache("/ is the root of the file system, not a cache")
        cache = cls(root, inner)
        if cache.is_tagged():
            cache._check_inside()
            disk.share_with_group(root)
            with contextlib.suppress(OSError):  # to look at it, it need not be writable
                for name in inner:
                    (root / name).mkdir(exist_ok=True)
            return cache
        if set(os.listdir(root)) <= {"lost+found"}:
            return None
        raise NotACache(
            f"{root} is not empty and has no {TAG_NAME}, so it is not a cache that download.py made; "
            f"nothing in it is touched"
        )

    def _check_inside(self) -> None:
        for name in self.inner:
            path = self.root / name
            # What is deleted below these must be the cache's own.
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise NotACache(f"{self.root / name} is not a directory of the cache; remove it by hand")

    def is_tagged(self) -> bool:
        """Whether the directory has the tag of a cache."""
        with contextlib.suppress(OSError), disk.open_regular(self.root / TAG_NAME) as file:
            return file.read(len(TAG_SIGNATURE)) == TAG_SIGNATURE.encode()
        return False

    def now(self) -> float:
        """The file server's clock, in seconds since the epoch: the mtime it gives.

        Nothing is created for it, except on a volume where times can't be set, or only by the owner of the tag.
        """
        tag = self.root / TAG_NAME
        try:
            os.utime(tag, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (*disk.UNSUPPORTED, errno.EACCES):
                raise
            disk.write_atomically(tag, _TAG)
        return tag.lstat().st_mtime

    # Entries

    def model(self, key: str) -> Path:
        return model_of(self.root / key)

    def has(self, key: str) -> bool:
        """Whether there is an entry `key`; `damage` says whether a whole one. Raises as `fingerprint` does."""
        return self.fingerprint(key) is not None

    def fingerprint(self, key: str) -> tuple[int, int] | None:
        """What tells the entry `key` from one that replaces it; None when there is none.

        Raises `NotACache` when there is something else than a directory.
        """
        path = self.root / key
        # At the opening of a directory a network file system asks its server; of what is in it, it may answer from a
        # memory of half a minute ago.
        os.close(os.open(self.root, os.O_RDONLY | os.O_DIRECTORY))
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        if not stat.S_ISDIR(found.st_mode):
            kind = "symbolic link" if stat.S_ISLNK(found.st_mode) else "file"
            raise NotACache(f"{path} is a {kind} where an entry belongs; remove it by hand")
        return found.st_ino, found.st_mtime_ns

    def damage(self, key: str, verify: str = "size") -> list[str]:
        """What is wrong with the entry `key`, by file; empty when whole. Raises `OSError` when it can't be told.

        `verify` is one of `manifest.VERIFY`.
        """
        return _damage(self.root / key, verify)

    def manifest(self, key: str) -> Manifest:
        """Raises `OSError` or `ValueError` when it is missing or unreadable."""
        return _manifest(self.root / key)

    def touch(self, key: str) -> None:
        """Note that the entry was needed just now."""
        # By way of the entry itself: its name may be a link to elsewhere.
        entry = os.open(self.root / key, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            with disk.about(self.root / key / LAST_USED):
                stamp(LAST_USED, os.O_NOFOLLOW, entry)
        finally:
            os.close(entry)

    def entries(self, now: float) -> tuple[list[Entry], list[str]]:
        """All entries, idle as of `now`, and the names in the cache that are none of ours, which are left alone."""
        known, strange = [], []
        for name in sorted(os.listdir(self.root)):
            path = self.root / name
            if name in (TAG_NAME, "lost+found", *INNER) or path.is_symlink() or disk.is_temporary(name):
                continue
            try:
                if not is_key(name):
                    raise ValueError(name)
                manifest = self.manifest(name)
                used = (path / LAST_USED).lstat().st_mtime
            except (OSError, ValueError):
                strange.append(name)
                continue
            version = manifest.resolved.get("version", "") if "name" in manifest.resolved else ""
            known.append(Entry(name, manifest.bytes, max(0.0, now - used), manifest.model_uri, version))
        return known, strange

    # Leases

    def lease(self, pod: str, output: str, key: str, uid: str = "") -> None:
        """Claim `key` for a pod's output, instead of what that output used before. Then look at it, and `keep` it.

        `uid` tells the pod from others of the same name.
        """
        name = re.sub("[^A-Za-z0-9.-]", "_", pod)[:63].rstrip("-.") or "_"
        whose = hashlib.sha256(f"{pod}\n{uid}\n{output}".encode()).hexdigest()[:16]
        stem = f"{name}.{uid or '-'}.{whose}."
        before = [path for path in self.inside(LEASES) if path.name.startswith(stem)]
        # A new name each time: who drops a lease of the dead can't hit one of the living.
        path = self.root / LEASES / f"{stem}{key}.{secrets.token_hex(8)}"
        stamp(path, os.O_EXCL)
        disk.sync(path.parent)
        for old in before:
            old.unlink(missing_ok=True)

    def leases(self) -> list[Lease]:
        """All leases. Raises `OSError` or `ValueError` when one can't be read: nothing may be removed then."""
        found = []
        for path in self.inside(LEASES):
            if not (told := _LEASE.fullmatch(path.name)):
                raise ValueError(f"{path} is not a lease; remove it once no pod of that name runs")
            with contextlib.suppress(FileNotFoundError):  # its pod moved on between the listing and now
                written = path.lstat().st_mtime
                found.append(Lease(told["pod"], told["uid"].strip("-"), told["key"], written, path.name))
        return found

    def inside(self, inner: str) -> list[Path]:
        """What is in a directory of the cache's own; without what begins with a dot, which a file system may put there.

        Raises `OSError` when it can't be told.
        """
        directory = self.root / inner
        return [directory / name for name in sorted(os.listdir(directory)) if not name.startswith(".")]

    def drop_lease(self, lease: Lease) -> None:
        (self.root / LEASES / lease.name).unlink(missing_ok=True)

    # Removing

    def announce(self, key: str) -> Removal:
        """Say that `key` is about to be removed. List the leases after this, and before `commit`."""
        removal = Removal(key, self.root / TRASH / f"{key}.{secrets.token_hex(8)}")
        disk.write_atomically(removal.plan, "")
        return removal

    def commit(self, removal: Removal) -> bool:
        """Take the entry out of use with one rename; False when it is gone already, or a pod has vetoed it."""
        if not removal.plan.exists():
            return False
        try:
            (self.root / removal.key).rename(removal.trash)
        except FileNotFoundError:
            return (removal.trash / MANIFEST).exists()  # the reply to a rename that happened can be lost
        except OSError as error:
            if error.errno in TAKEN:
                return False
            raise
        return True

    def cancel(self, removal: Removal) -> None:
        """Take the announcement back, whether carried out or not."""
        removal.plan.unlink(missing_ok=True)
        if removal.trash.is_file():
            removal.trash.unlink(missing_ok=True)

    def veto_removals(self, key: str, found: tuple[int, int]) -> bool:
        """Veto every announced removal of the leased entry whose `fingerprint` was `found`; False when it is gone.

        From then on the entry stays while its pod lives.
        """
        for plan in self.inside(TRASH):
            if plan.name.startswith(f"{key}.") and plan.name.endswith(_PLANNED):
                # Onto a file no directory can be renamed, and where one is already, no file can be created.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(plan.with_suffix(""), os.O_WRONLY | os.O_CREAT | os.O_EXCL, disk.FILE_MODE))
        return self.fingerprint(key) == found

    def trash(self) -> list[tuple[Path, str]]:
        """What waits in the trash, and belongs to no cleanup that is at work: paths and their keys."""
        found = [(path, key_of(path)) for path in self.inside(TRASH)]
        return [(path, key) for path, key in found if key and not Removal(key, path).plan.exists()]

    def restore(self, trash: Path, key: str) -> bool:
        """Put an entry back; False when it is not whole, its place is taken, or another cleanup was first."""
        if _damage(trash, "size"):
            return False
        try:
            trash.rename(self.root / key)
        except OSError as error:
            if error.errno in (*TAKEN, errno.ENOENT):
                return False
            raise
        return True

    def delete_tree(self, path: Path) -> None:
        """Delete something of the cache, under a name by which nobody can restore it, or go on with it, meanwhile."""
        doomed = self.root / TRASH / f"{secrets.token_hex(8)}{_DOOMED}"
        with contextlib.suppress(FileNotFoundError):
            if path.name.endswith(_DOOMED):
                doomed = path
            else:
                path.rename(doomed)
            disk.remove_tree(doomed)

    def leftovers(self) -> Iterator[Path]:
        """What the dead have left: downloads, locks, announcements and half-written files that nobody touches any more,
        and deletions that were not finished."""
        trash = self.inside(TRASH)
        yield from (path for path in trash if path.name.endswith(_DOOMED))
        before = self.now() - ABANDONED_SECONDS
        found = [path for path in self.inside(STAGING) if key_of(path)]
        found += [*self.inside(LOCKS), *(path for path in trash if path.name.endswith(_PLANNED))]
        for directory in (self.root, *(self.root / inner for inner in self.inner)):
            found += [directory / name for name in os.listdir(directory) if disk.is_temporary(name)]
        for path in found:
            with contextlib.suppress(FileNotFoundError):
                if disk.last_change(path) < before:
                    yield path


def stamp(path: Path | str, flag: int, directory: int | None = None) -> None:
    """Create an empty file, opened with `flag`, or keep the one there; its mtime is now, by the file server's clock.

    `path` may be relative to the open `directory`.
    """
    # Without waiting for the other end of a pipe.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flag, disk.FILE_MODE, dir_fd=directory)
    try:
        with disk.about(Path(path)):
            disk.touch(descriptor)  # whatever creating it did
    finally:
        os.close(descriptor)


def _manifest(entry: Path) -> Manifest:
    return Manifest.parse(disk.read_small(entry / MANIFEST, MANIFEST_BYTES).decode())


def _damage(entry: Path, verify: str) -> list[str]:
    try:
        manifest = _manifest(entry)
    except (FileNotFoundError, NotADirectoryError, NotRegularFile, ValueError) as error:
        return [f"{entry / MANIFEST}: {error}"]
    return differences(manifest, entry, verify)


def parse_note(text: bytes) -> Mapping[str, object]:
    """The JSON object in `text`; an empty one where there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def differences(manifest: Manifest, entry: Path, verify: str) -> list[str]:
    model = model_of(entry)
    if model.is_symlink():
        return [f"{model}: a link"]
    return manifest.damage(model, verify, alone=True)


def key_of(path: Path) -> str | None:
    """The key in the name `<key>.<random>` of a directory of ours; None for anything else."""
    key, _, random = path.name.partition(".")
    return key if is_key(key) and random.isalnum() and not path.is_symlink() else None
