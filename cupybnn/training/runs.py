"""Run folders: one numbered folder per run, never shared."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cupybnn.files import atomic_write, new_folder, remove_leftovers
from cupybnn.paths import user_path
from cupybnn.training.config import TrainConfig

__all__ = [
    "CONFIG_NAME",
    "new_run_folder",
    "settings_folder",
    "sibling_log_dir",
]

CONFIG_NAME = "config.json"


def settings_folder(config: TrainConfig) -> Path:
    """Return the folder that contains all runs with the settings of `config`, numbered.

    ``LOG_DIR/bin/xnor/hid_512/batch_norm/bs_128/reg_0.0`` or
    ``LOG_DIR/fp/hid_1024/bs_1024/reg_0.0001``: binary or full precision ("bin_first", "bin_last"
    and "bin_all" with a binary first layer, last layer, or both), which product, hidden units
    (``hid_1024-512-256`` where each layer has a width of its own), batch size and the factor of the
    penalty as Python prints it. A run that goes on in the same log directory with the same settings
    is numbered beside the one that it restores, also where that has the name of earlier versions,
    ``0.0001`` alone, or was moved (see `sibling_log_dir`).
    """
    if config.log_dir is None:
        raise ValueError("A run folder needs a configuration with a 'log_dir'; got None.")
    root = user_path(config.log_dir)
    if config.restore is not None:
        path = user_path(config.restore)
        beside = Path(os.path.abspath(path if path.is_dir() else path.parent)).parent
        for folder in (root, *(root / name for name in _names(config))):
            if Path(os.path.abspath(folder)) == beside:
                return folder
    return root / _names(config)[0]


def sibling_log_dir(run: Path, config: TrainConfig) -> str | None:
    """Return the log directory that puts a continued run next to the folder `run`.

    Parameters
    ----------
    run : Path
    config : TrainConfig
        The settings of `run`.
    """
    if not (run / CONFIG_NAME).is_file():  # a checkpoint outside of a run folder
        return config.log_dir
    parent = Path(os.path.abspath(run)).parent
    for name in _names(config):
        root = parent.parents[len(name.parts) - 1] if len(parent.parts) > len(name.parts) else None
        if root is not None and root / name == parent:
            return str(root)
    return str(parent)


def _names(config: TrainConfig) -> tuple[Path, Path]:
    """Return the settings' folder below a log directory: its current and its former name."""
    folder = Path("fp")
    if config.binary:
        which = {(False, False): "bin", (True, False): "bin_first", (False, True): "bin_last"}
        folder = Path(which.get((config.first, config.last), "bin_all"))
        folder /= "xnor" if config.xnor else "matmul"
    widths = config.n_hidden if isinstance(config.n_hidden, tuple) else (config.n_hidden,)
    folder /= f"hid_{'-'.join(map(str, widths))}"
    if config.batch_norm:
        folder /= "batch_norm"
    folder /= f"bs_{config.batch_size}"
    return folder / f"reg_{config.reg}", folder / str(config.reg)


def new_run_folder(config: TrainConfig, fill: Callable[[Path], None] | None = None) -> Path:
    """Make the next numbered folder in `settings_folder`, with ``config.json`` in it.

    Numbers begin at 1; the next is one more than the highest. The folder is made under a hidden
    name and renamed to its number when its files are complete, so that a killed process leaves no
    incomplete run. Two runs that start at the same moment get different folders, because a folder
    cannot be renamed to one that is not empty. Hidden folders and temporary files that killed
    processes left in the same place are removed.

    Parameters
    ----------
    config : TrainConfig
    fill : callable, optional
        Called with the hidden folder, to add the first files.

    Raises
    ------
    OSError
        If the folder cannot be made; the message names it and the setting.
    """
    parent = settings_folder(config)
    try:
        return _new_folder(parent, config, fill)
    except OSError as error:
        raise OSError(
            f"The 'log_dir' must be a folder in which run folders can be made; {parent} cannot be "
            f"created or written: {error.strerror or error}. Choose another with --log_dir."
        ) from error


def _new_folder(parent: Path, config: TrainConfig, fill: Callable[[Path], None] | None) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for run in parent.iterdir():
        if run.name.isdecimal():
            remove_leftovers(run)
    with new_folder(parent) as hidden:
        with atomic_write(hidden / CONFIG_NAME) as file:
            file.write(config.with_absolute_paths().to_json().encode())
        if fill is not None:
            fill(hidden)
        return _give_number(hidden)


def _give_number(hidden: Path) -> Path:
    """Rename a folder to the first number after all existing ones."""
    taken = [int(p.name) for p in hidden.parent.iterdir() if p.name.isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        folder = hidden.parent / str(number)
        try:
            os.rename(hidden, folder)
            return folder
        except OSError:
            if not os.path.lexists(folder):  # otherwise another run has just taken the number
                raise
        number += 1
