"""``cupybnn train``: the command line of the trainer."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupybnn.errors import NonFiniteError
    from cupybnn.training import TrainConfig, Trainer

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``cupybnn train``.

    Options carry no default here, so that one that was given can be told from one that was not:
    the defaults are those of `TrainConfig`, a recipe or the restored run.
    """
    parser = subparsers.add_parser(
        "train",
        help="train a full-precision or binarized network",
        description="Train a network of three hidden layers on MNIST or on the bundled digits.",
        epilog="Every option may be spelled with hyphens too (--log-dir), and every switch can be "
        "turned off again, over a recipe or a restored run, with --no_ before its name.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "data_dir", nargs="?", help="folder with MNIST's four IDX files, plain or .gz"
    )
    _option(parser, "dataset", "DATA", "auto, mnist or digits (default: auto)")
    _option(parser, "log_dir", "DIR", "make a numbered run folder below DIR: records, checkpoints")
    _option(parser, "restore", "DIR", "go on from the newest checkpoint of a run folder")
    _option(parser, "n_hidden", "H", "units in each hidden layer (default: 512)", int)
    _option(parser, "reg", "R", "factor of the L1 penalty on weights (default: 1e-4)", float)
    _option(parser, "lr", "LR", "learning rate of Adam (default: 1e-3)", float)
    _option(parser, "keep_prob", "P", "chance of a unit not to be dropped (default: 1.0)", float)
    _option(parser, "batch_size", "B", "images in a step (default: 128)", int)
    _option(parser, "max_steps", "N", "step at which training ends (default: 1000)", int)
    _option(parser, "eval_every_n", "N", "steps between evaluations (default: 100)", int)
    _switch(parser, "binary", "binary weights and activations in the hidden layers")
    _switch(parser, "first", "with --binary: binary weights in the first layer too")
    _switch(parser, "last", "with --binary: binary weights and inputs in the last layer too")
    _switch(parser, "xnor", "with --binary: do the binary products with xnor_gemm")
    _switch(parser, "batch_norm", "batch normalization after each hidden product")
    _option(
        parser,
        "ste",
        "STE",
        "pseudo-gradient of sign: hard_tanh, clipped_grad (the original "
        "program's), identity (default: hard_tanh)",
    )
    _option(parser, "dtype", "T", "float32 or float64 (default: float32)")
    _option(parser, "device", "D", "auto, cpu, cuda or cuda:N (default: auto)")
    _option(parser, "gpu", "N", "the same as --device cuda:N", int)
    _option(parser, "seed", "S", "of weights, order and dropout (default: 0)", int)
    _option(
        parser,
        "validation",
        "N",
        "evaluate on the last N training images, which are held out, instead of on the test set",
        int,
    )
    _switch(parser, "debug", "stop at the first NaN or infinity, in the debugger on a terminal")


def _option(parser: Any, name: str, metavar: str, text: str, kind: Any = str) -> None:
    parser.add_argument(*_spellings(name), dest=name, metavar=metavar, type=kind, help=text)


def _switch(parser: Any, name: str, text: str) -> None:
    parser.add_argument(*_spellings(name), dest=name, action="store_const", const=True, help=text)
    parser.add_argument(
        *_spellings("no_" + name),
        dest=name,
        action="store_const",
        const=False,
        help=argparse.SUPPRESS,
    )


def _spellings(name: str) -> list[str]:
    return sorted({"--" + name, "--" + name.replace("_", "-")}, key=lambda s: s.count("-"))


def run(args: argparse.Namespace) -> int:
    """Train as `args` say; return the exit code."""
    from cupybnn.cli.console import Console
    from cupybnn.errors import NonFiniteError
    from cupybnn.training import Trainer

    config = _config(vars(args))
    console = Console()
    try:
        trainer = Trainer(config, [console])
        with _signals(trainer) as received:
            trainer.run()
    except NonFiniteError as error:
        return _debug(error)
    finally:
        console.close()
    return 128 + received[0] if received else 0


def _config(given: dict[str, Any]) -> TrainConfig:
    """Put the options that were given over the defaults or the restored run's settings."""
    from cupybnn.training import TrainConfig, restored_config

    known = {field.name for field in fields(TrainConfig)}
    settings = {name: value for name, value in given.items() if name in known}
    if "gpu" in given:
        device = f"cuda:{given['gpu']}"
        if given["gpu"] < 0 or settings.get("device", device) not in (device, "cuda"):
            raise ValueError(
                f"The option --gpu must be a device number, from 0, and agree with --device; got "
                f"--gpu {given['gpu']} and --device {settings.get('device', '(none)')}."
            )
        settings["device"] = device
    if "restore" in settings:
        return restored_config(settings.pop("restore"), **settings)
    return TrainConfig.from_mapping(settings)


@contextlib.contextmanager
def _signals(trainer: Trainer) -> Iterator[list[int]]:
    """Let the first Ctrl-C or SIGTERM end the run after its step, the second at once.

    Yields a list that the first signal's number is put into.
    """
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        trainer.request_stop()
        for each, handler in before.items():
            signal.signal(each, handler)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _debug(error: NonFiniteError) -> int:
    """Tell where the first NaN or infinity came up and, on a terminal, open the debugger there."""
    step = "" if error.step is None else f" at step {error.step}"
    print(f"cupybnn train: not finite{step}: {error}", file=sys.stderr)
    if sys.stdin.isatty() and sys.stdout.isatty():
        import pdb

        print("The debugger is where it was made: 'up' goes to its operation, 'q' leaves.")
        pdb.post_mortem(error.__traceback__)
    return 1
