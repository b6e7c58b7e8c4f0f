"""Averages of the weights over training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from cupybnn.backends.devices import CPU, device_of, to_device
from cupybnn.nn import Parameter
from cupybnn.nn.state import check_state

__all__ = ["WeightAverage"]


class WeightAverage:
    """A running average of parameters: exponential, or of equal weights.

    Of binary weights the latent ones are averaged. The statistics of batch norm belong to the
    weights of the moment: see `cupybnn.nn.refresh_statistics`.

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

    def update(self) -> None:
        """Take the present weights into the average; the first ones are the whole of it."""
        self.updates += 1
        if self.decay is None:
            part = 1 / self.updates
        else:
            part = (1 - self.decay) / (1 - self.decay**self.updates)
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            with device_of(average).scope():
                average += part * (parameter._data - average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context within which the parameters have their averaged values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            present = parameter.write()
            with device_of(present).scope():
                kept = present.copy()
                present[...] = self.averages[i]
            self.averages[i] = kept

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
        self.updates = int(state["updates"])
        for i, average in enumerate(self.averages):
            average[...] = to_device(np.asarray(state[str(i)]), device_of(average))
