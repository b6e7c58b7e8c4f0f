"""The examples of a fit in an order that their content alone decides, equal ones merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cupybnn.backends.devices import CPU, array_module, to_device

__all__ = ["distinct", "row_blocks"]

#: Elements converted to float64 at a time.
_BLOCK = 1 << 20


def row_blocks(x: Any, rows: np.ndarray | None = None) -> Iterator[tuple[slice, Any]]:
    """Yield (place, part) for `x` or its given rows, a few at a time, in float64.

    Parameters
    ----------
    x : array, shape (examples, features)
    rows : ndarray of integers, optional
        Which rows, in this order.
    """
    count = len(x) if rows is None else len(rows)
    size = max(1, _BLOCK // max(1, x.shape[1]))
    for start in range(0, count, size):
        place = slice(start, min(start + size, count))
        part = x[place] if rows is None else x[array_module(x).asarray(rows[place])]
        yield place, part.astype(np.float64)


def distinct(
    x: Any, labels: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the rows to train on and their weights, equal rows merged into one.

    The order of the rows and their weights do not depend on the order of the examples, nor on
    whether an example is repeated or has a larger weight.

    Parameters
    ----------
    x : array of floats or uint8, shape (examples, features)
    labels : ndarray of int64, shape (examples,)
    weights : ndarray of float64, shape (examples,), or None
        At least 0, not all 0.

    Returns
    -------
    rows : ndarray of int64, shape (rows,)
        One for each distinct pair of an example of positive weight and its label.
    weights : ndarray of float64, shape (rows,), or None
        None if all are 1.
    """
    keys = _keys(x, labels)
    order = np.argsort(keys, kind="stable")
    if weights is not None:
        order = order[weights[order] > 0]
    first = np.ones(len(order), bool)
    alike = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
    first[alike] = ~_equal(x, labels, order[alike], order[alike - 1])
    starts = np.flatnonzero(first)
    each = np.ones(len(order)) if weights is None else weights[order]
    sums = np.add.reduceat(each, starts)
    return order[starts], None if (sums == 1).all() else sums


def _keys(x: Any, labels: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each example with its label, of values and not of dtypes."""
    xp = array_module(x)
    rng = np.random.default_rng(0xD157)
    factors = xp.asarray(rng.integers(2**64, size=x.shape[1], dtype=np.uint64) | np.uint64(1))
    keys = np.empty(len(x), np.uint64)
    for place, part in row_blocks(x):
        part += 0.0  # -0.0 is 0.0
        words = part.view(np.uint64)
        words ^= (words >> np.uint64(32)) ^ (words >> np.uint64(47))  # few numbers use all bits
        words *= factors
        keys[place] = to_device(words.sum(axis=1, dtype=np.uint64), CPU)
    return keys + labels.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _equal(x: Any, labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return whether the examples in the rows `a` are those in the rows `b`, one by one."""
    equal = labels[a] == labels[b]
    for (place, one), (_, other) in zip(row_blocks(x, a), row_blocks(x, b), strict=True):
        equal[place] &= to_device((one == other).all(axis=1), CPU)
    return equal
