"""Several threads for NumPy's elementwise work, which by itself keeps to one.

NumPy's matmul uses all cores; what prepares its operands must not be left to one of them. NumPy
lets go of the interpreter lock within each call, so that plain threads run side by side.
"""

from __future__ import annotations

import collections
import contextvars
import itertools
import os
import threading
from collections.abc import Callable, Iterable
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
    shared = _Shared(work, itertools.pairwise(ends))
    try:
        shared.ask_for_help(threads - 1)
        shared.help()
    finally:
        shared.finish()
    if shared.error is not None:
        raise shared.error


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


class _Shared:
    """Parts of one piece of work. Each thread that is free takes the next one, the caller too.

    So the caller never depends on the pool. Where no thread comes, because all are busy, none can
    be started or the interpreter is ending, the caller does all parts by itself.
    """

    def __init__(self, work: Callable[[int, int], None], parts: Iterable[tuple[int, int]]) -> None:
        self.error: BaseException | None = None
        self._work = work
        self._parts = collections.deque(parts)
        self._helpers = 0  # threads of the pool that are in the middle of a part
        self._changed = threading.Condition()

    def ask_for_help(self, threads: int) -> None:
        """Have up to so many threads of the pool call `help`, in the caller's context.

        What NumPy does about overflow and the like (`numpy.errstate`) belongs to that context.
        """
        try:
            pool = _executor()
            for _ in range(threads):
                pool.submit(contextvars.copy_context().run, self._help_from_pool)
        except RuntimeError:  # no thread can be started, or none any more: do without
            pass

    def help(self) -> None:
        """Work on parts until none is left or one has failed."""
        while self.error is None:
            try:
                part = self._parts.popleft()
            except IndexError:
                return
            self._do(part)

    def _help_from_pool(self) -> None:
        while True:
            with self._changed:  # `finish` must see a part as not taken or as being worked on
                if self.error is not None or not self._parts:
                    return
                try:
                    part = self._parts.popleft()
                except IndexError:
                    return
                self._helpers += 1
            try:
                self._do(part)
            finally:
                with self._changed:
                    self._helpers -= 1
                    self._changed.notify_all()

    def _do(self, part: tuple[int, int]) -> None:
        try:
            self._work(*part)
        except BaseException as error:  # raised again by the caller, once no thread is at work
            self.error = error

    def finish(self) -> None:
        """Hand out no further part and wait for those begun: they write to the caller's memory."""
        interruption: KeyboardInterrupt | None = None
        while True:
            try:
                with self._changed:
                    self._parts.clear()
                    self._changed.wait_for(lambda: self._helpers == 0)
                break
            except KeyboardInterrupt as error:
                interruption = error
        if interruption is not None:
            raise interruption


def _executor() -> Any:
    global _pool
    if _pool is None:
        from concurrent.futures import ThreadPoolExecutor

        threads = max(1, settings.cpu_threads() - 1)
        _pool = ThreadPoolExecutor(threads, thread_name_prefix="cupybnn")
    return _pool


def _forget_pool() -> None:
    """Start anew in a forked child, which has the pool but none of its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
