"""A training step's work besides products by compiled kernels: their arguments, and threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn import settings
from cupybnn.backends.cpu import training
from cupybnn.backends.cpu.addresses import address
from cupybnn.backends.cpu.threads import run

__all__ = [
    "adam",
    "batch_norm",
    "batch_norm_gradient",
    "gradient_in_window",
    "sign",
    "takes",
]

FLOAT32 = np.dtype(np.float32)
# What is worth a second thread, some 60 microseconds; and parts for each.
ELEMENTS_A_THREAD = 1 << 17
PARTS_A_THREAD = 4
LINE = 16  # elements of a cache line, which no two threads should write to

Kernel = Callable[..., Any]


def takes(*arrays: Any) -> bool:
    """Whether all are contiguous NumPy arrays of float32, as the kernels want them."""
    for x in arrays:
        if type(x) is not np.ndarray or x.dtype != FLOAT32:
            return False
        flags = x.flags
        if not (flags.c_contiguous and flags.aligned):
            return False
    return True


def _run(kernel: Kernel, axis: int, elements: int, *arguments: Any) -> None:
    """Run a kernel over parts of an axis of `axis` elements."""
    threads = min(settings.kernel_threads(), elements // ELEMENTS_A_THREAD)
    step = axis
    if threads > 1:
        step = -(-axis // (PARTS_A_THREAD * threads * LINE)) * LINE
    parts = -(-axis // step)
    run(lambda counter: kernel(counter, parts, step, *arguments), parts, threads)


def sign(x: np.ndarray) -> np.ndarray:
    """Return +1 where ``x >= 0`` and -1 elsewhere."""
    out = np.empty_like(x)
    _run(training.signs, x.size, x.size, x.size, address(x), address(out))
    return out


def gradient_in_window(x: np.ndarray, grad: np.ndarray, window: float) -> np.ndarray:
    """Return ``grad * (abs(x) <= window)``, arrays of one shape."""
    out = np.empty_like(x)
    _run(
        training.gradient_in_window, x.size, x.size, x.size, address(x), address(grad),
        np.float32(window), address(out),
    )  # fmt: skip
    return out


def adam(
    weight: np.ndarray, grad: np.ndarray, mean: np.ndarray, square: np.ndarray, *, decay: float,
    rates: tuple[float, float], eps: float, factor: float, limit: float | None,
) -> None:  # fmt: skip
    """Update a weight and its means in place, and clip it; see `training.adam`."""
    numbers = (decay, *rates, eps, factor, np.inf if limit is None else limit)
    _run(
        training.adam, weight.size, weight.size, weight.size,
        *map(address, (weight, grad, mean, square)), *map(np.float32, numbers),
    )  # fmt: skip


def batch_norm(
    x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, running: tuple[np.ndarray, np.ndarray],
    decay: float, eps: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Normalize features by their batch, and update the running statistics.

    Parameters
    ----------
    x : ndarray, shape (..., features)
    gamma, beta : ndarray, shape (features,)
    running : ndarrays of mean and variance, shape (features,)
    decay, eps : float
        As in `ops.batch_norm`.

    Returns
    -------
    normal, out : ndarray, shape of `x`
        Normalized, before and after `gamma` and `beta`.
    inverse : ndarray, shape (features,)
        1 / sqrt(variance + eps).
    """
    features = x.shape[-1]
    rows = x.size // features
    normal, out = np.empty_like(x), np.empty_like(x)
    inverse, work = np.empty(features, FLOAT32), np.empty(2 * features, FLOAT32)
    numbers = (rows, decay, 1 - decay, eps)
    arrays = (x, gamma, beta, *running, normal, out, inverse, work)
    _run(
        training.batch_norm, features, x.size, rows, features, *map(address, arrays),
        *map(np.float32, numbers),
    )  # fmt: skip
    return normal, out, inverse


def batch_norm_gradient(
    grad: np.ndarray, normal: np.ndarray, gamma: np.ndarray, inverse: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of x, gamma and beta from that of `batch_norm`'s result."""
    features = gamma.size
    rows = grad.size // features
    grad_x, grad_gamma, grad_beta = np.empty_like(grad), np.empty_like(gamma), np.empty_like(gamma)
    work = np.empty(2 * features, FLOAT32)
    arrays = (grad, normal, gamma, inverse, grad_x, grad_gamma, grad_beta, work)
    _run(
        training.batch_norm_gradient, features, grad.size, rows, features,
        *map(address, arrays), np.float32(rows),
    )  # fmt: skip
    return grad_x, grad_gamma, grad_beta
