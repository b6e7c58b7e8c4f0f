"""Threads for compiled kernels, which take the parts of their work from a counter in memory.

A kernel without the interpreter's lock takes one part after the other by adding to the counter. So
parts may be small, a thread that wakes up late finds what is left, and the caller returns as soon
as the last part is done. A pool of `concurrent.futures` takes 30 to 40 microseconds to ask for a
thread; this one takes 10.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
import time
from collections.abc import Callable

import numpy as np

from cupybnn import settings
from cupybnn.backends.cpu import parts as counted
from cupybnn.backends.cpu.addresses import address as address_of

__all__ = ["run"]

# Two numbers in cache lines of their own: the next part, and how many are done.
_COUNTERS = 24
# Looks at the counter, about a nanosecond each, before the caller lets others run.
_LOOKS = 100_000
_PAUSE = 50e-6


class _Worker:
    """A thread that waits for work, and does it."""

    def __init__(self) -> None:
        self.job: Callable[[], None] | None = None
        self._go = _thread.allocate_lock()
        self._go.acquire()
        threading.Thread(target=self._run, name="cupybnn-kernels", daemon=True).start()

    def start(self, job: Callable[[], None]) -> None:
        self.job = job
        self._go.release()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            job, self.job = self.job, None
            if job is not None:
                # What it has not done is left to the caller, who meets the same error.
                with contextlib.suppress(BaseException):
                    job()
            del job
            _idle.append(self)


_idle: list[_Worker] = []
_started = 0


def run(kernel: Callable[[int], object], parts: int, threads: int) -> None:
    """Run a kernel in this thread and in free others, at most `threads` in all.

    Parameters
    ----------
    kernel : callable
        Called in each thread with the address of a counter; takes parts from it until it reaches
        `parts`, and counts those that are done: see `parts.first_part`. With the address 0 it
        does all of them.
    parts : int
    threads : int
    """
    threads = min(threads, parts)
    if threads < 2:
        kernel(0)
        return
    counters = np.zeros(_COUNTERS, np.int64)
    address = address_of(counters)
    address += -address % 64

    def job() -> None:
        kernel(address)
        counters.view()  # still in use by a thread that comes when all is done

    try:
        _ask(job, threads - 1)
        kernel(address)
    finally:
        # Others may be writing to the caller's memory. After an error no part is begun any more.
        taken: int | None = None
        interruption: KeyboardInterrupt | None = None
        while True:
            try:
                if taken is None:
                    taken = min(counted.close(address), parts)
                while not counted.wait(address, taken, _LOOKS):
                    time.sleep(_PAUSE)
                break
            except KeyboardInterrupt as error:
                interruption = error
        if interruption is not None:
            raise interruption


def _ask(job: Callable[[], None], helpers: int) -> None:
    """Give a job to free threads; start some as long as there are too few."""
    global _started
    for _ in range(helpers):
        try:
            worker = _idle.pop()
        except IndexError:
            if _started >= settings.kernel_threads() - 1:
                return
            try:
                worker = _Worker()
            except RuntimeError:  # no thread can be started, or no more
                return
            _started += 1
        worker.start(job)


def _forget_threads() -> None:
    """Start anew in a forked child, which has none of the threads."""
    global _started
    _idle.clear()
    _started = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
