"""The check of a cache entry that a pod has leased: there, whole, as required, and kept from removal."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from darwin_runtime.storage import digest
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.manifest import summary

logger = logging.getLogger("darwin.download")


@dataclass(frozen=True)
class Claim:
    """A pod's claim on an entry for its output, and how it checks that entry."""

    pod: str
    uid: str
    output: Path
    verify: str
    required: str

    @property
    def owner(self) -> str:
        return " ".join(filter(None, (self.pod, self.uid, str(self.output))))


class EntryCheck:
    """Leases an entry, and checks at each call whether it is there, whole, and as required. If so, it stays."""

    def __init__(self, cache: Cache, key: str, claim: Claim) -> None:
        # Before the first check, which keeps the entry that it finds: `cache` has the reason.
        cache.lease(claim.pod, str(claim.output), key, claim.uid)
        self.cache = cache
        self.key = key
        self.claim = claim
        self.damaged: tuple[int, int] | None = None

    def __call__(self) -> bool:
        there = self.cache.fingerprint(self.key)
        # One that is replaced is another directory. Reading all of it again, and again, would keep others from it.
        if there is None or there == self.damaged:
            return False
        damage = self.cache.damage(self.key, self.claim.verify)
        if (required := self.claim.required) and not damage:
            seen = digest.digest_of(self.cache.manifest(self.key))
            damage = [f"{digest.NAME} expects {required}, seen {seen}"] if seen != required else []
        if damage:
            self.damaged = there
            logger.warning("the cache entry %s is damaged: %s", self.key, summary(damage))
            return False
        return self.cache.veto_removals(self.key, there)
