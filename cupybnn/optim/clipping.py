"""Gradient clipping by norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from cupybnn.autograd.storage import module_of
from cupybnn.backends.devices import device_of, to_device
from cupybnn.nn import Parameter
from cupybnn.optim.options import as_parameters

__all__ = ["clip_grad_norm"]

# Elements squared at a time on the host, so that the float64 copy stays in cache.
_HOST_BLOCK = 1 << 15


def clip_grad_norm(parameters: Iterable[Parameter] | Parameter, max_norm: float) -> Any:
    """Scale gradients down in place so that their total norm is at most `max_norm`.

    Call it between ``loss.backward()`` and ``optimizer.step()``.

    Parameters
    ----------
    parameters : iterable of Parameter, or Parameter
        Those without a gradient are skipped.
    max_norm : float
        Positive; infinity computes the norm and changes nothing.

    Returns
    -------
    float or 0-d cupy.ndarray of float64
        The norm before clipping: the root of the sum of the squares of all elements. On a GPU it
        stays there, and the host does not wait for it.

    Raises
    ------
    ValueError
        If `max_norm` is not positive.
    TypeError
        If an item is not a Parameter.

    Notes
    -----
    Squares are summed in float64, so that float16 and large float32 gradients do not overflow. If
    an element is NaN or infinite, so is the norm, and the gradients are left unchanged: a factor of
    0 or NaN would hide which of them it was.

    Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, ICML 2013.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn, optim
    >>> weight = nn.Parameter(np.zeros(2))
    >>> weight.grad = np.array([3.0, 4.0])
    >>> optim.clip_grad_norm([weight], max_norm=1.0)
    5.0
    >>> weight.grad
    array([0.6, 0.8])
    """
    try:
        valid = not isinstance(max_norm, bool) and bool(max_norm > 0)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"The 'max_norm' must be a positive number; got {max_norm!r}.")
    max_norm = float(max_norm)
    grads = {id(p.grad): p.grad for p in as_parameters(parameters) if p.grad is not None}
    arrays = [grad for grad in grads.values() if grad.size]
    if not arrays:
        return 0.0
    home = device_of(arrays[0])
    with home.scope():
        total = sum(to_device(_sum_of_squares(grad), home) for grad in arrays)
        if home.kind == "cpu":
            norm = math.sqrt(total)
            factor = np.float64(max_norm / norm if max_norm < norm < math.inf else 1)
        else:
            xp = module_of(total)
            norm = xp.sqrt(total)
            clip = xp.isfinite(norm) & (norm > max_norm)
            factor = xp.where(clip, max_norm / norm, 1.0)
    if home.kind == "cuda" or factor != 1:
        for grad in arrays:
            _scale(grad, factor)
    return norm


def _scale(grad: Any, factor: Any) -> None:
    device = device_of(grad)
    with device.scope():
        # In float64, rounded once: the factor may be too small for float16.
        device.xp.multiply(grad, to_device(factor, device), out=grad, casting="unsafe")


def _sum_of_squares(grad: Any) -> Any:
    """Return the sum in float64: a number, or a 0-d array on the device."""
    with device_of(grad).scope():
        if isinstance(grad, np.ndarray):
            flat = grad.reshape(-1)
            starts = range(0, flat.size, _HOST_BLOCK)
            with np.errstate(over="ignore"):
                parts = (flat[i : i + _HOST_BLOCK].astype(np.float64) for i in starts)
                return sum(float(part @ part) for part in parts)
        wide = grad.astype(np.float64)
        return (wide * wide).sum()
