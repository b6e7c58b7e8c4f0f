"""Conversion between the kernels' word layout and lines of 64-bit words, on device or host.

The layout is defined in ``kernels/include/layout.cuh``. Everything here is indexing that works the
same in NumPy and CuPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["place", "take"]

PIECES = 8  # of 16 bytes, in the 128 bytes of a chunk


def _slots(xp: Any, positions: Any) -> Any:
    """Return the slots of the pieces of the lines at `positions`, shape (*positions.shape, 8).

    The permutation is its own inverse.
    """
    return xp.arange(PIECES) ^ (positions & 7)[..., None]


def take(xp: Any, words: Any, numbers: Any, lines: int, k: int) -> Any:
    """Return lines, in the canonical layout, from words in the kernels' layout.

    Parameters
    ----------
    xp : module
        numpy or cupy, the module of both arrays.
    words : ndarray of uint32, shape (batch, chunks, padded lines, 32)
    numbers : ndarray of int64, any shape
        Indices of lines, counted through the first matrix of the batch, then the second, ...
    lines : int
        Number of lines in a matrix.
    k : int
        Length of a line.

    Returns
    -------
    ndarray of uint64, shape (*numbers.shape, ceil(k / 64))
    """
    batch, chunks, padded, size = words.shape
    width = -(-k // 64)
    if not numbers.size or not width:
        return xp.zeros((*numbers.shape, width), "<u8")
    line = numbers % lines
    # position_of in layout.cuh
    positions = (line & ~15) | ((line & 2) << 2) | ((line & 12) >> 1) | (line & 1)
    pieces = words.reshape(batch, chunks, padded, PIECES, size // PIECES)
    found = pieces[
        (numbers // lines)[..., None, None],
        xp.arange(chunks)[:, None],
        positions[..., None, None],
        _slots(xp, positions)[..., None, :],
    ]
    found = xp.ascontiguousarray(found).reshape(*numbers.shape, chunks * size).view("<u8")
    return xp.ascontiguousarray(found[..., :width])


def place(xp: Any, lines: Any, batch: int, count: int, k: int, shape: tuple[int, ...]) -> Any:
    """Return words in the kernels' layout from lines in the canonical layout.

    Parameters
    ----------
    xp : module
        numpy or cupy, the module of `lines`.
    lines : ndarray of uint64, shape (..., count, ceil(k / 64))
    batch, count, k : int
        Number of matrices, lines in a matrix, length of a line.
    shape : tuple of int
        Shape of the result, (batch, chunks, padded lines, 32).

    Returns
    -------
    ndarray of uint32
    """
    _, chunks, padded, size = shape
    width = -(-k // 64)
    whole = xp.zeros((batch, padded, chunks * size // 2), "<u8")
    whole[:, :count, :width] = lines.reshape(batch, count, width)
    pieces = whole.view(np.uint32).reshape(batch, padded, chunks, PIECES, size // PIECES)
    positions = xp.arange(padded)
    # line_at in layout.cuh
    line = (positions & ~15) | ((positions & 6) << 1) | ((positions & 8) >> 2) | (positions & 1)
    pieces = xp.moveaxis(pieces, 2, 1)[:, :, line[:, None], _slots(xp, positions)]
    return xp.ascontiguousarray(pieces).reshape(shape)
