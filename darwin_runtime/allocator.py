"""What the C library's allocator keeps of freed memory. Where it is not glibc, nothing is changed."""

from __future__ import annotations

import contextlib
import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

KEPT_BYTES = 32 * 1024 * 1024


def give_back() -> None:
    """Return what is free to the system: after a forest of trees was read, that is half of the process's memory."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_buffers() -> None:
    """Keep up to `KEPT_BYTES`, a thread, for the next large body: mapping it anew takes longer than reading it."""
    with contextlib.suppress(AttributeError):
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, KEPT_BYTES)
