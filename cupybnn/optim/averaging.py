"""Averages of weights over training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from cupybnn.backends.devices import CPU, device_of, to_device
from cupybnn.nn import Parameter
from cupybnn.nn.state import Expected, check_state, copy_into, mismatches, statistics_dtype
from cupybnn.optim.options import as_parameters, count_elements

__all__ = ["WeightAverage"]


class WeightAverage:
    """A running average of parameters: exponential, or equally weighted.

    Binary weights are averaged by their latent weights. Batch-norm statistics do not match the
    averaged weights: see `cupybnn.nn.refresh_statistics`. Averages of float16 parameters are kept
    in float32.

    Parameters
    ----------
    parameters : iterable of Parameter
        The parameters, at least one.
    decay : float, optional
        Weight of each update relative to the next: the newest has weight 1, the one before it
        ``decay``, then ``decay**2`` and so on. None: all have equal weight (SWA).

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn, optim
    >>> model = nn.Linear(2, 1, rng=0)
    >>> average = optim.WeightAverage(model.parameters(), decay=0.99)
    >>> average.update()  # after each step of the optimizer
    >>> with average.applied():
    ...     state = model.state_dict()  # of the averaged model

    Notes
    -----
    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, 1992; Izmailov et al.:
    Averaging weights leads to wider optima and better generalization (SWA), UAI 2018. The weights
    of the exponential mean sum to 1 from the first update on, as with Adam's bias correction;
    ``average = decay * average + (1 - decay) * weight`` alone would give the initial weights a
    share of ``decay**updates``, which is still a third after 1000 updates at 0.999.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"The 'decay' must be None or in [0, 1); got {decay!r}.")
        self.parameters = as_parameters(parameters)
        if not self.parameters:
            raise ValueError("A WeightAverage must have parameters; got none.")
        self.decay = decay
        self.updates = 0
        self.averages = [p._data.astype(statistics_dtype(p.dtype)) for p in self.parameters]
        # The training weights, while the parameters hold their averages.
        self._kept: list[Any] | None = None

    @property
    def is_applied(self) -> bool:
        """Whether the parameters currently hold their averages, within `applied`."""
        return self._kept is not None

    def update(self) -> None:
        """Add the current weights to the average; the first update sets it.

        Within `applied`, this adds the training weights, and the parameters keep the average that
        they hold.
        """
        self.updates += 1
        if self.decay is None:
            part = 1 / self.updates
        else:
            part = (1 - self.decay) / (1 - self.decay**self.updates)
        weights = [p._data for p in self.parameters] if self._kept is None else self._kept
        for i, weight in enumerate(weights):
            average = self.averages[i] = to_device(self.averages[i], device_of(weight))
            with device_of(average).scope():
                average += part * (weight - average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the parameters hold their averages.

        Nesting it changes nothing. On exit, normal or not, the parameters get their previous values
        back; anything written to them meanwhile is lost.
        """
        if self._kept is not None:
            yield
            return
        kept = [_copy(p._data) for p in self.parameters]
        try:
            self._kept = kept
            self._write(self.averages)
            yield
        finally:
            self._write(kept)
            self._kept = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context within `applied` that temporarily restores the parameters' own values.

        Used to save the state of a training run, for example. Outside `applied` it does nothing.
        """
        kept = self._kept
        if kept is None:
            yield
            return
        inside = [_copy(p._data) for p in self.parameters]
        try:
            self._kept = None
            self._write(kept)
            yield
        finally:
            self._write(inside)
            self._kept = kept

    def _write(self, values: list[Any]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            copy_into(parameter.write(), value)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the number of updates and the averages, as NumPy copies."""
        state = {str(i): np.array(to_device(a, CPU)) for i, a in enumerate(self.averages)}
        return {"updates": np.array(self.updates), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises
        ------
        TypeError
            If `state` is not a mapping of names to arrays.
        ValueError
            If names, shapes or dtypes do not match, or the number of updates is not an integer
            >= 0. All mismatches are listed, and nothing has been changed.
        """
        check_state(state, state, self)
        expected = {str(i): Expected.like(a) for i, a in enumerate(self.averages)}
        if faults := mismatches(state, {"updates": Expected.count(), **expected}):
            raise ValueError(
                "The state does not match this WeightAverage:\n  " + "\n  ".join(faults)
            )
        self.updates = int(state["updates"])
        for i, average in enumerate(self.averages):
            copy_into(average, state[str(i)])

    def __repr__(self) -> str:
        return (
            f"WeightAverage(decay={self.decay}, updates={self.updates}, "
            f"{count_elements(self.parameters)})"
        )


def _copy(array: Any) -> Any:
    with device_of(array).scope():
        return array.copy()
