"""One rank of one measurement: ``python -m cupybnn.benchmark.scaling.worker TASK``."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn import parallel
from cupybnn.backends.devices import resolve, synchronize
from cupybnn.benchmark.training.record import random_images
from cupybnn.parallel import Alone, Ranks
from cupybnn.training import TrainConfig, Trainer

__all__ = ["main", "ours", "time_steps"]

_GROUPS = 7
_WARM_UP = 4  # the second fused step captures a graph


def time_steps(
    step: Callable[[], Any], wait: Callable[[], None], ranks: Ranks, seconds: float
) -> dict[str, float]:
    """Return the seconds of a step: median, minimum and 90th percentile of groups of steps.

    All ranks begin a group together, and it ends when the slowest has ended.

    Parameters
    ----------
    step : callable
    wait : callable
        Waits for the device.
    ranks : Ranks
    seconds : float
        Of a group, at least one step.
    """
    for _ in range(_WARM_UP):
        step()
    wait()
    began = time.perf_counter()
    step()
    wait()
    # The same number on every rank.
    once = float(ranks.sums([time.perf_counter() - began])[0]) / ranks.size
    steps = max(1, round(seconds / max(once, 1e-6)))
    groups = []
    for _ in range(_GROUPS):
        ranks.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        ranks.barrier()
        groups.append((time.perf_counter() - began) / steps)
    groups.sort()
    return {"median": statistics.median(groups), "min": groups[0], "p90": groups[-1]}


def ours(ranks: Ranks, task: dict[str, Any], batch: int) -> tuple[Callable[[], Any], Trainer]:
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


def _measure_ours(ranks: Ranks, task: dict[str, Any]) -> dict[str, Any]:
    step, trainer = ours(ranks, task, task["batch"])
    wait = lambda: synchronize(trainer.device)  # noqa: E731
    row: dict[str, Any] = {"step": time_steps(step, wait, ranks, task["seconds"])}
    row["how"] = _how(trainer)
    row["state_bytes"] = _state_bytes(trainer)
    alone = Alone()
    alone.device = ranks.device
    single = {**task, "device": str(trainer.device)}
    step, trainer = ours(alone, single, task["batch"] // ranks.size)
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


def main(text: str) -> None:
    """Measure what the JSON object `text` describes; rank 0 prints the result as JSON."""
    task = json.loads(text)
    with parallel.connect(task["device"], seconds=task.get("timeout", 60.0)) as ranks:
        device = resolve(ranks.device if ranks.size > 1 else task["device"])
        with device.scope(), np.errstate(all="ignore"):
            if task["library"] == "PyTorch":
                from cupybnn.benchmark.scaling.peer import measure

                row = measure(ranks, task, device)
            else:
                row = _measure_ours(ranks, task)
        if ranks.rank == 0:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
