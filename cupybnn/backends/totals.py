"""Sums of arrays, and whether all of a mask is True, without kernels that take long to compile.

CuPy compiles a sum of another dtype, a sum along an axis, and the sum, mean and `all` of a mask
when they are first used, with CUB's headers: 4 to 15 seconds each. The sum of all float64 elements
and the minimum of bytes are part of its wheel, and products of cuBLAS.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.devices import array_module

__all__ = ["all_true", "column_means", "fraction", "total"]

_CHUNK = 1 << 24  # elements that are converted at once


def all_true(mask: Any) -> bool:
    """Return whether all elements of a mask are True."""
    if array_module(mask) is np or not mask.size:
        return bool(mask.all())
    return bool(mask.view(np.uint8).min())


def total(array: Any) -> float:
    """Return the sum of all elements, in float64."""
    if array_module(array) is np:
        return float(array.sum(dtype=np.float64))
    flat = array.reshape(-1)
    chunks = (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))
    return sum(float(chunk.astype(np.float64).sum()) for chunk in chunks)


def fraction(mask: Any) -> float:
    """Return the fraction of a mask that is True; 0 if it is empty."""
    return total(mask) / mask.size if mask.size else 0.0


def column_means(mask: Any) -> Any:
    """Return the fraction of each column of a 2-D mask that is True, as float64.

    It must have at most 2**24 rows, and at least one.
    """
    rows = len(mask)
    ones = array_module(mask).ones(rows, np.float32)
    return (ones @ mask.astype(np.float32)).astype(np.float64) / rows
