"""Counter-based random numbers: identical on NumPy and CuPy, with two integers as state.

The generator is Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as
1, 2, 3. SC 2011): ten rounds of a keyed bijection turn a 128-bit counter into four 32-bit words.
The key is the seed. The low half of the counter is the index of a block of four words within an
array, the high half is the caller's `counter`, incremented for each array drawn. A number thus
depends only on (seed, counter, position). `counter` may be a 0-d array on the device, so that a
captured CUDA graph can increment it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.backends.devices import CPU, Device

__all__ = ["Stream", "bell", "bernoulli", "first_row", "from_row", "random_words", "uniform"]

_first_row: ContextVar[int] = ContextVar("first_row", default=0)


@contextlib.contextmanager
def from_row(row: int) -> Iterator[None]:
    """Context in which an array is drawn as if `row` others came before along its first axis.

    So a process that has a part of a batch draws for it what a single one draws for that part.
    """
    token = _first_row.set(row)
    try:
        yield
    finally:
        _first_row.reset(token)


def first_row() -> int:
    """Return the row that `from_row` set, or 0."""
    return _first_row.get()


def random_words(shape: tuple[int, ...], seed: int, counter: Any, xp: Any) -> Any:
    """Return random 32-bit words.

    Parameters
    ----------
    shape : tuple of int
        Shape of the result.
    seed : int
        From 0 to 2**64 - 1.
    counter : int or 0-d uint64 array
        Number of the draw, from 0 to 2**64 - 1.
    xp : module
        numpy or cupy; with cupy, the result is on the current device.

    Returns
    -------
    ndarray of uint32
    """
    row = _first_row.get()
    if not row or not shape:
        return _backend(xp).random_words(shape, seed, counter)
    # Words come in blocks of four.
    first, skipped = divmod(row * math.prod(shape[1:]), 4)
    words = _backend(xp).random_words((skipped + math.prod(shape),), seed, counter, first)
    return words[skipped:].reshape(shape)


def uniform(shape: tuple[int, ...], seed: int, counter: Any, xp: Any) -> Any:
    """Return float32 numbers, multiples of 2**-24, uniform in [0, 1); see `random_words`."""
    if not _first_row.get() or not shape:
        return _backend(xp).uniform(shape, seed, counter)
    words = random_words(shape, seed, counter, xp) >> np.uint32(8)
    return words.astype(np.float32) * np.float32(2.0**-24)


def _backend(xp: Any) -> Any:
    return backends.get(CPU if xp is np else Device("cuda"))


def bernoulli(words: Any, probability: float) -> Any:
    """Return a bool array that is True with the given probability, from random words.

    The lowest bits of the words stay random, given the result.
    """
    return words <= np.uint32(max(round(probability * 2**32), 1) - 1)


def bell(shape: tuple[int, ...], seed: int, counter: Any, xp: Any) -> Any:
    """Return float32 whole numbers, nearly normal: the sum of a random word's four bytes, less 510.

    Their mean is 0 and their variance 21,845. Sums of whole numbers are exact, so that NumPy and
    CUDA agree, which functions of a normal distribution would not. See `random_words`.
    """
    words = random_words(shape, seed, counter, xp)
    pairs = (words & np.uint32(0xFF00FF)) + (words >> np.uint32(8) & np.uint32(0xFF00FF))
    sums = (pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))
    return sums.astype(np.float32) - np.float32(510)


class Stream:
    """A seed and the index of the next draw.

    Attributes
    ----------
    state : numpy.ndarray of uint64, shape (2,)
        Seed and counter: the complete state, to be saved and restored in place.
    """

    def __init__(self, seed: int) -> None:
        self.state = np.array([seed, 0], np.uint64)

    def next(self) -> tuple[int, int]:
        """Return seed and counter for one draw."""
        seed, counter = (int(n) for n in self.state)
        self.state[1] += np.uint64(1)
        return seed, counter

    def __repr__(self) -> str:
        return f"Stream(seed={self.state[0]}, counter={self.state[1]})"
