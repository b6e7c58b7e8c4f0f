"""Full-precision layers with parameters, statistics or random numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from cupybnn import ops
from cupybnn.autograd import Tensor, no_grad
from cupybnn.backends.random import Stream
from cupybnn.nn.module import Module, Parameter
from cupybnn.nn.state import statistics_dtype

__all__ = [
    "BatchNorm",
    "Dropout",
    "Linear",
    "glorot_uniform",
    "refresh_statistics",
]

Rng = np.random.Generator | int | None


def glorot_uniform(shape: tuple[int, int], rng: Rng = None, dtype: Any = "float32") -> np.ndarray:
    """Draw uniformly from ``± sqrt(6 / (inputs + outputs))``; shape (inputs, outputs).

    Notes
    -----
    Glorot, Bengio: Understanding the difficulty of training deep feedforward networks, 2010.

    Examples
    --------
    >>> from cupybnn import nn
    >>> weights = nn.glorot_uniform((100, 50), rng=0)
    >>> weights.shape
    (100, 50)
    >>> bool(abs(weights).max() <= 0.2)  # sqrt(6 / 150)
    True
    """
    limit = math.sqrt(6 / max(sum(shape), 1))
    return np.random.default_rng(rng).uniform(-limit, limit, shape).astype(dtype)


def _size(name: str, value: Any) -> int:
    """Return a number of features, after checking it."""
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(
            f"The {name!r} must be an integer; got {value!r} ({type(value).__name__})."
        ) from None
    if size < 0:
        raise ValueError(f"The {name!r} must be 0 or more; got {size}.")
    return size


class Linear(Module):
    """``y = x @ weight + bias``.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axes of x and y.
    bias : bool
        Whether there is a bias; it starts at 0.
    rng : numpy.random.Generator or int, optional
        Generator or seed for the initial weights (`glorot_uniform`).
    dtype : dtype
        Dtype of the parameters.

    Attributes
    ----------
    weight : Parameter, shape (in_features, out_features)
    bias : Parameter, shape (out_features,), or None

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor, nn
    >>> layer = nn.Linear(3, 2, bias=True, rng=0)
    >>> layer(Tensor(np.ones((5, 3), np.float32))).shape
    (5, 2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        rng: Rng = None,
        dtype: Any = "float32",
    ) -> None:
        shape = _size("in_features", in_features), _size("out_features", out_features)
        self.weight = Parameter(glorot_uniform(shape, rng, dtype))
        self.bias = Parameter(np.zeros(shape[1], dtype)) if bias else None

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def _checked(self, x: Tensor) -> Tensor:
        if not hasattr(x, "shape"):
            raise TypeError(
                f"The input of {type(self).__name__}({self._settings()}) must be a Tensor or an "
                f"array; got {type(x).__name__}. Make it one: Tensor(numpy.asarray(x))."
            )
        if x.ndim == 0 or x.shape[-1] != self.weight.shape[0]:
            raise ValueError(
                f"The input of {type(self).__name__}({self._settings()}) must have shape "
                f"(..., {self.weight.shape[0]}); got {x.shape}."
            )
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._biased(self._checked(x) @ self.weight)

    def multiply_adds(self) -> tuple[int, int]:
        return 0, self.weight.size

    def _settings(self) -> str:
        return ", ".join(str(n) for n in self.weight.shape)


class BatchNorm(Module):
    """Batch normalization of the last axis; see `cupybnn.ops.batch_norm`.

    Parameters
    ----------
    features : int
        Size of the last axis.
    eps : float
        Added to the variance.
    decay : float
        Decay of the exponential moving averages used in evaluation.
    dtype : dtype
        Dtype of the parameters.

    Attributes
    ----------
    gamma, beta : Parameter, shape (features,)
        Scale and shift, initially 1 and 0.
    mean, variance : ndarray, shape (features,)
        The moving averages, initially 0 and 1; at least float32, because the variance of float16
        activations may not fit in float16.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor, nn
    >>> norm = nn.BatchNorm(1)
    >>> y = norm(Tensor(np.array([[1.0], [3.0]], np.float32)))
    >>> y.data.round(3)
    array([[-1.],
           [ 1.]], dtype=float32)
    """

    buffers = ("mean", "variance")

    def __init__(
        self, features: int, eps: float = 1e-4, decay: float = 0.9, dtype: Any = "float32"
    ) -> None:
        features = _size("features", features)
        if not eps > 0:
            raise ValueError(f"The 'eps' must be positive; got {eps!r}.")
        if not 0 <= decay <= 1:
            raise ValueError(f"The 'decay' must be in [0, 1]; got {decay!r}.")
        self.gamma = Parameter(np.ones(features, dtype))
        self.beta = Parameter(np.zeros(features, dtype))
        self.mean = np.zeros(features, statistics_dtype(dtype))
        self.variance = np.ones(features, statistics_dtype(dtype))
        self.eps = eps
        self.decay = decay

    def forward(self, x: Tensor) -> Tensor:
        return ops.batch_norm(
            x,
            self.gamma,
            self.beta,
            self.mean,
            self.variance,
            training=self.training,
            decay=self.decay,
            eps=self.eps,
        )

    def _settings(self) -> str:
        return str(self.gamma.size)


def refresh_statistics(model: Module, batches: Iterable[Tensor]) -> None:
    """Recompute the batch-norm statistics in `model` as means over `batches`.

    Use it for weights that were not trained with the current statistics, such as averaged ones.
    The rest of the model runs in evaluation mode, and its weights do not change.

    Parameters
    ----------
    model : Module
        Called with each batch.
    batches : iterable of Tensor
        Inputs, all of the same size. If training changes inputs at random, change these alike: a
        network that learned deformed images is worse with the statistics of other images.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.autograd import Tensor
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
    >>> batches = [Tensor(np.ones((8, 4), np.float32)) for _ in range(3)]
    >>> nn.refresh_statistics(model, batches)
    >>> variance = dict(model.named_buffers())["1.variance"]  # of constant inputs
    >>> bool((variance < 1e-6).all())
    True
    """
    norms = [module for _, module in model.named_modules() if isinstance(module, BatchNorm)]
    modes = [(module, module.training) for _, module in model.named_modules()]
    decays = [norm.decay for norm in norms]
    model.eval()
    for norm in norms:
        norm.training = True
    try:
        with no_grad():
            for number, batch in enumerate(batches):
                for norm in norms:
                    norm.decay = number / (number + 1)
                model(batch)
    finally:
        for norm, decay in zip(norms, decays, strict=True):
            norm.decay = decay
        for module, training in modes:
            module.training = training


class Dropout(Module):
    """In training, set random elements to 0; see `cupybnn.ops.dropout`.

    Parameters
    ----------
    keep_prob : float
        Probability of keeping an element, in (0, 1].
    rng : numpy.random.Generator or int, optional
        Generator, or its seed, that draws the seed of the counter-based random numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor, nn
    >>> layer = nn.Dropout(0.5, rng=0)
    >>> x = Tensor(np.ones((1, 4), np.float32))
    >>> sorted(set(layer(x).data.ravel().tolist())) in ([0.0], [2.0], [0.0, 2.0])
    True
    >>> layer.eval()(x).data
    array([[1., 1., 1., 1.]], dtype=float32)
    """

    _drop = staticmethod(ops.dropout)

    def __init__(self, keep_prob: float, *, rng: Rng = None) -> None:
        if not 0 < keep_prob <= 1:
            raise ValueError(f"The 'keep_prob' must be in (0, 1]; got {keep_prob!r}.")
        self.keep_prob = keep_prob
        self.random = Stream(int(np.random.default_rng(rng).integers(2**63)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keep_prob == 1:
            return x
        seed, counter = self.random.next()
        return self._drop(x, self.keep_prob, seed=seed, counter=counter)

    def random_state(self) -> np.ndarray:
        return self.random.state

    def _settings(self) -> str:
        return f"keep_prob={self.keep_prob}"
