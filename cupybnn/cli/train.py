"""``cupybnn train``: the command line of the trainer."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.cli.export import Export, open_network, packed
from cupybnn.cli.signals import Signals
from cupybnn.cli.spawn import RunFolderFile
from cupybnn.cli.streams import complain
from cupybnn.errors import NonFiniteError, RankError, SettingError
from cupybnn.paths import user_path
from cupybnn.settings import rendezvous
from cupybnn.training.checks import Rule, Switch
from cupybnn.training.config import TrainConfig
from cupybnn.training.declaration import Setting, declared

if TYPE_CHECKING:
    from cupybnn.parallel import Ranks
    from cupybnn.training.recipes import TeacherRecipe

__all__ = ["add_parser", "run"]


#: Defaults that differ for a binary network, and the options that override them.
_BY_BINARY = {
    "batch_norm": ("batch norm", "--no_batch_norm"),
    "reg": ("no penalty", "--reg R"),
}


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``cupybnn train``: an option for each declared setting, and a few more.

    Options have no default here, so that given options can be distinguished; defaults come from
    `TrainConfig`, a recipe or the restored run.
    """
    parser = subparsers.add_parser(
        "train",
        help="train a full-precision or binarized network",
        description="Train a multilayer perceptron on MNIST, Fashion-MNIST or the bundled digits.",
        epilog="Defaults are in parentheses. Options may also be spelled with hyphens (--log-dir). "
        "The prefix --no_ turns a switch off that a default, a recipe or a restored run turns on.",
        argument_default=argparse.SUPPRESS,
    )
    settings = declared(TrainConfig)
    parser.add_argument("data_dir", nargs="?", help=settings.pop("data_dir").help)
    for heading, group in itertools.groupby(settings.items(), lambda item: item[1].group):
        options = parser.add_argument_group(heading)
        for name, each in group:
            _add(options, name, each)
            parser.also(name, each.synonyms)
    options = parser.add_argument_group("source of settings")
    options.add_argument(
        "--recipe", metavar="NAME", help="start from a recipe's settings: a name or a .toml file"
    )
    options.add_argument(
        "--list_recipes",
        action="store_true",
        help="list the recipes, with the test accuracy and time of each, and exit",
    )
    options.add_argument("--gpu", metavar="N", type=int, help="the same as --device cuda:N")
    options = parser.add_argument_group(
        "several ranks",
        "A run that torchrun, mpirun or srun started as several processes needs no option: they "
        "train together.",
    )
    options.add_argument("--gpus", metavar="N", type=int, help="start N ranks, with a GPU each")
    options.add_argument(
        "--ranks", metavar="N", type=int, help="start N ranks on the CPU, to try such a run"
    )
    options.add_argument(
        "--restarts",
        metavar="K",
        type=int,
        help="with --gpus or --ranks: if a rank dies or hangs, continue from the newest "
        "checkpoint, at most K times (0)",
    )
    options = parser.add_argument_group("the trained network")
    options.add_argument(
        "--export",
        metavar="FILE",
        help="write the network, after the last step, as .npz, .onnx or .h; see 'cupybnn export'",
    )


def _add(options: Any, name: str, declaration: Setting) -> None:
    rule, default = declaration.rule, declaration.default_text
    text = (declaration.text + (f" ({default})" if default else "")).replace("%", "%%")
    if not isinstance(rule, Switch):
        parse = _typed(rule)
        options.add_argument(f"--{name}", metavar=rule.metavar, type=parse, help=text)
        return
    # The negative form is shown only for switches that may be on by default.
    off = argparse.SUPPRESS if declaration.by_binary is None else f"turn --{name} off"
    for option, value, shown in ((name, True, text), (f"no_{name}", False, off)):
        options.add_argument(
            f"--{option}", dest=name, action="store_const", const=value, help=shown
        )


def _typed(rule: Rule) -> Any:
    """Return a function that parses an option's value for argparse."""

    def parse(text: str) -> Any:
        try:
            return rule.parse(text)
        except ValueError:
            message = f"must be {rule.typed}; got {text!r}"
            raise argparse.ArgumentTypeError(message) from None

    return parse


def run(args: argparse.Namespace) -> int:
    """Train with the options in `args`; return the exit code."""
    if "list_recipes" in args:
        from cupybnn.cli.recipe_report import listing

        print("\n".join(listing()))
        return 0
    given = vars(args)
    if "gpus" in args or "ranks" in args:
        from cupybnn.cli.spawn import spawn

        _config({n: v for n, v in given.items() if n != "gpu"})  # now, rather than once a rank
        return spawn(args.words[1:], given)
    if "restarts" in args:
        raise SettingError("The '--restarts' must be given with --gpus or --ranks; got it alone.")
    try:
        _train(given, args.signals)
    except NonFiniteError as error:
        return _debug(error)
    return int(args.signals.exit_code)


def _train(given: dict[str, Any], signals: Signals) -> None:
    from cupybnn import parallel

    config = _config(given)
    with parallel.connect(
        config.device,
        config.log_dir,
        seconds=config.rank_timeout,
        last_resort=lambda error: _end(given["who"], error),
    ) as ranks:
        if ranks.size > 1:
            given["who"] = f"{given['who']} (rank {ranks.rank})"
        _train_with(ranks, config, given, signals)


def _end(who: str, error: RankError) -> None:
    """End a process whose main thread waits in a library for a rank that is lost."""
    if error.report:
        complain(f"{who}: {error}")
    os._exit(1)


def _train_with(ranks: Ranks, config: TrainConfig, given: dict[str, Any], signals: Signals) -> None:
    from cupybnn.cli.console import Console
    from cupybnn.cli.recipe_report import ended
    from cupybnn.cli.teaching import train_teachers
    from cupybnn.data import load
    from cupybnn.training import Trainer, recipes
    from cupybnn.training.setup import in_turn

    export = Export.of(given["export"]) if "export" in given and ranks.rank == 0 else None
    begun, taught_in = time.perf_counter(), 0.0
    console = Console(_chosen(config, given))
    data, teachers = None, _teachers(given)
    try:
        with contextlib.ExitStack() as stack:
            if teachers is not None:
                notify = _say if ranks.rank == 0 else _say_nothing
                data = in_turn(ranks, lambda: load(config.dataset, config.data_dir, notify=notify))
                folder = _teachers_folder(config, stack, ranks)
                taught = train_teachers(teachers, config, data, folder, signals, ranks)
                if taught is None:
                    return
                config, taught_in = taught, time.perf_counter() - begun
            trainer = Trainer(config, [console, RunFolderFile()], data=data, ranks=ranks)
        if export is not None:
            packed(trainer.model, trainer.dataset)  # now, rather than after hours, if it cannot be
        if trainer.step >= config.max_steps:
            trainer.notice(
                f"Nothing left to train: --max_steps, which includes the steps before a restore, "
                f"is {config.max_steps}."
            )
            if export is not None:
                print(export.write(open_network(str(config.restore))))
            return
        signals.training_begins(trainer)
        # Console reports a loss that is not finite once; NumPy would warn in each operation.
        with np.errstate(all="ignore"):
            result = trainer.run()
    finally:
        console.close()
    if "recipe" in given and not result.stopped and ranks.rank == 0:
        seconds = time.perf_counter() - begun
        print(ended(recipes.load(given["recipe"]), result, seconds, taught_in), flush=True)
    if export is not None:
        print(export.write(packed(result.model, trainer.dataset)))


def _teachers(given: dict[str, Any]) -> TeacherRecipe | None:
    """Return how a recipe's teachers are trained; None if there are none, or others are given."""
    from cupybnn.training import recipes

    if "recipe" not in given or "teacher" in given or "restore" in given:
        return None
    return recipes.load(given["recipe"]).teachers


def _teachers_folder(config: TrainConfig, stack: contextlib.ExitStack, ranks: Ranks) -> Path:
    """Return a folder for teachers: in the log directory, to which a restored run returns.

    Ranks other than the first may not see that one, so they have a folder of their own.
    """
    if config.log_dir is None or ranks.rank:
        # What starts ranks removes the folder in which they meet, even if one is killed.
        where = rendezvous() if ranks.size > 1 else None
        made = tempfile.TemporaryDirectory(prefix="cupybnn-", dir=where)
        return Path(stack.enter_context(made))
    folder = user_path(config.log_dir) / "teachers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _say_nothing(sentence: str) -> None:
    """Do as a rank that leaves it to the first one."""


def _config(given: dict[str, Any]) -> TrainConfig:
    """Combine settings: options override a recipe, which overrides a restored run or defaults."""
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
                f"The option --gpu must be a device number from 0 on and agree with --device; got "
                f"--gpu {given['gpu']} and --device {settings.get('device', '(none)')}."
            )
        settings["device"] = device
    if "restore" in settings:
        return restored_config(settings.pop("restore"), **settings)
    return TrainConfig.from_mapping(settings, source=source)


def _chosen(config: TrainConfig, given: dict[str, Any]) -> str:
    """Return a line about defaults that `--binary` chose; "" if the user set all of them."""
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
    """Report where the first NaN or infinity occurred and, on a terminal, open the debugger."""
    if not error.report:
        return 1
    step = "" if error.step is None else f" at step {error.step}"
    print(f"cupybnn train: not finite{step}: {error}", file=sys.stderr)
    if sys.stdin.isatty() and sys.stdout.isatty():
        import pdb

        print("The debugger is where it was computed: 'up' goes to the operation, 'q' quits.")
        pdb.post_mortem(error.__traceback__)
    return 1
