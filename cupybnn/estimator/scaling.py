"""The scaling of an estimator's input, and the statistics that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cupybnn.backends.devices import CPU, array_module, device_of, to_device
from cupybnn.estimator.examples import row_blocks

__all__ = ["Scaling"]


class Scaling:
    """``(x - mean) / scale``, of statistics that grow with each set of examples.

    Parameters
    ----------
    state : mapping
        What `state` returned; or only the kind.

    Attributes
    ----------
    kind : {"standard", "max"} or None
        "standard": mean and standard deviation of each feature. "max": no mean; one scale for all
        features, their largest magnitude. None: the input as it is.
    mean, scale : ndarray of float64, shape (features,)
        Set by `update`. The scale of a constant feature is 1.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.kind: str | None = state["kind"]
        self._weight: float = state.get("weight", 0.0)
        self._largest: float = state.get("largest", 0.0)
        self.mean: np.ndarray = state.get("mean", np.zeros(0))
        self._variance: np.ndarray = state.get("variance", np.zeros(0))

    def state(self) -> dict[str, Any]:
        """Return the kind and the statistics: numbers, and arrays on the host."""
        return {
            "kind": self.kind,
            "weight": self._weight,
            "largest": self._largest,
            "mean": self.mean,
            "variance": self._variance,
        }

    @property
    def scale(self) -> np.ndarray:
        if self.kind == "standard":
            deviation = np.sqrt(self._variance)
            # The rounded variance of a constant is not always 0.
            constant = deviation <= 1e-12 * abs(self.mean)
            return np.where(constant, 1.0, deviation)
        largest = self._largest if self.kind == "max" and self._largest > 0 else 1.0
        return np.full(len(self.mean), largest)

    def update(self, x: Any, rows: np.ndarray, weights: np.ndarray | None) -> None:
        """Add examples to the statistics.

        Parameters
        ----------
        x : array, shape (examples, features)
        rows : ndarray of integers, shape (rows,)
            Those to add.
        weights : ndarray of float64, shape (rows,), or None

        Raises
        ------
        ValueError
            If the statistics overflow.
        """
        features = x.shape[1]
        if len(self.mean) == 0:
            self.mean = self._variance = np.zeros(features)
        if self.kind == "max":
            for _, part in row_blocks(x, rows):
                self._largest = max(self._largest, float(abs(part).max()))
        if self.kind != "standard":
            return
        xp = array_module(x)
        each = xp.ones(len(rows)) if weights is None else xp.asarray(weights)
        weight = float(each.sum())
        with np.errstate(over="ignore", invalid="ignore"):
            mean = xp.zeros(features)
            for place, part in row_blocks(x, rows):
                mean += each[place] @ part
            mean /= weight
            variance = xp.zeros(features)
            for place, part in row_blocks(x, rows):
                part -= mean
                part *= part
                variance += each[place] @ part
            variance /= weight
            self._join(weight, to_device(mean, CPU), to_device(variance, CPU))
        if not np.isfinite(self._variance).all():
            feature = int(np.flatnonzero(~np.isfinite(self._variance))[0])
            raise ValueError(
                f"The variance of each feature of X must be finite in float64; got an overflow in "
                f"feature {feature}. Scale the feature down."
            )

    def _join(self, weight: float, mean: np.ndarray, variance: np.ndarray) -> None:
        """Join mean and variance of two sets of examples.

        Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample
        variances, 1979.
        """
        share = weight / (self._weight + weight)
        apart = mean - self.mean
        spread = self._variance + share * (variance - self._variance)
        self._variance = spread + share * (1 - share) * apart * apart
        self.mean = self.mean + share * apart
        self._weight += weight

    def apply(self, x: Any, rows: np.ndarray | None, dtype: Any) -> Any:
        """Return `x`, or its given rows, scaled in float64 and rounded to `dtype`."""
        xp = array_module(x)
        with device_of(x).scope(), np.errstate(over="ignore"):
            count = len(x) if rows is None else len(rows)
            out = xp.empty((count, x.shape[1]), dtype)
            mean, scale = xp.asarray(self.mean), xp.asarray(self.scale)
            for place, part in row_blocks(x, rows):
                part -= mean
                part /= scale
                out[place] = part
        return out
