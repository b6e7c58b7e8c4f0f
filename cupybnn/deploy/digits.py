"""Real weights as integers: digits for products of bytes, bit planes for products of bits.

The weights of a unit are whole multiples of one power of two, its step, of at most `MOST` steps:
the greatest weight keeps 22 or 23 bits. That is as exact as float32 where weights are about as
large as each other, and sums are then exact in any order. Weights that are few bits apart, as signs
are, stay what they are.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

__all__ = [
    "CONSTANTS",
    "MOST_INPUTS",
    "PLANES",
    "fixed_point",
    "least_sums",
    "pixel_digits",
    "sign_planes",
]

_BASE = 256  # of digits
MOST = 127 * (_BASE**2 + _BASE + 1)  # three digits from -128 to 127
#: Bit planes of a weight.
PLANES = 24
#: Pixels that follow the others, the same for each image; their weights make a remainder.
CONSTANTS = (2, 1)
#: Pixels for which sums of products with a digit fit an int32.
MOST_INPUTS = 1 << 14
_BEYOND = 1 << 46  # no sum of so many products of pixels and whole weights reaches it


def fixed_point(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights in steps, and the steps' exponents.

    Parameters
    ----------
    weight : ndarray of float32, shape (inputs, units)
        Finite.

    Returns
    -------
    whole : ndarray of int64, shape (inputs, units)
        From ``-MOST`` to `MOST`; ``whole * 2.0 ** -shift`` are the weights, rounded.
    shift : ndarray of int64, shape (units,)
    """
    wide = weight.astype(np.float64)
    greatest = np.abs(wide).max(axis=0, initial=0.0)
    shift = PLANES - 1 - np.frexp(greatest)[1].astype(np.int64)
    shift -= np.rint(np.ldexp(greatest, shift)) > MOST
    return np.rint(np.ldexp(wide, shift)).astype(np.int64), shift


def least_sums(threshold: np.ndarray, factor: Any, shift: np.ndarray) -> list[int]:
    """Return the least integers that, times ``factor * 2.0 ** -shift``, are at least `threshold`.

    Nothing is at least NaN.
    """
    by, found = Fraction(float(factor)), []
    for wanted, steps in zip(threshold.tolist(), shift.tolist(), strict=True):
        if not np.isfinite(wanted):
            found.append(-_BEYOND if wanted == -np.inf else _BEYOND)
            continue
        exact = Fraction(wanted) / by * Fraction(2) ** steps
        found.append(max(-_BEYOND, min(_BEYOND, -(-exact.numerator // exact.denominator))))
    return found


def pixel_digits(
    whole: np.ndarray, shift: np.ndarray, threshold: np.ndarray, factor: Any, digits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return whole weights as digits, and thresholds for what the product with pixels leaves.

    Parameters
    ----------
    whole, shift : ndarray of int64, shapes (inputs, units) and (units,)
        See `fixed_point`; at most `MOST_INPUTS` inputs.
    threshold : ndarray of float32, shape (units,)
        Of the product of weights and scaled pixels.
    factor : float32
        What pixels are multiplied by.
    digits : {1, 3}

    Returns
    -------
    digits : ndarray of int8, shape (digits, units, inputs + 2)
        The lowest first, to the base 256. The last two weights are for the pixels `CONSTANTS`.
    least : ndarray of int32, shape (units,)
        The product of pixels and weights reaches `threshold` where that of pixels and digits,
        divided by ``256 ** (digits - 1)`` and rounded down, is at least this.
    """
    unit = _BASE ** (digits - 1)
    wanted = least_sums(threshold, factor, shift)
    # A remainder is added to the sum, so that what it is compared with is a multiple of `unit`.
    rest = np.array([-w % unit for w in wanted], np.int64)
    least = np.array([(w + r) // unit for w, r in zip(wanted, rest.tolist(), strict=True)])
    out = np.empty((digits, whole.shape[1], whole.shape[0] + 2), np.int8)
    left = whole.T.copy()
    for i in range(digits):
        low = (left + 128) % _BASE - 128
        out[i, :, :-2] = low
        left = (left - low) // _BASE
        low = rest % _BASE if i + 1 < digits else np.zeros_like(rest)
        out[i, :, -2], out[i, :, -1] = low >> 1, low & 1
        rest = rest // _BASE
    assert not left.any(), "weights have more digits"
    # Beyond all sums; a sum less this still fits an int32.
    return out, np.clip(least, -(1 << 30), 1 << 30).astype(np.int32)


def sign_planes(whole: np.ndarray) -> np.ndarray:
    """Return whole weights as signs.

    Parameters
    ----------
    whole : ndarray of int64, shape (inputs, units)
        Of `fixed_point`.

    Returns
    -------
    ndarray of bool, shape (inputs, PLANES * units + 1)
        True for +1. With s the signs of a unit's columns, ``2 * whole + 1`` is the sum of
        ``s[j] * 2 ** j``; the last column is +1.
    """
    above = whole + (1 << (PLANES - 1))
    bits = (above[:, :, None] >> np.arange(PLANES)) & 1
    flat = bits.reshape(len(whole), -1).astype(bool)
    return np.concatenate([flat, np.ones((len(whole), 1), bool)], axis=1)
