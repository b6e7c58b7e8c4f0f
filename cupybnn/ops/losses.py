"""Losses, each with a hand-derived gradient."""

from __future__ import annotations

from typing import Any

from cupybnn.autograd import Context, Function, Tensor, tensor_or_number
from cupybnn.autograd.precision import narrowed, widened

__all__ = ["mse", "softmax_cross_entropy", "softmax_divergence", "squared_hinge"]


def _targets(labels: Any, like: Any, xp: Any) -> Any:
    """Return class probabilities, shape (n, classes); one-hot if `labels` are class numbers."""
    if labels.ndim == 2:
        return labels.astype(like.dtype, copy=False)
    return (labels[:, None] == xp.arange(like.shape[1])).astype(like.dtype)


class SoftmaxCrossEntropy(Function):
    """Mean over the batch of -sum(targets * log softmax(logits)).

    An example of weight w = sum(targets) has the gradient w * softmax - targets.
    """

    @staticmethod
    def forward(ctx: Context, logits: Any, labels: Any, smoothing: float) -> Any:
        xp, wide = ctx.xp, widened(logits)
        targets = _targets(labels, wide, xp)
        weights = targets.sum(axis=1, keepdims=True)
        if smoothing:
            targets = targets * (1 - smoothing) + smoothing / logits.shape[1]
            weights += smoothing * (1 - weights)  # exactly 1 if they were 1 before
        shifted = wide - wide.max(axis=1, keepdims=True)
        difference = xp.exp(shifted)
        totals = difference.sum(axis=1, keepdims=True)
        losses = xp.log(totals) - shifted
        losses *= targets
        # A class of weight 0 adds nothing, even if its log-probability is -inf.
        loss = xp.where(targets == 0, losses.dtype.type(0), losses).sum() / len(logits)
        difference /= totals
        # An example of weight 0 has no gradient, even if its softmax is NaN.
        difference = xp.where(weights == 0, losses.dtype.type(0), difference * weights)
        difference -= targets
        ctx.save(difference)
        return narrowed(loss, logits)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (difference,) = ctx.saved
        return narrowed(difference * (widened(grad) / len(difference)), grad), None


class SoftmaxDivergence(Function):
    """Mean over the batch of sum(p * (log p - log softmax(logits))).

    An example of weight w = sum(p) has the gradient w * softmax - p.
    """

    @staticmethod
    def forward(ctx: Context, logits: Any, probabilities: Any) -> Any:
        xp, wide = ctx.xp, widened(logits)
        p = probabilities.astype(wide.dtype, copy=False)
        shifted = wide - wide.max(axis=1, keepdims=True)
        difference = xp.exp(shifted)
        totals = difference.sum(axis=1, keepdims=True)
        # A class of probability 0 adds nothing; its logarithm is never looked at.
        present = p > 0
        losses = xp.log(xp.where(present, p, p.dtype.type(1))) + (xp.log(totals) - shifted)
        loss = xp.where(present, p * losses, losses.dtype.type(0)).sum() / len(logits)
        difference /= totals
        # An example of weight 0 has no gradient, even if its softmax is NaN.
        weights = p.sum(axis=1, keepdims=True)
        difference = xp.where(weights == 0, losses.dtype.type(0), difference * weights)
        difference -= p
        ctx.save(difference)
        return narrowed(loss, logits)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (difference,) = ctx.saved
        return narrowed(difference * (widened(grad) / len(difference)), grad), None


class SquaredHinge(Function):
    """Mean over all outputs of max(0, 1 - target * output)**2, targets +1 and -1."""

    @staticmethod
    def forward(ctx: Context, outputs: Any, labels: Any) -> Any:
        xp, wide = ctx.xp, widened(outputs)
        targets = 2 * _targets(labels, wide, xp) - 1
        if labels.ndim == 2:  # a target of 0 has a margin of 1, even if the output is infinite
            wide = xp.where((targets == 0) & xp.isinf(wide), wide.dtype.type(0), wide)
        margins = xp.maximum(1 - targets * wide, 0)
        targets *= margins
        ctx.save(targets)
        return narrowed((margins * margins).mean(), outputs)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (products,) = ctx.saved
        return narrowed(products * (widened(grad) * (-2 / products.size)), grad), None


class Mse(Function):
    """Mean of (a - b)**2."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        difference = widened(a) - widened(b)
        ctx.save(difference)
        return (difference * difference).mean().astype(a.dtype)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (difference,) = ctx.saved
        out = difference * (widened(grad) * (2 / difference.size))
        return (
            ctx.fit(out, 0) if ctx.needs[0] else None,
            ctx.fit(-out, 1) if ctx.needs[1] else None,
        )


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
        raise ValueError(f"{op} has no gradient for its labels: pass labels.detach().")
    # On a GPU, checking the values would make the host wait.
    if classes and labels.device.kind == "cpu":
        lowest, highest = labels._data.min(), labels._data.max()
        if lowest < 0 or highest >= outputs.shape[1]:
            raise ValueError(
                f"The labels of {op} must be class numbers from 0 to {outputs.shape[1] - 1}; got "
                f"{lowest if lowest < 0 else highest}."
            )
    return labels


def softmax_cross_entropy(logits: Tensor, labels: Any, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy between labels and the softmax of `logits`.

    Parameters
    ----------
    logits : Tensor, shape (n, classes)
        Unnormalized log-probabilities.
    labels : Tensor or array, shape (n,) or (n, classes)
        Class numbers, or class probabilities (soft labels, a teacher's outputs). An example's
        probabilities need not sum to 1: their sum is its weight, and 0 leaves it out.
        On a GPU, class numbers are not checked: an example out of range has no label and
        weight 0.
    smoothing : float
        Share of each example's probability that is spread evenly over all classes (label
        smoothing: Szegedy et al., CVPR 2016).

    Returns
    -------
    Tensor, shape ()

    Notes
    -----
    A logit of -inf excludes a class. The loss is infinite only if an excluded class has a label. It
    is NaN for an example with a logit of inf or NaN, or without any finite logit. An example of
    weight 0 adds nothing to the loss and has a gradient of 0, whatever its logits are.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> logits = Tensor([[0.0, 0.0], [3.0, 0.0]])
    >>> round(ops.softmax_cross_entropy(logits, [1, 0]).item(), 4)
    0.3709
    """
    if not 0 <= smoothing < 1:
        raise ValueError(
            f"The 'smoothing' of softmax_cross_entropy must be in [0, 1); got {smoothing!r}."
        )
    labels = _checked_labels(logits, labels, "softmax_cross_entropy", "logits")
    return SoftmaxCrossEntropy.apply(logits, labels, smoothing=smoothing)


def softmax_divergence(logits: Tensor, probabilities: Any) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the softmax of `logits` from predictions p.

    ``KL(p || q) = sum(p * (log p - log q))`` with ``q = softmax(logits)``: 0 where both agree, else
    positive.

    Parameters
    ----------
    logits : Tensor, shape (n, classes)
        Unnormalized log-probabilities.
    probabilities : Tensor or array of floats, shape (n, classes)
        The predictions p, constants: they have no gradient.

    Returns
    -------
    Tensor, shape ()

    Raises
    ------
    ValueError
        If the shapes differ, the batch is empty, or `probabilities` require a gradient.

    Notes
    -----
    Kullback, Leibler: On information and sufficiency, 1951. Its gradient is that of
    `softmax_cross_entropy` with the labels p; the two differ by the entropy of p.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> import numpy as np
    >>> logits = Tensor([[0.0, 0.0]], requires_grad=True)
    >>> loss = ops.softmax_divergence(logits, np.array([[1.0, 0.0]], "float32"))
    >>> round(loss.item(), 4)
    0.6931
    >>> loss.backward()
    >>> logits.grad
    array([[-0.5,  0.5]], dtype=float32)
    """
    p = probabilities if isinstance(probabilities, Tensor) else Tensor(probabilities)
    if logits.ndim != 2 or p.shape != logits.shape or p.dtype.kind != "f" or not len(logits):
        raise ValueError(
            f"softmax_divergence needs logits and floating probabilities of one shape (n, "
            f"classes), n at least 1; got logits {logits.shape} and probabilities {p.shape} "
            f"{p.dtype}."
        )
    if p.requires_grad:
        raise ValueError(
            "softmax_divergence has no gradient for its probabilities: pass p.detach()."
        )
    return SoftmaxDivergence.apply(logits, p)


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

    Notes
    -----
    An output whose target is 0 (a probability of 0.5) adds a constant and has a gradient of 0, even
    where it is infinite. An infinite output of the wrong sign makes the loss infinite; one that is
    NaN makes it NaN.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.squared_hinge(Tensor([[2.0, -0.5]]), [0]).item()
    0.125
    """
    labels = _checked_labels(outputs, labels, "squared_hinge", "outputs")
    return SquaredHinge.apply(outputs, labels)


def mse(outputs: Tensor, targets: Any) -> Tensor:
    """Return the mean squared error, the mean over all elements of ``(outputs - targets)**2``.

    Parameters
    ----------
    outputs : Tensor, any shape
        Floating.
    targets : Tensor or array, shape of `outputs`
        May require a gradient, too.

    Returns
    -------
    Tensor, shape ()
        Of the dtype of `outputs`.

    Raises
    ------
    ValueError
        If the shapes differ (broadcasting here would be a mistake), or are empty.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.mse(Tensor([1.0, 4.0]), Tensor([1.0, 2.0])).item()
    2.0
    """
    outputs, targets = tensor_or_number(outputs, "mse"), tensor_or_number(targets, "mse")
    shapes = [x.shape if isinstance(x, Tensor) else "a number" for x in (outputs, targets)]
    if shapes[0] != shapes[1] or not isinstance(outputs, Tensor) or outputs.size == 0:
        raise ValueError(
            f"mse needs outputs and targets of one shape, with at least one element; got "
            f"{shapes[0]} and {shapes[1]}."
        )
    if outputs.dtype.kind != "f":
        raise TypeError(f"The 'outputs' of mse must be floating; got {outputs.dtype}.")
    return Mse.apply(outputs, targets)
