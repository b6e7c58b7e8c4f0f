"""Several optimisers as one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cupybnn.optim.optimizer import Optimizer

__all__ = ["Combined"]


class Combined(Optimizer):
    """Optimisers that make their steps together, each for parameters of its own.

    Such as `Bop` for binary weights and `Adam` for all others.

    Parameters
    ----------
    *optimizers : Optimizer
        With learning rates and schedules of their own.

    Attributes
    ----------
    optimizers : tuple of Optimizer
    groups : list of dict
        The groups of all of them.

    Raises
    ------
    ValueError
        If there is no optimiser, or a parameter is in two of them.

    Examples
    --------
    >>> from cupybnn import nn, optim
    >>> model = nn.Sequential(nn.BinaryLinear(4, 3, rng=0), nn.BatchNorm(3))
    >>> binary, real = optim.parameter_groups(model, (optim.is_binary, {}))
    >>> optimizer = optim.Combined(optim.Bop([binary]), optim.Adam([real]))
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        if not optimizers:
            raise ValueError("A Combined must be made of at least one optimiser; got none.")
        groups = [group for each in optimizers for group in each.groups]
        super().__init__(({"params": group["params"]} for group in groups), lr=0.0)
        self.optimizers = optimizers
        self.groups = groups  # their own dicts: options changed here are changed there

    def step(self) -> None:
        for each in self.optimizers:
            each.step()
        self.steps += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the states of all; a name is "number/" and the name in that optimiser."""
        state = {"steps": np.array(self.steps)}
        for number, each in enumerate(self.optimizers):
            state |= {f"{number}/{name}": array for name, array in each.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        for number, each in enumerate(self.optimizers):
            each.load_state_dict(_part(state, number))

    def _faults(self, state: Mapping[str, np.ndarray]) -> list[str]:
        known = tuple(f"{number}/" for number in range(len(self.optimizers)))
        own = {name: array for name, array in state.items() if not name.startswith(known)}
        faults = super()._faults(own)
        for number, each in enumerate(self.optimizers):
            faults += [f"{number}/ {fault}" for fault in each._faults(_part(state, number))]
        return faults


def _part(state: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    prefix = f"{number}/"
    return {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
