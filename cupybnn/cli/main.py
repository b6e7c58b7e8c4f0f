"""The command ``cupybnn``: reads its first word, then loads only that command's module.

A command is a module ``cupybnn/cli/<name>.py`` with

* ``add_parser(subparsers)``: adds its own parser to argparse's subparsers, with
  ``set_defaults(run=run)`` left to this module;
* ``run(args) -> int``: does the work and returns the exit code.

Exit codes: 0 success, 1 the work failed, 2 the command line or an argument was wrong,
130 interrupted.
"""

from __future__ import annotations

import argparse
import dis
import importlib
import os
import sys
from collections.abc import Sequence

import cupybnn
from cupybnn.cli.parser import Parser
from cupybnn.errors import CheckpointError, DataError, DeviceError, GraphError, NonFiniteError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a full-precision or binarized network",
    "verify": "compare every kernel of this machine with a plain product, element by element",
    "bench": "time the 1-bit product against dense products",
    "info": "print versions, devices, kernels and folders",
}

#: Errors that are told in one line: their message says what to do, a traceback would hide it.
_PLAIN_ERRORS = (
    CheckpointError,
    DataError,
    DeviceError,
    GraphError,
    NonFiniteError,
    OSError,
)


def _top_level_parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    parser = Parser(
        prog="cupybnn", description="1-bit matrix products and binarized neural networks."
    )
    parser.add_argument("--version", action="version", version=f"cupybnn {cupybnn.__version__}")
    return parser, parser.add_subparsers(dest="command", metavar="COMMAND", required=True)


def _load(name: str, subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Import the module of command `name` and let it add its parser."""
    module = importlib.import_module(f"cupybnn.cli.{name}")
    module.add_parser(subparsers)
    parser: argparse.ArgumentParser = subparsers.choices[name]
    parser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("cupybnn: interrupted", file=sys.stderr)
        return 130


def _main(arguments: list[str]) -> int:
    parser, subparsers = _top_level_parser()
    if arguments and arguments[0] in COMMANDS:
        _load(arguments[0], subparsers)
    else:
        for name, summary in COMMANDS.items():
            subparsers.add_parser(name, help=summary)
    args = parser.parse_args(arguments)
    try:
        code = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) went away: no error, but keep the exit from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError) as error:
        if not _is_ours(error):
            raise
        print(f"cupybnn {args.command}: {error}", file=sys.stderr)
        return 2
    except _PLAIN_ERRORS as error:
        print(f"cupybnn {args.command}: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:  # of the host, or CuPy's of a GPU
        print(f"cupybnn {args.command}: out of memory. {error}", file=sys.stderr)
        return 1
    return int(code)


def _is_ours(error: BaseException) -> bool:
    """Whether a ``raise`` statement of cupybnn made `error`: then it is told in one line.

    One that came out of NumPy or another library, even straight below a line of cupybnn, is a bug
    and keeps its traceback.
    """
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code.co_code
    module = traceback.tb_frame.f_globals.get("__name__", "")
    raised_here = code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised_here and module.split(".")[0] == "cupybnn"
