"""Several optimizers combined into one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cupybnn.nn.state import Expected
from cupybnn.optim.optimizer import Optimizer

__all__ = ["Combined"]


class Combined(Optimizer):
    """Optimizers that step together, each with its own parameters.

    For example `Bop` for binary weights and `Adam` for all others.

    Parameters
    ----------
    *optimizers : Optimizer
        Each keeps its own learning rates and schedule.

    Attributes
    ----------
    optimizers : tuple of Optimizer
    groups : list of dict
        The groups of all of them.

    Raises
    ------
    ValueError
        If there is no optimizer, or a parameter is in two of them.
    TypeError
        If one is not an optimizer.

    Examples
    --------
    >>> from cupybnn import nn, optim
    >>> model = nn.Sequential(nn.BinaryLinear(4, 3, rng=0), nn.BatchNorm(3))
    >>> binary, real = optim.parameter_groups(model, (optim.is_binary, {}))
    >>> optimizer = optim.Combined(optim.Bop([binary]), optim.Adam([real]))
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        if not optimizers:
            raise ValueError("A Combined needs at least one optimizer; got none.")
        for each in optimizers:
            if not isinstance(each, Optimizer):
                raise TypeError(f"A Combined takes optimizers; got {type(each).__name__}.")
        groups = [group for each in optimizers for group in each.groups]
        super().__init__(({"params": group["params"]} for group in groups), lr=0.0)
        self.optimizers = optimizers
        self.groups = groups  # the same dicts: a change here is a change there

    def step(self) -> None:
        for each in self.optimizers:
            each.step()
        self.steps += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return all states; names are "number/" and the name in that optimizer."""
        state = {"steps": np.array(self.steps)}
        for number, each in enumerate(self.optimizers):
            state |= {f"{number}/{name}": array for name, array in each.state_dict().items()}
        return state

    def _expected(self) -> dict[str, Expected]:
        expected = {"steps": Expected.count()}
        for number, each in enumerate(self.optimizers):
            expected |= {f"{number}/{name}": rule for name, rule in each._expected().items()}
        return expected

    def _load(self, state: Mapping[str, np.ndarray]) -> None:
        self.steps = int(state["steps"])
        for number, each in enumerate(self.optimizers):
            prefix = f"{number}/"
            each._load(
                {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
            )

    def __repr__(self) -> str:
        lines = [f"({i}): {each!r}" for i, each in enumerate(self.optimizers)]
        return "\n".join(["Combined(", *lines]).replace("\n", "\n  ") + "\n)"
