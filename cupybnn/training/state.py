"""The arrays of a checkpoint: model, optimizer and averages in one mapping."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cupybnn import nn, optim
from cupybnn.training.evaluation import Averaging

__all__ = ["averaged_statistics", "checksum", "gather", "load", "part"]


def gather(
    model: nn.Module, optimizer: optim.Optimizer, averaging: Averaging
) -> dict[str, np.ndarray]:
    """Return all arrays that training needs to continue: "model/fc1.weight", and so on."""
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "average": averaging}
    return {
        f"{name}/{key}": array
        for name, owner in parts.items()
        for key, array in owner.state_dict().items()
    }


def averaged_statistics(model: nn.Module) -> dict[str, Any]:
    """Return batch norm's statistics of a model with averaged weights: "averaged/bn1.mean", ..."""
    state = model.state_dict()
    return {f"averaged/{name}": state[name] for name, _ in model.named_buffers()}


def load(
    arrays: Mapping[str, np.ndarray],
    model: nn.Module,
    optimizer: optim.Optimizer,
    averaging: Averaging,
) -> None:
    """Load the arrays that `gather` returned.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the arrays do not fit.
    """
    model.load_state_dict(part(arrays, "model/"))
    optimizer.load_state_dict(part(arrays, "optimizer/"))
    averaging.load_state_dict(part(arrays, "average/"))


def part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin with `prefix`, which is removed."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """Return one number that differs, almost certainly, if any array does."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(
            np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), total)
        )
    return total
