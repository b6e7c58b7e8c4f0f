"""Sums of float16, in float32: float16 counts only up to 2048 and overflows past 65,504."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["narrowed", "sum_dtype", "wide_sum", "widened"]

_NARROW = np.dtype(np.float16)


def widened(x: Any) -> Any:
    """Return a float16 array as float32, any other unchanged."""
    return x.astype(np.float32) if x.dtype == _NARROW else x


def narrowed(result: Any, x: Any) -> Any:
    """Cast a result computed from ``widened(x)`` back to float16 if `x` is float16."""
    return result.astype(np.float16) if x.dtype == _NARROW else result


def sum_dtype(x: Any) -> Any:
    """Return the ``dtype`` argument of a sum of `x`: None to keep its own."""
    return np.float32 if x.dtype == _NARROW else None


def wide_sum(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """Sum an array over axes; the sum of float16 is float32."""
    return x.sum(axis=axis, keepdims=keepdims, dtype=sum_dtype(x))
