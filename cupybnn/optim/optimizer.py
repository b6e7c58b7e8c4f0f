"""Base class of optimizers: parameter groups, learning rates, clipping, state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cupybnn import backends
from cupybnn.autograd.storage import module_of
from cupybnn.backends.devices import CPU, device_of, to_device
from cupybnn.nn import Module, Parameter
from cupybnn.nn.state import Expected, check_state, copy_into, mismatches, statistics_dtype
from cupybnn.optim.options import Group, Rules, check_keywords, count_elements

__all__ = ["Block", "Optimizer", "Rules"]

# Elements updated at a time on the host, so that the arrays of an update stay in cache between its
# steps. Smaller blocks lose more than that to call overhead and to threads waiting for the
# interpreter lock.
_HOST_BLOCK = 1 << 17
# Rough cost of an update, in passes over an array, for choosing the number of threads.
_PASSES = 8


@dataclass(slots=True)
class Block:
    """A flat part of a parameter, with everything needed to update it.

    Attributes
    ----------
    xp : module
        numpy or cupy.
    options : dict
        The parameter's group.
    lr : float
        The learning rate, including schedule and scale.
    weight : ndarray, shape (n,)
        Update it in place. Like all arrays here it is at least float32: for a float16 parameter, a
        copy that is rounded after the update.
    grad : ndarray, shape (n,)
        The gradient; read-only.
    slots : list of ndarray, shape (n,)
        The arrays named in `Optimizer.slots`; update them in place.
    work : ndarray, shape (2, n)
        Scratch memory.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn, optim
    >>> class Momentum(optim.Optimizer):
    ...     slots = ("mean",)  # an array for each parameter, kept in checkpoints
    ...
    ...     def update(self, block):
    ...         (mean,) = block.slots
    ...         mean *= 0.9
    ...         mean += block.grad
    ...         block.weight -= block.lr * mean
    >>> optimizer = Momentum(nn.Linear(2, 1).parameters(), lr=0.1)
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
        The parameters, at least one; or groups of them, each a dict with "params" and the options
        that differ from the optimizer's: "lr", "lr_scale" and those of the subclass.
    lr : float
        Learning rate.
    schedule : callable, optional
        Called with the number of steps done; returns the learning-rate factor for the next step.
        See `cupybnn.optim.schedules`.
    lr_scale : float or callable
        Additional factor of a group's learning rate; a callable receives each parameter.
    **options
        Options of the subclass.

    Raises
    ------
    ValueError
        If an option is invalid, a group has an unknown option, a parameter appears twice, or there
        are no parameters.
    TypeError
        If a keyword is not an option of this optimizer, or an item is not a Parameter.

    Attributes
    ----------
    groups : list of dict
        The groups, with all their options. Options may be changed between steps, and are checked
        again.
    steps : int
        Number of steps done.

    Notes
    -----
    A parameter with a ``limit`` is clipped to it after its update. The slots of a float16 parameter
    are float32, and its update is computed in float32.

    A subclass defines `update`, lists the arrays that it keeps in `slots` and the rules for its
    options in `rules`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn, optim
    >>> class SignSGD(optim.Optimizer):
    ...     def update(self, block):
    ...         block.weight -= block.lr * np.sign(block.grad)
    >>> layer = nn.Linear(2, 1, rng=0)
    >>> optimizer = SignSGD(layer.parameters(), lr=0.1)
    """

    # Names of the arrays that an optimizer keeps for each parameter, initially 0.
    slots: ClassVar[tuple[str, ...]] = ()
    # Those that are never negative.
    nonnegative: ClassVar[tuple[str, ...]] = ()
    # Rules for the options; a subclass adds its own.
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
        kind = type(self)
        check_keywords(kind, options)
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"The 'schedule' of {kind.__name__} must be None or a function of the number of "
                f"steps; got {schedule!r}. See cupybnn.optim.schedules."
            )
        defaults = {"lr": lr, "lr_scale": lr_scale, **options}
        self.groups = [Group(kind, {**defaults, **group}) for group in _as_groups(parameters)]
        self.schedule = schedule
        self.steps = 0
        everything = [p for group in self.groups for p in group["params"]]
        if not everything:
            raise ValueError(
                f"The {kind.__name__} must have parameters to update; got none. A generator such "
                f"as model.parameters() is empty after its first use, and a model whose layers "
                f"are not attributes has no parameters."
            )
        if len({id(p) for p in everything}) < len(everything):
            raise ValueError("A parameter must appear only once in the groups of an optimizer.")
        self._slots: dict[Parameter, tuple[Any, ...]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.rules:
            raise AttributeError(
                f"Set an option of an optimizer in its groups: for group in optimizer.groups: "
                f"group[{name!r}] = {value!r}."
            )
        super().__setattr__(name, value)

    def update(self, block: Block) -> None:
        """Change ``block.weight`` in place."""
        raise NotImplementedError

    def step(self) -> None:
        """Update every parameter that has a gradient.

        Raises
        ------
        ValueError
            If a gradient's shape differs from its parameter's; nothing has been changed.
        """
        for group in self.groups:
            for parameter in group["params"]:
                grad = None if parameter.share is not None else parameter.grad
                if grad is not None and grad.shape != parameter.shape:
                    raise ValueError(
                        f"The gradient of a parameter must have its shape {parameter.shape}; got "
                        f"{grad.shape}."
                    )
        factor = 1.0 if self.schedule is None else self.schedule(self.steps)
        self.steps += 1
        for group in self.groups:
            for parameter in group["params"]:
                share = parameter.share
                grad = parameter.grad if share is None else share.grad
                if grad is not None and grad.size:
                    scale = group["lr_scale"]
                    scale = scale(parameter) if callable(scale) else scale
                    self._update_parameter(group, group["lr"] * factor * scale, parameter)

    def _update_parameter(self, group: dict[str, Any], lr: float, parameter: Parameter) -> None:
        share = parameter.share
        own = (parameter.write(), parameter.grad) if share is None else (share.weight, share.grad)
        arrays = (*own, *self._slots_of(parameter))
        weight, grad, *slots = (array.reshape(-1) for array in arrays)
        limit = parameter.limit
        if self._pass_over(group, lr, limit, weight, grad, slots):
            return
        xp = module_of(weight)
        dtype = statistics_dtype(weight.dtype)

        def update(start: int, stop: int) -> None:
            length = min(_HOST_BLOCK, stop - start) if xp is np else stop - start
            work = xp.empty((2, length), dtype)
            for first in range(start, stop, length):
                at = slice(first, min(first + length, stop))
                kept = [slot[at] for slot in slots]
                stored = weight[at]
                part = stored.astype(dtype, copy=False)
                slope = grad[at].astype(dtype, copy=False)
                self.update(Block(xp, group, lr, part, slope, kept, work[:, : part.size]))
                if limit is not None:
                    part.clip(-limit, limit, out=part)
                if part is not stored:
                    stored[...] = part

        with device_of(weight).scope():
            backends.get(weight).parallel_for(weight.size, weight.size * _PASSES, update)

    def _pass_over(
        self, group: dict[str, Any], lr: float, limit: float | None, weight: Any, grad: Any,
        slots: list[Any],
    ) -> bool:  # fmt: skip
        """Update and clip a flat weight in one pass of compiled code; return whether that was done.

        A subclass that has such a pass overrides this, for its own `update` alone.
        """
        return False

    def _slots_of(self, parameter: Parameter) -> tuple[Any, ...]:
        """Return the arrays kept for a parameter, on its device; initially zeros."""
        array = parameter._data if parameter.share is None else parameter.share.weight
        device = device_of(array)
        kept = self._slots.get(parameter)
        with device.scope():
            if kept is None:
                zeros, dtype = module_of(array).zeros_like, statistics_dtype(array.dtype)
                kept = tuple(zeros(array, dtype=dtype) for _ in self.slots)
            elif kept and device_of(kept[0]) != device:
                kept = tuple(to_device(slot, device) for slot in kept)
        self._slots[parameter] = kept
        return kept

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for group in self.groups:
            for parameter in group["params"]:
                parameter.grad = None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self.groups:
            group["lr"] = lr

    def _named_slots(self) -> Iterator[tuple[str, Parameter, int]]:
        """Yield ("group.parameter.slot", parameter, slot number)."""
        for i, group in enumerate(self.groups):
            for j, parameter in enumerate(group["params"]):
                for k, slot in enumerate(self.slots):
                    yield f"{i}.{j}.{slot}", parameter, k

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the number of steps and the arrays kept for each parameter, as NumPy copies.

        An array is named "group.parameter.slot", where group and parameter are numbers. Options
        such as the learning rate are not included.
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
            If `state` is not a mapping of names to arrays.
        ValueError
            If names, shapes or dtypes do not match, the number of steps is not an integer >= 0, or
            an array holds values that training cannot continue from: NaN, an infinity, a negative
            mean square. All mismatches are listed, and nothing has been changed.
        """
        check_state(state, state, self)
        if faults := mismatches(state, self._expected()):
            raise ValueError(
                f"The state does not match this {type(self).__name__}:\n  " + "\n  ".join(faults)
            )
        self._load(state)

    def _expected(self) -> dict[str, Expected]:
        """Return the requirements of the state arrays."""
        expected = {"steps": Expected.count()}
        for name, parameter, k in self._named_slots():
            least = 0 if self.slots[k] in self.nonnegative else None
            dtype = statistics_dtype(parameter.dtype)
            expected[name] = Expected(parameter.shape, dtype, finite=True, least=least)
        return expected

    def _load(self, state: Mapping[str, np.ndarray]) -> None:
        """Load a state that has been checked."""
        self.steps = int(state["steps"])
        for name, parameter, k in self._named_slots():
            copy_into(self._slots_of(parameter)[k], state[name])

    def __repr__(self) -> str:
        schedule = "" if self.schedule is None else f"schedule={self.schedule!r}, "
        descriptions = [_describe(group) for group in self.groups]
        name = type(self).__name__
        if len(descriptions) == 1:
            return f"{name}({schedule}{descriptions[0]})"
        lines = [f"({i}): {text}" for i, text in enumerate(descriptions)]
        return "\n  ".join([f"{name}({schedule}".rstrip(", "), *lines]) + "\n)"


def _as_groups(parameters: Any) -> list[Mapping[str, Any]]:
    """Convert the parameters of an optimizer to groups."""
    if isinstance(parameters, (Module, Parameter, Mapping)):
        return [parameters if isinstance(parameters, Mapping) else {"params": parameters}]
    given = list(parameters)
    if not any(isinstance(each, Mapping) for each in given):
        return [{"params": given}]
    for each in given:
        if not isinstance(each, Mapping) or "params" not in each:
            raise ValueError(
                f"Parameter groups must all be dicts with 'params'; got "
                f"{'one without' if isinstance(each, Mapping) else type(each).__name__}."
            )
    return given


def _describe(group: Group) -> str:
    """Describe a group's name, options and size, for `repr`."""
    names = ["name"] if "name" in group else []
    names += [name for name in group if name not in ("params", "name", "lr_scale")]
    options = [f"{name}={group[name]!r}" for name in names]
    scale = group["lr_scale"]
    if callable(scale) or scale != 1:
        options.append(f"lr_scale={getattr(scale, '__name__', repr(scale))}")
    return ", ".join([*options, count_elements(group["params"])])
