"""The command ``cupybnn``: dispatches to a subcommand, and imports only that one's module.

A command is a module ``cupybnn/cli/<name>.py`` with

* ``add_parser(subparsers)``: adds its own parser to argparse's subparsers, with
  ``set_defaults(run=run)`` left to this module;
* ``run(args) -> int``: does the work and returns the exit code; ``args.signals`` are the `Signals`
  that the command is run within.

Exit codes: 0 success, 1 the work failed or its output could not be written, 2 the command line or
a setting was wrong, 130 interrupted; of ``train``, 143 terminated.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence

import cupybnn
from cupybnn.cli.parser import Parser
from cupybnn.cli.signals import Signals
from cupybnn.cli.streams import complain, flush, usable_streams
from cupybnn.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    GraphError,
    NonFiniteError,
    RankError,
    SettingError,
)
from cupybnn.process import tune_process

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a full-precision or binarized network",
    "evaluate": "measure a trained network on labeled images",
    "predict": "say which class a picture shows",
    "export": "write a trained network as .npz, ONNX or a C header",
    "verify": "check every kernel on this machine against a plain product, element by element",
    "bench": "time the 1-bit product against dense products",
    "info": "print versions, devices, kernels and folders",
}

#: Errors reported in one line: their message says what to do, and a traceback would hide it.
_PLAIN_ERRORS = (
    CheckpointError,
    DataError,
    DeviceError,
    GraphError,
    NonFiniteError,
    OSError,
    RankError,
)


def _top_level_parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    parser = Parser(
        prog="cupybnn",
        description="1-bit matrix products and binarized neural networks.",
        epilog="'cupybnn COMMAND --help' lists a command's options. Exit codes: 0 success, 1 "
        "failure, 2 invalid command line or setting, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"cupybnn {cupybnn.__version__}")
    return parser, parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )


def _load(name: str, subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Import the module of command `name` and let it add its parser."""
    module = importlib.import_module(f"cupybnn.cli.{name}")
    module.add_parser(subparsers)
    parser: argparse.ArgumentParser = subparsers.choices[name]
    parser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Before anything else: what training imports and loads can take seconds.
    with usable_streams(), Signals(wanted=arguments[:1] == ["train"]) as signals:
        try:
            return _main(arguments, signals)
        except KeyboardInterrupt:
            complain("cupybnn: interrupted")
            return 130


def _main(arguments: list[str], signals: Signals) -> int:
    args = argparse.Namespace(who="cupybnn")
    try:
        try:
            args = _parsed(arguments)
            args.who = f"cupybnn {args.command}"
            args.signals, args.words = signals, arguments
            if sys.stderr.isatty():  # as progress bars
                # Imports NumPy, so only after `tune_process`.
                from cupybnn.backends.cpu import announce_compilation

                announce_compilation(_say_compiling)
            return int(args.run(args))
        except BaseException:
            # Whatever a library made of an interruption, it is reported as one.
            word = signals.ended_the_start()
            if not word:
                raise
            complain(f"cupybnn train: {word} before training began")
            return signals.exit_code
        finally:
            flush()  # of the help, too
    except BrokenPipeError:  # the reader (head, less) has closed the pipe
        return 1
    except SettingError as error:
        _complain(args, error)
        return 2
    except _PLAIN_ERRORS as error:
        _complain(args, error)
        return 1
    except MemoryError as error:  # the host's, or CuPy's for a GPU
        complain(f"{args.who}: out of memory. {error}")
        return 1


def _say_compiling() -> None:
    complain("Compiling kernels for this processor, once; it takes ten seconds or more.")


def _complain(args: argparse.Namespace, error: Exception) -> None:
    """Print an error, unless every rank has the same and another one prints it."""
    if getattr(error, "report", True):
        complain(f"{args.who}: {error}")


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line, loading only the named command; exit as argparse does."""
    parser, subparsers = _top_level_parser()
    if arguments and arguments[0] in COMMANDS:
        tune_process()
        _load(arguments[0], subparsers)
        parser_of_command = subparsers.choices[arguments[0]]
    else:
        parser_of_command = parser
        for name, summary in COMMANDS.items():
            subparsers.add_parser(name, help=summary)
        if not arguments:
            parser.print_help(sys.stderr)
            parser.exit(2)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for option in options:
        # argparse would remove "--" from an option's values, and then fail without a message.
        if re.fullmatch(r"--[^=]+=--", option):
            parser_of_command.error(f"argument {option[:-3]}: invalid value: '--'")
    return parser.parse_args(arguments)
