"""Init container: put one MLflow model on disk, pod-local or through the shared cache.

Settings (environment variables): MODEL_URI (required), OUTPUT_PATH, STORAGE_STRATEGY (emptydir, pvc), CACHE_PATH,
MAX_RETRIES, BACKOFF_SECONDS, DOWNLOAD_TIMEOUT_SECONDS, VERIFY (size, sha256, off), REQUIRE_SHA256 (the digest that the
model must have, see README), DEPLOYMENT_NAME, LINK_MODE (symlink, copy), POD_NAME, POD_TEMPLATE_HASH (the pod's
rollout), LOG_LEVEL, LOG_FORMAT, ENV, SERVICE_NAME, and whatever MLflow itself reads: MLFLOW_TRACKING_URI,
MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID, ...

Exit codes: 0 the model is there; 1 it is not, trying again may help; 2 the settings are bad.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from darwin_runtime import mlflow_import, resources
from darwin_runtime.errors import ConfigError, NoLinks, NotACache, RoleError, StoreUnreachable
from darwin_runtime.role import leave, log_settings, run_role, write_termination
from darwin_runtime.settings import Reader
from darwin_runtime.storage import access, cached_model, digest, disk, fetch, references, resolve
from darwin_runtime.storage import manifest as manifest_module
from darwin_runtime.storage import output as output_module
from darwin_runtime.storage.attempts import Deadline, RetryPolicy
from darwin_runtime.storage.cache import Cache, make_key
from darwin_runtime.storage.cached_model import PATIENCE_SECONDS, Wanted, log_fallback
from darwin_runtime.storage.entry_check import Claim
from darwin_runtime.storage.manifest import Manifest
from darwin_runtime.storage.transfer import Transfer

logger = logging.getLogger("darwin.download")


@dataclass(frozen=True)
class Settings:
    model_uri: str
    output: Path
    output_is_default: bool
    strategy: str
    cache: Path
    retry: RetryPolicy
    timeout_seconds: float
    verify: str
    required: str
    deployment: str
    link_mode: str
    pod: str
    uid: str
    rollout: str

    @classmethod
    def from_env(cls, read: Reader) -> Settings:
        """Raises `settings.ConfigError` naming every bad variable."""
        uri = read.required("MODEL_URI", example=access.MODEL_URI_EXAMPLE)
        access.check_access(read, "MODEL_URI", uri)
        required = digest.required(read)
        settings = cls(
            model_uri=uri,
            output_is_default=not read.raw("OUTPUT_PATH"),
            output=Path(read.text("OUTPUT_PATH", "/models")),
            strategy=read.choice("STORAGE_STRATEGY", "emptydir", ("emptydir", "pvc")),
            cache=Path(read.text("CACHE_PATH", "/model-cache")),
            retry=RetryPolicy(
                read.integer("MAX_RETRIES", 3, minimum=0), read.number("BACKOFF_SECONDS", 5.0, minimum=0)
            ),
            timeout_seconds=read.number("DOWNLOAD_TIMEOUT_SECONDS", fetch.TIMEOUT_SECONDS, minimum=1),
            verify=read.choice("VERIFY", "size", manifest_module.VERIFY),
            required=required,
            deployment=read.text("DEPLOYMENT_NAME"),
            link_mode=read.choice("LINK_MODE", "symlink", ("symlink", "copy")),
            pod=read.text("POD_NAME", socket.gethostname()),
            uid=resources.pod_uid(),
            rollout=read.text("POD_TEMPLATE_HASH"),
        )
        cache = settings.cache if settings.strategy == "pvc" else None
        output_module.check_place(read, settings.output, cache, uri)
        read.finish()
        if settings.rollout and (why := cached_model.why_no_rollout(settings.rollout, read.raw("POD_NAME"))):
            logger.warning("POD_TEMPLATE_HASH=%.100r %s, so this pod belongs to no rollout", settings.rollout, why)
            settings = replace(settings, rollout="")
        # A digest that is asked for is one of bytes, whatever a manifest says.
        return replace(settings, verify="sha256") if required else settings

    @property
    def claim(self) -> Claim:
        return Claim(self.pod, self.uid, self.output, self.verify, self.required)

    def wanted(self, deadline: Deadline) -> Wanted:
        return Wanted(self.model_uri, self.rollout, self.claim, self.retry, deadline)


@dataclass(frozen=True)
class Placed:
    """The model that is in its place now: its manifest, where it was taken from, and whether MLflow could be asked."""

    manifest: Manifest
    origin: str
    fallback: bool = False


def to_output(settings: Settings, deadline: Deadline) -> Placed:
    """`emptydir`: the model's files at OUTPUT_PATH itself."""
    output_module.make(settings.output)
    _clear_other(settings)
    held = output_module.read(settings.output)
    if held and access.comes_from_here(settings.model_uri, held.manifest.model_uri, held.manifest.resolved):
        held = output_module.current_record(settings.output, settings.verify)
    else:
        held = None
    try:
        patience = min(deadline.left(), PATIENCE_SECONDS) if held else deadline.left()
        source = resolve.resolve_within(patience, settings.model_uri, settings.retry)
    except StoreUnreachable as error:
        if held is None:
            raise
        log_fallback(error, f"{settings.output} holds", held.manifest.resolved)
        return Placed(held.manifest, f"{settings.output}, where it already was", fallback=True)
    key = make_key(source.identity, source.listing)
    # What was just found whole is not read again, and nothing is read of another model.
    held = held or output_module.current_record(settings.output, settings.verify, key=key)
    if held and held.key == key:
        output_module.unstage(settings.output)
        logger.info("%s already holds %s, 0 bytes transferred", settings.output, source.label)
        return Placed(held.manifest, f"{settings.output}, where it already was")
    staging = output_module.stage(settings.output, key)
    model, parts = output_module.staged(staging)
    transfer = Transfer(source, model, parts, settings.retry, deadline)
    manifest = fetch.download(transfer, settings.required, partial(output_module.unstage, settings.output))
    output_module.move(model, settings.output, key, manifest)
    logger.info("%s is at %s", source.label, settings.output)
    return Placed(manifest, "its store")


def through_cache(settings: Settings, deadline: Deadline) -> Placed:
    """`pvc`: the model as an entry of the cache, and links to it (or a copy) at OUTPUT_PATH."""
    _clear_other(settings)
    try:
        cache = Cache.prepare(settings.cache)
    except NotACache as error:
        raise ConfigError([f"CACHE_PATH={settings.cache}: {error}"]) from error
    except OSError as error:
        raise RoleError(f"cannot write to CACHE_PATH {settings.cache}: {disk.explain(error)}") from error
    found = cached_model.find(cache, settings.wanted(deadline))
    key = found.key
    cache.touch(key)
    if settings.deployment:
        references.set_alias(cache, references.make_alias(settings.deployment, settings.model_uri), key)
    _populate_output(cache, settings, key)
    return Placed(cache.manifest(key), f"the cache entry {key}", found.fallback)


def _clear_other(settings: Settings) -> None:
    """Whatever follows, no model that is not the required one stays where the main container would find it."""
    record = output_module.read(settings.output) if settings.required else None
    if record and digest.digest_of(record.manifest) != settings.required:
        logger.warning("%s holds a model that %s does not ask for: it is removed", settings.output, digest.NAME)
        output_module.clear(settings.output)


def _populate_output(cache: Cache, settings: Settings, key: str) -> None:
    """Put the entry `key` at OUTPUT_PATH. A Job that only fills the cache may have no such place."""
    try:
        output_module.make(settings.output)
    except RoleError:
        if not settings.output_is_default:
            raise
        logger.info("there is no %s here; the model is in the cache only: %s", settings.output, cache.model(key))
        return
    model, manifest = cache.model(key).absolute(), cache.manifest(key)
    if settings.link_mode == "symlink":
        try:
            output_module.link(model, settings.output, key, manifest)
        except NoLinks as error:
            logger.warning("%s gets a copy, as with LINK_MODE=copy: %s", settings.output, error.strerror)
        else:
            logger.info("%s holds the model, as links to %s", settings.output, model)
            return
    if output_module.current_record(settings.output, settings.verify, key=key):
        output_module.unstage(settings.output)
        logger.info("%s already holds a copy of %s, 0 bytes transferred", settings.output, model)
        return
    output_module.copy(model, settings.output, key, manifest)
    logger.info("%s holds the model, as a copy of %s", settings.output, model)


def run(read: Reader) -> None:
    settings = Settings.from_env(read)
    log_settings(read)
    repeats = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    logger.info(
        "%d attempts at most for each file, %g s in all; in each, MLflow itself repeats a failing request %s times",
        settings.retry.retries + 1,
        settings.timeout_seconds,
        read.text(repeats, mlflow_import.DEFAULTS[repeats]),
    )
    deadline = Deadline(settings.timeout_seconds)
    try:
        placed = (through_cache if settings.strategy == "pvc" else to_output)(settings, deadline)
        output_module.note_fallback(settings.output, placed.fallback)
        sha256 = digest.digest_of(placed.manifest)
        logger.info("%s has sha256 %s, which %s can ask for", settings.model_uri, sha256, digest.NAME)
        write_termination(_outcome(settings, placed, sha256))
    except NotACache as error:
        raise RoleError(str(error)) from error
    except OSError as error:
        raise RoleError(f"cannot put {settings.model_uri} on disk: {disk.explain(error)}") from error


def _outcome(settings: Settings, placed: Placed, sha256: str) -> str:
    """A line for `kubectl describe pod`."""
    resolved = placed.manifest.resolved
    version = f"{resolved['name']} version {resolved.get('version')}" if "name" in resolved else settings.model_uri
    how = "FALL-BACK, as MLflow did not answer" if placed.fallback else "no fall-back"
    rollout = f", rollout {settings.rollout}" if settings.strategy == "pvc" and settings.rollout else ""
    return f"{version}, sha256 {sha256}, from {placed.origin}; {how}{rollout}"


def main(environ: Mapping[str, str] = os.environ) -> int:
    return run_role(run, environ)


if __name__ == "__main__":
    leave(main())
