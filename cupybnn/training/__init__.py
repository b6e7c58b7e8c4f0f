"""Training: configuration, the loop, checkpoints, records."""

from cupybnn.training.config import TrainConfig
from cupybnn.training.records import Callback, Evaluation, TrainResult
from cupybnn.training.restore import restored_config
from cupybnn.training.trainer import Trainer, train

__all__ = [
    "Callback",
    "Evaluation",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "restored_config",
    "train",
]
