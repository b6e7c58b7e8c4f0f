"""What optimisers share: parameter groups, learning rates, clipping, state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cupybnn.autograd.storage import module_of
from cupybnn.backends import numpy_threads
from cupybnn.backends.devices import CPU, device_of, to_device
from cupybnn.nn import Parameter
from cupybnn.nn.state import check_state

__all__ = ["Block", "Optimizer", "Rules"]

# For each option what it must be, in words and as a test; the test may fail by TypeError.
Rules = dict[str, tuple[str, Callable[[Any], Any]]]

# Elements updated at a time on the host: the arrays of an update then stay in the cache between its
# steps. Smaller blocks lose more than that to the calls, and to threads that wait for the
# interpreter's lock between them.
_HOST_BLOCK = 1 << 17
# How many passes over an array an update is worth, roughly, when threads are shared out.
_PASSES = 8


@dataclass(slots=True)
class Block:
    """Part of a parameter, flat, with what is needed to update it.

    Attributes
    ----------
    xp : module
        numpy or cupy.
    options : dict
        The parameter's group.
    lr : float
        The learning rate, with schedule and scale.
    weight : ndarray, shape (n,)
        To be changed in place.
    grad : ndarray, shape (n,)
        The gradient, not to be changed.
    slots : list of ndarray, shape (n,)
        What `Optimizer.slots` names, to be changed in place.
    work : ndarray, shape (2, n)
        Memory for in-between results.
    """

    xp: Any
    options: dict[str, Any]
    lr: float
    weight: Any
    grad: Any
    slots: list[Any]
    work: Any


class Optimizer:
    """Base class: calls `update` for every block of every parameter that has a gradient.

    Parameters
    ----------
    parameters : iterable of Parameter, or of dict
        The parameters; or groups of them, each a dict with "params" and the options that are to
        differ from the optimiser's: "lr", "lr_scale" and those of the subclass.
    lr : float
        Learning rate.
    schedule : callable, optional
        Called with the number of steps done; returns the factor for the learning rates of the
        next one. See `cupybnn.optim.schedules`.
    lr_scale : float or callable
        Further factor of a group's learning rate; a callable is given each parameter.
    **options
        Options of the subclass.

    Raises
    ------
    ValueError
        If an option is unknown or not what it must be, or a parameter is in two groups.
    TypeError
        If what is to be updated is no Parameter.

    Attributes
    ----------
    groups : list of dict
        The groups, with all their options; these may be changed between steps.
    steps : int
        Number of steps done.

    Notes
    -----
    A parameter that has a ``limit`` is clipped to it here, after its update.
    """

    # Names of the arrays that an optimiser keeps for each parameter, at first 0.
    slots: ClassVar[tuple[str, ...]] = ()
    # What the options must be; a subclass adds its own.
    rules: ClassVar[Rules] = {
        "lr": ("a finite number >= 0", lambda lr: 0 <= lr < math.inf),
        "lr_scale": (
            "a finite number >= 0 or a function of a parameter",
            lambda scale: callable(scale) or 0 <= scale < math.inf,
        ),
    }

    def __init__(
        self,
        parameters: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float,
        schedule: Callable[[int], float] | None = None,
        lr_scale: float | Callable[[Parameter], float] = 1.0,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "lr_scale": lr_scale, **options}
        given: list[Any] = list(parameters)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        self.groups = [self._checked_group(group, defaults) for group in groups]
        self.schedule = schedule
        self.steps = 0
        everything = [p for group in self.groups for p in group["params"]]
        if len(set(everything)) < len(everything):
            raise ValueError("A parameter must not be in two groups of an optimiser.")
        self._slots: dict[Parameter, tuple[Any, ...]] = {}

    def _checked_group(self, group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        """Return the group with all options, its parameters as a list."""
        unknown = set(group) - set(defaults) - {"params", "name"}
        if unknown or "params" not in group:
            raise ValueError(
                f"A parameter group must have 'params' and may have {', '.join(sorted(defaults))} "
                f"and 'name'; got {', '.join(map(repr, group))}."
            )
        merged = {**defaults, **group, "params": list(group["params"])}
        if not all(isinstance(p, Parameter) for p in merged["params"]):
            raise TypeError("An optimiser takes Parameters: model.parameters(), or groups of them.")
        for name, (rule, holds) in self.rules.items():
            value = merged[name]
            try:
                right = not isinstance(value, bool) and bool(holds(value))
            except (TypeError, ValueError):  # no number at all, or an array of several
                right = False
            if not right:
                raise ValueError(
                    f"The {name!r} of {type(self).__name__} must be {rule}; got {value!r}."
                )
        return merged

    def update(self, block: Block) -> None:
        """Change ``block.weight`` in place."""
        raise NotImplementedError

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        factor = 1.0 if self.schedule is None else self.schedule(self.steps)
        self.steps += 1
        for group in self.groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.size:
                    scale = group["lr_scale"]
                    scale = scale(parameter) if callable(scale) else scale
                    self._update_parameter(group, group["lr"] * factor * scale, parameter)

    def _update_parameter(self, group: dict[str, Any], lr: float, parameter: Parameter) -> None:
        arrays = (parameter.write(), parameter.grad, *self._slots_of(parameter))
        weight, grad, *slots = (array.reshape(-1) for array in arrays)
        limit = parameter.limit
        xp = module_of(weight)

        def update(start: int, stop: int) -> None:
            length = min(_HOST_BLOCK, stop - start) if xp is np else stop - start
            work = xp.empty((2, length), weight.dtype)
            for first in range(start, stop, length):
                at = slice(first, min(first + length, stop))
                part = weight[at]
                kept = [slot[at] for slot in slots]
                self.update(Block(xp, group, lr, part, grad[at], kept, work[:, : part.size]))
                if limit is not None:
                    part.clip(-limit, limit, out=part)

        if xp is np:
            numpy_threads.over(weight.size, weight.size * _PASSES, update)
        else:
            with device_of(weight).scope():
                update(0, weight.size)

    def _slots_of(self, parameter: Parameter) -> tuple[Any, ...]:
        """Return the arrays kept for a parameter, on its device; zeros at first."""
        array = parameter._data
        device = device_of(array)
        kept = self._slots.get(parameter)
        with device.scope():
            if kept is None:
                kept = tuple(module_of(array).zeros_like(array) for _ in self.slots)
            elif kept and device_of(kept[0]) != device:
                kept = tuple(to_device(slot, device) for slot in kept)
        self._slots[parameter] = kept
        return kept

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.groups:
            for parameter in group["params"]:
                parameter.grad = None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self.groups:
            group["lr"] = lr

    def _named_slots(self) -> Iterator[tuple[str, Parameter, int]]:
        """Yield ("group.parameter.slot", parameter, number of the slot)."""
        for i, group in enumerate(self.groups):
            for j, parameter in enumerate(group["params"]):
                for k, slot in enumerate(self.slots):
                    yield f"{i}.{j}.{slot}", parameter, k

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the number of steps and the arrays kept for each parameter: NumPy copies.

        An array's name is "group.parameter.slot", the first two being numbers. Options such as the
        learning rate are not included.
        """
        state = {"steps": np.array(self.steps)}
        for name, parameter, k in self._named_slots():
            state[name] = np.array(to_device(self._slots_of(parameter)[k], CPU))
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned.

        Raises
        ------
        TypeError
            If `state` is no mapping of names to arrays.
        ValueError
            If names or shapes do not fit; all misfits are listed, and nothing has been changed.
        """
        check_state(state, state, self)
        if faults := self._faults(state):
            raise ValueError(
                f"The state does not fit this {type(self).__name__}:\n  " + "\n  ".join(faults)
            )
        self.steps = int(state["steps"])
        for name, parameter, k in self._named_slots():
            slot = self._slots_of(parameter)[k]
            slot[...] = to_device(np.asarray(state[name]), device_of(slot))

    def _faults(self, state: Mapping[str, np.ndarray]) -> list[str]:
        """Return what of `state` does not fit."""
        shapes = {name: parameter.shape for name, parameter, _ in self._named_slots()}
        shapes["steps"] = ()
        faults = [f"missing: {name}" for name in shapes if name not in state]
        faults += [f"unknown: {name}" for name in state if name not in shapes]
        faults += [
            f"{name}: must be of shape {shape}, is {np.shape(state[name])}"
            for name, shape in shapes.items()
            if name in state and np.shape(state[name]) != shape
        ]
        return faults
