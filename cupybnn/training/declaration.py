"""How a setting of a run is declared: once, for everything that reads it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from cupybnn.training.checks import Rule

__all__ = ["Setting", "declared", "setting", "with_attributes", "without_effect"]

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Setting:
    """What a field of `TrainConfig` declares about itself.

    Attributes
    ----------
    rule : Rule
        What its value must be.
    default : object
        None in a setting with `by_binary`.
    help : str
        Its meaning, for ``cupybnn train --help``, the README's table and the docstring.
    group : str
        The heading under which it is listed.
    by_binary : tuple or None
        Defaults of a full-precision and of a binary network, where they differ.
    needs : tuple of str
        The setting without which it has no effect, and the values of that setting that enable it:
        ``("optimizer", "sgd")``. Without values it must be on: a switch, a number other than 0.
    restore : {"same", "reported", "free"} or callable
        Whether a restored run may change it: "same": no; "reported": yes, with a notice, because
        the run then diverges from an uninterrupted one; "free": yes. A function gets the new
        configuration and returns one of these.
    fused : bool
        Whether the fused step supports it or does not depend on it.
    synonyms : tuple of str
        Names that other programs use; an unknown setting with such a name gets this one suggested.
    """

    rule: Rule
    default: Any
    help: str
    group: str
    by_binary: tuple[Any, Any] | None = None
    needs: tuple[str, ...] = ()
    restore: str | Callable[[Any], str] = "same"
    fused: bool = True
    synonyms: tuple[str, ...] = ()

    def may_change(self, config: Any) -> str:
        """Return "same", "reported" or "free" for a run that continues with `config`."""
        return self.restore if isinstance(self.restore, str) else self.restore(config)

    @property
    def text(self) -> str:
        """The help text and what the setting needs (for a choice, only some values may need it)."""
        if not self.needs or self.rule.kind.startswith("{"):
            return self.help
        return f"with --{_either(self.needs)}: {self.help}"

    @property
    def default_text(self) -> str:
        """The default as a help text shows it; empty if it is None."""
        if self.by_binary is not None:
            real, binary = map(self.rule.show, self.by_binary)
            return f"{real}; {binary} with --binary"
        return "" if self.default is None else self.rule.show(self.default)


def setting(group: str, default: Any, rule: Rule, help: str, **more: Any) -> Any:
    """Declare a field of a configuration; `more` are attributes of `Setting`."""
    declaration = Setting(rule, default, help, group, **more)
    return field(default=default, metadata={"setting": declaration})


def declared(cls: Any) -> dict[str, Setting]:
    """Return the declarations of a configuration's fields by name, in order."""
    return {each.name: each.metadata["setting"] for each in fields(cls)}


def with_attributes(cls: C) -> C:
    """Append the declared fields to a configuration's docstring."""
    if cls.__doc__ is None:  # python -OO
        return cls
    lines = ["", "Attributes", "----------"]
    for name, each in declared(cls).items():
        default = f"default {each.default!r}"
        if each.by_binary is not None:
            default = "default {!r}, with `binary` {!r}".format(*each.by_binary)
        text = f"{each.text[0].upper()}{each.text[1:]}.".replace("|x|", "``|x|``")
        lines.append(f"{name} : {each.rule.kind}, {default}")
        lines += textwrap.wrap(text, 92, initial_indent="    ", subsequent_indent="    ")
    cls.__doc__ = f"{cls.__doc__.rstrip()}\n{textwrap.indent(chr(10).join(lines), '    ')}\n    "
    return cls


def without_effect(config: Any) -> list[str]:
    """Return a sentence for each changed setting that has no effect because of another one."""
    sentences = []
    for name, each in declared(type(config)).items():
        value = getattr(config, name)
        if not each.needs or value == each.default:
            continue
        other, *values = each.needs
        present = getattr(config, other)
        if present not in values if values else not present:
            shown = f" {value}" if each.rule.kind.startswith("{") else ""
            option = name if value is not False else f"no_{name}"
            sentences.append(f"--{option}{shown} has no effect without --{_either(each.needs)}.")
    return sentences


def _either(needs: tuple[str, ...]) -> str:
    name, *values = needs
    return f"{name} {' or '.join(values)}".strip()
