"""Init container: put one MLflow model on disk, pod-local or through the shared cache.

Settings (environment variables): MODEL_URI (required), OUTPUT_PATH, STORAGE_STRATEGY (emptydir, pvc), CACHE_PATH,
MAX_RETRIES, BACKOFF_SECONDS, DEPLOYMENT_NAME, LINK_MODE (symlink, copy), POD_NAME, LOG_LEVEL, LOG_FORMAT, ENV,
SERVICE_NAME, and whatever MLflow itself reads: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME,
MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID, ...

Exit codes: 0 the model is there; 1 it is not, trying again may help; 2 the settings are bad.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import darwin_cache
import darwin_fetch
import darwin_mlflow
import darwin_output
from darwin_cache import Cache, Manifest, NotACache
from darwin_env import ConfigError, Reader
from darwin_fetch import Retry, Source, Transfer, Unreachable
from darwin_log import Redactor, RoleError, human, log_settings, mask_uri, run_role

logger = logging.getLogger("darwin.download")


@dataclass(frozen=True)
class Settings:
    model_uri: str
    output: Path
    output_is_default: bool
    strategy: str
    cache: Path
    retry: Retry
    deployment: str
    link_mode: str
    pod: str
    tracking_uri: str

    @classmethod
    def from_env(cls, read: Reader) -> Settings:
        """Raises `darwin_env.ConfigError` naming every bad variable."""
        uri = read.required("MODEL_URI", example=darwin_fetch.MODEL_URI_EXAMPLE)
        darwin_fetch.check_access(read, "MODEL_URI", uri)
        settings = cls(
            model_uri=uri,
            output_is_default=not read.raw("OUTPUT_PATH"),
            output=Path(read.text("OUTPUT_PATH", "/models")),
            strategy=read.choice("STORAGE_STRATEGY", "emptydir", ("emptydir", "pvc")),
            cache=Path(read.text("CACHE_PATH", "/model-cache")),
            retry=Retry(read.integer("MAX_RETRIES", 3, least=0), read.number("BACKOFF_SECONDS", 5.0, least=0)),
            deployment=read.text("DEPLOYMENT_NAME"),
            link_mode=read.choice("LINK_MODE", "symlink", ("symlink", "copy")),
            pod=read.text("POD_NAME", socket.gethostname()),
            tracking_uri=read.raw("MLFLOW_TRACKING_URI"),
        )
        read.finish()
        return settings


def to_output(settings: Settings) -> None:
    """`emptydir`: the model's files at OUTPUT_PATH itself."""
    _make_output(settings.output)
    source = darwin_fetch.persist(lambda: darwin_fetch.resolve(settings.model_uri), settings.retry)
    key = darwin_cache.make_key(source.identity, source.listing())
    if darwin_output.holds(settings.output, key):
        logger.info("%s already holds %s, 0 bytes transferred", settings.output, _named(source))
        return
    staging = darwin_output.stage(settings.output)
    try:
        manifest = _transfer(source, staging, settings.retry)
        darwin_output.move(staging, settings.output, key, manifest)
    finally:
        darwin_cache.remove_tree(staging)
    logger.info("%s is at %s", _named(source), settings.output)


def through_cache(settings: Settings) -> None:
    """`pvc`: the model as an entry of the cache, and links to it (or a copy of it) at OUTPUT_PATH."""
    try:
        cache = Cache.prepare(settings.cache)
    except NotACache as error:
        raise ConfigError([f"CACHE_PATH={settings.cache}: {error}"]) from error
    except OSError as error:
        raise RoleError(
            f"cannot write to CACHE_PATH {settings.cache} ({error.strerror}); "
            f"mount the cache's volume there, writable by user {os.getuid()}"
        ) from error
    try:
        source = darwin_fetch.persist(lambda: darwin_fetch.resolve(settings.model_uri), settings.retry)
    except Unreachable as error:
        key = _last_known(cache, settings, error)
    else:
        key = _cached(cache, settings, source)
    cache.touch(key)
    if settings.deployment:
        cache.set_alias(darwin_cache.make_alias(settings.deployment, settings.model_uri), key)
    _provide(cache, settings, key)


def _cached(cache: Cache, settings: Settings, source: Source) -> str:
    """Make sure that the cache has `source`, whole; return its key."""
    key = darwin_cache.make_key(source.identity, source.listing())
    # Before looking: from here on cleanup keeps the entry, or had already moved it out of sight.
    cache.lease(settings.pod, str(settings.output), key)
    if cache.has(key) and (damage := cache.damage(key)):
        logger.warning("replacing the damaged cache entry %s: %s", key, "; ".join(damage))
        cache.discard_damaged(key)
    if cache.has(key):
        logger.info("%s is in the cache as %s, 0 bytes transferred", _named(source), key)
    else:
        staging = cache.stage(key)
        try:
            manifest = _transfer(source, darwin_cache.model_of(staging), settings.retry)
            first = cache.publish(staging, key, manifest)
        finally:
            darwin_cache.remove_tree(staging)
        logger.info("%s %s as %s", _named(source), "published" if first else "was published meanwhile", key)
    cache.set_ref(mask_uri(settings.tracking_uri), settings.model_uri, key)
    return key


def _last_known(cache: Cache, settings: Settings, error: Unreachable) -> str:
    """The key that MODEL_URI last resolved to, if its entry is whole; raises `error` otherwise."""
    ref = cache.ref(mask_uri(settings.tracking_uri), settings.model_uri)
    if ref is None:
        raise RoleError(f"{error}; and the cache {settings.cache} has never held this URI's model") from error
    key, age = ref
    cache.lease(settings.pod, str(settings.output), key)
    if not cache.has(key) or cache.damage(key):
        raise RoleError(f"{error}; and what it last resolved to, cache entry {key}, is not there whole") from error
    logger.warning(
        "%s. FALLING BACK to what %s resolved to %.1f hours ago: cache entry %s, %s",
        error,
        settings.model_uri,
        age / 3600,
        key,
        " ".join(f"{name}={value}" for name, value in cache.manifest(key).resolved.items()),
    )
    return key


def _provide(cache: Cache, settings: Settings, key: str) -> None:
    """Put the entry `key` at OUTPUT_PATH. A Job that only fills the cache may have no such place."""
    try:
        _make_output(settings.output)
    except RoleError:
        if not settings.output_is_default:
            raise
        logger.info("there is no %s here; the model is in the cache only: %s", settings.output, cache.model(key))
        return
    if settings.link_mode == "copy" and darwin_output.holds(settings.output, key):
        logger.info("%s already holds a copy of %s", settings.output, cache.model(key))
        return
    put = darwin_output.copy if settings.link_mode == "copy" else darwin_output.link
    put(cache.model(key).absolute(), settings.output, key, cache.manifest(key))
    logger.info("%s holds the model, as %s of %s", settings.output, settings.link_mode, cache.model(key))


def _make_output(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        writable = os.access(output, os.W_OK | os.X_OK)
    except OSError as error:
        raise RoleError(f"cannot create OUTPUT_PATH {output} ({error.strerror}); mount a volume there") from error
    if not writable:
        raise RoleError(f"cannot write to OUTPUT_PATH {output} as user {os.getuid()}; mount a writable volume there")


def _transfer(source: Source, destination: Path, retry: Retry) -> Manifest:
    files = Transfer(source, destination).run(retry)
    return Manifest(mask_uri(source.uri), source.identity, files)


def _named(source: Source) -> str:
    resolved = "".join(f", {name} {value}" for name, value in source.identity.items() if name in ("version", "run"))
    return f"{source.uri} ({human(source.bytes)} in {len(source.files)} files{resolved})"


def run(read: Reader, redact: Redactor) -> None:
    settings = Settings.from_env(read)
    log_settings(read.seen, redact)
    repeats = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    logger.info(
        "%d attempts at most; in each, MLflow itself repeats a failing request %s times",
        settings.retry.retries + 1,
        read.text(repeats, darwin_mlflow.DEFAULTS[repeats]),
    )
    try:
        (through_cache if settings.strategy == "pvc" else to_output)(settings)
    except OSError as error:
        raise RoleError(
            f"cannot put {settings.model_uri} on disk: {error}; is a volume full or not writable?"
        ) from error


def main(environ: Mapping[str, str] = os.environ) -> int:
    return run_role(run, environ)


if __name__ == "__main__":
    sys.exit(main())
