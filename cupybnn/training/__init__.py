"""Training: configuration, the loop, checkpoints, records."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupybnn.training.config import TrainConfig
    from cupybnn.training.records import Callback, Evaluation, TrainResult
    from cupybnn.training.restore import restored_config
    from cupybnn.training.run import train
    from cupybnn.training.saved import DataDescription, load_model
    from cupybnn.training.trainer import Trainer

__all__ = [
    "Callback",
    "DataDescription",
    "Evaluation",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "load_model",
    "restored_config",
    "train",
]

_MODULES = {
    "config": ("TrainConfig",),
    "records": ("Callback", "Evaluation", "TrainResult"),
    "restore": ("restored_config",),
    "saved": ("DataDescription", "load_model"),
    "run": ("train",),
    "trainer": ("Trainer",),
}


def __getattr__(name: str) -> Any:
    """Import a name on first use, since the command line often needs only the settings."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
