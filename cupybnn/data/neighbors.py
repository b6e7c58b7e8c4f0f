"""Noise in the directions of an image's nearest neighbors, and finding these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.autograd.storage import module_of
from cupybnn.backends.random import bell

__all__ = ["NeighborNoise", "nearest_neighbors"]

#: Standard deviation of `bell`.
_BELL = math.sqrt(21845)
#: Greatest factor. With it any difference moves a pixel beyond its range, and the product of it and
#: a sum of 32 bits is far from overflowing 64.
_MOST = 2**31 - 1
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
        Standard deviation of the multiples. With 0 nothing moves.

    Raises
    ------
    ValueError
        If the amount is negative or not finite.

    Notes
    -----
    Vincent and Bengio (Manifold Parzen windows, NIPS 2002) estimate densities by a normal
    distribution like this around each example.

    8-bit pixels stay 8-bit: sums are computed in whole numbers, exactly for up to 16,512 neighbors,
    then rounded, and limited to the pixels' range. So all backends agree bit for bit. But pixels of
    few levels, such as 0 and 1, hardly move; use floating-point features instead.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.data import NeighborNoise, nearest_neighbors
    >>> images = np.array([[0, 0], [0, 9], [90, 0]], np.uint8)
    >>> table = nearest_neighbors(images, 1)
    >>> table.T
    array([[1, 0, 0]], dtype=int32)
    >>> moved = NeighborNoise(0.5)(images, table, np.array([0, 1]), seed=1, number=0)
    >>> moved.shape, moved.dtype, moved[:, 0].any()  # in the first pixel they do not differ
    ((2, 2), dtype('uint8'), np.False_)
    """

    amount: float = 0.0

    #: Binary digits after the point of a multiple.
    DIGITS = 20

    def __post_init__(self) -> None:
        if not 0 <= self.amount < math.inf:
            raise ValueError(
                f"The 'amount' of a NeighborNoise must be finite and at least 0; got "
                f"{self.amount!r}."
            )

    def __bool__(self) -> bool:
        return self.amount > 0

    @property
    def factor(self) -> int:
        """A multiple of standard deviation `amount` is ``bell * factor / 2**DIGITS``."""
        return min(round(self.amount * 2**self.DIGITS / _BELL), _MOST)

    def __call__(
        self, images: Any, table: Any, indices: Any, *, seed: int, number: int, brightest: int = 255
    ) -> Any:
        """Return moved examples.

        Parameters
        ----------
        images : array of uint8, float32 or float64, shape (examples, features)
        table : array of int32, shape (examples, neighbors)
            See `nearest_neighbors`.
        indices : array of integers, shape (batch,)
            Which examples.
        seed : int
            From 0 to 2**64 - 1.
        number : int
            Number of the batch: the same `seed` and `number` always give the same multiples.
        brightest : int
            The greatest pixel value, for uint8.

        Returns
        -------
        array of the dtype of `images`, shape (batch, features)

        Raises
        ------
        TypeError
            If the dtype is another.
        """
        xp, pixels = module_of(images), images.dtype == np.uint8
        if not pixels and images.dtype not in (np.float32, np.float64):
            raise TypeError(
                f"The 'images' must be uint8, float32 or float64; got {images.dtype}. Convert them "
                f"with astype."
            )
        dtype = np.dtype(np.int32) if pixels else images.dtype
        own, around = images[indices].astype(dtype, copy=False), table[indices]
        multiples = bell(around.shape, seed, number, xp).astype(dtype)
        if not pixels:
            multiples *= dtype.type(self.amount / _BELL)
        total = xp.zeros(own.shape, dtype)
        for j in range(around.shape[1]):
            total += multiples[:, j : j + 1] * (images[around[:, j]] - own)
        if not pixels:
            return own + total
        half = 1 << (self.DIGITS - 1)
        moved = own + (total.astype(np.int64) * self.factor + half >> self.DIGITS)
        return xp.clip(moved, 0, brightest).astype(np.uint8)


def nearest_neighbors(images: Any, count: int, among: Any = None) -> Any:
    """Return the nearest neighbors of each example by Euclidean distance, nearest first.

    All pairs are compared: time grows with the square of the number of examples. Distances of 8-bit
    pixels are exact; of several at the same distance, the one with the smallest index comes first.
    Distances of floating-point features are rounded to the precision of float64, relative to the
    features' distance from their mean.

    Parameters
    ----------
    images : array of uint8, float32 or float64, shape (examples, features)
    count : int
        How many; at least 1, and less than the number of examples that may be neighbors.
    among : array of integers, optional
        Indices of those that may be neighbors, ascending; by default, all.

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
    >>> from cupybnn.data import nearest_neighbors
    >>> nearest_neighbors(np.array([[0.0], [1.0], [5.0], [7.0]]), 2).tolist()
    [[1, 2], [0, 2], [3, 1], [2, 1]]
    """
    xp, examples = module_of(images), len(images)
    among = xp.arange(examples) if among is None else xp.asarray(among)
    if not 1 <= count < len(among):
        raise ValueError(
            f"The 'count' of neighbors must be at least 1 and less than the number of examples, "
            f"{len(among):,}; got {count}."
        )
    place = xp.full(examples, -1)  # among those that may be neighbors; -1, harmlessly, for others
    place[among] = xp.arange(len(among))
    distances = _Distances(images, among)
    table = xp.empty((examples, count), np.int32)
    rows = max(1, _DISTANCES[xp.__name__] // len(among))
    for start in range(0, examples, rows):
        part = slice(start, min(start + rows, examples))
        found = distances.of(part)
        each, own = xp.arange(len(found)), place[part]
        # An example is no neighbor of its own.
        found[each, own] = xp.where(own < 0, found[each, own], distances.most)
        for j in range(count):
            closest = found.argmin(axis=1)
            table[part, j] = among[closest]
            found[each, closest] = distances.most
    return table


class _Distances:
    """Squared distances of rows of an array to some of its rows, less a number for each of them.

    ``|x - y|**2 - |x|**2 = |y|**2 - 2 x y``. Of 8-bit pixels, less 128, that is a whole number. The
    product is exact in float32, where products are fast, up to 1024 of them: then it is even, and
    no sum exceeds 2**25.
    """

    def __init__(self, images: Any, among: Any) -> None:
        xp, features = module_of(images), images.shape[1]
        pixels = images.dtype == np.uint8
        exact = pixels and 128**2 * features <= 2**24
        self._images, self._real = images, np.dtype(np.float32 if exact else np.float64)
        self._dtype = np.dtype(np.int32 if exact else np.float64)
        self._center = 128 if pixels else images.mean(axis=0, dtype=np.float64)
        self._others = self._numbers(among)
        self._squares = xp.empty(len(among), self._dtype)
        ones = xp.ones(features, self._real)  # a product, which needs no kernel for sums on a GPU
        for start in range(0, len(among), 4096):
            part = slice(start, start + 4096)
            self._squares[part] = ((self._others[part] ** 2) @ ones).astype(self._dtype)

    @property
    def most(self) -> Any:
        """More than any distance, of the distances' dtype."""
        return self._dtype.type(math.inf if self._dtype.kind == "f" else 2**31 - 1)

    def of(self, part: slice) -> Any:
        """Return the distances of some rows: shape (rows, others)."""
        product = (-2 * self._numbers(part)) @ self._others.T
        found = product.astype(self._dtype, copy=False)
        found += self._squares
        return found

    def _numbers(self, part: Any) -> Any:
        numbers = self._images[part].astype(self._real)
        numbers -= self._center
        return numbers
