"""A single flight for each entry: of the pods that need it at once, one downloads it, and the others wait."""

from __future__ import annotations

import logging
import time
from functools import partial

from darwin_runtime.errors import RoleError
from darwin_runtime.storage import locks
from darwin_runtime.storage.artifacts import Source
from darwin_runtime.storage.attempts import Deadline, RetryPolicy
from darwin_runtime.storage.cache import Cache, make_key, model_of, parts_of
from darwin_runtime.storage.entry_check import Claim, EntryCheck
from darwin_runtime.storage.fetch import download
from darwin_runtime.storage.locks import Lock, LockState
from darwin_runtime.storage.transfer import Transfer

# How often a pod looks whether another has finished the download, and how often it logs that it waits.
POLL_SECONDS = 0.5
WAITING_SECONDS = 5.0

logger = logging.getLogger("darwin.download")


def ensure_entry(cache: Cache, source: Source, claim: Claim, policy: RetryPolicy, deadline: Deadline) -> str:
    """Make sure that the cache has `source`, whole; return its key."""
    key = make_key(source.identity, source.listing)
    is_there = EntryCheck(cache, key, claim)
    waiting = Waiting(key)
    filled = False
    while not is_there():
        held = locks.try_lock(cache, key, claim.owner)
        if isinstance(held, LockState):
            deadline.check(f"waiting for {held.owner} to download {source.uri}")
            waiting.log(held)
            time.sleep(POLL_SECONDS)
        # It may have come between the check and the lock.
        elif is_there():
            held.release(done=True)
        else:
            filled = _fill(cache, source, claim, held, policy, deadline)
    if not filled:
        logger.info("%s is in the cache as %s, 0 bytes transferred", source.label, key)
    return key


def _fill(cache: Cache, source: Source, claim: Claim, lock: Lock, policy: RetryPolicy, deadline: Deadline) -> bool:
    """Download and publish; False when another pod, which took this one for dead, has taken the download over."""
    key, done = make_key(source.identity, source.listing), False
    try:
        staging = locks.stage(cache, key, lock)
        transfer = Transfer(source, model_of(staging), parts_of(staging), policy, deadline, shared=True)
        with lock.beating(lambda: (transfer.arrived(), transfer.total)):
            manifest = download(transfer, claim.required, partial(cache.delete_tree, staging))
            first = locks.publish(cache, staging, key, manifest, claim.verify, exactly=bool(claim.required))
        done = True
    except (OSError, RoleError) as error:
        if not lock.is_lost():
            raise
        logger.warning("another pod has taken this download over (%s)", error)
        return False
    finally:
        lock.release(done=done)
    logger.info("%s %s as %s", source.label, "published" if first else "was published meanwhile", key)
    return True


class Waiting:
    """Logs now and then which pod this one waits for."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.logged = 0.0

    def log(self, holder: LockState) -> None:
        if time.monotonic() - self.logged > WAITING_SECONDS:
            self.logged = time.monotonic()
            logger.info(
                "waiting for %s, which downloads %s: %s, last heard of %.0f s ago",
                *(holder.owner or "another pod", self.key, holder.progress, holder.silence),
            )
