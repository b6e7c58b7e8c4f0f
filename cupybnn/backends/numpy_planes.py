"""Matrices of several bits on the CPU: packing, unpacking, and products plane by plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn.backends import epilogue as epilogues
from cupybnn.backends import numpy_backend
from cupybnn.backends.epilogue import Epilogue
from cupybnn.backends.levels import SIGNS, Levels, numbers_of
from cupybnn.backends.numpy_random import random_words

__all__ = [
    "drawn_for",
    "gemm_levels",
    "gemm_levels_packed",
    "pack_levels",
    "pack_numbers",
    "quantize_gradient",
    "rounded_numbers",
    "unpack_levels",
]

#: Elements of a column that share a block of four random words.
EIGHT = 8


class _Plane:
    """A plane of a packed matrix as an operand of a product of signs."""

    __slots__ = ("k", "levels", "ndim", "shape", "words")

    def __init__(self, matrix: Any, number: int) -> None:
        width = -(-matrix.k // 64)
        self.words = matrix.words[..., number * width : (number + 1) * width]
        self.k, self.shape, self.ndim, self.levels = matrix.k, matrix.shape, matrix.ndim, SIGNS


def pack_levels(x: np.ndarray, axis: int, levels: Levels) -> tuple[np.ndarray, np.ndarray]:
    """Pack the levels nearest to `x`, shape (..., M, K), along `axis`; see `numpy_backend.pack`.

    Returns
    -------
    words : ndarray of uint64, shape (..., lines, bits * ceil(k / 64))
    sums : ndarray of int32, shape (..., lines)
        Of the levels' numbers.
    """
    return pack_numbers(numbers_of(x, levels), axis, levels)


def pack_numbers(numbers: np.ndarray, axis: int, levels: Levels) -> tuple[np.ndarray, np.ndarray]:
    """Pack levels by their numbers, an array of uint8; see `pack_levels`."""
    parts, sums = [], None
    for bit in reversed(range(levels.bits)):
        words, ones = numpy_backend.pack((numbers & np.uint8(1 << bit)) != 0, axis)
        parts.append(words)
        sums = ones if sums is None else 2 * sums + ones
    assert sums is not None
    return np.concatenate(parts, axis=-1), sums


def unpack_levels(
    words: np.ndarray, shape: tuple[int, ...], axis: int, levels: Levels, dtype: np.dtype
) -> np.ndarray:
    """Unpack `words` into an array of levels, of a dtype that holds them."""
    width = -(-shape[axis] // 64)
    numbers = np.zeros(shape, np.int16)
    for plane in range(levels.bits):
        part = np.ascontiguousarray(words[..., plane * width : (plane + 1) * width])
        numbers += numbers
        numbers += numpy_backend.unpack(part, shape, axis, np.dtype(bool))
    return (np.int16(levels.step) * numbers + np.int16(levels.low)).astype(dtype)


def _products(a: Any, b: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the product of a matrix of levels and one of signs, in either order, as int32."""
    matrix, first = (a, True) if a.levels is not SIGNS else (b, False)
    levels = matrix.levels
    acc, part = np.zeros(shape, np.int32), np.empty(shape, np.int32)
    for number in range(levels.bits):
        plane = _Plane(matrix, number)
        numpy_backend.gemm(plane if first else a, b if first else plane, part, None)
        acc += acc
        acc += part
    if not levels.signed:
        # acc is the product of the signed levels 2 n - top, where n is an unsigned one's number.
        # Sums of signs are even or odd with K, and so is each acc: the half is whole.
        signs = b if first else a
        sums = 2 * signs.popcounts - np.int32(signs.k)
        sums = sums[..., None, :] if first else sums[..., :, None]
        acc = (acc.astype(np.int64) + np.int64(levels.top) * sums) >> 1
    return acc


def gemm_levels(a: Any, b: Any, out: np.ndarray, epilogue: Epilogue | None) -> None:
    """Write the product of packed operands into `out`, as `numpy_backend.gemm`.

    Exactly one operand is one of levels other than signs.
    """
    if out.size:
        if epilogue is not None:
            epilogue = epilogue.broadcast(out.shape)
        acc = _products(a, b, out.shape)
        # As on a GPU, where half precision is rounded from float32.
        narrow = out.dtype.kind != "i" and out.dtype.itemsize < 4
        epilogues.apply(acc.astype(np.float32) if narrow else acc, epilogue, out)


def gemm_levels_packed(
    a: Any, b: Any, threshold: np.ndarray | None, flip: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the words and popcounts of a thresholded product, as `numpy_backend.gemm_packed`."""
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    acc = _products(a, b, (*batch, a.shape[-2], b.shape[-1]))
    bits = acc >= (0 if threshold is None else threshold)
    if flip is not None:
        bits ^= flip
    return numpy_backend.pack(bits, -1)


def quantize_gradient(
    grad: np.ndarray,
    levels: Levels,
    seed: int,
    counter: int,
    first: int,
    greatest: Callable[[Any], Any] | None = None,
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
    """Quantize a gradient, packed along its rows and along its columns.

    Parameters
    ----------
    grad : ndarray, shape (rows, cols)
        Used as float32.
    levels : Levels
        Signed.
    seed, counter : int
        See `cupybnn.backends.random`.
    first : int
        Rows of a batch before this part of it.
    greatest : callable, optional
        Returns the greatest elements over all parts of the batch, given those of this one.

    Returns
    -------
    by_row, by_col : (words, sums, scale)
        As from `pack_levels` along axis -1, and -2; and the float32 scale of each line.

    Notes
    -----
    `cupybnn.ops.quantize_gradient` defines the numbers. The element in row r and column c takes
    sixteen bits of block ``n // 8 * cols + c`` of the draw, with ``n = first + r``: the low or, for
    an odd n, the high half of word ``n % 8 // 2``.
    """
    g = _normal(grad.astype(np.float32, copy=False))
    drawn = drawn_for(g.shape, levels, seed, counter, first)
    results = []
    for axis in (1, 0):
        most = np.abs(g).max(axis=axis, initial=0.0)
        if axis == 0 and greatest is not None:
            most = greatest(most)
        numbers, scale = rounded_numbers(g, most, axis, drawn, levels)
        results.append((*pack_numbers(numbers, -1 if axis == 1 else -2, levels), scale))
    return results[0], results[1]


def drawn_for(
    shape: tuple[int, ...], levels: Levels, seed: int, counter: int, first: int
) -> np.ndarray:
    """Return what is added before an element is rounded down: half of the levels, and chance."""
    rows, cols = shape
    start, skipped = divmod(first, EIGHT)
    eights = -(-(skipped + rows) // EIGHT)
    words = random_words((eights, cols, 4, 1), seed, counter, start * cols)
    halves = (words >> np.array([0, 16], np.uint32)).astype(np.uint16)  # the low ones of both
    halves = halves.reshape(eights, cols, EIGHT).swapaxes(1, 2).reshape(EIGHT * eights, cols)
    mine = halves[skipped : skipped + rows]
    return mine.astype(np.float32) * np.float32(2.0**-16) + np.float32(levels.top) / 2


def rounded_numbers(
    g: np.ndarray, most: np.ndarray, axis: int, drawn: np.ndarray, levels: Levels
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of a gradient's levels, and the scale of each line along `axis`."""
    top = np.float32(levels.top)
    with np.errstate(all="ignore"):
        inverse = _normal((top / 2) / most)
        inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
        v = g * np.expand_dims(inverse, axis) + drawn
        v = np.where(v > 0, v, np.float32(0))  # NaN, too
        numbers = np.floor(np.minimum(v, top)).astype(np.uint8)
        return numbers, _normal(most / top)


def _normal(x: np.ndarray) -> np.ndarray:
    """Return float32 numbers with denormal ones replaced by 0, as kernels have them."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
