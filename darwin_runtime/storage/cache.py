"""The on-disk contract of the shared model cache; the only module that builds a path inside it.

    <root>/
      CACHEDIR.TAG                         marks the directory as a cache; nothing is removed where it is missing
      <key>/                               a published entry, complete from the moment it has this name
        model/                             the MLflow model, MLmodel at its root
        manifest.json                      where it came from, and every file's size and sha256
        last_used                          its mtime is the last time someone needed the entry
      <alias> -> <key>                     a name that can be computed without asking MLflow
      .leases/<pod>.<uid>.<whose>.<key>.<random>
                                           a pod's OUTPUT_PATH uses <key>; empty, so that it fits on a full volume
      .refs/<digest>.json                  (tracking URI, model URI) -> the key it last resolved to
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
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darwin_runtime.errors import NotACache, NotRegularFile, RoleError
from darwin_runtime.redact import mask_uri
from darwin_runtime.storage import disk
from darwin_runtime.storage.manifest import MANIFEST_BYTES, Manifest, summary

TAG_NAME = "CACHEDIR.TAG"
TAG_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"  # https://bford.info/cachedir/
_TAG = f"{TAG_SIGNATURE}\n# MLflow models shared between pods; cleanup.py removes entries that no pod uses.\n"

KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")

_MANIFEST, _MODEL, _PARTS, _LAST_USED = "manifest.json", "model", "parts", "last_used"
_INNER = _LEASES, _REFS, _LOCKS, _STAGING, _TRASH = ".leases", ".refs", ".locks", ".staging", ".trash"
_PLANNED, _DOOMED = ".planned", ".doomed"
_LEASE = re.compile(r"(?P<pod>.+)\.(?P<uid>[0-9a-f-]{36}|-)\.[0-9a-f]{16}\.(?P<key>[0-9a-f]{64})\.[0-9a-f]{16}")

# By a rename onto something that is there, in the words of one file system or another.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)

# More than a lock or a ref has.
_NOTE_BYTES = 1 << 16

# A downloader shows this often that it is alive, and is taken for dead after so much silence.
HEARTBEAT_SECONDS = 5.0
SILENCE_SECONDS = 30.0

# What nobody has touched for this long belongs to the dead: a download, a lock, an announcement.
ABANDONED_SECONDS = 86400.0


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
    """A published entry; `idle` is the time since it was last needed, in seconds, by the file server's clock."""

    key: str
    bytes: int
    idle: float
    model_uri: str


@dataclass(frozen=True)
class Removal:
    """An entry's announced move to `trash`."""

    key: str
    trash: Path

    @property
    def plan(self) -> Path:
        return self.trash.with_name(self.trash.name + _PLANNED)


@dataclass(frozen=True)
class LockState:
    """Who holds a lock: how far its download is, in bytes, and how long it has been silent, in seconds."""

    owner: str
    arrived: int
    total: int
    silence: float
    released: bool

    @property
    def alive(self) -> bool:
        return not self.released and self.silence < SILENCE_SECONDS


class Lock:
    """The exclusive right to download one key, as long as all play by the rules; no more than bandwidth depends on it.

    `inherited` tells that the holder before died, or gave up: what it has staged is there to be taken over.
    """

    def __init__(self, path: Path, descriptor: int, owner: str, *, inherited: bool) -> None:
        self.path = path
        self.owner = owner
        self.inherited = inherited
        self.staging: Path | None = None
        self._descriptor = descriptor
        self.beat(0, 0)

    def beat(self, arrived: int, total: int) -> None:
        """Show that the holder is alive, and so what it has staged, and how far it is, in bytes."""
        self._write(arrived, total, released=False)
        if self.staging:
            with contextlib.suppress(OSError):
                os.utime(self.staging)

    def is_lost(self) -> bool:
        """Whether another has taken the lock, and then what was staged, from this one, which it took for dead."""
        try:
            return self.path.stat().st_ino != os.fstat(self._descriptor).st_ino
        except FileNotFoundError:
            return True

    def release(self, *, done: bool) -> None:
        """Give the lock up; unless all is `done`, what was staged is left to the next holder."""
        try:
            if done:
                with contextlib.suppress(FileNotFoundError):
                    if not self.is_lost():
                        self.path.unlink()
            else:
                self._write(0, 0, released=True)
        finally:
            os.close(self._descriptor)

    def _write(self, arrived: int, total: int, *, released: bool) -> None:
        state = {"owner": self.owner, "released": released, "arrived": arrived, "total": total}
        content = json.dumps(state).encode()
        # Taken over, or on a full volume, it is still the downloader's right to go on.
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, content, 0)
            os.ftruncate(self._descriptor, len(content))
            os.fsync(self._descriptor)


def model_of(entry: Path) -> Path:
    """Where the model is in an entry, published or staged."""
    return entry / _MODEL


def parts_of(staging: Path) -> Path:
    """Where a download under way keeps files that have not arrived whole."""
    return staging / _PARTS


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
    if is_key(entry.name) and any(os.path.lexists(entry / name) for name in (_MANIFEST, _LAST_USED)):
        return _damage(entry, verify)
    manifest = manifest_of(model)  # an entry that is mounted under another name
    return _differences(manifest, entry, verify) if manifest else None


def make_key(identity: Mapping[str, str], listing: Sequence[tuple[str, int | None]]) -> str:
    """The key of a model: 64 hex digits over its resolved identity and its files' (path, size)."""
    content = json.dumps([sorted(identity.items()), sorted(listing, key=lambda file: file[0])], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def make_alias(deployment: str, model_uri: str) -> str:
    """The name under which Darwin's chart looks for a deployment's model."""
    return hashlib.sha256(f"{deployment}:{model_uri}".encode()).hexdigest()


def is_key(name: str) -> bool:
    return KEY.fullmatch(name) is not None


class Cache:
    """A cache directory. Use `prepare` to write to it, `find` to look after an existing one."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def prepare(cls, root: Path) -> Cache:
        """Make `root` a cache if it is not one yet. Raises `NotACache`, and `OSError` where it can't be made."""
        cache = cls(root)
        root.mkdir(parents=True, exist_ok=True)
        if not cache._is_tagged():
            disk.write_atomically(root / TAG_NAME, _TAG)
        for name in _INNER:
            (root / name).mkdir(exist_ok=True)
        cache._check_inside()
        return cache

    @classmethod
    def find(cls, root: Path) -> Cache | None:
        """The cache at `root`; None when the directory is empty. Raises `NotACache` for anything else."""
        if root.is_symlink():
            raise NotACache(f"{root} is a symbolic link; give the directory it points to ({root.resolve()})")
        if not root.is_dir():
            raise NotACache(f"{root} is not a directory; mount the cache's volume there")
        if root.resolve() == Path("/"):
            raise NotACache("/ is the root of the file system, not a cache")
        cache = cls(root)
        if cache._is_tagged():
            cache._check_inside()
            with contextlib.suppress(OSError):  # to look at it, it need not be writable
                for name in _INNER:
                    (root / name).mkdir(exist_ok=True)
            return cache
        if set(os.listdir(root)) <= {"lost+found"}:
            return None
        raise NotACache(
            f"{root} is not empty and has no {TAG_NAME}, so it is not a cache that download.py made; "
            f"nothing in it is touched"
        )

    def _check_inside(self) -> None:
        for name in _INNER:
            path = self.root / name
            # What is deleted below these must be the cache's own.
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise NotACache(f"{self.root / name} is not a directory of the cache; remove it by hand")

    def _is_tagged(self) -> bool:
        with contextlib.suppress(OSError), disk.open_regular(self.root / TAG_NAME) as file:
            return file.read(len(TAG_SIGNATURE)) == TAG_SIGNATURE.encode()
        return False

    def now(self) -> float:
        """The file server's clock, in seconds since the epoch: the mtime it gives. Nothing is created for it."""
        tag = self.root / TAG_NAME
        os.utime(tag, follow_symlinks=False)
        return tag.lstat().st_mtime

    # Entries

    def model(self, key: str) -> Path:
        return model_of(self.root / key)

    def has(self, key: str) -> bool:
        """Whether there is an entry `key`; `damage` says whether a whole one. Raises as `which` does."""
        return self.which(key) is not None

    def which(self, key: str) -> tuple[int, int] | None:
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
            _stamp(_LAST_USED, os.O_NOFOLLOW, entry)
        finally:
            os.close(entry)

    def entries(self, now: float) -> tuple[list[Entry], list[str]]:
        """All entries, idle as of `now`, and the names in the cache that are none of ours, which are left alone."""
        known, strange = [], []
        for name in sorted(os.listdir(self.root)):
            path = self.root / name
            if name in (TAG_NAME, "lost+found", *_INNER) or path.is_symlink() or disk.is_temporary(name):
                continue
            try:
                if not is_key(name):
                    raise ValueError(name)
                manifest = self.manifest(name)
                used = (path / _LAST_USED).lstat().st_mtime
            except (OSError, ValueError):
                strange.append(name)
                continue
            known.append(Entry(name, manifest.bytes, max(0.0, now - used), manifest.model_uri))
        return known, strange

    # Downloading

    def try_lock(self, key: str, owner: str) -> Lock | LockState:
        """The lock on the download of `key`, or who holds it: another owner that is alive."""
        path, inherited = self.root / _LOCKS / key, False
        while True:
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                return Lock(path, descriptor, owner, inherited=self._clear_seized(path) or inherited)
            except FileExistsError:
                holder = self._holder(path)
                if holder and holder.alive and holder.owner != owner:
                    return holder
                if holder:
                    inherited = self._steal(path, owner) or inherited

    def _holder(self, path: Path) -> LockState | None:
        try:
            with disk.open_regular(path) as file:
                beaten = os.fstat(file.fileno()).st_mtime
                text = file.read(_NOTE_BYTES)
        except FileNotFoundError:
            return None
        state = _noted(text)  # nothing while it is being written
        arrived, total = (_size(state.get(name)) for name in ("arrived", "total"))
        released = bool(state.get("released"))
        owner = "".join(letter for letter in str(state.get("owner", ""))[:500] if letter.isprintable())
        return LockState(owner, arrived, total, self.now() - beaten, released)

    def _steal(self, path: Path, owner: str) -> bool:
        """Take a dead holder's lock away. Of several who try, one succeeds."""
        taken = disk.temporary(path)
        try:
            path.rename(taken)
        except FileNotFoundError:
            return False
        holder = self._holder(taken)
        if holder and holder.alive and holder.owner != owner:
            with contextlib.suppress(FileNotFoundError):
                taken.rename(path)  # it is not the one that was dead
            return False
        taken.unlink(missing_ok=True)
        return True

    def _clear_seized(self, path: Path) -> bool:
        """Whether someone died, or still is, taking a dead holder's lock away: what that one staged is there, too."""
        seized = list(path.parent.glob(f".{path.name}.*.tmp"))
        for lock in seized:
            lock.unlink(missing_ok=True)
        return bool(seized)

    def stage(self, key: str, lock: Lock | None = None) -> Path:
        """A directory to put a model together in: what the holder before left of it, or an empty one.

        It is renamed, so that a former owner that is not dead after all finds nothing to write to by its name.
        """
        staging = self.root / _STAGING / f"{key}.{secrets.token_hex(8)}"
        found = False
        for left in self._inside(_STAGING) if lock else ():
            if _key_of(left) == key and lock and (lock.inherited or self._is_silent(left)):
                if found or _holds_links(left):
                    self.discard(left)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    left.rename(staging)
                    found = True
        # Not tempfile.mkdtemp: its 0700 would stay on the entry and keep other users' pods out. And what has been taken
        # over again by now is not begun anew.
        for directory in (*(() if found else (staging,)), model_of(staging), parts_of(staging)):
            directory.mkdir(exist_ok=True)
        if lock:
            lock.staging = staging
        return staging

    def _is_silent(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.now() - _touched(path) > SILENCE_SECONDS
        return False

    def publish(
        self, staging: Path, key: str, manifest: Manifest, verify: str = "size", *, exactly: bool = False
    ) -> bool:
        """Give what is staged its final name; False when another writer was first and ours was dropped.

        The files, whose sizes the manifest states, are on disk before the name is. An entry that is damaged, as far as
        `verify` looks, is replaced, and so is one of other files, if they have to be `exactly` these. Raises
        `RoleError` when what is staged is not what the manifest states.
        """
        _stamp(staging / _LAST_USED, os.O_NOFOLLOW)
        disk.remove_tree(parts_of(staging))
        if damage := _differences(manifest, staging, "size"):
            raise RoleError(f"not published, {summary(damage)}")
        disk.sync_tree(staging)
        disk.write_atomically(staging / _MANIFEST, manifest.dump())

        def wrong() -> bool:
            return bool(self.damage(key, verify)) or (exactly and set(self.manifest(key).files) != set(manifest.files))

        while True:
            try:
                staging.rename(self.root / key)
            except OSError as error:
                if staging.exists():
                    if error.errno not in _TAKEN:
                        raise
                    if self.has(key) and not wrong():
                        self.discard(staging)
                        return False
                    self._set_aside(key, wrong)
                    continue
                # On a network file system the reply to a rename that happened can be lost. Or what was staged has been
                # taken over.
                if not self.has(key) or wrong():
                    raise
            break
        disk.sync(self.root)
        return True

    def _set_aside(self, key: str, wrong: Callable[[], bool]) -> None:
        removal = self.announce(key)
        try:
            # Looked at once more: another pod may have replaced it, and others may use it, before the announcement.
            if wrong():
                self.commit(removal)
        finally:
            self.cancel(removal)

    # Names

    def set_alias(self, alias: str, key: str) -> None:
        """Point `alias` to `key`. Raises `OSError` where the name is taken by something that is no link."""
        path = self.root / alias
        with contextlib.suppress(OSError):
            if str(path.readlink()) == key:
                os.utime(path, follow_symlinks=False)  # for which there is room on a full volume
                return
        disk.replace_link(path, key)

    def aliases(self) -> dict[str, str]:
        """Alias -> key, for every link in the cache whose both ends look like keys."""
        links = {}
        for name in os.listdir(self.root):
            path = self.root / name
            with contextlib.suppress(FileNotFoundError):  # another cleanup is dropping it
                if is_key(name) and path.is_symlink() and is_key(target := str(path.readlink())):
                    links[name] = target
        return links

    def names(self) -> dict[str, str]:
        """Every name by which an entry, published or in the trash, may be asked for -> its key."""
        keys = {name for name in os.listdir(self.root) if is_key(name) and not (self.root / name).is_symlink()}
        keys |= {key for path in self._inside(_TRASH) if (key := _key_of(path))}
        return {key: key for key in keys} | self.aliases()

    def drop_dangling(self, age: float) -> None:
        """Remove aliases and refs, made more than `age` seconds ago, of entries that are gone: a new one may come."""
        before = self.now() - age
        for alias, key in self.aliases().items():
            path, taken = self.root / alias, disk.temporary(self.root / alias)
            with contextlib.suppress(FileNotFoundError):
                if not self.has(key) and path.lstat().st_mtime < before:
                    path.rename(taken)
                    # Its pod may have made it anew in between.
                    if taken.lstat().st_mtime < before:
                        taken.unlink()
                    else:
                        taken.rename(path)
        for path in self._inside(_REFS):
            with contextlib.suppress(FileNotFoundError):
                if (referred := _referred(path)) and not self.has(referred) and path.lstat().st_mtime < before:
                    path.unlink()

    def set_ref(self, tracking_uri: str, model_uri: str, key: str) -> None:
        """Remember what a URI resolved to, for when the tracking server can't be asked."""
        path = self._ref(tracking_uri, model_uri)
        if _referred(path) == key:
            os.utime(path, follow_symlinks=False)  # for which there is room on a full volume
        else:
            disk.write_atomically(path, json.dumps({"key": key}))

    def ref(self, tracking_uri: str, model_uri: str) -> tuple[str, float] | None:
        """The key that was last resolved for a URI, and how many seconds ago; None when it never was."""
        path = self._ref(tracking_uri, model_uri)
        with contextlib.suppress(OSError):
            if key := _referred(path):
                return key, max(0.0, self.now() - path.lstat().st_mtime)
        return None

    def _ref(self, tracking_uri: str, model_uri: str) -> Path:
        # Who reads the name of a file has no use for a login in either.
        digest = hashlib.sha256(f"{mask_uri(tracking_uri)}\n{mask_uri(model_uri)}".encode()).hexdigest()
        return self.root / _REFS / f"{digest}.json"

    # Leases

    def lease(self, pod: str, output: str, key: str, uid: str = "") -> None:
        """Claim `key` for a pod's output, instead of what that output used before. Then look at it, and `keep` it.

        `uid` tells the pod from others of the same name.
        """
        name = re.sub("[^A-Za-z0-9.-]", "_", pod)[:63].rstrip("-.") or "_"
        whose = hashlib.sha256(f"{pod}\n{uid}\n{output}".encode()).hexdigest()[:16]
        stem = f"{name}.{uid or '-'}.{whose}."
        before = [path for path in self._inside(_LEASES) if path.name.startswith(stem)]
        # A new name each time: who drops a lease of the dead can't hit one of the living.
        path = self.root / _LEASES / f"{stem}{key}.{secrets.token_hex(8)}"
        _stamp(path, os.O_EXCL)
        disk.sync(path.parent)
        for old in before:
            old.unlink(missing_ok=True)

    def leases(self) -> list[Lease]:
        """All leases. Raises `OSError` or `ValueError` when one can't be read: nothing may be removed then."""
        found = []
        for path in self._inside(_LEASES):
            if not (told := _LEASE.fullmatch(path.name)):
                raise ValueError(f"{path} is not a lease; remove it once no pod of that name runs")
            with contextlib.suppress(FileNotFoundError):  # its pod moved on between the listing and now
                written = path.lstat().st_mtime
                found.append(Lease(told["pod"], told["uid"].strip("-"), told["key"], written, path.name))
        return found

    def _inside(self, inner: str) -> list[Path]:
        """What is in a directory of the cache's own; without what begins with a dot, which a file system may put there.

        Raises `OSError` when it can't be told.
        """
        directory = self.root / inner
        return [directory / name for name in sorted(os.listdir(directory)) if not name.startswith(".")]

    def drop_lease(self, lease: Lease) -> None:
        (self.root / _LEASES / lease.name).unlink(missing_ok=True)

    # Removing

    def announce(self, key: str) -> Removal:
        """Say that `key` is about to be removed. List the leases after this, and before `commit`."""
        removal = Removal(key, self.root / _TRASH / f"{key}.{secrets.token_hex(8)}")
        disk.write_atomically(removal.plan, "")
        return removal

    def commit(self, removal: Removal) -> bool:
        """Take the entry out of use with one rename; False when it is gone already, or a pod has vetoed it."""
        if not removal.plan.exists():
            return False
        try:
            (self.root / removal.key).rename(removal.trash)
        except FileNotFoundError:
            return (removal.trash / _MANIFEST).exists()  # the reply to a rename that happened can be lost
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise
        return True

    def cancel(self, removal: Removal) -> None:
        """Take the announcement back, whether carried out or not."""
        removal.plan.unlink(missing_ok=True)
        if removal.trash.is_file():
            removal.trash.unlink(missing_ok=True)

    def veto_removals(self, key: str, found: tuple[int, int]) -> bool:
        """Veto every announced removal of the leased entry that was `found` whole, see `which`. From then on it stays
        while its pod lives; False when it is gone already."""
        for plan in self._inside(_TRASH):
            if plan.name.startswith(f"{key}.") and plan.name.endswith(_PLANNED):
                # Onto a file no directory can be renamed, and where one is already, no file can be created.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(plan.with_suffix(""), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        return self.which(key) == found

    def trash(self) -> list[tuple[Path, str]]:
        """What waits in the trash, and belongs to no cleanup that is at work: paths and their keys."""
        found = [(path, _key_of(path)) for path in self._inside(_TRASH)]
        return [(path, key) for path, key in found if key and not Removal(key, path).plan.exists()]

    def restore(self, trash: Path, key: str) -> bool:
        """Put an entry back; False when it is not whole, its place is taken, or another cleanup was first."""
        if _damage(trash, "size"):
            return False
        try:
            trash.rename(self.root / key)
        except OSError as error:
            if error.errno in (*_TAKEN, errno.ENOENT):
                return False
            raise
        return True

    def discard(self, path: Path) -> None:
        """Delete something of the cache, under a name by which nobody can restore it, or go on with it, meanwhile."""
        doomed = self.root / _TRASH / f"{secrets.token_hex(8)}{_DOOMED}"
        with contextlib.suppress(FileNotFoundError):
            if path.name.endswith(_DOOMED):
                doomed = path
            else:
                path.rename(doomed)
            disk.remove_tree(doomed)

    def leftovers(self) -> Iterator[Path]:
        """What the dead have left: downloads, locks, announcements and half-written files that nobody touches any more,
        and deletions that were not finished."""
        trash = self._inside(_TRASH)
        yield from (path for path in trash if path.name.endswith(_DOOMED))
        before = self.now() - ABANDONED_SECONDS
        found = [path for path in self._inside(_STAGING) if _key_of(path)]
        found += [*self._inside(_LOCKS), *(path for path in trash if path.name.endswith(_PLANNED))]
        for directory in (self.root, *(self.root / inner for inner in _INNER)):
            found += [directory / name for name in os.listdir(directory) if disk.is_temporary(name)]
        for path in found:
            with contextlib.suppress(FileNotFoundError):
                if _touched(path) < before:
                    yield path


def _stamp(path: Path | str, flag: int, directory: int | None = None) -> None:
    """Create an empty file, opened with `flag`, or keep the one there; its mtime is now, by the file server's clock.

    `path` may be relative to the open `directory`.
    """
    # Without waiting for the other end of a pipe.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flag, 0o644, dir_fd=directory)
    try:
        os.utime(descriptor)  # whatever creating it did
    finally:
        os.close(descriptor)


def _manifest(entry: Path) -> Manifest:
    return Manifest.parse(disk.read_small(entry / _MANIFEST, MANIFEST_BYTES).decode())


def _size(told: object) -> int:
    return min(max(told, 0), sys.maxsize) if isinstance(told, int) else 0


def _referred(ref: Path) -> str | None:
    """The key in a ref; None when there is none, or none that can be read."""
    try:
        key = _noted(disk.read_small(ref, _NOTE_BYTES)).get("key")
    except (OSError, ValueError):
        return None
    return key if isinstance(key, str) and is_key(key) else None


def _noted(text: bytes) -> Mapping[str, object]:
    """The JSON object in `text`; an empty one where there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _damage(entry: Path, verify: str) -> list[str]:
    try:
        manifest = _manifest(entry)
    except (FileNotFoundError, NotADirectoryError, NotRegularFile, ValueError) as error:
        return [f"{entry / _MANIFEST}: {error}"]
    return _differences(manifest, entry, verify)


def _differences(manifest: Manifest, entry: Path, verify: str) -> list[str]:
    model = model_of(entry)
    if model.is_symlink():
        return [f"{model}: a link"]
    return manifest.damage(model, verify, alone=True)


def _key_of(path: Path) -> str | None:
    """The key in the name `<key>.<random>` of a directory of ours; None for anything else."""
    key, _, random = path.name.partition(".")
    return key if is_key(key) and random.isalnum() and not path.is_symlink() else None


def _touched(path: Path) -> float:
    """When something last happened to `path` or in it. Not mtime: a copy of a local store's file keeps its source's."""
    newest = path.lstat().st_ctime
    if path.is_dir() and not path.is_symlink():
        # What can't be looked into is as old as it shows itself: a download that is alive touches its directory.
        with contextlib.suppress(OSError):
            for node in disk.below(path):
                newest = max(newest, node.lstat().st_ctime)
    return newest


def _holds_links(root: Path) -> bool:
    """Whether there are links in what was staged, where a download would follow them."""
    return any(path.is_symlink() for path in disk.below(root))
