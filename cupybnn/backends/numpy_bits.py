"""The sign bit on the CPU: the only place where numbers become bits."""

from __future__ import annotations

import numpy as np

__all__ = ["write_bits"]

FLOAT32 = np.dtype(np.float32)
ZERO = np.array(0, FLOAT32)
MINUS_ZERO = 0x8000
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}


def write_bits(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return True where x >= 0 and False elsewhere, including NaN; a bool is its own bit.

    Parameters
    ----------
    x : ndarray
        Of a dtype that has a sign.
    out : ndarray of bool, shape of `x`, optional
        Output array; by default a new one that does not share memory with `x`.
    """
    if x.dtype == FLOAT32:
        # Comparing a signalling NaN raises "invalid", but its result is defined here. Set in each
        # thread, because pool threads may not have the caller's numpy.errstate.
        with np.errstate(invalid="ignore"):
            return np.greater_equal(x, ZERO, out=out)
    if x.dtype.kind == "b":
        if out is None:
            return x.copy()
        out[...] = x
        return out
    infinity = INFINITY.get(x.dtype.name)
    if infinity is None:
        with np.errstate(invalid="ignore"):
            return np.greater_equal(x, x.dtype.type(0), out=out)
    # NumPy compares 16-bit floats by converting each to float32. As integers, 0 to infinity are in
    # order from 0; above them come NaN, then -0.0, then the negative numbers.
    integers = x.view(np.dtype(np.uint16).newbyteorder(x.dtype.byteorder))
    out = np.less_equal(integers, infinity, out=out)
    out |= integers == MINUS_ZERO
    return out
