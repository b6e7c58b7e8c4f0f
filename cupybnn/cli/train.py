"""``cupybnn train``: the command line of the trainer."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.cli.signals import Signals
from cupybnn.errors import NonFiniteError, SettingError

if TYPE_CHECKING:
    from cupybnn.training import TrainConfig

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``cupybnn train``.

    Options carry no default here, so that one that was given can be told from one that was not:
    the defaults are those of `TrainConfig`, a recipe or the restored run.
    """
    parser = subparsers.add_parser(
        "train",
        help="train a full-precision or binarized network",
        description="Train a multilayer perceptron on MNIST or on the bundled digits.",
        epilog="Every option may be spelled with hyphens too (--log-dir), and every switch can be "
        "turned off again, over a recipe or a restored run, with --no_ before its name. Defaults "
        "are in parentheses.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "data_dir", nargs="?", help="folder with MNIST's four IDX files, plain or .gz"
    )
    about = parser.add_argument_group
    group = about("what to train on")
    _option(group, "dataset", "DATA", "auto, mnist or digits (default: auto)")
    _option(group, "validation", "N", "evaluate on the last N training images, held out (0)", int)
    _option(group, "batch_size", "B", "images in a step (128)", int)
    _option(group, "seed", "S", "of weights, order and dropout (0)", int)

    group = about("the network")
    _option(group, "n_hidden", "H", "units in each hidden layer (512)", int)
    _option(group, "hidden_layers", "N", "number of hidden layers (3)", int)
    _switch(group, "binary", "binary weights and activations in the hidden layers")
    _switch(group, "first", "with --binary: binary weights in the first layer too")
    _switch(group, "last", "with --binary: binary weights and inputs in the last layer too")
    _switch(group, "xnor", "with --binary: do the binary products with xnor_gemm")
    _option(
        group,
        "ste",
        "NAME",
        "pseudo-gradient of sign: hard_tanh or ste_sign, clipped_grad (the original program's), "
        "identity, approx_sign, swish_sign, magnitude_aware_sign, stochastic_sign, ede_sign "
        "(sharpens over training) (hard_tanh)",
    )
    _switch(group, "batch_norm", "batch normalization after each hidden product")
    _option(group, "keep_prob", "P", "chance of a hidden unit not to be dropped (1.0)", float)
    _option(group, "input_keep_prob", "P", "chance of a pixel not to be dropped (1.0)", float)
    _option(
        group,
        "sign_keep_prob",
        "P",
        "with --binary: chance of an activation not to be replaced by a coin toss (1.0)",
        float,
    )

    group = about("changes of training images")
    _option(group, "augment_shift", "PIXELS", "move by up to so much (0)", float)
    _option(group, "augment_rotation", "DEGREES", "turn by up to so much (0)", float)
    _option(group, "augment_scale", "SHARE", "stretch height and width by up to so much (0)", float)
    _option(group, "augment_shear", "SHARE", "shear by up to so much (0)", float)
    _option(group, "augment_elastic", "PIXELS", "elastic displacements, typical size (0)", float)

    _option(
        group,
        "adversarial",
        "E",
        "move each pixel, from 0 to 1, by so much in the direction in which the loss rises (0)",
        float,
    )

    group = about("how it learns")
    _option(group, "max_steps", "N", "step at which training ends (1000)", int)
    _option(group, "loss", "NAME", "cross_entropy or squared_hinge (cross_entropy)")
    _option(group, "label_smoothing", "S", "share of a label spread over all classes (0)", float)
    _option(group, "penalty", "NAME", "l1, or bipolar: sum(1 - w**2) of binary layers (l1)")
    _option(group, "reg", "R", "factor of the penalty (1e-4)", float)
    _option(group, "optimizer", "NAME", "adam, adamw, sgd, or bop: flips binary weights (adam)")
    _option(group, "momentum", "M", "of sgd (0.9)", float)
    _option(group, "weight_decay", "D", "of adamw (0)", float)
    _option(group, "bop_rate", "R", "of bop: part of the newest gradient in the mean (1e-4)", float)
    _option(group, "bop_threshold", "T", "of bop: least mean for a flip (1e-8)", float)
    _option(group, "lr", "LR", "learning rate (1e-3)", float)
    _option(group, "latent_lr", "F", "factor of the learning rate of latent weights (1.0)", float)
    _option(group, "lr_scale", "NAME", "none, or binarynet: larger for binary weights (none)")
    _option(group, "schedule", "NAME", "constant, cosine, exponential or step (constant)")
    _option(group, "final_lr", "F", "last factor of a falling learning rate (0)", float)
    _option(
        group,
        "milestones",
        "N,...",
        "with --schedule step: steps at which the learning rate falls",
        _numbers,
    )
    _option(group, "milestone_factor", "F", "factor of the learning rate at each (0.1)", float)
    _option(group, "warm_up", "N", "steps over which the learning rate first rises (0)", int)
    _option(group, "average", "NAME", "evaluate averaged weights: none, ema or swa (none)")
    _option(group, "average_decay", "D", "of ema (0.999)", float)
    _option(group, "average_from", "N", "step after which the average begins (0)", int)

    group = about("the run")
    group.add_argument(*_spellings("recipe"), metavar="NAME", help="start from settings in a file")
    group.add_argument(
        *_spellings("list_recipes"), action="store_true", help="list the recipes and exit"
    )
    _option(group, "log_dir", "DIR", "make a numbered run folder below DIR: records, checkpoints")
    _option(group, "restore", "DIR", "go on from the newest checkpoint of a run folder")
    _option(group, "eval_every_n", "N", "steps between evaluations (100)", int)
    _option(group, "device", "D", "auto, cpu, cuda or cuda:N (auto)")
    _option(group, "gpu", "N", "the same as --device cuda:N", int)
    _option(
        group,
        "dtype",
        "T",
        "float32, float64; on a GPU tf32, bfloat16: rounding of dense products (float32)",
    )
    _switch(group, "graph", "replay a fused step as a CUDA graph (the default; --no_graph)")
    _switch(group, "fused", "on a GPU, make steps by fused kernels (the default; --no_fused)")
    _switch(group, "debug", "stop at the first NaN or infinity, in the debugger on a terminal")


def _option(parser: Any, name: str, metavar: str, text: str, kind: Any = str) -> None:
    parser.add_argument(*_spellings(name), dest=name, metavar=metavar, type=kind, help=text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas between them; got {text!r}"
        ) from None


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
    if "list_recipes" in args:
        return _list_recipes()
    try:
        # First of all: what start-up imports and loads can take seconds.
        with Signals() as signals:
            try:
                _train(vars(args), signals)
            except BaseException:
                # Whatever a library made of the interruption: it is told as that.
                word = signals.ended_the_start()
                if not word:
                    raise
                print(f"cupybnn train: {word} before training began", file=sys.stderr)
    except NonFiniteError as error:
        return _debug(error)
    return 128 + signals.received[0] if signals.received else 0


def _train(given: dict[str, Any], signals: Signals) -> None:
    from cupybnn.cli.console import Console
    from cupybnn.training import Trainer

    config = _config(given)
    console = Console()
    try:
        trainer = Trainer(config, [console])
        signals.training_begins(trainer)
        # Console says once that the loss is not finite; NumPy would say it of each operation.
        with np.errstate(all="ignore"):
            trainer.run()
    finally:
        console.close()


def _list_recipes() -> int:
    from cupybnn.training import recipes

    for name in recipes.names():
        print(f"{name:12} {recipes.load(name).summary}")
    return 0


def _config(given: dict[str, Any]) -> TrainConfig:
    """Put the options over those of the recipe, these over the restored run's or the defaults."""
    from cupybnn.training import TrainConfig, recipes, restored_config

    known = {field.name for field in fields(TrainConfig)}
    settings = {name: value for name, value in given.items() if name in known}
    source = "settings"
    if "recipe" in given:
        settings = {**recipes.load(given["recipe"]).settings, **settings}
        source = f"recipe {given['recipe']}"
    if "gpu" in given:
        device = f"cuda:{given['gpu']}"
        if given["gpu"] < 0 or settings.get("device", device) not in (device, "cuda"):
            raise SettingError(
                f"The option --gpu must be a device number, from 0, and agree with --device; got "
                f"--gpu {given['gpu']} and --device {settings.get('device', '(none)')}."
            )
        settings["device"] = device
    if "restore" in settings:
        return restored_config(settings.pop("restore"), **settings)
    return TrainConfig.from_mapping(settings, source=source)


def _debug(error: NonFiniteError) -> int:
    """Tell where the first NaN or infinity came up and, on a terminal, open the debugger there."""
    step = "" if error.step is None else f" at step {error.step}"
    print(f"cupybnn train: not finite{step}: {error}", file=sys.stderr)
    if sys.stdin.isatty() and sys.stdout.isatty():
        import pdb

        print("The debugger is where it was made: 'up' goes to its operation, 'q' leaves.")
        pdb.post_mortem(error.__traceback__)
    return 1
