"""Settings of a run that are allowed but hardly meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cupybnn import nn
from cupybnn.training.declaration import without_effect

if TYPE_CHECKING:
    from cupybnn.training.protocol import TrainingRun

__all__ = ["advice"]


def advice(trainer: TrainingRun) -> list[str]:
    """Return a sentence for each setting that has no effect or prevents learning."""
    config = trainer.config
    sentences = without_effect(config)
    if config.warm_up >= config.max_steps > 0:
        sentences.append(
            f"--warm_up {config.warm_up} does not end before the last step, so the learning rate "
            f"stays below --lr."
        )
    if config.average != "none" and config.average_from >= config.max_steps > 0:
        sentences.append(
            f"--average {config.average} has no effect: --average_from {config.average_from} is "
            f"after the last step."
        )
    # Each rank normalizes its own part of a batch, unless they share the sums.
    parts = 1 if config.sync_batch_norm else trainer.ranks.size
    if config.batch_size < 2 * parts and _has_batch_norm(trainer.model):
        whose = "a batch" if parts == 1 else "a rank's part of a batch"
        sentences.append(
            f"Batch norm needs several images: it turns {whose} of one image into zeros, so the "
            f"network hardly learns. Choose a larger --batch_size."
        )
    return sentences


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm) for _, module in model.named_modules())
