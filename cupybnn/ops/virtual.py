"""Virtual adversarial directions: where a small move of the input changes predictions most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn.autograd import Tensor
from cupybnn.autograd.storage import module_of
from cupybnn.ops.losses import softmax_divergence

__all__ = ["of_length", "virtual_adversarial"]


def of_length(directions: Any, length: float) -> Any:
    """Return rows scaled to a Euclidean length; rows of zeros stay zeros.

    Parameters
    ----------
    directions : array of floating dtype, shape (n, features)
    length : float

    Returns
    -------
    array of that shape and dtype

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> ops.of_length(np.array([[3.0, 4.0], [0.0, 0.0]]), 10.0)
    array([[6., 8.],
           [0., 0.]])
    """
    xp = module_of(directions)
    # In float64, in which the squares of tiny gradients are not 0.
    wide = directions.astype(np.float64)
    norms = xp.sqrt((wide * wide).sum(axis=1, keepdims=True))
    factors = length / xp.where(norms > 0, norms, 1.0)
    return (wide * xp.where(norms > 0, factors, 0.0)).astype(directions.dtype)


def virtual_adversarial(
    network: Callable[[Tensor], Tensor],
    x: Any,
    probabilities: Any,
    start: Any,
    *,
    distance: float,
    xi: float,
    weight: float = 1.0,
) -> Any:
    """Return the move of each input that changes its prediction most, by one power iteration.

    With ``p`` the predictions at ``x``, constants, ``q(r)`` those at ``x + r``, and ``|start|`` the
    Euclidean norm of a row::

        d = gradient for r of KL(p || q(r)) at r = xi * start / |start|
        move = distance * d / |d|

    Parameters
    ----------
    network : callable
        Maps inputs, a Tensor of shape (n, features), to logits, shape (n, classes). Gradients of
        its parameters accumulate: clear them afterwards.
    x : array of floating dtype, shape (n, features)
    probabilities : array, shape (n, classes)
        The predictions at `x`.
    start : array of floating dtype, shape (n, features)
        Random directions.
    distance : float
        Length of a move.
    xi : float
        Length of the first step. A network of signs does not change at all if it is tiny: choose a
        tenth of a pixel's range or more.
    weight : float
        Share of these inputs in a batch of which other processes have the rest. It matters only
        where batch norm normalizes the whole batch: the others' predictions then depend on `x`.

    Returns
    -------
    array of the shape and dtype of `x`
        0 for an input whose prediction does not change.

    Notes
    -----
    Miyato, Maeda, Koyama, Ishii: Virtual adversarial training: a regularization method for
    supervised and semi-supervised learning, arXiv 1704.03976. KL(p || q) is smallest at r = 0, so
    that its first derivative is 0 there, and near it ``H r``: the gradient at a random r is a step
    of the power iteration for the eigenvector of the Hessian H with the greatest eigenvalue.

    Examples
    --------
    A linear network is most sensitive along the difference of its two columns:

    >>> import numpy as np
    >>> from cupybnn import Tensor, ops
    >>> weight = Tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> x, p = np.zeros((1, 2), "float32"), np.full((1, 2), 0.5, "float32")
    >>> start = np.array([[1.0, 0.5]], "float32")
    >>> ops.virtual_adversarial(lambda t: t @ weight, x, p, start, distance=10.0, xi=0.1)
    array([[ 6., -8.]], dtype=float32)
    """
    moved = Tensor(x + of_length(start, xi), requires_grad=True)
    divergence = softmax_divergence(network(moved), probabilities)
    divergence.backward(module_of(x).full((), weight, divergence.dtype))
    return of_length(moved.grad, distance)
