"""Averages of the weights over training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from cupybnn.backends.devices import CPU, device_of, to_device
from cupybnn.nn import Parameter
from cupybnn.nn.module import check_state

__all__ = ["WeightAverage"]


class WeightAverage:
    """A running average of parameters: exponential, or of equal weights.

    For binary weights, the latent weights are averaged. The statistics of batch norm belong to the
    current weights: see `cupybnn.nn.refresh_statistics`.

    Parameters
    ----------
    parameters : iterable of Parameter
        The parameters.
    decay : float, optional
        How much each update counts in comparison with the next: the mean of all updates, the
        newest with weight 1, the one before with ``decay``, then ``decay**2`` and so on. None: all
        count the same (SWA).

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn, optim
    >>> model = nn.Linear(2, 1, rng=0)
    >>> average = optim.WeightAverage(model.parameters(), decay=0.99)
    >>> average.update()  # after each step of the optimiser
    >>> with average.applied():
    ...     state = model.state_dict()  # of the averaged model

    Notes
    -----
    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, 1992; Izmailov et al.:
    Averaging weights leads to wider optima and better generalization (SWA), UAI 2018. The weights
    of the exponential mean sum to 1 from the first update on, as Adam's do by its correction;
    ``average = decay * average + (1 - decay) * weight`` alone would leave ``decay**updates`` to the
    weights it began with, which is a third after 1000 updates of 0.999.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"The 'decay' must be None or in [0, 1); got {decay!r}.")
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.averages = [p._data.copy() for p in self.parameters]
        # The weights that training goes on with, while the parameters have their averages.
        self._kept: list[Any] | None = None

    @property
    def is_applied(self) -> bool:
        """Whether the parameters have their averaged values now: within `applied`."""
        return self._kept is not None

    def update(self) -> None:
        """Add the weights to the average; the first ones are the whole of it.

        Within `applied` these are the weights that were there before, and the parameters keep the
        average they have.
        """
        self.updates += 1
        if self.decay is None:
            part = 1 / self.updates
        else:
            part = (1 - self.decay) / (1 - self.decay**self.updates)
        present = [p._data for p in self.parameters] if self._kept is None else self._kept
        for average, weight in zip(self.averages, present, strict=True):
            with device_of(average).scope():
                average += part * (weight - average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context within which the parameters have their averaged values.

        It may be entered again within itself, which changes nothing. However it ends, the
        parameters get back the values they had before; what was written to them within is lost.
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
        """Context within `applied` in which the parameters have their own values for a while.

        Outside of `applied` it changes nothing.
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
            array = parameter.write()
            device = device_of(array)
            with device.scope():
                array[...] = to_device(value, device)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the number of updates and the averages: NumPy copies."""
        state = {str(i): np.array(to_device(a, CPU)) for i, a in enumerate(self.averages)}
        return {"updates": np.array(self.updates), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises
        ------
        TypeError
            If `state` is no mapping of names to arrays.
        ValueError
            If names or shapes do not fit.
        """
        check_state(state, state, self)
        shapes = {"updates": (), **{str(i): a.shape for i, a in enumerate(self.averages)}}
        given = {name: np.shape(array) for name, array in state.items()}
        if given != shapes:
            raise ValueError(
                f"The state does not fit this WeightAverage: it must have the arrays and shapes "
                f"{shapes}; got {given}."
            )
        updates = np.asarray(state["updates"])
        if updates.dtype.kind not in "iu" or updates < 0:
            raise ValueError(
                f"The 'updates' of a WeightAverage's state must be a whole number, at least 0; got "
                f"{updates!r}."
            )
        self.updates = int(updates)
        for i, average in enumerate(self.averages):
            device = device_of(average)
            with device.scope():
                average[...] = to_device(np.asarray(state[str(i)]), device)


def _copy(array: Any) -> Any:
    with device_of(array).scope():
        return array.copy()
