"""Batch normalisation."""

from __future__ import annotations

from typing import Any

from cupybnn.autograd import Context, Function, Tensor

__all__ = ["batch_norm"]


def _row_sums(x: Any) -> Any:
    """Sum over every axis but the last."""
    return x.reshape(-1, x.shape[-1]).sum(axis=0)


class BatchNormTrain(Function):
    """Normalisation by the batch's own mean and variance."""

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
        n = x.size // x.shape[-1]
        mean = _row_sums(x) / n
        normal = x - mean
        out = normal * normal
        variance = _row_sums(out) / n
        for statistic, now in zip(running, (mean, variance), strict=True):
            statistic *= decay
            statistic += (1 - decay) * now
        ctx.deviation_inverse = 1 / ctx.xp.sqrt(variance + eps)
        normal *= ctx.deviation_inverse
        ctx.save(normal, gamma)
        ctx.xp.multiply(normal, gamma, out=out)
        out += beta
        return out

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        # With n rows, normal = (x - mean) / deviation and sums over the rows:
        #   beta' = sum(grad),  gamma' = sum(grad * normal),
        #   x' = gamma / deviation * (grad - (beta' + normal * gamma') / n)
        normal, gamma = ctx.saved
        work = grad * normal
        grad_gamma = _row_sums(work)
        grad_beta = _row_sums(grad)
        if not ctx.needs[0]:
            return None, grad_gamma, grad_beta
        n = grad.size // grad.shape[-1]
        ctx.xp.multiply(normal, -grad_gamma / n, out=work)
        work -= grad_beta / n
        work += grad
        work *= gamma * ctx.deviation_inverse
        return work, grad_gamma, grad_beta


class BatchNormEval(Function):
    """Normalisation by given statistics: an affine map of each feature."""

    @staticmethod
    def forward(
        ctx: Context, x: Any, gamma: Any, beta: Any, running: tuple[Any, Any], eps: float
    ) -> Any:
        mean, variance = running
        ctx.mean = mean.copy()
        ctx.deviation_inverse = 1 / ctx.xp.sqrt(variance + eps)
        ctx.save(x, gamma)
        scale = gamma * ctx.deviation_inverse
        out = x * scale
        out += beta - mean * scale
        return out

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        x, gamma = ctx.saved
        normal = (x - ctx.mean) * ctx.deviation_inverse
        return grad * (gamma * ctx.deviation_inverse), _row_sums(grad * normal), _row_sums(grad)


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
    """Normalise each feature over the batch: ``gamma * (x - mean) / sqrt(variance + eps) + beta``.

    Parameters
    ----------
    x : Tensor, shape (..., features)
        The batch; statistics are taken over all axes but the last.
    gamma, beta : Tensor, shape (features,)
        Scale and shift.
    running_mean, running_variance : ndarray, shape (features,)
        Exponential moving averages of the batches' statistics; the variance is the biased one
        (divided by the size of the batch). Updated in place when training, used otherwise.
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
    Ioffe, Szegedy: Batch normalization, ICML 2015. The backward pass is that paper's, summed up.
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
    if x.size == 0:
        raise ValueError(f"batch_norm cannot train on an empty batch; got x {x.shape}.")
    return BatchNormTrain.apply(x, gamma, beta, running=running, decay=decay, eps=eps)
