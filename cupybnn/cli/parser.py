"""An argument parser that reports usage errors in one line, with the nearest options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from cupybnn.spelling import nearest

__all__ = ["Parser"]

_SHORT = 6  # lines; a longer usage message is not printed with errors


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` without abbreviations.

    ``--log-dir`` is accepted for ``--log_dir``. For other programs' names of an option, the error
    message suggests ours: see `also`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})
        self._synonyms: dict[str, tuple[str, ...]] = {}

    def also(self, option: str, synonyms: Iterable[str]) -> None:
        """Suggest `option`, given without dashes, for each unknown option in `synonyms`."""
        self._synonyms[option] = tuple(synonyms)

    def error(self, message: str) -> NoReturn:
        """Print the error in one line, after the usage if that is short, and exit with code 2."""
        usage = self.format_usage()
        message = message.rstrip(".")
        if usage.count("\n") <= _SHORT:
            self.print_usage(sys.stderr)
        else:
            message += f"{'' if message.endswith('?') else '.'} Options: {self.prog} --help"
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse `args`; report unknown arguments here, where the options are known."""
        given = self._with_underscores(sys.argv[1:] if args is None else args)
        if self._subparsers is None:
            self._check_spellings(given)
        found, rest = super().parse_known_args(given, namespace)
        if rest:
            options = [word for word in rest if word.startswith("-") and word.strip("-")]
            unexpected = f"unexpected argument: {rest[0]!r}"
            self.error(self._unknown(options[0]) if options else unexpected)
        return found, rest

    def _with_underscores(self, args: Sequence[str]) -> list[str]:
        """Return `args` with options spelled as they were declared."""
        words = list(args)
        for i, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            spelled = "--" + name[2:].replace("-", "_")
            if name.startswith("--") and spelled in self._option_string_actions:
                words[i] = spelled + equals + value
        return words

    def _check_spellings(self, words: Iterable[str]) -> None:
        """Report the first unknown option, before its value is parsed as something else."""
        for word in words:
            if word == "--":
                return
            if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                self.error(self._unknown(word))

    def _unknown(self, word: str) -> str:
        option = word.partition("=")[0]
        names: dict[str, tuple[str, ...]] = {}
        for action in self._actions:
            if action.help is argparse.SUPPRESS:
                continue
            for spelling in action.option_strings[:1]:
                names[spelling.lstrip("-")] = self._synonyms.get(spelling.lstrip("-"), ())
        wanted = option.strip("-").replace("-", "_")
        off = {name for name in names if f"--no_{name}" in self._option_string_actions}
        near = [f"--{name}" for name in nearest(wanted, names)]
        if wanted.startswith("no_") and off:
            switches = {name: names[name] for name in off}
            near = [f"--no_{name}" for name in nearest(wanted[3:], switches)] or near
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"unknown option {option}{hint}"
