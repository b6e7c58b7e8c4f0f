"""Memory of NumPy's arrays between one training step and the next.

The C library gives large pieces of memory back to the system as soon as they are freed. A training
step, which frees what the next one asks for again, would then have the system find and clear the
same pages in every step: as much work as several passes over each array.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

__all__ = ["keep_freed"]

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Pieces larger than this go back at once; more than 32 MiB glibc does not take.
_LARGEST = 32 << 20
# So much free memory is kept.
_KEPT = 512 << 20


@lru_cache(maxsize=1)
def keep_freed() -> None:
    """Keep freed memory in the process (glibc; elsewhere nothing happens).

    The setting is the whole process's and stays: see `cupybnn.tune_process`.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
