"""Steps and a sign after a product, folded into a threshold for each unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cupybnn.deploy.layers import Step, apply_steps
from cupybnn.fold import LIMIT

__all__ = ["integer_threshold", "real_threshold"]

_INFINITY = 0x7F800000  # bit pattern of float32


def _change(
    is_plus: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where a monotone predicate of integers changes in (low, high]; its ends' values."""
    first, last = is_plus(low), is_plus(high)
    for _ in range(int((high - low).max(initial=1)).bit_length()):
        middle = low + ((high - low) >> 1)
        as_first = is_plus(middle) == first
        low = np.where(as_first, middle, low)
        high = np.where(as_first, high, middle)
    return high, first, last


def integer_threshold(steps: Sequence[Step], units: int) -> tuple[np.ndarray, np.ndarray]:
    """Return threshold (int32) and flip (bool) of a product of signs, an integer.

    ``(product >= threshold) != flip`` is then exactly ``steps(product) >= 0``, for each integer
    from -2**24 to 2**24: each step is monotone, so the sign changes at one integer at most, and
    that is found by bisection on the steps themselves; see `cupybnn.fold_batch_norm`.

    Parameters
    ----------
    steps : sequence of Step
        With arrays on the CPU.
    units : int
    """

    def is_plus(s: np.ndarray) -> np.ndarray:
        return apply_steps(steps, s.astype(np.float32)) >= 0

    low, high = (np.full(units, limit, np.int64) for limit in (-LIMIT, LIMIT))
    change, first, last = _change(is_plus, low, high)
    least = np.iinfo(np.int32).min
    return np.where(first == last, least, change).astype(np.int32), ~last


def real_threshold(steps: Sequence[Step], units: int) -> tuple[np.ndarray, np.ndarray]:
    """Return threshold (float32) and flip (bool) of a product of real numbers.

    As `integer_threshold`, for each float32 but NaN, by bisection on the numbers in their order.

    Parameters
    ----------
    steps : sequence of Step
        With arrays on the CPU.
    units : int
    """

    def number(order: np.ndarray) -> np.ndarray:
        """Return the float32 with a place in the order of all: 0 at 0, the next above it at 1."""
        bits = np.where(order >= 0, order, -order).astype(np.uint32)
        return (bits | np.where(order < 0, 0x80000000, 0).astype(np.uint32)).view(np.float32)

    def is_plus(order: np.ndarray) -> np.ndarray:
        return apply_steps(steps, number(order)) >= 0

    low, high = (np.full(units, limit, np.int64) for limit in (-_INFINITY, _INFINITY))
    # At an infinity itself a factor of 0 makes NaN.
    low, high = low + 1, high - 1
    change, first, last = _change(is_plus, low, high)
    return np.where(first == last, np.float32(-np.inf), number(change)), ~last
