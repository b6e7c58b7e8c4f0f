"""Modules: parts of a model, with named parameters, state and devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import recursive_repr
from typing import Any, ClassVar, TypeVar

import numpy as np

from cupybnn.autograd import Tensor
from cupybnn.autograd.debug import scope
from cupybnn.autograd.state import state as engine
from cupybnn.backends.devices import CPU, Device, resolve, to_device
from cupybnn.nn.attributes import find_held, stray_error
from cupybnn.nn.state import Expected, check_state, copy_into, mismatches
from cupybnn.nn.summary import Row, Summary, inference_nbytes

__all__ = ["Module", "Parameter", "Share"]

_M = TypeVar("_M", bound="Module")


@dataclass(eq=False)
class Share:
    """The part of a binary weight that one of several processes updates.

    Attributes
    ----------
    weight : ndarray, shape (n,)
        Its latent weights.
    grad : ndarray, shape (n,), or None
        Their gradient.
    bring_up_to_date : callable or None
        Writes the signs into the weight's elements, where these may be those of an earlier step.
    """

    weight: Any
    grad: Any = None
    bring_up_to_date: Callable[[], None] | None = None


class Parameter(Tensor):
    """A tensor that a model learns.

    Parameters
    ----------
    data : array_like
        Initial values; floating.
    bits : int
        Bits per element in inference: 1 if only the sign is used.
    limit : float, optional
        Optimizers keep the elements within [-limit, limit].

    Attributes
    ----------
    share : Share or None
        Where several processes train together, optimizers update this part in place of the
        elements, which are then the signs; see `cupybnn.training.team`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> nn.Parameter(np.zeros(3, np.float32)).requires_grad
    True
    """

    __slots__ = ("bits", "limit", "share")

    share: Share | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Parameter:
        self = super().__new__(cls)
        self.share = None  # also in those that earlier versions pickled
        return self

    def __init__(self, data: Any, bits: int = 32, limit: float | None = None) -> None:
        super().__init__(data, requires_grad=True)
        self.bits = bits
        self.limit = limit

    @property
    def data(self) -> Any:
        """The array; see `Tensor.data`."""
        if self.share is not None and self.share.bring_up_to_date is not None:
            self.share.bring_up_to_date()
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Any) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


class Module:
    """Base class of layers and models.

    A subclass assigns parameters and other modules to attributes, and defines `forward`. Names come
    from the attributes: ``model.hidden.weight`` is "hidden.weight". To keep several modules in one
    attribute, use a `ModuleList` or `ModuleDict`.

    Attributes
    ----------
    training : bool
        Whether the module is in training mode (affects batch norm, dropout, stochastic signs).
    buffers : tuple of str
        Names of a class's attributes that hold state arrays which are not learned.

    Raises
    ------
    TypeError
        If a module or parameter is put where it would not be found: in a plain list, tuple, set or
        dict, in an object that is not a module, or in the class itself. A list of modules that are
        also attributes themselves is allowed. Later additions to a list are noticed when
        parameters are next listed. To refer to a module without making it a submodule, keep a
        function that returns it.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.autograd import Tensor
    >>> class Doubled(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = nn.Parameter(np.full((), 2.0, np.float32))
    ...
    ...     def forward(self, x):
    ...         return x * self.factor
    >>> Doubled()(Tensor(np.ones(2, np.float32))).numpy()
    array([2., 2.], dtype=float32)
    """

    training = True
    buffers: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in list(vars(cls).items()):
            if _is_part(value) or any(find_held(value, _is_part)):
                raise TypeError(
                    f"The class attribute {name!r} of {cls.__name__} must not hold modules or "
                    f"parameters, which all its instances would share; got a "
                    f"{type(value).__name__}. Assign it in __init__: self.{name} = ..."
                )
        if vars(cls).get("__slots__"):
            raise TypeError(
                f"The class {cls.__name__} must not define __slots__: a Module finds its parts in "
                f"its __dict__."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, Parameter):
            if value is not None and isinstance(vars(self).get(name), Parameter):
                raise TypeError(
                    f"The parameter {name!r} of {type(self).__name__} can be replaced by an "
                    f"nn.Parameter or None; got {type(value).__name__}. To change its values, "
                    f"assign to its data: .{name}.data = ..."
                )
            if type(value) not in _PLAIN and not isinstance(value, Module):
                self._refuse_strays(
                    [(self, name, value, *each) for each in find_held(value, _is_part)]
                )
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's result, in most modules from a tensor."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward().")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if engine.check is None:
            return self.forward(*args, **kwargs)
        with scope(self):
            return self.forward(*args, **kwargs)

    def path_of(self, inner: Module) -> str:
        """Return the name of a submodule, or its class name if it is not one."""
        names = (name for name, module in self.named_modules() if module is inner)
        return next(names, type(inner).__name__)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Yield (name, module) for this module, whose name is "", and all its submodules.

        A module used in several places is listed once, under its first name.

        Parameters
        ----------
        prefix : str
            Prefix of the names.
        """
        for name, module in self._modules():
            yield ".".join(part for part in (prefix, name) if part), module

    def _modules(self) -> list[tuple[str, Module]]:
        found: list[tuple[str, Module]] = []
        seen: set[int] = set()

        def visit(name: str, module: Module) -> None:
            seen.add(id(module))
            found.append((name, module))
            for attribute, value in list(vars(module).items()):
                if isinstance(value, Module) and id(value) not in seen:
                    visit(f"{name}.{attribute}" if name else attribute, value)

        visit("", self)
        return found

    def _check_parts(self) -> None:
        """Raise TypeError if a part is where it would not be found; see the class."""
        held = []
        for _, module in self._modules():
            for name, value in list(vars(module).items()):
                if type(value) not in _PLAIN and not isinstance(value, Module):
                    held += [(module, name, value, *each) for each in find_held(value, _is_part)]
        self._refuse_strays(held)

    def _refuse_strays(self, held: list[tuple[Any, ...]]) -> None:
        """Raise TypeError if an item of `held` is not also a registered part of this module.

        Parameters
        ----------
        held : list of (owner, attribute, value, place, item)
        """
        if not held:
            return
        modules = [module for _, module in self._modules()]
        known = {id(module) for module in modules}
        known |= {id(v) for m in modules for v in vars(m).values() if isinstance(v, Parameter)}
        for stray in held:
            if id(stray[-1]) not in known:
                raise stray_error(*stray)

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """Yield (name, parameter) in order of definition; a shared one once.

        Parameters
        ----------
        recurse : bool
            Whether to include submodules.
        """
        if recurse:
            self._check_parts()
        seen: set[int] = set()
        for prefix, module in self.named_modules() if recurse else [("", self)]:
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{prefix}.{name}" if prefix else name, value

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters in order of definition."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, array) for the state arrays that are not learned."""
        for prefix, module in self.named_modules():
            for name in module.buffers:
                yield f"{prefix}.{name}" if prefix else name, getattr(module, name)

    def random_state(self) -> np.ndarray | None:
        """Return the state of this module's own random numbers, or None if it has none."""
        return None

    def _state(self) -> dict[str, Any]:
        """Return everything that `state_dict` saves, as the live arrays."""
        arrays = {name: parameter._data for name, parameter in self.named_parameters()}
        arrays |= self.named_buffers()
        for prefix, module in self.named_modules():
            if (random := module.random_state()) is not None:
                arrays[f"{prefix}.random_state" if prefix else "random_state"] = random
        return arrays

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return parameters, buffers and random states by name, as NumPy copies."""
        return {name: np.array(to_device(a, CPU)) for name, a in self._state().items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray], strict: bool = True) -> None:
        """Set parameters, buffers and random states from what `state_dict` returned.

        Parameters
        ----------
        state : mapping of str to array
            Arrays by name.
        strict : bool
            Whether the names must match exactly. If not, missing arrays keep their values and
            unknown ones are ignored.

        Raises
        ------
        TypeError
            If `state` is not a mapping, or a required value in it is not an array.
        ValueError
            If names (when strict), shapes or kinds of dtype do not match, or values do not fit the
            dtype. All mismatches are listed, and nothing has been changed.

        Notes
        -----
        Values may be NaN or infinite, as in the model that was saved.
        """
        own = self._state()
        check_state(state, own, self)
        expected = {name: Expected.like(array) for name, array in own.items()}
        if faults := mismatches(state, expected, strict):
            raise ValueError(
                f"The state does not match this {type(self).__name__}; is it from a model with "
                f"other options?\n  " + "\n  ".join(faults)
            )
        parameters = dict(self.named_parameters())
        for name in own:
            if name in state:
                target = parameters[name].write() if name in parameters else own[name]
                copy_into(target, state[name])

    def train(self: _M, training: bool = True) -> _M:
        """Put this module and its submodules in training mode; return the module."""
        for _, module in self.named_modules():
            module.training = training
        return self

    def eval(self: _M) -> _M:
        """Put this module and its submodules in evaluation mode; return the module."""
        return self.train(False)

    def to(self: _M, device: str | Device) -> _M:
        """Move parameters and buffers to "cpu", "cuda", "cuda:1", ...; return the module."""
        target = resolve(device)
        self._check_parts()
        for _, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    value.move(target)
                elif name in module.buffers:
                    setattr(module, name, to_device(value, target))
        return self

    @property
    def device(self) -> Device:
        """Device of the first parameter; the CPU if there is none."""
        return next((p.device for p in self.parameters()), CPU)

    def zero_grad(self) -> None:
        """Set the gradients of all parameters to None."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def multiply_adds(self) -> tuple[int, int]:
        """Return the products per example in this module: of two signs, and of numbers."""
        return 0, 0

    def summary(self) -> Summary:
        """Return a table of the layers: shapes, parameters, bits and bytes."""
        self._check_parts()
        rows = (module._row(name) for name, module in self.named_modules())
        return Summary(tuple(row for row in rows if row is not None))

    def _row(self, name: str) -> Row | None:
        """Return this module's row of a summary, or None if it has no parameters."""
        parameters = [p for _, p in self.named_parameters(recurse=False)]
        if not parameters:
            return None
        state = parameters + [getattr(self, buffer) for buffer in self.buffers]
        weight = parameters[0]
        binary_products, full_products = self.multiply_adds()
        return Row(
            name=name,
            kind=type(self).__name__,
            shape=weight.shape,
            bits=weight.bits,
            one_bit=sum(p.size for p in parameters if p.bits == 1),
            full=sum(p.size for p in parameters if p.bits != 1),
            nbytes=sum(inference_nbytes(array) for array in state),
            training_nbytes=sum(array.size * array.dtype.itemsize for array in state),
            binary_products=binary_products,
            full_products=full_products,
        )

    @recursive_repr()
    def __repr__(self) -> str:
        lines = [self._settings()] if self._settings() else []
        for name, value in vars(self).items():
            if isinstance(value, Module):
                lines.append(f"({name}): {value!r}".replace("\n", "\n  "))
        if len(lines) == bool(self._settings()):
            return f"{type(self).__name__}({''.join(lines)})"
        return "\n  ".join([f"{type(self).__name__}(", *lines]) + "\n)"

    def _settings(self) -> str:
        """Return what `repr` shows before the submodules."""
        return ""


def _is_part(value: Any) -> bool:
    return isinstance(value, (Module, Parameter))


# Types that cannot hold parts, by far the most common ones: not searched.
_PLAIN = frozenset({Parameter, Tensor, np.ndarray, str, int, float, bool, type(None)})
