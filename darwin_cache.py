"""The on-disk contract of the shared model cache; the only module that builds a path inside it.

    <root>/
      CACHEDIR.TAG                   marks the directory as a cache; nothing is removed where it is missing
      <key>/                         a published entry, complete from the moment it has this name
        model/                       the MLflow model, MLmodel at its root
        manifest.json                where it came from, and every file's size and sha256
        last_used                    its mtime is the last time someone needed the entry
      <alias> -> <key>               a name that can be computed without asking MLflow
      .leases/<pod>.<output>.json    which entry a pod's OUTPUT_PATH uses
      .refs/<digest>.json            (tracking URI, model URI) -> the key it last resolved to
      .staging/<key>.<random>/       downloads under way
      .trash/<key>.<random>/         entries moved aside, waiting out the grace period

Nothing here relies on file locks or on the clocks of two machines agreeing: an entry appears by one rename, disappears
by one rename, and ages are differences of mtimes that the file server gave.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TAG_NAME = "CACHEDIR.TAG"
TAG_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"  # https://bford.info/cachedir/
_TAG = f"{TAG_SIGNATURE}\n# MLflow models shared between pods; cleanup.py removes entries that no pod uses.\n"

KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")

_MANIFEST, _MODEL, _LAST_USED = "manifest.json", "model", "last_used"
_INNER = _LEASES, _REFS, _STAGING, _TRASH = ".leases", ".refs", ".staging", ".trash"


class NotACache(Exception):
    """The directory can't be used as a cache; the message says why and what to do."""


@dataclass(frozen=True)
class File:
    """One file of a model: path relative to the model's root (with `/`), size in bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Where an entry came from and what is in it. `resolved` is the identity its key was made of."""

    model_uri: str
    resolved: Mapping[str, str]
    files: Sequence[File]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @classmethod
    def read(cls, entry: Path) -> Manifest:
        """The manifest of an entry, wherever it lies. Raises `OSError` or `ValueError`."""
        return cls.parse((entry / _MANIFEST).read_text(encoding="utf-8"))

    def dump(self) -> str:
        return json.dumps({"format": 1, **asdict(self)}, indent=1)

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Raises `ValueError` when `text` is not a manifest of this format."""
        try:
            data = json.loads(text)
            if data["format"] != 1:
                raise ValueError(f"manifest format {data['format']!r} is not known here")
            files = [File(str(file["path"]), int(file["size"]), str(file["sha256"])) for file in data["files"]]
            return cls(str(data["model_uri"]), dict(data["resolved"]), files)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error

    def damage(self, model: Path) -> list[str]:
        """What differs, by name and size, between this manifest and the files below `model`; empty when whole.

        Raises `OSError` when that can't be told: a file one may not look at is not a file that is missing.
        """
        found = []
        for file in self.files:
            path = model / file.path
            try:
                size = path.stat().st_size
            except (FileNotFoundError, NotADirectoryError) as error:
                found.append(f"{path}: {error.strerror}")
                continue
            if size != file.size:
                found.append(f"{path}: {size} bytes instead of {file.size}")
        return found

    def altered(self, model: Path) -> list[str]:
        """The files below `model` whose bytes are not those of the manifest. Reads all of them."""
        return [
            f"{model / file.path} is not what was downloaded (sha256)"
            for file in self.files
            if digest(model / file.path) != file.sha256
        ]


@dataclass(frozen=True)
class Lease:
    """A pod's claim on an entry; `written` is when, in seconds since the epoch by the file server's clock."""

    pod: str
    output: str
    key: str
    written: float


@dataclass(frozen=True)
class Entry:
    """A published entry; `idle` is the time since it was last needed, in seconds, by the file server's clock."""

    key: str
    bytes: int
    idle: float
    model_uri: str


def model_of(entry: Path) -> Path:
    """Where the model is in an entry, published or staged."""
    return entry / _MODEL


def manifest_of(model: Path) -> Manifest | None:
    """The manifest of the entry whose model is in the directory `model`; None where that is no entry of a cache."""
    try:
        return Manifest.read(model.parent)
    except (OSError, ValueError):
        return None


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


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
            write_atomically(root / TAG_NAME, _TAG)
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
            return cache
        if set(os.listdir(root)) <= {"lost+found"}:
            return None
        raise NotACache(
            f"{root} is not empty and has no {TAG_NAME}, so it is not a cache that download.py made; "
            f"nothing in it is touched"
        )

    def _check_inside(self) -> None:
        for name in _INNER:
            # What is deleted below these must be the cache's own.
            if (self.root / name).is_symlink() or not (self.root / name).is_dir():
                raise NotACache(f"{self.root / name} is not a directory of the cache; remove it by hand")

    def _is_tagged(self) -> bool:
        with contextlib.suppress(OSError), (self.root / TAG_NAME).open(encoding="utf-8", errors="replace") as file:
            return file.read(len(TAG_SIGNATURE)) == TAG_SIGNATURE
        return False

    def now(self) -> float:
        """The file server's clock: the mtime of a file just made there, in seconds since the epoch."""
        probe = self.root / _STAGING / f"clock.{secrets.token_hex(8)}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    # Entries

    def model(self, key: str) -> Path:
        return model_of(self.root / key)

    def has(self, key: str) -> bool:
        """Whether `key` is taken; `damage` says whether by a whole entry."""
        return (self.root / key).is_dir()

    def damage(self, key: str) -> list[str]:
        """What is wrong with the entry `key`, by file; empty when whole. Raises `OSError` when it can't be told."""
        return _damage(self.root / key)

    def manifest(self, key: str) -> Manifest:
        """Raises `OSError` or `ValueError` when it is missing or unreadable."""
        return Manifest.read(self.root / key)

    def touch(self, key: str) -> None:
        """Note that the entry was needed just now."""
        (self.root / key / _LAST_USED).touch()

    def entries(self) -> tuple[list[Entry], list[str]]:
        """All entries, and the names in the cache that are none of ours, which are left alone."""
        now = self.now()
        known, strange = [], []
        for name in sorted(os.listdir(self.root)):
            path = self.root / name
            if name in (TAG_NAME, "lost+found", *_INNER) or path.is_symlink():
                continue
            try:
                manifest = self.manifest(name) if is_key(name) else None
                if manifest is None:
                    strange.append(name)
                    continue
                used = (path / _LAST_USED).stat().st_mtime
            except (OSError, ValueError):
                strange.append(name)
                continue
            known.append(Entry(name, manifest.bytes, max(0.0, now - used), manifest.model_uri))
        return known, strange

    # Publishing

    def stage(self, key: str) -> Path:
        """A new directory to put a model together in; its `model/` is there."""
        staging = self.root / _STAGING / f"{key}.{secrets.token_hex(8)}"
        # Not tempfile.mkdtemp: its 0700 would stay on the entry and keep other users' pods out.
        (staging / _MODEL).mkdir(parents=True)
        return staging

    def publish(self, staging: Path, key: str, manifest: Manifest) -> bool:
        """Give what is staged its final name; False when another writer was first and ours was dropped.

        The files, whose sizes the manifest states, are on disk before the name is.
        """
        (staging / _MANIFEST).write_text(manifest.dump(), encoding="utf-8")
        (staging / _LAST_USED).touch()
        if damage := manifest.damage(staging / _MODEL):
            raise ValueError(f"not published, {'; '.join(damage)}")
        sync_tree(staging)
        while True:
            try:
                staging.rename(self.root / key)
            except OSError as error:
                # On a network file system the reply to a rename that happened can be lost.
                if staging.exists() or not self.has(key):
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    if not self.damage(key):
                        remove_tree(staging)
                        return False
                    self.discard_damaged(key)
                    continue
            break
        sync(self.root)
        return True

    def discard_damaged(self, key: str) -> None:
        """Take a damaged entry away, to be replaced; one that somebody else has replaced meanwhile stays."""
        if trash := self.move_to_trash(key):
            self.restore(trash, key)

    def set_alias(self, alias: str, key: str) -> None:
        """Point `alias` to `key`. Raises `OSError` where the name is taken by something that is no link."""
        _replace_link(self.root / alias, key)

    def aliases(self) -> dict[str, str]:
        """Alias -> key, for every link in the cache whose both ends look like keys."""
        links = {}
        for name in os.listdir(self.root):
            path = self.root / name
            if is_key(name) and path.is_symlink() and is_key(target := str(path.readlink())):
                links[name] = target
        return links

    def names(self) -> dict[str, str]:
        """Every name by which an entry, published or in the trash, may be asked for -> its key."""
        keys = {name for name in os.listdir(self.root) if is_key(name) and not (self.root / name).is_symlink()}
        keys |= {key for _, key in self.trash()}
        return {key: key for key in keys} | self.aliases()

    def drop_dangling_aliases(self, age: float) -> None:
        """Remove links, made more than `age` seconds ago, to entries that are gone: a newer one's may come back."""
        before = self.now() - age
        for alias, key in self.aliases().items():
            path = self.root / alias
            with contextlib.suppress(FileNotFoundError):
                if not self.has(key) and path.lstat().st_mtime < before:
                    path.unlink()

    # Leases and refs

    def lease(self, pod: str, output: str, key: str) -> None:
        """Claim `key` for a pod's output, instead of what that output used before. Do this before looking at `key`."""
        write_atomically(self._lease(pod, output), json.dumps({"pod": pod, "output": output, "key": key}))

    def leases(self) -> list[Lease]:
        """All leases. Raises `OSError` or `ValueError` when one can't be read: nothing may be removed then."""
        found = []
        for path in sorted((self.root / _LEASES).glob("*.json")):
            try:
                with path.open(encoding="utf-8") as file:
                    # Of the open file: by its name it may be another lease by now.
                    written = os.fstat(file.fileno()).st_mtime
                    data = json.load(file)
            except FileNotFoundError:
                continue  # its pod moved on between the listing and now
            except ValueError:
                data = None
            if not isinstance(data, dict) or not is_key(str(data.get("key"))):
                raise ValueError(f"{path} is not a lease; remove it once no pod of that name runs")
            found.append(Lease(str(data.get("pod")), str(data.get("output")), data["key"], written))
        return found

    def drop_lease(self, lease: Lease) -> None:
        """Remove a lease, unless its pod has written it anew."""
        path = self._lease(lease.pod, lease.output)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime == lease.written:
                path.unlink()

    def _lease(self, pod: str, output: str) -> Path:
        # Both parts can be long or hold a slash; what they say is inside the file.
        digest = hashlib.sha256(f"{pod}\n{output}".encode()).hexdigest()[:32]
        return self.root / _LEASES / f"{re.sub('[^A-Za-z0-9.-]', '_', pod)[:128]}.{digest}.json"

    def set_ref(self, tracking_uri: str, model_uri: str, key: str) -> None:
        """Remember what a URI resolved to, for when the tracking server can't be asked."""
        write_atomically(self._ref(tracking_uri, model_uri), json.dumps({"key": key}))

    def ref(self, tracking_uri: str, model_uri: str) -> tuple[str, float] | None:
        """The key that was last resolved for a URI, and how many seconds ago; None when it never was."""
        path = self._ref(tracking_uri, model_uri)
        try:
            key = json.loads(path.read_text(encoding="utf-8"))["key"]
            return (key, max(0.0, self.now() - path.stat().st_mtime)) if is_key(key) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _ref(self, tracking_uri: str, model_uri: str) -> Path:
        digest = hashlib.sha256(f"{tracking_uri}\n{model_uri}".encode()).hexdigest()
        return self.root / _REFS / f"{digest}.json"

    def drop_refs_to(self, keys: set[str]) -> None:
        for path in (self.root / _REFS).glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(path.read_text(encoding="utf-8"))["key"] in keys:
                    path.unlink(missing_ok=True)

    # Removing

    def move_to_trash(self, key: str) -> Path | None:
        """Take an entry out of use with one rename; None when it is gone already."""
        trash = self.root / _TRASH / f"{key}.{secrets.token_hex(8)}"
        try:
            (self.root / key).rename(trash)
        except FileNotFoundError:
            return None
        return trash

    def trash(self) -> list[tuple[Path, str]]:
        """What waits in the trash: paths and their keys."""
        return [(path, key) for path in sorted((self.root / _TRASH).iterdir()) if (key := _key_of(path))]

    def restore(self, trash: Path, key: str) -> bool:
        """Put an entry back; False when it is not whole, its place is taken, or another cleanup was first."""
        if _damage(trash):
            return False
        try:
            trash.rename(self.root / key)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                return False
            raise
        return True

    def abandoned(self, age: float) -> Iterator[Path]:
        """Staging directories in which nothing happened for `age` seconds."""
        now = self.now()
        for path in filter(_key_of, (self.root / _STAGING).iterdir()):
            # Not mtime: a file copied from a local store keeps its source's.
            with contextlib.suppress(FileNotFoundError):
                if now - max(node.lstat().st_ctime for node in (path, *path.rglob("*"))) > age:
                    yield path


def _damage(entry: Path) -> list[str]:
    try:
        manifest = Manifest.read(entry)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return [f"{entry / _MANIFEST}: {error}"]
    return manifest.damage(model_of(entry))


def _key_of(path: Path) -> str | None:
    """The key in the name `<key>.<random>` of a directory of ours; None for anything else."""
    key = path.name.partition(".")[0]
    return key if is_key(key) and not path.is_symlink() else None


def write_atomically(path: Path, text: str) -> None:
    """Write `path` so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _replace_link(path: Path, target: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.symlink_to(target)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush one file or directory to disk; file systems that can't sync a directory are taken as they are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush every file and directory below `root`, and `root` itself, children before parents."""
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            sync(Path(directory, name))
        sync(Path(directory))


def remove_tree(path: Path) -> None:
    """Delete a directory, or the link or file that is there instead; links inside are not followed.

    Where someone else deletes the same tree at the same time, what is left is theirs to finish.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
