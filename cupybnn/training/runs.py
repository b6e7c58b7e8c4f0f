"""Run folders: one numbered folder a run, never shared."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cupybnn.files import atomic_write
from cupybnn.training.config import TrainConfig

__all__ = ["CONFIG_NAME", "new_run_folder", "settings_folder"]

CONFIG_NAME = "config.json"


def settings_folder(config: TrainConfig) -> Path:
    """Return the folder in which all runs with the settings of `config` are numbered.

    ``LOG_DIR/bin/xnor/hid_512/batch_norm/bs_128/0.0001`` or
    ``LOG_DIR/fp/hid_1024/bs_1024/0.0``: binary or full precision ("bin_first", "bin_last" and
    "bin_all" with a binary first layer, last layer, or both), which product, hidden units, batch
    size and the factor of the penalty as Python prints it.
    """
    if config.log_dir is None:
        raise ValueError("A run folder needs a configuration with a 'log_dir'; got None.")
    folder = Path(config.log_dir).expanduser()
    if config.binary:
        which = {(False, False): "bin", (True, False): "bin_first", (False, True): "bin_last"}
        folder /= which.get((config.first, config.last), "bin_all")
        folder /= "xnor" if config.xnor else "matmul"
    else:
        folder /= "fp"
    folder /= f"hid_{config.n_hidden}"
    if config.batch_norm:
        folder /= "batch_norm"
    return folder / f"bs_{config.batch_size}" / str(config.reg)


def new_run_folder(config: TrainConfig) -> Path:
    """Make the next numbered folder in `settings_folder` and put ``config.json`` into it.

    Numbers count up from 1, one more than the highest there is. Two runs that start at the same
    moment get different folders, because making a folder succeeds for one of them only.

    Raises
    ------
    OSError
        If the folder cannot be made; the message names it.
    """
    parent = settings_folder(config)
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(p.name) for p in parent.iterdir() if p.name.isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        folder = parent / str(number)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
        number += 1
    with atomic_write(folder / CONFIG_NAME) as file:
        file.write(config.to_json().encode())
    return folder
