"""Steps of this library on several ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from cupybnn.backends.devices import Device, synchronize
from cupybnn.benchmark.scaling.steps import time_steps
from cupybnn.benchmark.training.record import random_images
from cupybnn.parallel import Alone, Ranks
from cupybnn.training import TrainConfig, Trainer

__all__ = ["measure"]


def _step(ranks: Ranks, task: dict[str, Any], batch: int) -> tuple[Callable[[], Any], Trainer]:
    """Return a step of this library on a batch of all `ranks`, and its trainer."""
    config = TrainConfig(
        n_hidden=task["hidden"],
        batch_size=batch,
        binary=True,
        xnor=True,
        batch_norm=True,
        reg=0.0,
        dtype=task["precision"],
        max_steps=1 << 40,
        device=task["device"],
    )
    trainer = Trainer(config, data=random_images(task["images"]), ranks=ranks)
    numbers = itertools.count()
    return lambda: trainer.make_step(next(numbers)), trainer


def measure(ranks: Ranks, task: dict[str, Any], device: Device) -> dict[str, Any]:
    """Time steps of the network on all ranks, and on one with as many images as each has."""
    step, trainer = _step(ranks, task, task["batch"])
    wait = lambda: synchronize(trainer.device)  # noqa: E731
    row: dict[str, Any] = {"step": time_steps(step, wait, ranks, task["seconds"])}
    row["how"] = _how(trainer)
    row["state_bytes"] = _state_bytes(trainer)
    if ranks.size == 1:
        return {**row, "alone": row["step"]["median"], "alone_how": row["how"]}
    alone = Alone()
    alone.device = ranks.device
    single = {**task, "device": str(device)}
    step, trainer = _step(alone, single, task["batch"] // ranks.size)
    wait = lambda: synchronize(trainer.device)  # noqa: E731
    row["alone"] = time_steps(step, wait, alone, task["seconds"])["median"]
    row["alone_how"] = _how(trainer)
    return row


def _how(trainer: Trainer) -> str:
    if type(trainer._step).__name__ == "PlainStep":
        return "plain"
    return "fused + graph" if not trainer.notices else "fused"


def _state_bytes(trainer: Trainer) -> int:
    """Return the bytes of latent weights and their optimizer's arrays on this rank."""
    slots = trainer.optimizer._slots
    binary = [p for p in trainer.model.parameters() if p.bits == 1]
    latent = [p._data if p.share is None else p.share.weight for p in binary]
    arrays = latent + [slot for p in binary for slot in slots.get(p, ())]
    return sum(array.size * array.dtype.itemsize for array in arrays)
