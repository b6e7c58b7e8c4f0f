"""Random numbers from a counter: the same on NumPy and CuPy, with two integers as their state.

The generator is Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as
1, 2, 3. SC 2011): ten rounds of a keyed bijection turn a 128-bit counter into four 32-bit words.
The key is the seed. The low half of the counter numbers the block of four words within an array,
the high half is the caller's `counter`, to be raised by one for each array drawn. A number thus
depends on (seed, counter, position) alone. `counter` may be an array without dimensions on the
device, so that a captured CUDA graph can raise it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn.backends import numpy_threads

__all__ = ["Stream", "chosen", "random_words", "uniform"]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# Blocks computed at a time on the host, so that the temporary arrays stay in its cache.
_HOST_BLOCKS = 4096
# How many passes over an array its computation is worth, roughly, when threads are shared out.
_PASSES = 100


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
        numpy or cupy.

    Returns
    -------
    ndarray of uint32
    """
    size = math.prod(shape)
    blocks = -(-size // 4)
    words = xp.empty((blocks, 4), np.uint32)
    draw = counter if isinstance(counter, xp.ndarray) else np.uint64(counter)
    step = _HOST_BLOCKS if xp is np else max(blocks, 1)

    def fill(start: int, stop: int) -> None:
        for first in range(start, stop, step):
            last = min(first + step, stop)
            _philox(words[first:last], xp.arange(first, last, dtype=np.uint64), draw, seed)

    if xp is np:
        numpy_threads.over(blocks, blocks * _PASSES, fill)
    else:
        fill(0, blocks)
    return words.reshape(-1)[:size].reshape(shape)


def _philox(words: Any, block: Any, draw: Any, seed: int) -> None:
    """Fill `words`, shape (n, 4), with the blocks of the numbers `block`, shape (n,)."""
    # Each 32-bit word of the counter lies in a 64-bit element, which a product of two words fits.
    c0, c1, c2, c3 = block & _LOW, block >> _HALF, draw & _LOW, draw >> _HALF
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _HALF) ^ c1 ^ np.uint64(keys[0])
        c2 = (product0 >> _HALF) ^ c3 ^ np.uint64(keys[1])
        c1, c3 = product1 & _LOW, product0 & _LOW
        keys = [(k + w) & 0xFFFFFFFF for k, w in zip(keys, _KEY_STEPS, strict=True)]
    for column, word in enumerate((c0, c1, c2, c3)):
        words[:, column] = word


def uniform(shape: tuple[int, ...], seed: int, counter: Any, xp: Any) -> Any:
    """Return float32 numbers, multiples of 2**-24, uniform in [0, 1); see `random_words`."""
    words = random_words(shape, seed, counter, xp) >> np.uint32(8)
    return words.astype(np.float32) * np.float32(2.0**-24)


def chosen(words: Any, probability: float) -> Any:
    """Return a bool array that is True where a random word lies in the given part of its range.

    The lowest bits of the chosen words, and of the others, are still random.
    """
    return words <= np.uint32(max(round(probability * 2**32), 1) - 1)


class Stream:
    """A seed, and the number of the next draw.

    Attributes
    ----------
    state : numpy.ndarray of uint64, shape (2,)
        Seed and counter: all that is to be saved, and restored in place.
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
