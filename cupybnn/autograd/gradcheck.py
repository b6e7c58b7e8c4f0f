"""Compare a backward pass with finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn.autograd.state import no_grad
from cupybnn.autograd.tensor import Tensor
from cupybnn.backends.devices import CPU, to_device

__all__ = ["gradcheck"]


def gradcheck(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    eps: float = 1e-6,
    rtol: float = 1e-5,
    atol: float = 1e-7,
) -> bool:
    """Compare the gradients of `function` with central differences, in float64.

    The function's result is multiplied by a fixed random array and summed, so that one backward
    pass tests every element of every gradient.

    Parameters
    ----------
    function : callable
        Takes `inputs` (it may ignore some) and returns a tensor of any shape. It must be smooth
        within `eps` of the inputs and give the same result on every call. A straight-through
        estimator is not a derivative: compare it with its formula.
    *inputs : Tensor
        Those that require a gradient must be float64 leaves; their `grad` is overwritten.
    eps : float
        Step size: ``(f(x + eps) - f(x - eps)) / (2 eps)``.
    rtol, atol : float
        A gradient may differ by ``atol + rtol * |difference quotient|``.

    Returns
    -------
    bool
        True.

    Raises
    ------
    AssertionError
        If an element differs; the message names the input, the element and both values.
    TypeError
        If no input requires a gradient, if one that does is not a float64 leaf, or if one is not
        a Tensor.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor
    >>> from cupybnn.autograd import gradcheck
    >>> gradcheck(lambda x: (x * x).sum(), Tensor(np.array([1.0, -2.0]), requires_grad=True))
    True
    """
    for number, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"gradcheck takes a function and then its inputs one by one; got "
                f"{type(x).__name__} as input {number}, not a Tensor."
            )
    wanted = [x for x in inputs if x.requires_grad]
    if not wanted or any(x.dtype != np.float64 or not x.is_leaf for x in wanted):
        raise TypeError(
            "gradcheck needs at least one input with requires_grad=True, and each such input must "
            "be a float64 leaf; got "
            + ", ".join(f"{x.dtype}, requires_grad={x.requires_grad}" for x in inputs)
        )
    for x in wanted:
        x.zero_grad()
    result = function(*inputs)
    weights = to_device(np.random.default_rng(0).uniform(0.5, 1.5, result.shape), result.device)
    result.backward(weights)

    def value() -> float:
        with no_grad(), np.errstate(all="ignore"):
            return float((function(*inputs)._data * weights).sum())

    for number, x in enumerate(inputs):
        if not x.requires_grad:
            continue
        expected = _differences(value, x, eps)
        # An input that the result does not depend on gets no gradient at all.
        got = np.zeros(x.shape) if x.grad is None else to_device(x.grad, CPU)
        with np.errstate(all="ignore"):
            wrong = ~(np.abs(got - expected) <= atol + rtol * np.abs(expected))
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"The gradient of input {number} is wrong in {int(wrong.sum())} of {x.size} "
                f"element(s), first at {at}: backward gives {got[at]:.9g}, central differences "
                f"give {expected[at]:.9g}."
            )
    return True


def _differences(value: Callable[[], float], x: Tensor, eps: float) -> Any:
    """Return central difference quotients of `value` for every element of `x`, as a NumPy array."""
    quotients = np.empty(x.shape)
    for at in np.ndindex(x.shape):
        before = float(x._data[at])
        values = []
        for step in (eps, -eps):
            x.write()[at] = before + step
            values.append(value())
        x.write()[at] = before
        quotients[at] = (values[0] - values[1]) / (2 * eps)
    return quotients
