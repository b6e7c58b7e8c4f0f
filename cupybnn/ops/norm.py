"""Batch normalization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from cupybnn import backends
from cupybnn.autograd import Context, Function, Tensor
from cupybnn.autograd.precision import narrowed, widened

__all__ = ["batch_norm", "whole_batch"]

#: Within `whole_batch`: the function that sums over all parts of a batch, and their rows.
_whole: ContextVar[tuple[Callable[[Any], Any], int] | None] = ContextVar("whole", default=None)


@contextlib.contextmanager
def whole_batch(total: Callable[[Any], Any], rows: int) -> Iterator[None]:
    """Context in which batch norm trains with the statistics of a batch of which x is a part.

    Parameters
    ----------
    total : callable
        Returns the sum of an array over all parts of the batch, wherever they are: each part's
        process calls it in turn.
    rows : int
        Rows of the whole batch.
    """
    token = _whole.set((total, rows))
    try:
        yield
    finally:
        _whole.reset(token)


def _row_sums(x: Any, out: Any = None) -> Any:
    """Sum over every axis but the last."""
    return x.reshape(-1, x.shape[-1]).sum(axis=0, out=out)


def _fit_to_operands(ctx: Context, *grads: Any) -> tuple[Any, ...]:
    """Cast gradients to their operands' dtypes; None for those not needed."""
    return tuple(
        ctx.fit(grad, i) if needed else None
        for i, (grad, needed) in enumerate(zip(grads, ctx.needs, strict=True))
    )


def _passes(x: Any, *others: Any) -> Any:
    """Return the compiled passes for batch norm, or None.

    NumPy adds up a single feature in another order than several.
    """
    return backends.get(x).passes(x, *others) if x.shape[-1] > 1 else None


class BatchNormTrain(Function):
    """Normalization with the batch's own mean and variance."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Any,
        gamma: Any,
        beta: Any,
        running: tuple[Any, Any],
        decay: float,
        eps: float,
    ) -> Any:
        passes = _passes(x, gamma, beta, *running)
        if passes is not None:
            normal, out, ctx.deviation_inverse = passes.batch_norm(
                x, gamma, beta, running, decay, eps
            )
            ctx.save(normal, gamma)
            return out
        original, x = x, widened(x)
        xp, n = ctx.xp, x.size // x.shape[-1]
        normal, out = xp.empty_like(x), xp.empty_like(x)
        ctx.deviation_inverse = xp.empty_like(x, shape=x.shape[-1:])

        def normalize_part(part: Any) -> None:
            here, work = normal[part], out[part]
            mean = _row_sums(x[part]) / n
            xp.subtract(x[part], mean, out=here)
            xp.multiply(here, here, out=work)
            variance = _row_sums(work) / n
            for average, current in zip(running, (mean, variance), strict=True):
                stored = average[part]
                updated = widened(stored)
                updated *= decay
                updated += (1 - decay) * current
                if updated is not stored:
                    stored[...] = updated
            inverse = xp.divide(1, xp.sqrt(variance + eps), out=ctx.deviation_inverse[part])
            here *= inverse
            xp.multiply(here, gamma[part], out=work)
            work += beta[part]

        backends.get(x).parallel_parts(x, -1, normalize_part)
        ctx.save(normal, gamma)
        return narrowed(out, original)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        # With n rows, normal = (x - mean) / deviation and sums over the rows:
        #   beta' = sum(grad),  gamma' = sum(grad * normal),
        #   x' = gamma / deviation * (grad - (beta' + normal * gamma') / n)
        normal, gamma = ctx.saved
        passes = _passes(grad, normal, gamma)
        if passes is not None:
            grads = passes.batch_norm_gradient(grad, normal, gamma, ctx.deviation_inverse)
            return _fit_to_operands(ctx, *grads)
        grad, gamma = widened(grad), widened(gamma)
        xp, n = ctx.xp, grad.size // grad.shape[-1]
        grad_x = xp.empty_like(grad)
        grad_gamma, grad_beta = xp.empty_like(gamma), xp.empty_like(gamma)

        def normalize_part(part: Any) -> None:
            here, x, out = grad[part], normal[part], grad_x[part]
            xp.multiply(here, x, out=out)
            for_gamma = _row_sums(out, out=grad_gamma[part])
            for_beta = _row_sums(here, out=grad_beta[part])
            xp.multiply(x, for_gamma / -n, out=out)
            out -= for_beta / n
            out += here
            out *= gamma[part] * ctx.deviation_inverse[part]

        backends.get(grad).parallel_parts(grad, -1, normalize_part)
        return _fit_to_operands(ctx, grad_x, grad_gamma, grad_beta)


class BatchNormWhole(Function):
    """Normalization with mean and variance of a batch of which other processes have parts."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Any,
        gamma: Any,
        beta: Any,
        running: tuple[Any, Any],
        decay: float,
        eps: float,
        whole: tuple[Callable[[Any], Any], int],
    ) -> Any:
        original, x = x, widened(x)
        ctx.total, rows = whole
        # Elements of a feature: all axes but the first and the last count for each row.
        ctx.n = rows * (x.size // x.shape[-1] // len(x)) if len(x) else rows
        mean = ctx.total(_row_sums(x)) / ctx.n
        normal = x - mean
        variance = ctx.total(_row_sums(normal * normal)) / ctx.n
        for stored, current in zip(running, (mean, variance), strict=True):
            stored[...] = decay * widened(stored) + (1 - decay) * current
        ctx.deviation_inverse = 1 / ctx.xp.sqrt(variance + eps)
        normal *= ctx.deviation_inverse
        ctx.save(normal, gamma)
        return narrowed(normal * gamma + beta, original)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        # As in BatchNormTrain, where only the sums for x' are those of the whole batch: whoever
        # has the other parts adds the gradients of gamma and beta.
        normal, gamma = ctx.saved
        grad, gamma = widened(grad), widened(gamma)
        sums = ctx.xp.stack([_row_sums(grad * normal), _row_sums(grad)])
        for_gamma, for_beta = ctx.total(sums)
        grad_x = normal * (for_gamma / -ctx.n)
        grad_x += grad - for_beta / ctx.n
        grad_x *= gamma * ctx.deviation_inverse
        return _fit_to_operands(ctx, grad_x, *sums)


class BatchNormEval(Function):
    """Normalization with running statistics: an affine map of each feature."""

    @staticmethod
    def forward(
        ctx: Context, x: Any, gamma: Any, beta: Any, running: tuple[Any, Any], eps: float
    ) -> Any:
        mean, variance = running
        ctx.mean = mean.copy()
        ctx.deviation_inverse = 1 / ctx.xp.sqrt(widened(variance) + eps)
        ctx.save(x, gamma)
        scale = gamma * ctx.deviation_inverse
        out = x * scale
        out += beta - mean * scale
        return narrowed(out, x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        x, gamma = ctx.saved
        normal = (widened(x) - ctx.mean) * ctx.deviation_inverse
        grad = widened(grad)
        return _fit_to_operands(
            ctx, grad * (gamma * ctx.deviation_inverse), _row_sums(grad * normal), _row_sums(grad)
        )


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Any,
    running_variance: Any,
    *,
    training: bool,
    decay: float = 0.9,
    eps: float = 1e-4,
) -> Tensor:
    """Normalize each feature over the batch: ``gamma * (x - mean) / sqrt(variance + eps) + beta``.

    Parameters
    ----------
    x : Tensor, shape (..., features)
        The batch; statistics are taken over all axes but the last.
    gamma, beta : Tensor, shape (features,)
        Scale and shift.
    running_mean, running_variance : ndarray, shape (features,)
        Exponential moving averages of the batch statistics, with the biased variance (divided by
        the batch size). Updated in place when training, used otherwise.
    training : bool
        Whether the batch's own statistics are used.
    decay : float
        ``running = decay * running + (1 - decay) * batch``.
    eps : float
        Added to the variance.

    Raises
    ------
    ValueError
        If the numbers of features differ, or the batch is empty when training.

    Notes
    -----
    Ioffe, Szegedy: Batch normalization, ICML 2015. The backward pass is that paper's, simplified.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([[1.0], [3.0]]))
    >>> one, zero = Tensor(np.ones(1)), Tensor(np.zeros(1))
    >>> mean, variance = np.zeros(1), np.ones(1)
    >>> ops.batch_norm(x, one, zero, mean, variance, training=True).numpy().round(3)
    array([[-1.],
           [ 1.]])
    >>> mean
    array([0.2])
    """
    features = (x.shape[-1],) if x.ndim else ()
    if x.ndim < 2 or any(
        p.shape != features for p in (gamma, beta, running_mean, running_variance)
    ):
        raise ValueError(
            f"batch_norm needs an x of shape (..., features), and gamma, beta and the running "
            f"statistics of shape (features,); got x {x.shape}, gamma {gamma.shape}, beta "
            f"{beta.shape}, running statistics {running_mean.shape} and {running_variance.shape}."
        )
    running = (running_mean, running_variance)
    if not training:
        return BatchNormEval.apply(x, gamma, beta, running=running, eps=eps)
    whole = _whole.get()
    if whole is not None:
        return BatchNormWhole.apply(
            x, gamma, beta, running=running, decay=decay, eps=eps, whole=whole
        )
    if x.size == 0:
        raise ValueError(f"batch_norm cannot train on an empty batch; got x {x.shape}.")
    return BatchNormTrain.apply(x, gamma, beta, running=running, decay=decay, eps=eps)
