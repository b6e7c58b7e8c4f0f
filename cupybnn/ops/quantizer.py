"""Base class of quantizers, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cupybnn.packed import sign

__all__ = ["Quantizer", "get_quantizer", "quantizer_names", "register_quantizer"]

_REGISTRY: dict[str, Callable[[], Quantizer]] = {}


class Quantizer:
    """Base class: ``forward(x) = sign(x)``, and a pseudo-gradient that a subclass defines.

    To add a quantizer, subclass this and register it with `register_quantizer`.

    Attributes
    ----------
    window : float or None
        The pseudo-gradient is 0 where ``|x| > window``: a latent weight outside has stopped
        learning. None if it is nowhere 0.
    progress : float
        Training progress, from 0 to 1, for quantizers that change during training. Set by
        `cupybnn.nn.set_progress`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.ops import Quantizer
    >>> class Triangle(Quantizer):
    ...     window = 1.0
    ...
    ...     def pseudo_gradient(self, x, grad):
    ...         return grad * (1 - abs(x)).clip(0)
    >>> Triangle().pseudo_gradient(np.array([0.0, 0.5, 2.0]), np.ones(3))
    array([1. , 0.5, 0. ])
    """

    window: float | None = None
    progress = 0.0

    def forward(self, x: Any, training: bool = True) -> Any:
        """Return +1 and -1 for an array `x`, in its dtype and shape."""
        return sign(x)

    def pseudo_gradient(self, x: Any, grad: Any) -> Any:
        """Return the gradient of `x` from `grad`, the gradient of its sign, as a new array."""
        raise NotImplementedError

    def scale(self, x: Any) -> Any | None:
        """Return a factor for each element of the last axis, or None for factors of 1."""
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
    """Class decorator that registers a quantizer under one or more names.

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
            if name in _REGISTRY:
                raise ValueError(f"A quantizer named {name!r} is already registered.")
            _REGISTRY[name] = factory
        return factory

    return register


def quantizer_names() -> list[str]:
    """Return the names that `get_quantizer` knows.

    Examples
    --------
    >>> from cupybnn.ops import quantizer_names
    >>> "hard_tanh" in quantizer_names()
    True
    """
    return sorted(_REGISTRY)


def get_quantizer(quantizer: str | Quantizer) -> Quantizer:
    """Return a new quantizer of the given name; a `Quantizer` is returned unchanged.

    Examples
    --------
    >>> from cupybnn.ops import get_quantizer
    >>> get_quantizer("hard_tanh")
    SteSign(window=1.0)
    """
    if isinstance(quantizer, Quantizer):
        return quantizer
    if quantizer not in _REGISTRY:
        raise ValueError(
            f"A quantizer must be one of {', '.join(quantizer_names())} or a Quantizer; got "
            f"{quantizer!r}."
        )
    return _REGISTRY[quantizer]()
