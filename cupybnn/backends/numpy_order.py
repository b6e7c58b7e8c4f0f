"""The order of training images on the host; see `cupybnn.backends.order`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.numpy_random import random_blocks
from cupybnn.backends.order import ROUNDS, Order

__all__ = ["fill_order"]

_WORDS = 16  # of an epoch
_MULTIPLIERS = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_SHIFT = np.uint32(15)


def fill_order(order: Order, step: int, batch: int, first: int, out: np.ndarray) -> None:
    """Write the images of steps; see `cupybnn.backends.order.Order`."""
    steps, rows = out.shape
    if not out.size:
        return
    places = (first + np.arange(rows, dtype=np.int64)) % batch
    positions = (step + np.arange(steps, dtype=np.int64)[:, None]) * batch + places
    positions = positions.reshape(-1)
    epochs, points = np.divmod(positions, order.images)
    if order.shuffle or order.ends is not None:
        words = _words(order.seed, epochs)
        if order.shuffle:
            points = _permuted(order, points.astype(np.uint32), words)
        if order.ends is not None:
            sought = points + _offset(order, words[13], words[14])
            points = np.minimum(np.searchsorted(order.ends, sought, side="right"), order.last)
    out[...] = points.reshape(out.shape)


def _words(seed: int, epochs: np.ndarray) -> np.ndarray:
    """Return the random words of each position's epoch: shape (16, positions), or (16, 1)."""
    some = np.arange(epochs.min(), epochs.max() + 1, dtype=np.uint64)
    blocks = np.arange(_WORDS // 4, dtype=np.uint64)
    words = random_blocks(np.tile(blocks, some.size), np.repeat(some, blocks.size), seed)
    words = words.reshape(some.size, _WORDS).T
    return words if some.size == 1 else words[:, epochs - epochs.min()]


def _permuted(order: Order, x: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return where the permutation takes each of `x`, uint32."""
    found, places = np.empty_like(x), np.arange(x.size)
    while True:
        x = _network(order.bits, x, words)
        inside = x < order.images
        found[places[inside]] = x[inside]
        if inside.all():
            return found
        outside = ~inside
        x, places = x[outside], places[outside]
        if words.shape[1] > 1:
            words = words[:, outside]


def _network(bits: int, x: np.ndarray, words: np.ndarray) -> np.ndarray:
    right_bits = bits - bits // 2
    x = (x + words[12]) & np.uint32(2**bits - 1)
    left, right = x >> np.uint32(right_bits), x & np.uint32(2**right_bits - 1)
    for i in range(0, ROUNDS, 2):
        left ^= _mixed(right ^ words[i]) >> np.uint32(32 - bits // 2)
        right ^= _mixed(left ^ words[i + 1]) >> np.uint32(32 - right_bits)
    return left << np.uint32(right_bits) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """Return a word of each word, whose upper bits depend on all bits; changes `x`."""
    x *= _MULTIPLIERS[0]
    x ^= x >> _SHIFT
    x *= _MULTIPLIERS[1]
    return x


def _offset(order: Order, high: Any, low: Any) -> np.ndarray:
    """Return offsets from 0 to before 1."""
    bits = order.offset_bits
    word = high.astype(np.uint64) << np.uint64(32) | low
    return (word >> np.uint64(64 - bits)).astype(np.float64) * 2.0**-bits
