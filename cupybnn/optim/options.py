"""Options of optimisers: what they must be, and groups of parameters that have them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NoReturn

from cupybnn.nn import Module, Parameter

__all__ = ["Group", "Rules", "as_parameters", "check_keywords", "count_elements", "option_names"]

# For each option what it must be, in words and as a test; the test may fail by TypeError.
Rules = dict[str, tuple[str, Callable[[Any], Any]]]


@cache
def option_names(optimizer: Any) -> tuple[str, ...]:
    """Return the options of a class of optimisers that a group may set.

    They are those with a rule, and what a subclass names in the signature of its ``__init__``.
    """
    names = dict.fromkeys(optimizer.rules)
    for base in optimizer.__mro__:
        # Without self and the parameters to be updated, whatever they are called.
        for name, argument in list(inspect.signature(base.__init__).parameters.items())[2:]:
            if argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
                names[name] = None
    return tuple(name for name in names if name != "schedule")


def check_keywords(optimizer: Any, given: Iterable[str]) -> None:
    """Raise TypeError if a keyword is no option of a class of optimisers."""
    unknown = [name for name in given if name not in option_names(optimizer)]
    if unknown:
        raise TypeError(
            f"{optimizer.__name__} has no option {_quoted(unknown)}; it has "
            f"{_quoted([*option_names(optimizer), 'schedule'])}.{_hints(optimizer, unknown)}"
        )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _hints(optimizer: Any, unknown: list[str]) -> str:
    """Return sentences about the options that were probably meant."""
    hints = []
    for name in unknown:
        others = [
            other
            for other in _relatives(optimizer)
            if name in option_names(other) and other is not optimizer
        ]
        near = difflib.get_close_matches(name, option_names(optimizer), 1)
        if others:
            hints.append(f" {others[0].__name__} has {name!r}.")
        elif near:
            hints.append(f" Did you mean {near[0]!r}?")
    return "".join(hints)


def _relatives(optimizer: Any) -> list[Any]:
    """Return all optimisers, those first that extend `optimizer`."""

    def below(kind: Any) -> list[Any]:
        return [each for sub in kind.__subclasses__() for each in (sub, *below(sub))]

    base = [kind for kind in optimizer.__mro__ if hasattr(kind, "rules")][-1]
    return below(optimizer) + below(base)


class Group(dict):
    """Parameters with options: a dict that checks what is changed in it.

    Parameters
    ----------
    optimizer : type
        The class of optimisers whose options these are.
    options : mapping
        "params", an iterable of `Parameter`, all options, and perhaps a "name".

    Raises
    ------
    ValueError
        If an option is unknown or not what it must be, at once or when it is changed later.
    TypeError
        If something in "params" is no `Parameter`.
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
            right = not isinstance(value, bool) and bool(holds(value))
        except (TypeError, ValueError):  # no number at all, or an array of several
            right = not rule
        if rule and not right:
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
        """Return an option, set before if it was not there."""
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Group:  # type: ignore[override,misc]
        self.update(other)
        return self

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "An option of a parameter group cannot be removed: the optimiser needs it. Set it to "
            "another value."
        )

    __delitem__ = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (self._optimizer, dict(self))


def as_parameters(given: Any) -> list[Parameter]:
    """Return parameters as a list, if that is what they are."""
    if isinstance(given, Module):
        raise TypeError(
            f"An optimiser takes Parameters; got a {type(given).__name__}. Give its parameters()."
        )
    given = [given] if isinstance(given, Parameter) else list(given)
    for each in given:
        if not isinstance(each, Parameter):
            raise TypeError(
                f"An optimiser takes Parameters: model.parameters(), or groups of them; got a "
                f"{type(each).__name__}."
            )
    return given


def count_elements(parameters: list[Parameter]) -> str:
    """Return how many parameters and elements there are, in words."""
    plural = "" if len(parameters) == 1 else "s"
    return f"{len(parameters)} parameter{plural} of {sum(p.size for p in parameters):,} elements"
