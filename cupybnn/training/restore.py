"""Whether the settings of a run fit the checkpoint that it restores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cupybnn.errors import CheckpointError
from cupybnn.training.checkpoint import Checkpoint, find, load_info
from cupybnn.training.config import TrainConfig
from cupybnn.training.declaration import declared
from cupybnn.training.runs import sibling_log_dir

__all__ = ["check_settings", "restored_config", "stored_config"]


def restored_config(path: str, **changes: Any) -> TrainConfig:
    """Return the settings with which a checkpoint's run continues.

    Parameters
    ----------
    path : str
        A run folder or checkpoint file. If the run has a log directory, the new run folder is
        numbered next to the old one, wherever that was moved, unless `changes` name another
        log directory.
    **changes
        Settings to change, such as ``max_steps``.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or its settings cannot be read.
    ValueError
        If a changed setting is invalid.

    Examples
    --------
    >>> import cupybnn
    >>> result = cupybnn.train(
    ...     dataset="digits", binary=True, n_hidden=32, max_steps=5, log_dir="runs"
    ... )
    >>> cupybnn.training.restored_config(str(result.run_folder), max_steps=10).max_steps
    10
    """
    before = stored_config(load_info(path))
    settings = {**asdict(before), **changes, "restore": path}
    if "log_dir" not in changes and before.log_dir is not None:
        settings["log_dir"] = sibling_log_dir(find(path).parent, before)
    return TrainConfig.from_mapping(settings)


def stored_config(info: Mapping[str, Any]) -> TrainConfig:
    """Return the settings in a checkpoint's `info`; CheckpointError if they cannot be read."""
    try:
        return TrainConfig.from_mapping(info["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint's settings cannot be read: {error}") from error


def check_settings(config: TrainConfig, stored: Checkpoint) -> list[str]:
    """Compare the settings of a run with those of the checkpoint it restores.

    Returns
    -------
    list of str
        Notices about settings that differ and may.

    Raises
    ------
    CheckpointError
        If settings differ that must not; the message names all of them with both values.
    """
    old, new = asdict(stored_config(stored.info)), asdict(config)
    rules = {name: each.may_change(config) for name, each in declared(TrainConfig).items()}
    differing = [name for name in new if rules[name] != "free" and old[name] != new[name]]
    wrong = [name for name in differing if rules[name] == "same"]
    if wrong:
        listing = "; ".join(f"{n}: checkpoint {old[n]!r}, this run {new[n]!r}" for n in wrong)
        raise CheckpointError(
            f"The checkpoint {config.restore} was made with different settings ({listing}). Use "
            f"the same options as for that run, or omit them."
        )
    return [
        f"From step {stored.step} on, {name} is {new[name]!r} instead of {old[name]!r}: the "
        f"results will differ from those of an uninterrupted run."
        for name in differing
    ]
