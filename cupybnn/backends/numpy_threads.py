"""Multithreading for NumPy's elementwise work, which is single-threaded.

NumPy's matmul uses all cores, so preparing its operands must not be left to one. NumPy releases the
interpreter lock within each call, so plain threads run in parallel.
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

__all__ = ["parallel_for", "parallel_parts"]

# Minimum elements per thread: about 60 µs of work for 20 µs of wake-up.
ELEMENTS_A_THREAD = 1 << 17
# The minimum for work that makes several short calls, between which a thread may wait for the
# interpreter lock.
ELEMENTS_A_CALL = 1 << 18

_pool: Any = None


def parallel_for(
    size: int, elements: int, work: Callable[[int, int], None], most: int | None = None
) -> None:
    """Call ``work(start, stop)`` for consecutive parts of ``range(size)``, on several threads.

    Parameters
    ----------
    size : int
        Number of rows.
    elements : int
        Total number of elements; with too few, the caller's thread does all the work.
    work : callable
        Writes the results of its rows; must not call `parallel_for`.
    most : int, optional
        Greatest number of threads; default: `settings.cpu_threads`.
    """
    threads = min(most or settings.cpu_threads(), size, elements // ELEMENTS_A_THREAD)
    if threads < 2:
        work(0, size)
        return
    ends = [size * i // threads for i in range(threads + 1)]
    shared = _SharedWork(work, itertools.pairwise(ends))
    try:
        shared.request_helpers(threads - 1)
        shared.help()
    finally:
        shared.finish()
    if shared.error is not None:
        raise shared.error


def parallel_parts(x: Any, axis: int, work: Callable[[Any], None]) -> None:
    """Call ``work(part)`` for parts that cover an array, on several threads.

    Only large NumPy arrays are split; otherwise there is one part, ``...``.

    Parameters
    ----------
    x : ndarray
    axis : int
        The axis to split, 0 or -1.
    work : callable
        Receives an index into arrays of the shape of `x`; must not call `parallel_for`.
    """
    if type(x) is not np.ndarray or x.size < 2 * ELEMENTS_A_CALL:
        work(...)
        return

    # Split at whole cache lines, so that no two threads write to the same one.
    lines = -(-x.shape[axis] // 16)

    def part(start: int, stop: int) -> None:
        cut = slice(16 * start, 16 * stop)
        work((..., cut) if axis == -1 else cut)

    parallel_for(lines, x.size * ELEMENTS_A_THREAD // ELEMENTS_A_CALL, part)


class _SharedWork:
    """A queue of parts. Each free thread takes the next one, including the caller.

    The caller never depends on the pool: if all threads are busy, none can be started or the
    interpreter is shutting down, it does all parts itself.
    """

    def __init__(self, work: Callable[[int, int], None], parts: Iterable[tuple[int, int]]) -> None:
        self.error: BaseException | None = None
        self._work = work
        self._parts = collections.deque(parts)
        self._helpers = 0  # pool threads currently working on a part
        self._changed = threading.Condition()

    def request_helpers(self, threads: int) -> None:
        """Submit `help` to up to `threads` pool threads, in the caller's context.

        The context includes `numpy.errstate`.
        """
        try:
            pool = _executor()
            for _ in range(threads):
                pool.submit(contextvars.copy_context().run, self._help_from_pool)
        except RuntimeError:  # no thread can be started, or no more
            pass

    def help(self) -> None:
        """Work on parts until none are left or one has failed."""
        while self.error is None:
            try:
                part = self._parts.popleft()
            except IndexError:
                return
            self._do(part)

    def _help_from_pool(self) -> None:
        while True:
            with self._changed:  # `finish` must see a part either as waiting or as in progress
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
        except BaseException as error:  # re-raised by the caller when all threads are done
            self.error = error

    def finish(self) -> None:
        """Drop waiting parts and wait for those in progress: they write to the caller's memory."""
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

        threads = max(1, settings.cpu_threads() - 1, settings.kernel_threads() - 1)
        _pool = ThreadPoolExecutor(threads, thread_name_prefix="cupybnn")
    return _pool


def _forget_pool() -> None:
    """Reset the pool in a forked child, which inherits it without its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
