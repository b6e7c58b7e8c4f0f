"""Quantizers: the sign, each with another pseudo-gradient in the place of its derivative.

The derivative of the sign is 0 almost everywhere and would stop all learning. A straight-through
estimator (STE) uses another function of x in its place. The sketches below show that function, the
pseudo-gradient, for a gradient of 1, from x = -2 to 2.

A quantizer of your own is a subclass of `Quantizer`, made known by `register_quantizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cupybnn.autograd.storage import module_of
from cupybnn.backends.random import Stream, uniform
from cupybnn.packed import sign as signs

__all__ = [
    "ApproxSign",
    "ClippedGrad",
    "EdeSign",
    "IdentitySign",
    "MagnitudeAwareSign",
    "Quantizer",
    "SteSign",
    "StochasticSign",
    "SwishSign",
    "get_quantizer",
    "quantizer_names",
    "register_quantizer",
]

_TABLE: dict[str, Callable[[], Quantizer]] = {}


class Quantizer:
    """Base class: ``forward(x) = sign(x)``, and a pseudo-gradient that a subclass defines.

    Attributes
    ----------
    window : float or None
        The pseudo-gradient is 0 where ``|x| > window``: a latent weight out there has stopped
        learning. None if it is 0 nowhere.
    """

    window: float | None = None

    def forward(self, x: Any, training: bool = True) -> Any:
        """Return +1 and -1 for an array `x`, in its dtype and shape."""
        return signs(x)

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        """Return the gradient for `x` from `grad`, the gradient for its sign; a new array."""
        raise NotImplementedError

    def scale(self, x: Any) -> Any | None:
        """Return factors for the signs, one for each element of the last axis, or None for 1."""
        return None

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def plot(self, axes: Any = None) -> Any:
        """Draw the quantizer and its pseudo-gradient over [-2, 2]; needs matplotlib.

        Parameters
        ----------
        axes : matplotlib.axes.Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        matplotlib.axes.Axes
        """
        import matplotlib.pyplot as plt
        import numpy as np

        axes = plt.subplots()[1] if axes is None else axes
        x = np.linspace(-2, 2, 801)
        axes.plot(x, self.forward(x, training=False), "k-", label="forward")
        axes.plot(x, self.pseudo_gradient(x, np.ones_like(x)), "C0--", label="pseudo-gradient")
        axes.set(xlabel="x", ylabel="value for a gradient of 1", title=type(self).__name__)
        axes.legend()
        return axes


def register_quantizer(*names: str) -> Callable[[Any], Any]:
    """Class decorator that makes a quantizer known by one or more names.

    Examples
    --------
    >>> from cupybnn.ops import Quantizer, register_quantizer
    >>> @register_quantizer("half_window")
    ... class HalfWindow(Quantizer):
    ...     window = 0.5
    ...
    ...     def pseudo_gradient(self, x, grad):
    ...         return grad * (abs(x) <= 0.5)
    """

    def register(factory: Any) -> Any:
        for name in names:
            if name in _TABLE:
                raise ValueError(f"A quantizer named {name!r} is registered already.")
            _TABLE[name] = factory
        return factory

    return register


def quantizer_names() -> list[str]:
    """Return the names that `get_quantizer` knows."""
    return sorted(_TABLE)


def get_quantizer(quantizer: str | Quantizer) -> Quantizer:
    """Return a new quantizer of the given name; a quantizer itself is returned as it is."""
    if isinstance(quantizer, Quantizer):
        return quantizer
    if quantizer not in _TABLE:
        raise ValueError(
            f"A quantizer must be one of {', '.join(quantizer_names())} or a Quantizer; got "
            f"{quantizer!r}."
        )
    return _TABLE[quantizer]()


@register_quantizer("ste_sign", "hard_tanh")
class SteSign(Quantizer):
    """Straight-through within a window, as if the sign were a hard tanh.

    Pseudo-gradient: ``grad`` where ``|x| <= window``, else 0::

        1        ┌─────────┬─────────┐
                 │         │         │
        0  ──────┘         │         └──────
                -1         0         1

    Parameters
    ----------
    window : float
        Half the width of the window.

    Notes
    -----
    Courbariaux et al.: Binarized neural networks, NeurIPS 2016.
    """

    def __init__(self, window: float = 1.0) -> None:
        if not window > 0:
            raise ValueError(f"The 'window' of ste_sign must be positive; got {window!r}.")
        self.window = window

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        out = abs(x)
        return module_of(x).multiply(grad, out <= self.window, out=out)


@register_quantizer("clipped_grad")
class ClippedGrad(Quantizer):
    """Straight-through everywhere, the gradient clipped.

    Pseudo-gradient: ``grad`` limited to [-limit, limit], whatever x is::

        1  ────────────────┬────────────────
                           │
        0                  │
                -1         0         1

    Parameters
    ----------
    limit : float
        Greatest magnitude of a gradient.

    Notes
    -----
    What the TensorFlow program did that this package follows.
    """

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = limit

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        return grad.clip(-self.limit, self.limit)


@register_quantizer("identity")
class IdentitySign(Quantizer):
    """Straight-through everywhere.

    Pseudo-gradient: ``grad``::

        1  ────────────────┬────────────────
                           │
        0                  │
                -1         0         1

    Notes
    -----
    Bengio, Léonard, Courville: Estimating or propagating gradients through stochastic neurons for
    conditional computation, 2013.
    """

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        return grad.copy()


@register_quantizer("approx_sign")
class ApproxSign(Quantizer):
    """The derivative of a piecewise quadratic approximation of the sign.

    Pseudo-gradient: ``grad * (2 - 2 |x|)`` where ``|x| <= 1``, else 0::

        2                  ╱╲
                         ╱  │ ╲
        1              ╱    │   ╲
                     ╱      │     ╲
        0  ────────╱        │       ╲──────
                 -1         0         1

    Notes
    -----
    Liu et al.: Bi-Real Net, ECCV 2018.
    """

    window = 1.0

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        out = abs(x)
        out *= -2
        out += 2
        module_of(x).maximum(out, 0, out=out)
        out *= grad
        return out


@register_quantizer("swish_sign")
class SwishSign(Quantizer):
    """The derivative of SignSwish, a smooth approximation that overshoots.

    Pseudo-gradient: ``grad * b (2 - b x tanh(b x / 2)) / (1 + cosh(b x))``, negative where
    ``|b x| > 2.4``; for b = 5::

        5                  ╭┴╮
                          ╱ │ ╲
                         │  │  │
        0  ─────────╮    │  │  │    ╭─────────
                    ╰────╯  │  ╰────╯
                 -1         0         1

    Parameters
    ----------
    beta : float
        b: the greater, the steeper.

    Notes
    -----
    Darabi et al.: Regularized binary network training, 2018.
    """

    def __init__(self, beta: float = 5.0) -> None:
        self.beta = beta

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        xp = module_of(x)
        # 1 / (1 + cosh z) = 2 e / (1 + e)**2 with e = exp(-|z|), which cannot overflow.
        z = x * self.beta
        e = xp.exp(-abs(z))
        return grad * (2 * self.beta * (2 - z * xp.tanh(z / 2)) * e / ((1 + e) * (1 + e)))


@register_quantizer("magnitude_aware_sign")
class MagnitudeAwareSign(SteSign):
    """Signs times their column's mean magnitude.

    Forward: ``m * sign(x)`` with ``m = mean(|x|)`` over all axes but the last. Pseudo-gradient:
    that of `SteSign` times m, which counts as a constant::

        m        ┌─────────┬─────────┐
                 │         │         │
        0  ──────┘         │         └──────
                -1         0         1

    The signs and `scale` are applied apart, so that a product of signs stays one.

    Notes
    -----
    Rastegari et al.: XNOR-Net, ECCV 2016.
    """

    def scale(self, x: Any) -> Any:
        return abs(x).reshape(-1, x.shape[-1]).mean(axis=0)


@register_quantizer("stochastic_sign")
class StochasticSign(SteSign):
    """A random sign, +1 with a probability that rises linearly; the sign itself in evaluation.

    Forward: +1 with probability ``clip((x + 1) / 2, 0, 1)``, else -1. Pseudo-gradient: that of
    `SteSign`::

        1        ┌─────────┬─────────┐
                 │         │         │
        0  ──────┘         │         └──────
                -1         0         1

    Parameters
    ----------
    window : float
        As in `SteSign`.
    seed : int
        Of the random numbers.

    Notes
    -----
    Courbariaux, Bengio, David: BinaryConnect, NeurIPS 2015.
    """

    def __init__(self, window: float = 1.0, seed: int = 0) -> None:
        super().__init__(window)
        self.random = Stream(seed)

    def forward(self, x: Any, training: bool = True) -> Any:
        if not training:
            return signs(x)
        draws = uniform(x.shape, *self.random.next(), module_of(x))
        # Not >=: a draw of 0 would make x = -1 uncertain.
        return 2 * (x + 1 > 2 * draws).astype(x.dtype) - 1


@register_quantizer("ede_sign")
class EdeSign(Quantizer):
    """The derivative of a tanh that sharpens over training: error decay estimation.

    Pseudo-gradient: ``grad * k t (1 - tanh(t x)**2)`` with ``t = 0.1 * 100**progress`` and
    ``k = max(1 / t, 1)``: nearly the identity at first, nearly the sign's own derivative in the
    end::

        10                 │                  progress = 1: the spike
                           │
        1  ────────────────┼────────────────  progress = 0: the flat line
        0  ───────────────╯│╰───────────────
                -1         0         1

    Parameters
    ----------
    progress : float
        How much of training is done, from 0 to 1; to be set at every step.

    Notes
    -----
    Qin et al.: Forward and backward information retention for accurate binary neural networks
    (IR-Net), CVPR 2020.
    """

    def __init__(self, progress: float = 0.0) -> None:
        self.progress = progress

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        t = 0.1 * 100.0**self.progress
        k = max(1 / t, 1.0)
        y = module_of(x).tanh(x * t)
        return grad * (k * t * (1 - y * y))
