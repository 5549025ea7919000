"""`python -m darwin_runtime cache`: look into a model cache by hand, from a pod that mounts it. It changes nothing.

    python -m darwin_runtime cache list              every entry: size, last use, version, users, model URI
    python -m darwin_runtime cache verify <key> ...  compare all files' bytes with the manifest; --all for every entry

A key may be shortened, or be an alias. The cache is the one in CACHE_PATH, or /model-cache; --cache names another.
Users that are gone are marked where the pod's service account may list pods.

Exit codes: 0 all is well; 1 an entry is damaged; 2 there is no such cache, entry or command.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import k8s_client
from darwin_runtime.errors import ApiError, NotACache, NotInCluster
from darwin_runtime.logs import format_bytes
from darwin_runtime.storage import references
from darwin_runtime.storage.cache import Cache
from darwin_runtime.storage.manifest import VERIFY
from darwin_runtime.storage.usage import dead_leases

# An engineer waits so long for the API server, at most.
LISTING_SECONDS = 5.0


class _Unknown(Exception):
    """What was asked for isn't there; the message says so."""


def main(argv: Sequence[str] | None = None, service_account: Path = k8s_client.SERVICE_ACCOUNT) -> int:
    asked = _arguments(argv)
    try:
        cache = Cache.find(Path(asked.cache))
        if cache is None:
            raise _Unknown(f"{asked.cache} is empty")
        return _verify(cache, asked) if asked.command == "verify" else _list(cache, service_account)
    except (NotACache, OSError, ValueError, _Unknown) as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    whole = argparse.ArgumentParser(prog="python -m darwin_runtime")
    parser = whole.add_subparsers(required=True).add_parser("cache", description="Look into a model cache.")
    cache = os.environ.get("CACHE_PATH") or "/model-cache"
    parser.add_argument("--cache", default=cache, help=f"its directory ({cache})")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every entry: size, last use, version, users, model URI")
    verify = commands.add_parser("verify", help="compare the files of entries with their manifests")
    verify.add_argument("keys", nargs="*", metavar="key", help="a key, the start of one, or an alias")
    verify.add_argument("--all", action="store_true", help="every entry")
    verify.add_argument("--how", choices=VERIFY[1:], default="sha256", help="sizes only, or bytes (sha256)")
    return whole.parse_args(argv)


def _list(cache: Cache, service_account: Path) -> int:
    now = _now(cache)
    entries, strange = cache.entries(now)
    leases = cache.leases()
    users: dict[str, set[str]] = {}
    try:
        pods = _pods(service_account)
    except (NotInCluster, ApiError) as error:
        gone, note = [], f"users may be gone: the pods cannot be listed ({error})\n"
    else:
        gone, note = dead_leases(pods, leases, now), ""
    for lease in leases:
        users.setdefault(lease.key, set()).add(f"{lease.pod} (gone)" if lease in gone else lease.pod)
    aliases: dict[str, list[str]] = {}
    for alias, key in references.aliases(cache).items():
        aliases.setdefault(key, []).append(alias[:12])
    row = "{:<14}{:>10}  {:>9}  {:>7}  {:<30}  {}\n".format
    sys.stdout.write(row("entry", "size", "unused", "version", "leased by", "model"))
    for entry in sorted(entries, key=lambda entry: entry.idle):
        also = "".join(f", alias {alias}" for alias in aliases.get(entry.key, ()))
        version, by = _shown(entry.version) or "-", ", ".join(sorted(users.get(entry.key, ()))) or "-"
        sys.stdout.write(row(*entry.columns, version, by, f"{_shown(entry.model_uri)}{also}"))
    for name in map(_shown, strange):
        sys.stdout.write(row(name[:12], "", "", "", "", f"{name} is not an entry made by download.py, or damaged"))
    total = format_bytes(sum(entry.bytes for entry in entries))
    sys.stdout.write(f"{note}{len(entries)} entries, {total}, {len(cache.trash())} in the trash\n")
    return 0


def _pods(service_account: Path) -> list[dict[str, Any]]:
    with k8s_client.Client.in_cluster(os.environ, service_account) as client:
        client.deadline = LISTING_SECONDS
        return client.list_pods(k8s_client.namespace(service_account))


def _verify(cache: Cache, asked: argparse.Namespace) -> int:
    keys = sorted(key for key in set(references.all_names(cache).values()) if cache.has(key)) if asked.all else []
    keys += [_find(cache, key) for key in asked.keys]
    if not keys:
        raise _Unknown("verify what? Name an entry, or --all")
    code = 0
    for key in keys:
        damage = cache.damage(key, asked.how)
        sys.stdout.write(f"{key}: {'; '.join(damage) if damage else f'whole ({asked.how})'}\n")
        code = 1 if damage else code
    if code:
        sys.stdout.write("download.py with VERIFY=sha256 replaces a damaged entry: delete a pod that uses it\n")
    return code


def _find(cache: Cache, name: str) -> str:
    found = sorted({key for known, key in references.all_names(cache).items() if known.startswith(name)})
    if len(found) != 1:
        raise _Unknown(f"{len(found)} entries' names begin with {name}" if found else f"there is no entry {name}")
    return found[0]


def _shown(text: str) -> str:
    """For a terminal, which obeys what is not printable."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _now(cache: Cache) -> float:
    try:
        return cache.now()
    except OSError:
        return time.time()  # mounted read-only, there is no asking the file server


if __name__ == "__main__":
    sys.exit(main())
