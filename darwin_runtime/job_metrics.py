"""The result of a run of the CronJob: a line of JSON, and Prometheus metrics for a file or a Pushgateway."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from prometheus_client import CollectorRegistry, Gauge, push_to_gateway, write_to_textfile
from prometheus_client.exposition import basic_auth_handler, default_handler

from darwin_runtime.redact import hide

JOB = "darwin_model_cache_cleanup"

PUSH_TIMEOUT_SECONDS = 10.0

# Name in the result -> name and meaning of the metric.
_METRICS = {
    "success": (f"{JOB}_success", "Whether the last run succeeded."),
    "seconds": (f"{JOB}_duration_seconds", "How long the last run took."),
    "removed": (f"{JOB}_removed_entries", "Entries that the last run removed, or would have in a dry run."),
    "freed": (f"{JOB}_freed_bytes", "Bytes that the last run freed, or would have in a dry run."),
    "spared": (f"{JOB}_spared_entries", "Entries that the last run left because a pod came to use them meanwhile."),
    "restored": (f"{JOB}_restored_entries", "Entries that the last run put back."),
    "failed": (f"{JOB}_failed_removals", "What the last run could not remove."),
    "dry_run": (f"{JOB}_dry_run", "Whether the last run was a dry run."),
    "entries": ("darwin_model_cache_entries", "Models in the cache when the last run began."),
    "bytes": ("darwin_model_cache_size_bytes", "Size of the models in the cache when the last run began."),
    "entries_in_use": ("darwin_model_cache_entries_in_use", "Models in the cache that pods use."),
    "unknown": ("darwin_model_cache_unknown_entries", "What is in the cache and is none of its entries."),
}

logger = logging.getLogger("darwin.cleanup")


def publish(result: Mapping[str, float], textfile: str, pushgateway: str) -> None:
    """Print `result`, and write or push it where a place is given; what fails of that is only logged."""
    sys.stdout.write(f"{json.dumps(result)}\n")
    registry = metrics(result)
    try:
        if textfile:
            write_to_textfile(textfile, registry)
    except OSError as error:
        logger.warning("cannot write METRICS_TEXTFILE=%s: %s", textfile, error)
    try:
        if pushgateway:
            _push(pushgateway, registry)
    except Exception as error:  # whatever it is, the cleanup is done
        logger.warning("cannot push to PUSHGATEWAY_URL=%s: %s", hide(pushgateway), error)


def _push(uri: str, registry: CollectorRegistry) -> None:
    """`uri` may hold a user and a password; the scheme may be left out."""
    found = urlsplit(uri if "://" in uri else f"http://{uri}")
    where = found._replace(netloc=found.netloc.rpartition("@")[2]).geturl()
    handler: Callable[..., Any] = default_handler
    if found.username:
        user, password = unquote(found.username), unquote(found.password or "")
        handler = partial(basic_auth_handler, username=user, password=password)
    push_to_gateway(where, JOB, registry, timeout=PUSH_TIMEOUT_SECONDS, handler=handler)


def metrics(result: Mapping[str, float]) -> CollectorRegistry:
    """The metrics of one run; what a failed run does not know is left out."""
    registry = CollectorRegistry()
    for name, (metric, text) in _METRICS.items():
        if name in result:
            Gauge(metric, text, registry=registry).set(result[name])
    name, text = f"{JOB}_last_run_timestamp_seconds", "When the last run ended."
    Gauge(name, text, registry=registry).set(time.time())
    return registry
