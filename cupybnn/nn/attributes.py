"""Find modules and parameters in places that a module does not search."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

__all__ = ["find_held", "stray_error"]

_CONTAINERS = (list, tuple, set, frozenset, deque, dict)
# Objects whose attributes are not part of a model.
_CLOSED = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
# The most common values, skipped first: modules are walked in every training step.
_SIMPLE = frozenset({int, float, bool, str, bytes, type(None)})


def find_held(value: Any, wanted: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """Yield (place, item) for the items of a container, or of an object's attributes.

    Nested containers are searched. For an object, only its own attributes and the containers in
    them are searched; functions, weak references and objects with ``__slots__`` are not.

    Parameters
    ----------
    value : object
    wanted : callable
        Whether to yield an item.

    Yields
    ------
    place : str
        For example ``[0]``, ``['encoder']`` or ``.hidden``.
    item : object
    """
    if isinstance(value, _CONTAINERS):
        yield from _in_container(value, "", wanted, set())
    elif not isinstance(value, _CLOSED):
        for name, item in list(getattr(value, "__dict__", {}).items()):
            if type(item) in _SIMPLE:
                continue
            if wanted(item):
                yield f".{name}", item
            elif isinstance(item, _CONTAINERS):
                yield from _in_container(item, f".{name}", wanted, set())


def _in_container(
    value: Any, place: str, wanted: Callable[[Any], bool], seen: set[int]
) -> Iterator[tuple[str, Any]]:
    if id(value) in seen:  # a list that contains itself
        return
    seen.add(id(value))
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        if type(item) in _SIMPLE:
            continue
        here = f"{place}[{key!r}]"
        if wanted(item):
            yield here, item
        elif isinstance(item, _CONTAINERS):
            yield from _in_container(item, here, wanted, seen)


def stray_error(owner: Any, name: str, value: Any, place: str, item: Any) -> TypeError:
    """Return the error for a module or parameter that its owner would not find.

    Parameters
    ----------
    owner : Module
    name : str
        The attribute of `owner`.
    value : object
        The attribute's value.
    place, item
        As `find_held` yields them.
    """
    kind = type(value).__name__
    if not isinstance(value, _CONTAINERS):
        fix = f"nn.Module as the base class of {kind}"
    elif not hasattr(item, "named_modules"):
        fix = "an attribute of its own for each parameter"
    else:
        fix = f"nn.Module{'Dict' if isinstance(value, dict) else 'List'} for {name!r}"
    return TypeError(
        f"The attribute {name!r} of {type(owner).__name__} must not hold a {type(item).__name__} "
        f"(at {name}{place}) in a {kind}, where parameters(), state_dict() and to() do not find "
        f"it. Use {fix}."
    )
