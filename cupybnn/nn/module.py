"""Modules: parts of a model, with named parameters, state and devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

from cupybnn.autograd import Tensor
from cupybnn.autograd.debug import scope
from cupybnn.autograd.state import state as engine
from cupybnn.backends.devices import CPU, Device, device_of, is_cupy, resolve, to_device
from cupybnn.backends.interop import type_name
from cupybnn.nn.summary import Summary, summarize

__all__ = ["Module", "Parameter", "check_state"]

_M = TypeVar("_M", bound="Module")


class Parameter(Tensor):
    """A tensor that a model learns.

    Parameters
    ----------
    data : array_like
        First values; floating.
    bits : int
        Bits that inference needs for each element: 1 where only the sign is used.
    limit : float, optional
        Optimisers keep the elements within [-limit, limit].
    """

    __slots__ = ("bits", "limit")

    def __init__(self, data: Any, bits: int = 32, limit: float | None = None) -> None:
        super().__init__(data, requires_grad=True)
        self.bits = bits
        self.limit = limit


class Module:
    """Base class of layers and models.

    A subclass assigns parameters and other modules to attributes, and defines `forward`. Names come
    from the attributes: ``model.hidden.weight`` is "hidden.weight".

    Attributes
    ----------
    training : bool
        Whether the module behaves as in training (batch norm, dropout, stochastic signs).
    buffers : tuple of str
        Names of a class's attributes that hold arrays which are state, but not learned.
    """

    training = True
    buffers: ClassVar[tuple[str, ...]] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's result, from a tensor for most."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if engine.check is None:
            return self.forward(*args, **kwargs)
        with scope(self):
            return self.forward(*args, **kwargs)

    def path_of(self, inner: Module) -> str:
        """Return the name of a module within this one, or its class if it is elsewhere."""
        names = (name for name, module in self.named_modules() if module is inner)
        return next(names, type(inner).__name__)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Yield (name, module) for this module, whose name is "", and all within it."""
        yield prefix, self
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield from value.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """Yield (name, parameter) in the order of definition, a shared one once.

        Parameters
        ----------
        recurse : bool
            Whether to go into the modules within this one.
        """
        seen = set()
        for prefix, module in self.named_modules() if recurse else [("", self)]:
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and value not in seen:
                    seen.add(value)
                    yield f"{prefix}.{name}" if prefix else name, value

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters, in the order of definition."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, array) for the arrays that are state, but not learned."""
        for prefix, module in self.named_modules():
            for name in module.buffers:
                yield f"{prefix}.{name}" if prefix else name, getattr(module, name)

    def random_state(self) -> np.ndarray | None:
        """Return the state of this module's own random numbers, or None if it has none."""
        return None

    def _state(self) -> dict[str, Any]:
        """Everything that `state_dict` saves, as the live arrays."""
        arrays = {name: parameter._data for name, parameter in self.named_parameters()}
        arrays |= self.named_buffers()
        for prefix, module in self.named_modules():
            if (random := module.random_state()) is not None:
                arrays[f"{prefix}.random_state" if prefix else "random_state"] = random
        return arrays

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return parameters, buffers and random states by name: NumPy copies."""
        return {name: np.array(to_device(a, CPU)) for name, a in self._state().items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray], strict: bool = True) -> None:
        """Set parameters, buffers and random states from what `state_dict` returned.

        Parameters
        ----------
        state : mapping of str to array
            Arrays by name.
        strict : bool
            Whether the names must be exactly this module's. If not, missing ones are left as
            they are and unknown ones ignored.

        Raises
        ------
        TypeError
            If `state` is no mapping, or a value in it that is wanted is no array.
        ValueError
            If names (when strict), shapes or kinds of dtype do not fit. All misfits are listed,
            and nothing has been changed.
        """
        own = self._state()
        check_state(state, own, self)
        faults = []
        if strict:
            faults += [f"missing: {name}" for name in own if name not in state]
            faults += [f"unknown: {name}" for name in state if name not in own]
        common = [name for name in own if name in state]
        for name in common:
            mine, given = own[name], state[name]
            if mine.shape != given.shape or mine.dtype.kind != given.dtype.kind:
                faults.append(
                    f"{name}: must be {mine.shape} {mine.dtype}, is {given.shape} {given.dtype}"
                )
        if faults:
            raise ValueError(
                f"The state does not fit this {type(self).__name__}; is it of a model with other "
                f"options?\n  " + "\n  ".join(faults)
            )
        parameters = dict(self.named_parameters())
        for name in common:
            target = parameters[name].write() if name in parameters else own[name]
            device = device_of(target)
            with device.scope():
                target[...] = to_device(state[name], device)

    def train(self: _M, training: bool = True) -> _M:
        """Make this module and all within it behave as in training; returns the module."""
        for _, module in self.named_modules():
            module.training = training
        return self

    def eval(self: _M) -> _M:
        """Make this module and all within it behave as in use; returns the module."""
        return self.train(False)

    def to(self: _M, device: str | Device) -> _M:
        """Move parameters and buffers to "cpu", "cuda", "cuda:1", ...; returns the module."""
        target = resolve(device)
        for _, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    value.move(target)
                elif name in module.buffers:
                    setattr(module, name, to_device(value, target))
        return self

    @property
    def device(self) -> Device:
        """Where the first parameter is; the CPU if there is none."""
        return next((p.device for p in self.parameters()), CPU)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def multiply_adds(self) -> tuple[int, int]:
        """Return how many products an example takes here: of two signs, and of numbers."""
        return 0, 0

    def summary(self) -> Summary:
        """Return a table of the layers: shapes, parameters, bits and bytes; print it to see it."""
        return summarize(self)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}({self._settings()})"]
        for name, value in vars(self).items():
            if isinstance(value, Module):
                lines.append(f"  {name}: " + repr(value).replace("\n", "\n  "))
        return "\n".join(lines)

    def _settings(self) -> str:
        """What `repr` shows between the parentheses."""
        return ""


def check_state(state: Any, names: Iterable[str], owner: Any) -> None:
    """Raise TypeError unless `state` is a mapping whose values for `names` are arrays.

    Parameters
    ----------
    state
        What ``owner.load_state_dict`` was given.
    names : iterable of str
        Those that are looked at; they may be missing.
    owner : object
        Its class is named in the error.
    """
    what = f"The 'state' of {type(owner).__name__}.load_state_dict must"
    if not isinstance(state, Mapping):
        raise TypeError(f"{what} be a mapping of names to arrays; got {type_name(state)}.")
    given = {name: state[name] for name in names if name in state}
    wrong = [
        f"{type_name(value)} for {name!r}"
        for name, value in given.items()
        if not isinstance(value, (np.ndarray, np.generic)) and not is_cupy(value)
    ]
    if wrong:
        raise TypeError(f"{what} hold NumPy or CuPy arrays; got {', '.join(wrong)}.")
