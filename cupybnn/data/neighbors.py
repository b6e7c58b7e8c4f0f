"""Noise in the directions of an image's nearest neighbors, and finding these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.autograd.storage import module_of
from cupybnn.backends.random import bell

__all__ = ["NeighborNoise", "check_count", "nearest"]

#: Standard deviation of `bell`.
_BELL = math.sqrt(21845)
#: Binary digits after the point of a multiple.
_DIGITS = 20
#: Distances that are computed at a time: some 100 rows of MNIST on the host, 1000 on a GPU.
_DISTANCES = {"numpy": 1 << 23, "cupy": 1 << 26}


@dataclass(frozen=True)
class NeighborNoise:
    """Move each example by random multiples of its differences to its nearest neighbors.

    ``x`` becomes ``x + sum_j e_j * (x_j - x)``, where ``x_1, x_2, ...`` are the neighbors and the
    ``e_j`` are independent and nearly normal. The result is a sample of a normal distribution
    around x that is wide only in the directions in which the data extend there. Nothing needs to be
    known about images: permuted pixels give the same results, permuted.

    Attributes
    ----------
    amount : float
        Standard deviation of the multiples; at least 0. With 0 nothing moves.

    Notes
    -----
    Vincent and Bengio (Manifold Parzen windows, NIPS 2002) estimate densities by a normal
    distribution like this around each example.

    8-bit pixels stay 8-bit: sums are computed in whole numbers, exactly, then rounded, and limited
    to the pixels' range. So all backends agree bit for bit.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.data import NeighborNoise, nearest
    >>> images = np.array([[0, 0], [0, 9], [90, 0]], np.uint8)
    >>> table = nearest(images, 1)
    >>> table.T
    array([[1, 0, 0]], dtype=int32)
    >>> moved = NeighborNoise(0.5)(images, table, np.array([0, 1]), 255, seed=1, number=0)
    >>> moved.shape, moved.dtype, moved[:, 0].any()  # in the first pixel they do not differ
    ((2, 2), dtype('uint8'), np.False_)
    """

    amount: float = 0.0

    def __bool__(self) -> bool:
        return self.amount > 0

    @property
    def factor(self) -> int:
        """A multiple of standard deviation `amount` is ``bell * factor / 2**20``."""
        return round(self.amount * 2**_DIGITS / _BELL)

    def __call__(
        self, images: Any, table: Any, indices: Any, brightest: int | None, seed: int, number: int
    ) -> Any:
        """Return moved examples.

        Parameters
        ----------
        images : array of uint8, float32 or float64, shape (examples, features)
        table : array of int32, shape (examples, neighbors)
            See `nearest`.
        indices : array of integers, shape (batch,)
            Which examples.
        brightest : int or None
            The greatest pixel value, for uint8.
        seed : int
            From 0 to 2**64 - 1.
        number : int
            Number of the batch: the same `seed` and `number` always give the same multiples.

        Returns
        -------
        array of the dtype of `images`, shape (batch, features)
        """
        xp, pixels = module_of(images), images.dtype == np.uint8
        dtype = np.dtype(np.int32) if pixels else images.dtype
        own, around = images[indices].astype(dtype, copy=False), table[indices]
        draws = bell(around.shape, seed, number, xp).astype(dtype)
        total = xp.zeros(own.shape, dtype)
        for j in range(around.shape[1]):
            total += draws[:, j : j + 1] * (images[around[:, j]] - own)
        if not pixels:
            return own + total * dtype.type(self.amount / _BELL)
        half = 1 << (_DIGITS - 1)
        moved = own + (total.astype(np.int64) * self.factor + half >> _DIGITS)
        return xp.clip(moved, 0, brightest).astype(np.uint8)


def nearest(images: Any, count: int) -> Any:
    """Return the nearest neighbors of each example by Euclidean distance, nearest first.

    All pairs are compared: time grows with the square of the number of examples. Distances of 8-bit
    pixels are exact; of several at the same distance, the one with the smallest index comes first.

    Parameters
    ----------
    images : array of uint8, float32 or float64, shape (examples, features)
    count : int
        How many; at least 1, and less than the number of examples.

    Returns
    -------
    array of int32, shape (examples, count)
        Indices of other examples, on the device of `images`.

    Raises
    ------
    ValueError
        If `count` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.data import nearest
    >>> nearest(np.array([[0.0], [1.0], [5.0], [7.0]]), 2).tolist()
    [[1, 2], [0, 2], [3, 1], [2, 1]]
    """
    xp, examples = module_of(images), len(images)
    check_count(count, examples)
    distances = _Distances(images)
    table = xp.empty((examples, count), np.int32)
    rows = max(1, _DISTANCES[xp.__name__] // examples)
    for start in range(0, examples, rows):
        part = slice(start, min(start + rows, examples))
        found = distances.of(part)
        each = xp.arange(len(found))
        found[each, each + start] = distances.most  # an example is no neighbor of its own
        for j in range(count):
            closest = found.argmin(axis=1)
            table[part, j] = closest
            found[each, closest] = distances.most
    return table


def check_count(count: int, examples: int) -> None:
    """Raise ValueError unless each of the examples has so many neighbors."""
    if not 1 <= count < examples:
        raise ValueError(
            f"The number of neighbors must be at least 1 and less than that of the training "
            f"examples, {examples:,}; got {count}."
        )


class _Distances:
    """Squared distances of rows of an array to all of its rows, less a number for each of them.

    ``|x - y|**2 - |x|**2 = |y|**2 - 2 x y``. Of 8-bit pixels, less 128, that is a whole number. The
    product is exact in float32, where products are fast, up to 1024 of them: then it is even, and
    no sum exceeds 2**25.
    """

    def __init__(self, images: Any) -> None:
        xp, features = module_of(images), images.shape[1]
        self._pixels, self._images = images.dtype == np.uint8, images
        exact = self._pixels and 128**2 * features <= 2**24
        self._real = np.dtype(np.float32 if exact else np.float64)
        self._dtype = np.dtype(np.int32 if exact else np.float64)
        self._columns = xp.ascontiguousarray(self._numbers(slice(None)).T)
        self._squares = (self._columns**2).sum(axis=0, dtype=np.float64).astype(self._dtype)
        self._columns *= -2

    @property
    def most(self) -> float:
        """More than any distance, of those that are whole numbers the greatest of their dtype."""
        return math.inf if self._dtype.kind == "f" else 2 ** (8 * self._dtype.itemsize - 1) - 1

    def of(self, part: slice) -> Any:
        """Return the distances of some rows: shape (rows, examples)."""
        found = (self._numbers(part) @ self._columns).astype(self._dtype, copy=False)
        found += self._squares
        return found

    def _numbers(self, part: slice) -> Any:
        numbers = self._images[part].astype(self._real)
        if self._pixels:
            numbers -= 128
        return numbers
