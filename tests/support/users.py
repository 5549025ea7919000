"""The roles as other users of the system."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT, Finished, absent, clean_environ
from tests.support import prepared
from tests.support.apiserver import ApiServer

# All is imported by now: the libraries may lie where only root may look.
_BECOME = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import cleanup, download
from darwin_runtime.storage import cache, disk, locks
user, umask, *groups = map(int, sys.argv[2].split(","))
os.umask(umask); os.setgroups(groups[1:]); os.setgid(groups[0]); os.setuid(user)
"""


def let_others_look(*paths: Path) -> None:
    """Other users may not look into pytest's directories."""
    for path in paths:
        for place in (path, *path.parents[:3], *path.rglob("*")):
            if not place.is_symlink():
                place.chmod(place.stat().st_mode | (0o055 if place.is_dir() else 0o044))


def run_as(script: str, user: int, groups: Sequence[int], /, umask: int = 0o022, **environ: object) -> Finished:
    """Run Python code as another user, of the first of the groups and with the others besides."""
    if os.geteuid():
        absent("only root can become another user")
    settings = prepared.uncovered(clean_environ(**environ))  # that user could not write down what was covered
    identity = ",".join(map(str, (user, umask, *groups)))
    done = prepared.run("-c", _BECOME + script, ROOT, identity, env=settings)
    return Finished(done.returncode, done.stdout, done.stderr)


def download_as(user: int, groups: Sequence[int], /, umask: int = 0o022, **environ: object) -> Finished:
    return run_as("sys.exit(download.main())", user, groups, umask, **environ)


def clean_as(user: int, groups: Sequence[int], api: ApiServer, /, umask: int = 0o022, **environ: object) -> Finished:
    script = f"sys.exit(cleanup.main(os.environ, pathlib.Path({str(api.directory)!r})))"
    return run_as(script, user, groups, umask, **api.environ, GRACE_SECONDS=0, **environ)
