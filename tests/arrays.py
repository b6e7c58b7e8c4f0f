"""Arrays and tensors of either backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.autograd import Tensor


def host(array: Any) -> np.ndarray:
    """Return `array` itself if it is NumPy's, else a copy of it on the host."""
    return array if isinstance(array, np.ndarray) else array.get()


def leaf(xp: Any, shape: tuple[int, ...] = (3,), seed: int = 0, dtype: str = "float64") -> Tensor:
    """Return a tensor of random numbers that requires a gradient."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return Tensor(xp.asarray(values), requires_grad=True)
