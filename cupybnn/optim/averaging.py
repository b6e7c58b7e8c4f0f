"""Averages of the weights over training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from cupybnn.backends.devices import CPU, device_of, to_device
from cupybnn.nn import Parameter
from cupybnn.nn.state import Expected, check_state, copy_into, misfits, statistics_dtype
from cupybnn.optim.options import as_parameters, count_elements

__all__ = ["WeightAverage"]


class WeightAverage:
    """A running average of parameters: exponential, or of equal weights.

    Of binary weights the latent ones are averaged. The statistics of batch norm do not belong to
    the averaged weights: see `cupybnn.nn.refresh_statistics`. Averages of float16
    parameters are kept in float32.

    Parameters
    ----------
    parameters : iterable of Parameter
        The parameters, at least one.
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
        self.parameters = as_parameters(parameters)
        if not self.parameters:
            raise ValueError("A WeightAverage must have parameters; got none.")
        self.decay = decay
        self.updates = 0
        self.averages = [p._data.astype(statistics_dtype(p.dtype)) for p in self.parameters]
        self._live: list[Any] | None = None  # the weights put aside by `applied`

    def update(self) -> None:
        """Take the current weights into the average; the first ones are the whole of it.

        Raises
        ------
        RuntimeError
            Within `applied`, where the parameters hold the average itself.
        """
        if self._live is not None:
            raise RuntimeError(
                "update() must not be called within applied(), where the parameters hold their "
                "averages. Call it after the block, or within suspended()."
            )
        self.updates += 1
        if self.decay is None:
            part = 1 / self.updates
        else:
            part = (1 - self.decay) / (1 - self.decay**self.updates)
        for i, parameter in enumerate(self.parameters):
            array = parameter._data
            average = self.averages[i] = to_device(self.averages[i], device_of(array))
            with device_of(average).scope():
                average += part * (array - average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context within which the parameters have their averaged values.

        Entered again within itself, it changes nothing. What is written to the parameters within is
        lost at its end.
        """
        if self._live is not None:
            yield
            return
        self._live = [self._exchange(p, a) for p, a in self._pairs()]
        try:
            yield
        finally:
            self._put_back()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context within `applied` in which the parameters have their own values again.

        To save the state of a training run, for example. Outside of `applied` it changes nothing.
        """
        if self._live is None:
            yield
            return
        self._put_back()
        try:
            yield
        finally:
            self._live = [self._exchange(p, a) for p, a in self._pairs()]

    def _pairs(self) -> Iterator[tuple[Parameter, Any]]:
        return zip(self.parameters, self.averages, strict=True)

    @staticmethod
    def _exchange(parameter: Parameter, array: Any) -> Any:
        """Copy `array` into a parameter, and return what was there."""
        target = parameter.write()
        with device_of(target).scope():
            before = target.copy()
        copy_into(target, array)
        return before

    def _put_back(self) -> None:
        live, self._live = self._live, None
        for parameter, array in zip(self.parameters, live or (), strict=True):
            copy_into(parameter.write(), array)

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
            If names, shapes or dtypes do not fit, or the number of updates is no whole number
            >= 0. All misfits are listed, and nothing has been changed.
        """
        check_state(state, state, self)
        expected = {str(i): Expected.like(a) for i, a in enumerate(self.averages)}
        if faults := misfits(state, {"updates": Expected.count(), **expected}):
            raise ValueError("The state does not fit this WeightAverage:\n  " + "\n  ".join(faults))
        self.updates = int(state["updates"])
        for i, average in enumerate(self.averages):
            copy_into(average, state[str(i)])

    def __repr__(self) -> str:
        return (
            f"WeightAverage(decay={self.decay}, updates={self.updates}, "
            f"{count_elements(self.parameters)})"
        )
