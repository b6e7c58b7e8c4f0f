"""Launching the comparison of real numbers with thresholds, packed."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import load_kernel, multiprocessors
from cupybnn.backends.cuda.packing import chunk_count, words_shape
from cupybnn.backends.cuda.structs import Kernel

__all__ = ["threshold_pack"]

THRESHOLD_PACK = Kernel(
    "smxx_threshold_pack",
    "threshold_pack",
    "ptr y, threshold, flip, words, pops; i64 rows, cols",
)
_WARPS = 8  # of a block, each with a row at a time
_BLOCKS = 4  # for each multiprocessor: thresholds are then read for many rows at once


def threshold_pack(y: Any, threshold: Any, flip: Any) -> tuple[Any, Any]:
    """Return ``(y >= threshold) != flip``, packed along the columns.

    Parameters
    ----------
    y : cupy.ndarray of float32, shape (rows, columns), neither of them 0
        C-contiguous, on the current device; fewer than 2**31 rows.
    threshold : cupy.ndarray of float32, shape (columns,), contiguous
    flip : cupy.ndarray of bool, shape (columns,), contiguous

    Returns
    -------
    words, popcounts : cupy.ndarray
        As those of `cupybnn.backends.cuda.pack`.
    """
    import cupy

    rows, cols = y.shape
    words = cupy.empty(words_shape(1, rows, cols), np.uint32)
    popcounts = cupy.zeros(rows, np.int32)
    device = y.data.device_id
    chunks = chunk_count(cols)
    groups = -(-words.shape[2] // _WARPS)
    most = -(-_BLOCKS * multiprocessors(device) // chunks)
    kernel = load_kernel(THRESHOLD_PACK.source, THRESHOLD_PACK.function, (), device)
    arguments = THRESHOLD_PACK.arguments(
        y=y, threshold=threshold, flip=flip, words=words, pops=popcounts, rows=rows, cols=cols
    )
    kernel((chunks, min(groups, most)), (32 * _WARPS,), arguments)
    return words, popcounts
