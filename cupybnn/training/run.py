"""A whole training run in one call."""

from __future__ import annotations

from typing import Any

from cupybnn.training.config import TrainConfig
from cupybnn.training.records import TrainResult
from cupybnn.training.trainer import Trainer

__all__ = ["train"]


def train(config: TrainConfig | None = None, /, **settings: Any) -> TrainResult:
    """Train a network. Prints nothing.

    Parameters
    ----------
    config : TrainConfig, optional
    **settings
        Fields of `TrainConfig`, instead of `config`.

    Returns
    -------
    TrainResult

    Raises
    ------
    ValueError
        If a setting is invalid.
    DataError, DeviceError, CheckpointError
        If the data, the device or the checkpoint to restore is not available.
    NonFiniteError
        With ``debug=True``, at the first NaN or infinity.

    Examples
    --------
    >>> import cupybnn
    >>> result = cupybnn.train(dataset="digits", batch_norm=True, max_steps=100, device="cpu")
    >>> result.final_accuracy > 0.9
    True
    """
    if config is not None and settings:
        raise ValueError("train() takes a TrainConfig or individual settings, not both.")
    if config is None:
        config = TrainConfig.from_mapping(settings)
    return Trainer(config).run()
