"""Init container: put one MLflow model on disk, pod-local or through the shared cache.

Settings (environment variables): MODEL_URI (required), OUTPUT_PATH, STORAGE_STRATEGY (emptydir, pvc), CACHE_PATH,
MAX_RETRIES, BACKOFF_SECONDS, DOWNLOAD_TIMEOUT_SECONDS, VERIFY (size, sha256, off), REQUIRE_SHA256 (the digest that the
model must have, see README), DEPLOYMENT_NAME, LINK_MODE (symlink, copy), POD_NAME, LOG_LEVEL, LOG_FORMAT, ENV,
SERVICE_NAME, and whatever MLflow itself reads: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD,
AWS_ACCESS_KEY_ID, ...

Exit codes: 0 the model is there; 1 it is not, trying again may help; 2 the settings are bad.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import k8s_client
from darwin_runtime import mlflow_import
from darwin_runtime.errors import ConfigError, NotACache, RoleError, StoreUnreachable
from darwin_runtime.logs import format_bytes, log_settings
from darwin_runtime.redact import Redactor, mask_uri
from darwin_runtime.role import leave, run_role
from darwin_runtime.settings import Reader
from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage import digest, disk
from darwin_runtime.storage import manifest as manifest_module
from darwin_runtime.storage import output as output_module
from darwin_runtime.storage import resolve as resolve_module
from darwin_runtime.storage import transfer as transfer_module
from darwin_runtime.storage.cache import Cache, Lock, LockState
from darwin_runtime.storage.manifest import Manifest, summary
from darwin_runtime.storage.resolve import Retry, Source
from darwin_runtime.storage.transfer import Deadline, Transfer

# How often a pod looks whether another has finished the download, and how often it says that it waits.
POLL_SECONDS = 0.5
WAITING_SECONDS = 5.0

# So long MLflow is waited for, retries and all, where what the URI last resolved to is at hand.
PATIENCE_SECONDS = 60.0

logger = logging.getLogger("darwin.download")


@dataclass(frozen=True)
class Settings:
    model_uri: str
    output: Path
    output_is_default: bool
    strategy: str
    cache: Path
    retry: Retry
    timeout_seconds: float
    verify: str
    required: str
    deployment: str
    link_mode: str
    pod: str
    uid: str
    tracking_uri: str

    @classmethod
    def from_env(cls, read: Reader) -> Settings:
        """Raises `settings.ConfigError` naming every bad variable."""
        uri = read.required("MODEL_URI", example=resolve_module.MODEL_URI_EXAMPLE)
        resolve_module.check_access(read, "MODEL_URI", uri)
        required = digest.required(read)
        settings = cls(
            model_uri=uri,
            output_is_default=not read.raw("OUTPUT_PATH"),
            output=Path(read.text("OUTPUT_PATH", "/models")),
            strategy=read.choice("STORAGE_STRATEGY", "emptydir", ("emptydir", "pvc")),
            cache=Path(read.text("CACHE_PATH", "/model-cache")),
            retry=Retry(read.integer("MAX_RETRIES", 3, minimum=0), read.number("BACKOFF_SECONDS", 5.0, minimum=0)),
            timeout_seconds=read.number("DOWNLOAD_TIMEOUT_SECONDS", transfer_module.TIMEOUT_SECONDS, minimum=1),
            verify=read.choice("VERIFY", "size", manifest_module.VERIFY),
            required=required,
            deployment=read.text("DEPLOYMENT_NAME"),
            link_mode=read.choice("LINK_MODE", "symlink", ("symlink", "copy")),
            pod=read.text("POD_NAME", socket.gethostname()),
            uid=k8s_client.pod_uid(),
            tracking_uri=read.raw("MLFLOW_TRACKING_URI"),
        )
        read.finish()
        # A digest that is asked for is one of bytes, whatever a manifest says.
        return replace(settings, verify="sha256") if required else settings


def to_output(settings: Settings, deadline: Deadline) -> Manifest:
    """`emptydir`: the model's files at OUTPUT_PATH itself. Returns their manifest."""
    _make_output(settings.output)
    _clear_other(settings)
    held = output_module.current_record(settings.output, settings.verify, model_uri=mask_uri(settings.model_uri))
    try:
        source = _resolve(settings, deadline, fallback=held is not None)
    except StoreUnreachable as error:
        if held is None:
            raise
        _fall_back(error, f"{settings.output} holds", held.manifest)
        return held.manifest
    key = cache_module.make_key(source.identity, source.listing)
    # What was just found whole is not read again, and nothing is read of another model.
    held = held or output_module.current_record(settings.output, settings.verify, key=key)
    if held and held.key == key:
        output_module.unstage(settings.output)
        logger.info("%s already holds %s, 0 bytes transferred", settings.output, _named(source))
        return held.manifest
    staging = output_module.stage(settings.output, key)
    with _room_made(lambda: output_module.unstage(settings.output)):
        model, parts = output_module.staged(staging)
        manifest = _manifest(source, Transfer(source, model, parts, settings.retry, deadline))
        _check_required(settings, manifest, lambda: output_module.unstage(settings.output))
        output_module.move(model, settings.output, key, manifest)
    logger.info("%s is at %s", _named(source), settings.output)
    return manifest


def through_cache(settings: Settings, deadline: Deadline) -> Manifest:
    """`pvc`: the model as an entry of the cache, and links to it (or a copy) at OUTPUT_PATH. Returns its manifest."""
    _clear_other(settings)
    try:
        cache = Cache.prepare(settings.cache)
    except NotACache as error:
        raise ConfigError([f"CACHE_PATH={settings.cache}: {error}"]) from error
    except OSError as error:
        raise RoleError(
            f"cannot write to CACHE_PATH {settings.cache} ({disk.explain(error)}); "
            f"mount the cache's volume there, writable by user {os.getuid()}"
        ) from error
    known = cache.ref(settings.tracking_uri, settings.model_uri)
    try:
        source = _resolve(settings, deadline, fallback=known is not None and cache.has(known[0]))
    except StoreUnreachable as error:
        key = _last_known(cache, settings, known, error)
    else:
        key = _cached(cache, settings, source, deadline)
    cache.touch(key)
    if settings.deployment:
        cache.set_alias(cache_module.make_alias(settings.deployment, settings.model_uri), key)
    _populate_output(cache, settings, key)
    return cache.manifest(key)


def _clear_other(settings: Settings) -> None:
    """Whatever follows, no model that is not the required one stays where the main container would find it."""
    record = output_module.read(settings.output) if settings.required else None
    if record and digest.digest_of(record.manifest) != settings.required:
        logger.warning("%s holds a model that %s does not ask for: it is removed", settings.output, digest.NAME)
        output_module.clear(settings.output)


def _check_required(settings: Settings, manifest: Manifest, discard: Callable[[], object]) -> None:
    """Raise `RoleError`, after `discard`, for a model that is not the required one: the next attempt begins anew."""
    seen = digest.digest_of(manifest)
    if settings.required and seen != settings.required:
        discard()
        raise digest.refusal(settings.model_uri, seen, settings.required)


def _resolve(settings: Settings, deadline: Deadline, *, fallback: bool) -> Source:
    """Raises as `resolve.resolve` does, in time to start from what is at hand if there is a `fallback`."""
    left = min(deadline.left(), PATIENCE_SECONDS) if fallback else deadline.left()
    what = f"cannot resolve {settings.model_uri}, for which there are {left:.0f} s of DOWNLOAD_TIMEOUT_SECONDS"

    def resolve() -> Source:
        mlflow_import.prepare(tables=False)
        return resolve_module.retry_action(lambda: resolve_module.resolve(settings.model_uri), settings.retry)

    return transfer_module.run_with_timeout(left, resolve, what)


def _cached(cache: Cache, settings: Settings, source: Source, deadline: Deadline) -> str:
    """Make sure that the cache has `source`, whole; return its key. Of several pods one downloads, the others wait."""
    key = cache_module.make_key(source.identity, source.listing)
    # Before looking, and the look keeps what it finds: `cache` has why.
    cache.lease(settings.pod, str(settings.output), key, settings.uid)
    look = _EntryCheck(cache, key, settings.verify, settings.required)
    waiting = _Waiting(key)
    filled = False
    while not look():
        held = cache.try_lock(key, " ".join(filter(None, (settings.pod, settings.uid, str(settings.output)))))
        if isinstance(held, LockState):
            deadline.check(f"waiting for {held.owner} to download {source.uri}")
            waiting.say(held)
            time.sleep(POLL_SECONDS)
        # It may have come between the look and the lock.
        elif look():
            held.release(done=True)
        else:
            filled = _fill(cache, settings, source, key, held, deadline)
    if not filled:
        logger.info("%s is in the cache as %s, 0 bytes transferred", _named(source), key)
    try:
        cache.set_ref(settings.tracking_uri, settings.model_uri, key)
    except OSError as error:  # the model is there all the same
        logger.warning("what %s resolved to is not remembered: %s", settings.model_uri, disk.explain(error))
    return key


class _EntryCheck:
    """Tells whether an entry is there, whole, and as required, and keeps it there, as its pod has leased it."""

    def __init__(self, cache: Cache, key: str, verify: str, required: str = "") -> None:
        self.cache = cache
        self.key = key
        self.verify = verify
        self.required = required
        self.damaged: tuple[int, int] | None = None

    def __call__(self) -> bool:
        there = self.cache.which(self.key)
        # One that is replaced is another directory. Reading all of it again, and again, would keep others from it.
        if there is None or there == self.damaged:
            return False
        damage = self.cache.damage(self.key, self.verify)
        if self.required and not damage:
            seen = digest.digest_of(self.cache.manifest(self.key))
            damage = [f"{digest.NAME} expects {self.required}, seen {seen}"] if seen != self.required else []
        if damage:
            self.damaged = there
            logger.warning("the cache entry %s is damaged: %s", self.key, summary(damage))
            return False
        return self.cache.veto_removals(self.key, there)


def _fill(cache: Cache, settings: Settings, source: Source, key: str, lock: Lock, deadline: Deadline) -> bool:
    """Download and publish; False when another pod, which took this one for dead, has taken the download over."""
    done = False
    try:
        staging = cache.stage(key, lock)
        model, parts = cache_module.model_of(staging), cache_module.parts_of(staging)
        transfer = Transfer(source, model, parts, settings.retry, deadline, shared=True)
        with _beating(lock, transfer), _room_made(partial(cache.discard, staging)):
            manifest = _manifest(source, transfer)
            _check_required(settings, manifest, partial(cache.discard, staging))
            first = cache.publish(staging, key, manifest, settings.verify, exactly=bool(settings.required))
        done = True
    except (OSError, RoleError) as error:
        if not lock.is_lost():
            raise
        logger.warning("another pod has taken this download over (%s)", error)
        return False
    finally:
        lock.release(done=done)
    logger.info("%s %s as %s", _named(source), "published" if first else "was published meanwhile", key)
    return True


@contextlib.contextmanager
def _beating(lock: Lock, transfer: Transfer) -> Iterator[None]:
    """Show those who wait that the download goes on."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(cache_module.HEARTBEAT_SECONDS):
            lock.beat(transfer.arrived(), transfer.total)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def _room_made(discard: Callable[[], None]) -> Iterator[None]:
    """What has arrived is kept for the next attempt, but not where it fills the volume that others need, too."""
    try:
        yield
    except OSError as error:
        if error.errno in disk.FULL:
            discard()
        raise


class _Waiting:
    """Says now and then who is waited for."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.said = 0.0

    def say(self, holder: LockState) -> None:
        if time.monotonic() - self.said > WAITING_SECONDS:
            self.said = time.monotonic()
            percent = (
                f"{100 * holder.arrived / holder.total:.0f}% of {format_bytes(holder.total)}"
                if holder.total
                else "begun"
            )
            logger.info(
                "waiting for %s, which downloads %s: %s, last heard of %.0f s ago",
                *(holder.owner or "another pod", self.key, percent, holder.silence),
            )


def _last_known(cache: Cache, settings: Settings, ref: tuple[str, float] | None, error: StoreUnreachable) -> str:
    """The key that MODEL_URI last resolved to, if its entry is whole; raises `error` otherwise."""
    if ref is None:
        raise RoleError(f"{error}; and the cache {settings.cache} has never held this URI's model") from error
    key, age = ref
    cache.lease(settings.pod, str(settings.output), key, settings.uid)
    if not _EntryCheck(cache, key, settings.verify, settings.required)():
        raise RoleError(f"{error}; and what it last resolved to, cache entry {key}, is not there whole") from error
    what = f"{settings.model_uri} resolved {age / 3600:.1f} hours ago to cache entry {key}:"
    _fall_back(error, what, cache.manifest(key))
    return key


def _fall_back(error: StoreUnreachable, what: str, manifest: Manifest) -> None:
    resolved = " ".join(f"{name}={value}" for name, value in manifest.resolved.items())
    logger.warning("%s. FALLING BACK to the model at hand, which may be an older one: %s %s", error, what, resolved)


def _populate_output(cache: Cache, settings: Settings, key: str) -> None:
    """Put the entry `key` at OUTPUT_PATH. A Job that only fills the cache may have no such place."""
    try:
        _make_output(settings.output)
    except RoleError:
        if not settings.output_is_default:
            raise
        logger.info("there is no %s here; the model is in the cache only: %s", settings.output, cache.model(key))
        return
    if settings.link_mode == "copy" and output_module.current_record(settings.output, settings.verify, key=key):
        output_module.unstage(settings.output)
        logger.info("%s already holds a copy of %s", settings.output, cache.model(key))
        return
    put = output_module.copy if settings.link_mode == "copy" else output_module.link
    with _room_made(lambda: output_module.unstage(settings.output)):
        put(cache.model(key).absolute(), settings.output, key, cache.manifest(key))
    logger.info("%s holds the model, as %s of %s", settings.output, settings.link_mode, cache.model(key))


def _make_output(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        writable = os.access(output, os.W_OK | os.X_OK)
    except OSError as error:
        raise RoleError(f"cannot create OUTPUT_PATH {output} ({error.strerror}); mount a volume there") from error
    if not writable:
        number = errno.EROFS if os.statvfs(output).f_flag & os.ST_RDONLY else errno.EACCES
        why = disk.explain(OSError(number, os.strerror(number), str(output)))
        raise RoleError(f"cannot write to OUTPUT_PATH: {why}")


def _manifest(source: Source, transfer: Transfer) -> Manifest:
    return Manifest(mask_uri(source.uri), source.identity, transfer.run())


def _named(source: Source) -> str:
    resolved = "".join(f", {name} {value}" for name, value in source.identity.items() if name in ("version", "run"))
    return f"{source.uri}{resolved}"


def run(read: Reader, redact: Redactor) -> None:
    settings = Settings.from_env(read)
    log_settings(read.seen, redact)
    repeats = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    logger.info(
        "%d attempts at most for each file, %g s in all; in each, MLflow itself repeats a failing request %s times",
        settings.retry.retries + 1,
        settings.timeout_seconds,
        read.text(repeats, mlflow_import.DEFAULTS[repeats]),
    )
    deadline = Deadline(settings.timeout_seconds)
    try:
        manifest = (through_cache if settings.strategy == "pvc" else to_output)(settings, deadline)
        logger.info(
            "%s has sha256 %s, which %s can ask for",
            settings.model_uri,
            digest.digest_of(manifest),
            digest.NAME,
        )
    except NotACache as error:
        raise RoleError(str(error)) from error
    except OSError as error:
        raise RoleError(f"cannot put {settings.model_uri} on disk: {disk.explain(error)}") from error


def main(environ: Mapping[str, str] = os.environ) -> int:
    return run_role(run, environ)


if __name__ == "__main__":
    leave(main())
