"""Layers that apply one operation to each element, or rearrange the elements."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn import ops
from cupybnn.autograd import Tensor
from cupybnn.nn.module import Module, Parameter

__all__ = ["Flatten", "HardTanh", "Identity", "ReLU", "Scale", "Sigmoid", "Tanh"]


class Identity(Module):
    """Return the input: a placeholder for another layer.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([[-2.0, 0.5]], np.float32))
    >>> nn.Identity()(x).numpy()
    array([[-2. ,  0.5]], dtype=float32)
    """

    def forward(self, x: Tensor) -> Tensor:
        return x


class Flatten(Module):
    """Merge all axes but the first: (batch, ...) becomes (batch, features).

    A two-valued tensor stays two-valued.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor, nn
    >>> nn.Flatten()(Tensor(np.zeros((2, 28, 28), np.float32))).shape
    (2, 784)
    """

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(x, "shape"):
            raise TypeError(
                f"The input of a Flatten must be a Tensor or an array; got {type(x).__name__}. "
                f"Make it one: Tensor(numpy.asarray(x))."
            )
        if x.ndim == 0:
            raise ValueError("The input of Flatten must have a batch axis; got shape ().")
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))


class ReLU(Module):
    """``max(x, 0)``.

    Examples
    --------
    >>> from cupybnn import Tensor, nn
    >>> nn.ReLU()(Tensor([-1.0, 2.0])).data.tolist()
    [0.0, 2.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class HardTanh(Module):
    """``min(max(x, -1), 1)``; its derivative is the pseudo-gradient of "ste_sign".

    Examples
    --------
    >>> from cupybnn import Tensor, nn
    >>> nn.HardTanh()(Tensor([-3.0, 0.5, 2.0])).data.tolist()
    [-1.0, 0.5, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.clip(x, -1.0, 1.0)


class Tanh(Module):
    """Hyperbolic tangent.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([[-2.0, 0.5]], np.float32))
    >>> nn.Tanh()(x).numpy()
    array([[-0.9640276,  0.4621172]], dtype=float32)
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.tanh(x)


class Sigmoid(Module):
    """``1 / (1 + exp(-x))``.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([[-2.0, 0.5]], np.float32))
    >>> nn.Sigmoid()(x).numpy()
    array([[0.11920291, 0.62245935]], dtype=float32)
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.sigmoid(x)


class Scale(Module):
    """Multiply by one learned number.

    Products of signs have magnitudes around ``sqrt(inputs)``, far outside the window in which a
    sign has a pseudo-gradient. Without a batch norm, this layer scales them into it.

    Parameters
    ----------
    value : float
        Initial value.
    dtype : dtype
        Dtype of the parameter.

    Attributes
    ----------
    factor : Parameter, shape (1,)

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.autograd import Tensor
    >>> nn.Scale(0.5)(Tensor(np.array([2.0, -4.0], np.float32))).numpy()
    array([ 1., -2.], dtype=float32)
    """

    def __init__(self, value: float = 1.0, dtype: Any = "float32") -> None:
        try:
            finite = math.isfinite(value)
        except TypeError:
            finite = False
        if not finite:
            raise ValueError(f"The 'value' of Scale must be a finite number; got {value!r}.")
        self.factor = Parameter(np.full((1,), value, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor
