"""Several threads for NumPy's elementwise work, which by itself keeps to one.

NumPy's matmul uses all cores; what prepares its operands must not be left to one of them. NumPy
lets go of the interpreter lock within each call, so that plain threads run side by side.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn import settings

__all__ = ["over", "over_parts"]

# A thread is worth waking for so many elements: some 60 µs of work for 20 µs of waking.
ELEMENTS_A_THREAD = 1 << 17
# In work of several short calls, between any two of which a thread may wait for the interpreter's
# lock, it takes so many elements of each call.
ELEMENTS_A_CALL = 1 << 18

_pool: Any = None


def over(size: int, elements: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(start, stop)`` for parts that make up ``range(size)``, on several threads.

    Parameters
    ----------
    size : int
        Number of rows to share out.
    elements : int
        Number of elements in all of them: too few are not shared out.
    work : callable
        Writes the results of its rows; must not call `over`.
    """
    threads = min(settings.cpu_threads(), size, elements // ELEMENTS_A_THREAD)
    if threads < 2:
        work(0, size)
        return
    ends = [size * i // threads for i in range(threads + 1)]
    others = [_executor().submit(work, start, stop) for start, stop in itertools.pairwise(ends[1:])]
    try:
        work(0, ends[1])
    finally:  # the others write to the caller's memory: never leave before they have ended
        for other in others:
            other.exception()
    for other in others:
        other.result()


def over_parts(x: Any, axis: int, work: Callable[[Any], None]) -> None:
    """Call ``work(part)`` for parts of an array that make up all of it, on several threads.

    Only a NumPy array is cut, and only a large one: else there is one part, ``...``.

    Parameters
    ----------
    x : ndarray
    axis : int
        The axis to cut, 0 or -1.
    work : callable
        Gets an index of arrays of the shape of `x`; must not call `over`.
    """
    if type(x) is not np.ndarray or x.size < 2 * ELEMENTS_A_CALL:
        work(...)
        return

    # Edges at whole cache lines, so that no two threads write to the same one.
    lines = -(-x.shape[axis] // 16)

    def part(start: int, stop: int) -> None:
        cut = slice(16 * start, 16 * stop)
        work((..., cut) if axis == -1 else cut)

    over(lines, x.size * ELEMENTS_A_THREAD // ELEMENTS_A_CALL, part)


def _executor() -> Any:
    global _pool
    if _pool is None:
        from concurrent.futures import ThreadPoolExecutor

        _pool = ThreadPoolExecutor(settings.cpu_threads() - 1, thread_name_prefix="cupybnn")
    return _pool


def _forget_pool() -> None:
    """Start anew in a forked child, which has the pool but none of its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
