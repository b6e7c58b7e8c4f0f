"""Reuse of NumPy's memory from one training step to the next.

The C library returns large blocks to the system as soon as they are freed. Because every training
step allocates what the last one freed, the system would then map and clear the same pages in every
step, which costs as much as several passes over each array.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

__all__ = ["keep_freed"]

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Larger blocks are returned at once; 32 MiB is glibc's maximum.
_LARGEST = 32 << 20
# Maximum amount of free memory to keep.
_KEPT = 512 << 20


@lru_cache(maxsize=1)
def keep_freed() -> None:
    """Keep freed memory in the process (glibc; does nothing elsewhere).

    The setting is process-wide and permanent: see `cupybnn.tune_process`.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
