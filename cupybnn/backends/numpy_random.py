"""Random numbers on the host; see `cupybnn.backends.random`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn.backends.numpy_threads import parallel_for

__all__ = ["random_blocks", "random_words", "uniform"]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# Blocks computed at a time on the host, so that temporary arrays stay in cache.
_HOST_BLOCKS = 4096
# Rough cost of the generator, in passes over an array, for choosing the number of threads.
_PASSES = 100


def random_words(shape: tuple[int, ...], seed: int, counter: Any, first: int = 0) -> np.ndarray:
    """Return random 32-bit words as an array of uint32.

    Parameters
    ----------
    shape, seed, counter
        As in `cupybnn.backends.random.random_words`.
    first : int
        Index of the first block of four words, from 0 to 2**64 - 1.
    """
    size = math.prod(shape)
    blocks = -(-size // 4)
    words = np.empty((blocks, 4), np.uint32)
    draw, offset = np.uint64(counter), np.uint64(first)

    def fill(start: int, stop: int) -> None:
        for at in range(start, stop, _HOST_BLOCKS):
            last = min(at + _HOST_BLOCKS, stop)
            _philox(words[at:last], np.arange(at, last, dtype=np.uint64) + offset, draw, seed)

    parallel_for(blocks, blocks * _PASSES, fill)
    return words.reshape(-1)[:size].reshape(shape)


def _philox(words: np.ndarray, block: Any, draw: Any, seed: int) -> None:
    """Fill `words`, shape (n, 4), with the blocks numbered `block`, shape (n,)."""
    # Each 32-bit word of the counter is in a 64-bit element, so that a product of two words fits.
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


def random_blocks(block: np.ndarray, counter: np.ndarray, seed: int) -> np.ndarray:
    """Return blocks of four words, uint32 of shape (n, 4), each of a counter of its own.

    Parameters
    ----------
    block, counter : ndarray of uint64, shape (n,)
        Index of each block, and the number of the draw that it belongs to.
    seed : int
    """
    words = np.empty((len(block), 4), np.uint32)
    _philox(words, block, counter, seed)
    return words


def uniform(shape: tuple[int, ...], seed: int, counter: Any) -> np.ndarray:
    """Return numbers uniform in [0, 1) as an array of float32."""
    words = random_words((math.prod(shape),), seed, counter) >> np.uint32(8)
    return (words.astype(np.float32) * np.float32(2.0**-24)).reshape(shape)
