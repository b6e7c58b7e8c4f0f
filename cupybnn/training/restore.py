"""Whether a checkpoint fits the settings that a run was started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cupybnn.errors import CheckpointError
from cupybnn.training.checkpoint import Checkpoint, load_info
from cupybnn.training.config import TrainConfig

__all__ = ["check_settings", "restored_config"]

#: Settings that leave what is computed as it is: they may differ without a word.
_FREE = {
    "data_dir",
    "dataset",  # the data set itself is compared, once it is known
    "debug",
    "device",
    "eval_every_n",
    "graph",
    "log_dir",
    "max_steps",
    "restore",
    "xnor",
}
#: Settings that change how training goes on, but fit any checkpoint: they may differ, and it is
#: said.
_CHANGEABLE = {"fused", "lr", "max_steps", "reg"}  # some schedules go until max_steps


def restored_config(path: str, **changes: Any) -> TrainConfig:
    """Return the settings with which the run of a checkpoint goes on.

    Parameters
    ----------
    path : str
        A run folder or checkpoint file.
    **changes
        Settings to have other values than in that run, such as ``max_steps``.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or its settings cannot be read.
    ValueError
        If a changed setting is bad.
    """
    before = _stored_config(load_info(path))
    return TrainConfig.from_mapping({**asdict(before), **changes, "restore": path})


def _stored_config(info: Mapping[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.from_mapping(info["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint's settings cannot be read: {error}") from error


def check_settings(config: TrainConfig, stored: Checkpoint) -> list[str]:
    """Compare the settings of a run with those of the checkpoint it restores.

    Returns
    -------
    list of str
        What the user should know: settings that differ and may.

    Raises
    ------
    CheckpointError
        If settings differ that must not; all of them are named with both values.
    """
    before = _stored_config(stored.info)
    old, new = asdict(before), asdict(config)
    to_the_end = config.schedule in ("cosine", "exponential") or config.ste == "ede_sign"
    free = _FREE - {"max_steps"} if to_the_end else _FREE
    differing = [name for name in new if name not in free and old[name] != new[name]]
    wrong = [name for name in differing if name not in _CHANGEABLE]
    if wrong:
        listing = "; ".join(f"{n}: checkpoint {old[n]!r}, this run {new[n]!r}" for n in wrong)
        raise CheckpointError(
            f"The checkpoint {config.restore} was made with other settings ({listing}). Restore it "
            f"with the same options, or leave those out."
        )
    return [
        f"From step {stored.step} on, {name} is {new[name]!r} instead of {old[name]!r}: the run no "
        f"longer equals one that was never interrupted."
        for name in differing
    ]
