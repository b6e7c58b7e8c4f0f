"""Parts of a kernel's work, which several threads take from a counter in memory.

See `cupybnn.backends.cpu.threads`.
"""

from __future__ import annotations

from numba import njit

from cupybnn.backends.cpu.cache import cached
from cupybnn.backends.cpu.memory import fetch_add, load_counter

__all__ = ["close", "first_part", "inline", "next_part", "wait"]

#: Compiles what kernels call, as part of each.
inline = njit(inline="never", nogil=True, error_model="numpy")

CLOSED = 1 << 40  # more parts than there are
DONE = 64  # bytes from the counter of parts taken to that of parts done


@inline
def first_part(counter):
    """Return the first part that this thread does; 0 without a counter."""
    return fetch_add(counter, 1) if counter != 0 else 0


@inline
def next_part(counter, part):
    """Count `part` as done, and return the next one."""
    if counter == 0:
        return part + 1
    fetch_add(counter + DONE, 1)
    return fetch_add(counter, 1)


@cached()
def close(counter):
    """Let no more parts be taken; return how many were, or a larger number."""
    return fetch_add(counter, CLOSED)


@cached()
def wait(counter, parts, looks):
    """Return whether so many parts are done, after looking at most so many times."""
    looked = 0
    while looked < looks and load_counter(counter + DONE) < parts:
        looked += 1
    return looked < looks
