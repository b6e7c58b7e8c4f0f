"""Modules made of a list or a dict of modules."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, overload

from cupybnn.autograd import Tensor
from cupybnn.nn.module import Module

__all__ = ["ModuleDict", "ModuleList", "Sequential"]


class _List(Module, MutableSequence):
    """A module that is a list of modules: its attributes, in their order.

    A module without a name is named after its position.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _named(self) -> list[tuple[str, Module]]:
        return [(k, v) for k, v in vars(self).items() if isinstance(v, Module)]

    def _rename(self, items: Iterable[tuple[str, Module]]) -> None:
        """Replace the modules with `items`, and renumber those named by a number."""
        items = list(items)
        for name, _ in self._named():
            delattr(self, name)
        for position, (name, module) in enumerate(items):
            setattr(self, str(position) if name.isdecimal() else name, module)

    def _position(self, number: Any) -> int:
        try:
            position = operator.index(number)
        except TypeError:
            raise TypeError(
                f"The index of a {type(self).__name__} must be an integer or a slice; got "
                f"{number!r}."
            ) from None
        length = len(self)
        if not -length <= position < length:
            raise IndexError(
                f"The index of this {type(self).__name__} must be from {-length} to {length - 1}; "
                f"got {position}."
                if length
                else f"This {type(self).__name__} is empty; got the index {position}."
            )
        return position % length

    def __iter__(self) -> Iterator[Module]:
        return iter([module for _, module in self._named()])

    def __len__(self) -> int:
        return len(self._named())

    @overload
    def __getitem__(self, number: int) -> Module: ...
    @overload
    def __getitem__(self, number: slice) -> _List: ...
    def __getitem__(self, number: Any) -> Any:
        named = self._named()
        if not isinstance(number, slice):
            return named[self._position(number)][1]
        part = self._empty()
        part._rename(named[number])
        part.training = self.training
        return part

    def _empty(self) -> _List:
        """Return an empty list for a slice of this one; a subclass may need other arguments."""
        return ModuleList()

    def __setitem__(self, number: Any, module: Any) -> None:
        named = self._named()
        if isinstance(number, slice):
            named[number] = [("0", _checked_item(self, "0", each)) for each in module]
        else:
            position = self._position(number)
            named[position] = (named[position][0], _checked_item(self, str(number), module))
        self._rename(named)

    def __delitem__(self, number: Any) -> None:
        named = self._named()
        del named[number if isinstance(number, slice) else self._position(number)]
        self._rename(named)

    def insert(self, index: int, value: Any) -> None:
        """Insert a module before position `index`."""
        named = self._named()
        named.insert(index, ("0", _checked_item(self, str(index), value)))
        self._rename(named)

    def append(self, value: Any) -> None:
        """Append a module."""
        self.insert(len(self), value)


class ModuleList(_List):
    """A list of submodules, as in ``self.layers = nn.ModuleList([...])``.

    It behaves like a Python list. Parameters are named by position: "layers.0.weight".

    Parameters
    ----------
    modules : iterable of Module

    Examples
    --------
    >>> from cupybnn import nn
    >>> layers = nn.ModuleList(nn.Linear(4, 4, rng=seed) for seed in range(3))
    >>> layers.append(nn.Linear(4, 2, rng=3))
    >>> [name for name, _ in layers[2:].named_parameters()]
    ['0.weight', '1.weight']
    """

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        self.extend(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "A ModuleList only holds modules and cannot be called: loop over it in the forward() "
            "of your own module, or use nn.Sequential."
        )


class Sequential(_List):
    """Modules applied one after another; also a list of them.

    Parameters
    ----------
    *modules : Module
        Named "0", "1", ... .
    **named : Module
        Further modules, with names.

    Examples
    --------
    >>> from cupybnn import nn
    >>> model = nn.Sequential(nn.Linear(8, 4, rng=0), nn.ReLU())
    >>> model.append(nn.Linear(4, 2, rng=1))
    >>> model[:2]
    Sequential(
      (0): Linear(8, 4)
      (1): ReLU()
    )
    """

    def __init__(self, *modules: Module, **named: Module) -> None:
        for number, module in enumerate(modules):
            self.append(module, str(number))
        for name, module in named.items():
            self.append(module, name)

    def _empty(self) -> Sequential:
        return Sequential()

    def append(self, value: Module, name: str | None = None) -> None:
        """Append a module, by default named after its position."""
        if name is None:
            super().append(value)
            return
        value = _checked_item(self, name, value)
        if name in vars(self):
            raise ValueError(f"The name {name!r} is already used in this {type(self).__name__}.")
        setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


class ModuleDict(Module, MutableMapping):
    """A dict of submodules, as in ``self.heads = nn.ModuleDict({...})``.

    It behaves like a Python dict. Parameters are named by key: "heads.digits.weight".

    Parameters
    ----------
    modules : mapping of str to Module, or iterable of pairs

    Examples
    --------
    >>> from cupybnn import nn
    >>> heads = nn.ModuleDict({"a": nn.Linear(4, 2, rng=0), "b": nn.Linear(4, 3, rng=1)})
    >>> len(list(heads.parameters()))
    2
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]] = ()) -> None:
        self.update(modules)

    def __getitem__(self, key: str) -> Module:
        module = vars(self).get(key)
        if not isinstance(module, Module):
            raise KeyError(key)
        return module

    def __setitem__(self, key: str, module: Module) -> None:
        setattr(self, key, _checked_item(self, key, module))

    def __delitem__(self, key: str) -> None:
        self[key]  # raises KeyError if it is not a module
        delattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter([k for k, v in vars(self).items() if isinstance(v, Module)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "A ModuleDict only holds modules and cannot be called: call the modules that it holds "
            "in the forward() of your own module."
        )


def _checked_item(owner: Module, name: Any, module: Any) -> Module:
    """Return `module` if it is a Module and `name` is valid in a container."""
    kind = type(owner).__name__
    if not isinstance(module, Module):
        raise TypeError(f"{kind} takes modules; got {type(module).__name__} for {name!r}.")
    if not isinstance(name, str):
        raise TypeError(f"The name of a module in a {kind} must be a string; got {name!r}.")
    if not name or "." in name or hasattr(type(owner), name):
        raise ValueError(
            f"The name of a module in a {kind} must not be empty, contain a dot or be the name of "
            f"an attribute of {kind}; got {name!r}."
        )
    return module
