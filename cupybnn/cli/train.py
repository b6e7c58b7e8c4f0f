"""``cupybnn train``: the command line of the trainer."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import numpy as np

from cupybnn.cli.export import Export, open_network, packed
from cupybnn.cli.signals import Signals
from cupybnn.errors import NonFiniteError, SettingError
from cupybnn.training.checks import Rule, Switch
from cupybnn.training.config import TrainConfig
from cupybnn.training.declaration import Setting, declared

__all__ = ["add_parser", "run"]


#: What a binary network gets unless asked for otherwise, and the option that asks.
_BY_BINARY = {
    "batch_norm": ("batch norm", "--no_batch_norm"),
    "reg": ("no penalty", "--reg R"),
}


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``cupybnn train``: an option for each declared setting, and a few more.

    Options carry no default here, so that one that was given can be told from one that was not:
    the defaults are those of `TrainConfig`, a recipe or the restored run.
    """
    parser = subparsers.add_parser(
        "train",
        help="train a full-precision or binarized network",
        description="Train a multilayer perceptron on MNIST or on the bundled digits.",
        epilog="Every option may be spelled with hyphens too (--log-dir), and every switch can be "
        "turned off, over a default, a recipe or a restored run, with --no_ before its name. "
        "Defaults are in parentheses.",
        argument_default=argparse.SUPPRESS,
    )
    settings = declared(TrainConfig)
    parser.add_argument("data_dir", nargs="?", help=settings.pop("data_dir").help)
    for heading, group in itertools.groupby(settings.items(), lambda item: item[1].group):
        options = parser.add_argument_group(heading)
        for name, each in group:
            _add(options, name, each)
            parser.also(name, each.synonyms)
    options = parser.add_argument_group("where settings come from")
    options.add_argument("--recipe", metavar="NAME", help="start from settings in a file")
    options.add_argument("--list_recipes", action="store_true", help="list the recipes and exit")
    options.add_argument("--gpu", metavar="N", type=int, help="the same as --device cuda:N")
    options = parser.add_argument_group("the trained network")
    options.add_argument(
        "--export",
        metavar="FILE",
        help="write it, at the end, as .npz, .onnx or .h; see 'cupybnn export'",
    )


def _add(options: Any, name: str, declaration: Setting) -> None:
    rule, default = declaration.rule, declaration.default_text
    text = (declaration.text + (f" ({default})" if default else "")).replace("%", "%%")
    if not isinstance(rule, Switch):
        parse = _typed(rule)
        options.add_argument(f"--{name}", metavar=rule.metavar, type=parse, help=text)
        return
    # Who has a switch on by default may want to see how it is turned off.
    off = argparse.SUPPRESS if declaration.by_binary is None else f"turn --{name} off"
    for option, value, shown in ((name, True, text), (f"no_{name}", False, off)):
        options.add_argument(
            f"--{option}", dest=name, action="store_const", const=value, help=shown
        )


def _typed(rule: Rule) -> Any:
    """Return how argparse reads an option's word."""

    def parse(text: str) -> Any:
        try:
            return rule.parse(text)
        except ValueError:
            message = f"must be {rule.typed}; got {text!r}"
            raise argparse.ArgumentTypeError(message) from None

    return parse


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
    export = Export.of(given["export"]) if "export" in given else None
    console = Console(_chosen(config, given))
    try:
        trainer = Trainer(config, [console])
        if export is not None:
            packed(trainer.model, trainer.dataset)  # now, rather than after hours, if it cannot be
        if trainer.step >= config.max_steps:
            trainer.notice(
                f"Nothing is left to train: --max_steps, counted from the very first step, is "
                f"{config.max_steps}."
            )
            if export is not None:
                print(export.write(open_network(str(config.restore))))
            return
        signals.training_begins(trainer)
        # Console says once that the loss is not finite; NumPy would say it of each operation.
        with np.errstate(all="ignore"):
            result = trainer.run()
    finally:
        console.close()
    if export is not None:
        print(export.write(packed(result.model, trainer.dataset)))


def _list_recipes() -> int:
    from cupybnn.training import recipes

    for name in recipes.names():
        print(f"{name:12} {recipes.load(name).summary}")
    return 0


def _config(given: dict[str, Any]) -> TrainConfig:
    """Put the options over those of the recipe, these over the restored run's or the defaults."""
    from cupybnn.training import recipes, restored_config

    settings = {name: given[name] for name in declared(TrainConfig) if name in given}
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


def _chosen(config: TrainConfig, given: dict[str, Any]) -> str:
    """Return a line on the settings that `--binary` decided, or nothing where all were named."""
    from cupybnn.training import recipes

    named = set(given)
    if "recipe" in given:
        named |= recipes.load(given["recipe"]).settings.keys()
    if not config.binary or "restore" in given:
        return ""
    chosen = [(name, words) for name, words in _BY_BINARY.items() if name not in named]
    if not chosen:
        return ""
    options = ", ".join(option for _, (_, option) in chosen)
    return f"Binary network: {', '.join(what for _, (what, _) in chosen)} (change with {options})"


def _debug(error: NonFiniteError) -> int:
    """Tell where the first NaN or infinity came up and, on a terminal, open the debugger there."""
    step = "" if error.step is None else f" at step {error.step}"
    print(f"cupybnn train: not finite{step}: {error}", file=sys.stderr)
    if sys.stdin.isatty() and sys.stdout.isatty():
        import pdb

        print("The debugger is where it was made: 'up' goes to its operation, 'q' leaves.")
        pdb.post_mortem(error.__traceback__)
    return 1
