"""Histograms in TensorBoard's form, computed on the array's own device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.devices import array_module
from cupybnn.backends.totals import total

__all__ = ["Histogram"]

_BINS = 64


@dataclass(frozen=True)
class Histogram:
    """Counts of the finite values of an array, and their moments.

    Attributes
    ----------
    minimum, maximum, total, squares : float
        Minimum, maximum, sum, and sum of squares.
    count : int
        Number of finite values.
    limits : list of float
        Right edge of each bin.
    counts : list of int
    """

    minimum: float
    maximum: float
    count: int
    total: float
    squares: float
    limits: list[float]
    counts: list[int]

    @classmethod
    def of_all(cls, arrays: Iterable[tuple[str, Any, bool]]) -> Iterator[tuple[str, Histogram]]:
        """Yield (tag, histogram) for each (tag, array, whether to count signs).

        Arrays without a finite value are left out.
        """
        for tag, array, signs in arrays:
            histogram = cls.of_signs(array) if signs else cls.of_values(array)
            if histogram is not None:
                yield tag, histogram

    @classmethod
    def of_signs(cls, array: Any) -> Histogram | None:
        """Count the signs of `array`: +1 for values >= 0, else -1."""
        if array.size == 0:
            return None
        plus = int(total(array >= 0))
        minus = int(array.size) - plus
        return cls(
            minimum=-1.0 if minus else 1.0,
            maximum=1.0 if plus else -1.0,
            count=plus + minus,
            total=float(plus - minus),
            squares=float(plus + minus),
            # Two narrow bins, so that TensorBoard draws two peaks rather than a plateau.
            limits=[-1.0, -0.96875, 0.96875, 1.0],
            counts=[0, minus, 0, plus],
        )

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")  # overflow is detected and handled below
    def of_values(cls, array: Any) -> Histogram | None:
        """Count the values of `array` in bins of equal width from its minimum to its maximum."""
        xp = array_module(array)
        values = array.ravel()
        summed = total(values)
        if not np.isfinite(summed):
            values = values[xp.isfinite(values)]
            summed = total(values)
        if values.size == 0:
            return None
        low, high = float(values.min()), float(values.max())
        squares = float(xp.dot(values, values))
        if not np.isfinite(squares):
            squares = total(xp.square(values, dtype=np.float64))
        span = values.dtype.type(high) - values.dtype.type(low)
        scale = values.dtype.type(_BINS) / span if span > 0 else span
        if not (scale > 0 and np.isfinite(scale)):
            return cls(low, high, int(values.size), summed, squares, [high], [int(values.size)])
        # One pass computes bin numbers; np.histogram compares with edges, several times slower.
        numbers = ((values - values.dtype.type(low)) * scale).astype(np.int32)
        numbers = xp.minimum(numbers, _BINS - 1)
        if xp is np:
            counts = np.bincount(numbers, minlength=_BINS)
        else:  # CuPy's bincount looks for negative numbers, by a kernel that takes long to compile
            counts = xp.zeros(_BINS, np.int32)
            xp.add.at(counts, numbers, 1)
        limits = np.linspace(low, high, _BINS + 1)[1:]
        return cls(low, high, int(values.size), summed, squares, limits.tolist(), counts.tolist())

    def fields(self) -> dict[str, Any]:
        """Return the fields of TensorBoard's ``HistogramProto``."""
        return {
            "min": self.minimum,
            "max": self.maximum,
            "num": self.count,
            "sum": self.total,
            "sum_squares": self.squares,
            "bucket_limit": self.limits,
            "bucket": self.counts,
        }
