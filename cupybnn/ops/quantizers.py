"""Quantizers: the sign, with different pseudo-gradients instead of its derivative.

The derivative of the sign is 0 almost everywhere and would stop all learning. A straight-through
estimator (STE) replaces it with another function of x. The sketches below show that function, the
pseudo-gradient, for an incoming gradient of 1, from x = -2 to 2.

Pseudo-gradients and scales take arrays of NumPy and CuPy and tensors of PyTorch alike.
"""

from __future__ import annotations

from typing import Any

from cupybnn import backends
from cupybnn.autograd.precision import narrowed, sum_dtype
from cupybnn.autograd.storage import module_of
from cupybnn.backends.random import Stream, uniform
from cupybnn.ops.quantizer import Quantizer, register_quantizer
from cupybnn.packed import sign

__all__ = [
    "ApproxSign",
    "ClippedGrad",
    "EdeSign",
    "IdentitySign",
    "MagnitudeAwareSign",
    "SteSign",
    "StochasticSign",
    "SwishSign",
]


@register_quantizer("ste_sign", "hard_tanh")
class SteSign(Quantizer):
    """Straight-through within a window, as if the sign were a hard tanh.

    Forward: ``sign(x)``. Pseudo-gradient: ``grad`` where ``|x| <= window``, else 0::

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

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.ops import SteSign
    >>> x = np.array([-1.5, -0.5, 0.0, 0.5])
    >>> SteSign().pseudo_gradient(x, np.full(4, 2.0))
    array([0., 2., 2., 2.])
    """

    def __init__(self, window: float = 1.0) -> None:
        if not window > 0:
            raise ValueError(f"The 'window' of ste_sign must be positive; got {window!r}.")
        self.window = window

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        xp = module_of(x)
        passes = backends.get(x).passes(x, grad)
        if passes is not None:
            return passes.gradient_in_window(x, grad, self.window)
        out = xp.empty_like(x)

        def mask_part(part: Any) -> None:
            magnitudes = xp.abs(x[part], out=out[part])
            xp.multiply(grad[part], magnitudes <= self.window, out=magnitudes)

        backends.get(x).parallel_parts(x, 0, mask_part)
        return out


@register_quantizer("clipped_grad")
class ClippedGrad(Quantizer):
    """Straight-through everywhere, with a clipped gradient.

    Forward: ``sign(x)``. Pseudo-gradient: ``grad`` limited to [-limit, limit], whatever x is::

        1  ────────────────┬────────────────
                           │
        0                  │
                -1         0         1

    Parameters
    ----------
    limit : float
        Largest magnitude of a gradient.

    Notes
    -----
    Bengio, Léonard, Courville: Estimating or propagating gradients through stochastic neurons for
    conditional computation, 2013, without the limit. The limit comes from the TensorFlow program
    that this package follows.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.ops import ClippedGrad
    >>> x = np.array([-1.5, -0.5, 0.0, 0.5])
    >>> ClippedGrad().pseudo_gradient(x, np.full(4, 2.0))
    array([1., 1., 1., 1.])
    """

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = limit

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        return grad.clip(-self.limit, self.limit)


@register_quantizer("identity")
class IdentitySign(Quantizer):
    """Straight-through everywhere.

    Forward: ``sign(x)``. Pseudo-gradient: ``grad``::

        1  ────────────────┬────────────────
                           │
        0                  │
                -1         0         1

    Notes
    -----
    Bengio, Léonard, Courville: Estimating or propagating gradients through stochastic neurons for
    conditional computation, 2013.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.ops import IdentitySign
    >>> x = np.array([-1.5, -0.5, 0.0, 0.5])
    >>> IdentitySign().pseudo_gradient(x, np.full(4, 2.0))
    array([2., 2., 2., 2.])
    """

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        return +grad


@register_quantizer("approx_sign")
class ApproxSign(Quantizer):
    """The derivative of a piecewise quadratic approximation of the sign.

    Forward: ``sign(x)``. Pseudo-gradient: ``grad * (2 - 2 |x|)`` where ``|x| <= 1``, else 0::

        2                  ╱╲
                         ╱  │ ╲
        1              ╱    │   ╲
                     ╱      │     ╲
        0  ────────╱        │       ╲──────
                 -1         0         1

    Notes
    -----
    Liu et al.: Bi-Real Net, ECCV 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.ops import ApproxSign
    >>> x = np.array([-1.5, -0.5, 0.0, 0.5])
    >>> ApproxSign().pseudo_gradient(x, np.full(4, 2.0))
    array([0., 2., 4., 2.])
    """

    window = 1.0

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        out = abs(x)
        out *= -2
        out += 2
        module_of(x).clip(out, 0, None, out=out)
        out *= grad
        return out


@register_quantizer("swish_sign")
class SwishSign(Quantizer):
    """The derivative of SignSwish, a smooth approximation that overshoots.

    Forward: ``sign(x)``. Pseudo-gradient:
    ``grad * b (2 - b x tanh(b x / 2)) / (1 + cosh(b x))``, negative where ``|b x| > 2.4``; for
    b = 5::

        5                  ╭┴╮
                          ╱ │ ╲
                         │  │  │
        0  ─────────╮    │  │  │    ╭─────────
                    ╰────╯  │  ╰────╯
                 -1         0         1

    Parameters
    ----------
    beta : float
        b: the larger, the steeper.

    Notes
    -----
    Darabi et al.: Regularized binary network training, 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.ops import SwishSign
    >>> x = np.array([-1.5, -0.5, 0.0, 0.5])
    >>> SwishSign().pseudo_gradient(x, np.full(4, 2.0)).round(4)
    array([-0.0607, -0.1692, 10.    , -0.1692])
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
    """Signs scaled by the mean magnitude of their column.

    Forward: ``m * sign(x)`` with ``m = mean(|x|)`` over all axes but the last. Pseudo-gradient:
    that of `SteSign` times m, which is treated as a constant::

        m        ┌─────────┬─────────┐
                 │         │         │
        0  ──────┘         │         └──────
                -1         0         1

    `scale` is applied separately from the signs, so that a product of signs remains one.

    Notes
    -----
    Rastegari et al.: XNOR-Net, ECCV 2016.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.ops import MagnitudeAwareSign
    >>> x = np.array([[0.5, -1.0], [-0.25, 3.0]])
    >>> MagnitudeAwareSign().scale(x)  # of each column
    array([0.375, 2.   ])
    """

    def scale(self, x: Any) -> Any:
        magnitudes = abs(x).reshape(-1, x.shape[-1])
        return narrowed(magnitudes.mean(axis=0, dtype=sum_dtype(x)), x)


@register_quantizer("stochastic_sign")
class StochasticSign(SteSign):
    """A random sign, +1 with a probability linear in x; the plain sign in evaluation.

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
        Seed of the random numbers.

    Notes
    -----
    Courbariaux, Bengio, David: BinaryConnect, NeurIPS 2015.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.ops import StochasticSign
    >>> x = np.array([-1.5, -0.5, 0.0, 0.5])
    >>> StochasticSign().pseudo_gradient(x, np.full(4, 2.0))
    array([0., 2., 2., 2.])
    """

    def __init__(self, window: float = 1.0, seed: int = 0) -> None:
        super().__init__(window)
        self.random = Stream(seed)

    def forward(self, x: Any, training: bool = True) -> Any:
        if not training:
            return sign(x)
        draws = uniform(x.shape, *self.random.next(), module_of(x))
        return 2 * self.is_plus(x, draws).astype(x.dtype) - 1

    def is_plus(self, x: Any, draws: Any) -> Any:
        """Whether each sign is +1, given random numbers in [0, 1)."""
        # Not >=: with a draw of 0, x = -1 could give +1.
        return x + 1 > 2 * draws


@register_quantizer("ede_sign")
class EdeSign(Quantizer):
    """The derivative of a tanh that sharpens during training: error decay estimation.

    Forward: ``sign(x)``. Pseudo-gradient: ``grad * k t (1 - tanh(t x)**2)`` with
    ``t = 0.1 * 100**progress`` and ``k = max(1 / t, 1)``: close to the identity at first, close to
    the sign's own derivative at the end::

        10                 │                  progress = 1: the spike
                           │
        1  ────────────────┼────────────────  progress = 0: the flat line
        0  ───────────────╯│╰───────────────
                -1         0         1

    Notes
    -----
    Qin et al.: Forward and backward information retention for accurate binary neural networks
    (IR-Net), CVPR 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.ops import EdeSign
    >>> quantizer = EdeSign()
    >>> quantizer.progress = 1.0
    >>> quantizer.pseudo_gradient(np.array([0.0, 0.1, 1.0]), np.ones(3)).round(4)
    array([10.    ,  4.1997,  0.    ])
    """

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        t = 0.1 * 100.0**self.progress
        # PyTorch keeps the progress on the device, as a tensor.
        height = max(t, 1.0) if isinstance(t, float) else t.clip(1.0)  # k t
        y = module_of(x).tanh(x * t)
        return grad * (height * (1 - y * y))
