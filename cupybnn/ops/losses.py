"""Losses and penalties, each with its gradient summed up by hand."""

from __future__ import annotations

from typing import Any

from cupybnn.autograd import Context, Function, Tensor

__all__ = ["bipolar_penalty", "l1", "softmax_cross_entropy", "squared_hinge"]


def _targets(labels: Any, like: Any, xp: Any) -> Any:
    """Return class probabilities, shape (n, classes): one-hot if `labels` are class numbers."""
    if labels.ndim == 2:
        return labels.astype(like.dtype, copy=False)
    return (labels[:, None] == xp.arange(like.shape[1])).astype(like.dtype)


class SoftmaxCrossEntropy(Function):
    """Mean over the batch of -sum(targets * log softmax(logits))."""

    @staticmethod
    def forward(ctx: Context, logits: Any, labels: Any, smoothing: float) -> Any:
        xp = ctx.xp
        targets = _targets(labels, logits, xp)
        if smoothing:
            targets = targets * (1 - smoothing) + smoothing / logits.shape[1]
        shifted = logits - logits.max(axis=1, keepdims=True)
        difference = xp.exp(shifted)
        totals = difference.sum(axis=1, keepdims=True)
        log_total = xp.log(totals)
        loss = (targets * (log_total - shifted)).sum() / len(logits)
        difference /= totals
        difference -= targets
        ctx.save(difference)
        return loss

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (difference,) = ctx.saved
        return difference * (grad / len(difference)), None


class SquaredHinge(Function):
    """Mean over all outputs of max(0, 1 - target * output)**2, targets +1 and -1."""

    @staticmethod
    def forward(ctx: Context, outputs: Any, labels: Any) -> Any:
        targets = 2 * _targets(labels, outputs, ctx.xp) - 1
        margins = ctx.xp.maximum(1 - targets * outputs, 0)
        targets *= margins
        ctx.save(targets)
        return (margins * margins).mean()

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (products,) = ctx.saved
        return products * (grad * (-2 / products.size)), None


class L1(Function):
    """sum(|x|)."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        return abs(x).sum()

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        out = ctx.xp.sign(x)
        out *= grad
        return out


class BipolarPenalty(Function):
    """sum(1 - x**2)."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        return x.size - (x * x).sum()

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        return x * (-2 * grad)


def _checked_labels(outputs: Tensor, labels: Any, op: str, name: str) -> Tensor:
    """Return `labels` as a tensor, after checking them against `outputs`."""
    labels = labels if isinstance(labels, Tensor) else Tensor(labels)
    classes = labels.ndim == 1 and labels.dtype.kind in "iu" and outputs.shape[:1] == labels.shape
    probabilities = labels.dtype.kind == "f" and labels.shape == outputs.shape
    if outputs.ndim != 2 or not (classes or probabilities):
        raise ValueError(
            f"{op} needs {name} of shape (n, classes), and labels that are class numbers, integers "
            f"of shape (n,), or class probabilities, floats of shape (n, classes); got {name} "
            f"{outputs.shape} and labels {labels.shape} {labels.dtype}."
        )
    if outputs.shape[0] == 0:
        raise ValueError(f"{op} has no mean over an empty batch; got {name} {outputs.shape}.")
    if labels.requires_grad:
        raise ValueError(f"{op} has no gradient for its labels: give labels.detach().")
    # Looking at the values would make the host wait for the GPU.
    if classes and labels.device.kind == "cpu":
        least, greatest = labels._data.min(), labels._data.max()
        if least < 0 or greatest >= outputs.shape[1]:
            raise ValueError(
                f"The labels of {op} must be class numbers from 0 to {outputs.shape[1] - 1}; got "
                f"{least if least < 0 else greatest}."
            )
    return labels


def softmax_cross_entropy(logits: Tensor, labels: Any, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy between labels and the softmax of `logits`.

    Parameters
    ----------
    logits : Tensor, shape (n, classes)
        Unnormalised log-probabilities.
    labels : Tensor or array, shape (n,) or (n, classes)
        Class numbers, or class probabilities (soft labels, a teacher's outputs).
        On a GPU, class numbers out of range are not noticed: none of the classes is then right.
    smoothing : float
        This much of each example's probability is spread evenly over all classes (label
        smoothing: Szegedy et al., CVPR 2016).

    Returns
    -------
    Tensor, shape ()
    """
    if not 0 <= smoothing < 1:
        raise ValueError(
            f"The 'smoothing' of softmax_cross_entropy must be in [0, 1); got {smoothing!r}."
        )
    labels = _checked_labels(logits, labels, "softmax_cross_entropy", "logits")
    return SoftmaxCrossEntropy.apply(logits, labels, smoothing=smoothing)


def squared_hinge(outputs: Tensor, labels: Any) -> Tensor:
    """Return the mean over all outputs of ``max(0, 1 - target * output)**2``.

    The target is +1 for an example's class and -1 for the others, as in BinaryNet (Courbariaux
    et al. 2016) after Tang: Deep learning using linear support vector machines, 2013.

    Parameters
    ----------
    outputs : Tensor, shape (n, classes)
        Scores.
    labels : Tensor or array, shape (n,) or (n, classes)
        Class numbers, or class probabilities (the target is then ``2 * probability - 1``).

    Returns
    -------
    Tensor, shape ()
    """
    labels = _checked_labels(outputs, labels, "squared_hinge", "outputs")
    return SquaredHinge.apply(outputs, labels)


def l1(x: Tensor) -> Tensor:
    """Return ``sum(|x|)``, shape (). The gradient at 0 is 0."""
    return L1.apply(x)


def bipolar_penalty(x: Tensor) -> Tensor:
    """Return ``sum(1 - x**2)``, shape (), which draws latent weights in [-1, 1] to -1 and +1.

    Beyond that interval it falls without limit: clip the latent weights to it.

    Notes
    -----
    Tang, Hua, Wang: How to train a compact binary neural network with high accuracy? AAAI 2017.
    """
    return BipolarPenalty.apply(x)
