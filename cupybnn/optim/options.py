"""Options of optimizers: their rules, and the parameter groups that hold them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NoReturn

from cupybnn.nn import Module, Parameter

__all__ = ["Group", "Rules", "as_parameters", "check_keywords", "count_elements", "option_names"]

# For each option, its rule in words and as a predicate, which may raise TypeError.
Rules = dict[str, tuple[str, Callable[[Any], Any]]]


@cache
def option_names(optimizer: Any) -> tuple[str, ...]:
    """Return the options of an optimizer class that a group may set.

    They are the options with a rule and the arguments of a subclass's ``__init__``.
    """
    names = dict.fromkeys(optimizer.rules)
    for base in optimizer.__mro__:
        # Skip self and the parameters to update, whatever they are called.
        for name, argument in list(inspect.signature(base.__init__).parameters.items())[2:]:
            if argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
                names[name] = None
    return tuple(name for name in names if name != "schedule")


def check_keywords(optimizer: Any, given: Iterable[str]) -> None:
    """Raise TypeError if a keyword is not an option of an optimizer class."""
    unknown = [name for name in given if name not in option_names(optimizer)]
    if unknown:
        raise TypeError(
            f"{optimizer.__name__} has no option {_quoted(unknown)}; it has "
            f"{_quoted([*option_names(optimizer), 'schedule'])}.{_hints(optimizer, unknown)}"
        )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _hints(optimizer: Any, unknown: list[str]) -> str:
    """Suggest the options that were probably meant."""
    hints = []
    for name in unknown:
        others = [
            other
            for other in _related_optimizers(optimizer)
            if name in option_names(other) and other is not optimizer
        ]
        near = difflib.get_close_matches(name, option_names(optimizer), 1)
        if others:
            hints.append(f" {others[0].__name__} has {name!r}.")
        elif near:
            hints.append(f" Did you mean {near[0]!r}?")
    return "".join(hints)


def _related_optimizers(optimizer: Any) -> list[Any]:
    """Return all optimizer classes, subclasses of `optimizer` first."""

    def subclasses(kind: Any) -> list[Any]:
        return [each for sub in kind.__subclasses__() for each in (sub, *subclasses(sub))]

    base = [kind for kind in optimizer.__mro__ if hasattr(kind, "rules")][-1]
    return subclasses(optimizer) + subclasses(base)


class Group(dict):
    """Parameters with options: a dict that validates changes.

    Parameters
    ----------
    optimizer : type
        The optimizer class that defines the options.
    options : mapping
        "params", an iterable of `Parameter`, all options, and optionally a "name".

    Raises
    ------
    ValueError
        If an option is unknown or invalid, at once or when it is changed later.
    TypeError
        If an item of "params" is not a `Parameter`.
    """

    def __init__(self, optimizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._optimizer = optimizer
        self.update(options)

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "params":
            value = as_parameters(value)
        elif name != "name":
            self._check(name, value)
        super().__setitem__(name, value)

    def _check(self, name: str, value: Any) -> None:
        kind = self._optimizer
        if name not in option_names(kind):
            raise ValueError(
                f"A parameter group of {kind.__name__} must have 'params' and may have "
                f"{_quoted([*sorted(option_names(kind)), 'name'])}; got {name!r}."
                f"{_hints(kind, [name])}"
            )
        rule, holds = kind.rules.get(name, ("", lambda value: True))
        try:
            valid = not isinstance(value, bool) and bool(holds(value))
        except (TypeError, ValueError):  # not a number, or an array of several
            valid = not rule
        if rule and not valid:
            raise ValueError(f"The {name!r} of {kind.__name__} must be {rule}; got {value!r}.")

    def update(self, *others: Any, **options: Any) -> None:
        """Change several options; if one is refused, none is changed."""
        new = dict(*others, **options)
        checked = {k: as_parameters(v) if k == "params" else v for k, v in new.items()}
        for name, value in new.items():
            if name not in ("params", "name"):
                self._check(name, value)
        super().update(checked)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return an option, after setting it to `default` if it is missing."""
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Group:  # type: ignore[override,misc]
        self.update(other)
        return self

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "An option of a parameter group cannot be removed: the optimizer needs it. Set it to "
            "another value."
        )

    __delitem__ = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (self._optimizer, dict(self))


def as_parameters(given: Any) -> list[Parameter]:
    """Return parameters as a list, after checking their types."""
    if isinstance(given, Module):
        raise TypeError(
            f"An optimizer takes Parameters; got a {type(given).__name__}. Pass its parameters()."
        )
    given = [given] if isinstance(given, Parameter) else list(given)
    for each in given:
        if not isinstance(each, Parameter):
            raise TypeError(
                f"An optimizer takes Parameters: model.parameters(), or groups of them; got a "
                f"{type(each).__name__}."
            )
    return given


def count_elements(parameters: list[Parameter]) -> str:
    """Describe the number of parameters and elements."""
    plural = "" if len(parameters) == 1 else "s"
    return f"{len(parameters)} parameter{plural} of {sum(p.size for p in parameters):,} elements"
