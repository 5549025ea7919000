"""Remove the coverage files that killed processes left half-written: `coverage combine` would warn of each.

python -m tests.torn_coverage
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path


def is_whole(path: Path) -> bool:
    """Whether SQLite finds a coverage database, whole, in the file."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("SELECT version FROM coverage_schema").fetchone()
            database.execute("SELECT count(*) FROM arc, file, meta").fetchone()
            return bool(database.execute("PRAGMA quick_check").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False


if __name__ == "__main__":
    for path in Path().glob(".coverage.*"):
        if not is_whole(path):
            path.unlink()
