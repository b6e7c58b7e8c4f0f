"""Layers of binary weights and activations."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from cupybnn import ops
from cupybnn.autograd import Tensor
from cupybnn.backends.random import Stream, from_row
from cupybnn.nn.layers import Dropout, Linear, Rng
from cupybnn.nn.module import Module
from cupybnn.ops import GradientQuantizer, Quantizer, get_quantizer

__all__ = ["BinaryLinear", "GradientRounding", "Sign", "SignDropout", "set_progress"]


class GradientRounding(Module):
    """The random rounding of a layer's gradient, a part of a `BinaryLinear`.

    Parameters
    ----------
    bits : int
        See `cupybnn.ops.quantize_gradient`.
    rng : numpy.random.Generator or int, optional
        Generator, or its seed, that draws the seed of the counter-based random numbers.

    Attributes
    ----------
    quantizer : GradientQuantizer

    Examples
    --------
    >>> from cupybnn import nn
    >>> nn.BinaryLinear(3, 2, grad_bits=4, rng=0).rounding
    GradientRounding(bits=4)
    """

    def __init__(self, bits: int, *, rng: Rng = None) -> None:
        self.quantizer = GradientQuantizer(bits, int(np.random.default_rng(rng).integers(2**63)))

    def random_state(self) -> np.ndarray:
        return self.quantizer.random.state

    def _settings(self) -> str:
        return f"bits={self.quantizer.bits}"


class BinaryLinear(Linear):
    """``y = x @ sign(weight) + bias``: a product with the signs of latent weights.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axes of x and y.
    bias : bool
        Whether there is a full-precision bias; it starts at 0.
    binary_input : bool
        Whether x must hold signs (put a `Sign` before this layer): the product is then one of
        signs. If not, x may hold any numbers.
    xnor : bool
        Whether to compute a product of signs with `cupybnn.xnor_gemm` or as a dense product. The
        results are equal.
    ste : str or Quantizer
        Pseudo-gradient for the latent weights, and their scale if it has one; see
        `cupybnn.ops.sign`.
    clip : bool
        Whether optimizers keep the latent weights within [-1, 1].
    grad_bits : int, optional
        Round the product's gradient to levels of so many bits, from 1 to 8, for the products of the
        backward pass: see `cupybnn.ops.quantize_gradient`. None: not at all.
    rng, dtype
        As in `Linear`. The random numbers of the rounding are drawn after the weights.

    Attributes
    ----------
    weight : Parameter, shape (in_features, out_features)
        The latent weights.
    quantizer : Quantizer
        The quantizer named by `ste`.
    rounding : GradientRounding or None

    Raises
    ------
    ValueError
        If `grad_bits` is out of range, or given without `binary_input`.

    Warns
    -----
    UserWarning
        If latent weights can leave the quantizer's window, where they get no gradient and stop
        learning.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor, nn
    >>> layer = nn.BinaryLinear(3, 2, rng=0)
    >>> layer.weight.write()[...] = [[0.5, -0.1], [0.2, 0.3], [-0.7, 0.4]]
    >>> layer(nn.Sign()(Tensor(np.array([[2.0, -1.0, 3.0]], np.float32)))).data
    array([[-1., -1.]], dtype=float32)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        binary_input: bool = True,
        xnor: bool = True,
        ste: str | Quantizer = "ste_sign",
        clip: bool = True,
        grad_bits: int | None = None,
        rng: Rng = None,
        dtype: Any = "float32",
    ) -> None:
        if grad_bits is not None:
            if not binary_input:
                raise ValueError(
                    "The 'grad_bits' of a BinaryLinear must be None without binary_input: only "
                    "products of signs have gradients by bit planes."
                )
            rng = np.random.default_rng(rng)
        super().__init__(in_features, out_features, bias, rng=rng, dtype=dtype)
        self.rounding = None if grad_bits is None else GradientRounding(grad_bits, rng=rng)
        self.weight.bits = 1
        self.weight.limit = 1.0 if clip else None
        self.binary_input = binary_input
        self.xnor = xnor
        self.quantizer = get_quantizer(ste)
        window = self.quantizer.window
        if window is not None and not (clip and window >= 1.0):
            warnings.warn(
                f"The latent weights of a BinaryLinear can leave the window |w| <= {window:g} of "
                f"{self.quantizer!r}, and those that do stop learning. "
                + ("Use a window of at least 1." if clip else "Clip them: clip=True."),
                stacklevel=2,
            )

    def forward(self, x: Tensor) -> Tensor:
        x = self._checked(x)
        with from_row(0):  # a stochastic quantizer's draws for weights belong to no image
            signs = ops.sign(self.weight, self.quantizer, self.training)
        if not self.binary_input:
            y = x @ signs
        elif x.two_valued:
            rounds = None if self.rounding is None else self.rounding.quantizer
            y = ops.binary_matmul(x, signs, self.xnor, rounds)
        else:
            raise ValueError(
                f"The input of a BinaryLinear must hold only +1 and -1; got a tensor of shape "
                f"{x.shape} that may hold other values. Put a Sign layer before it, or use "
                f"binary_input=False."
            )
        scale = self.quantizer.scale(self.weight._data)
        return self._biased(y if scale is None else y * scale)

    def multiply_adds(self) -> tuple[int, int]:
        return (self.weight.size, 0) if self.binary_input else (0, self.weight.size)

    def random_state(self) -> np.ndarray | None:
        return _random_state_of(self.quantizer)

    def _settings(self) -> str:
        kind = "binary" if self.binary_input else "real"
        return f"{super()._settings()}, {kind} input, {self.quantizer!r}"


class Sign(Module):
    """Signs of the input, with a pseudo-gradient; see `cupybnn.ops.sign`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor, nn
    >>> nn.Sign()(Tensor(np.array([-0.5, 0.0, 2.0], np.float32))).data
    array([-1.,  1.,  1.], dtype=float32)
    """

    def __init__(self, ste: str | Quantizer = "ste_sign") -> None:
        self.quantizer = get_quantizer(ste)

    def forward(self, x: Tensor) -> Tensor:
        return ops.sign(x, self.quantizer, self.training)

    def random_state(self) -> np.ndarray | None:
        return _random_state_of(self.quantizer)

    def _settings(self) -> str:
        return repr(self.quantizer)


def _random_state_of(quantizer: Quantizer) -> np.ndarray | None:
    """Return the state of a stochastic quantizer's random numbers."""
    stream = getattr(quantizer, "random", None)
    return stream.state if isinstance(stream, Stream) else None


class SignDropout(Dropout):
    """In training, replace random signs by coin tosses; see `cupybnn.ops.sign_dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.autograd import Tensor
    >>> layer = nn.SignDropout(0.9, rng=0)
    >>> signs = nn.Sign()(Tensor(np.ones(1000, np.float32)))
    >>> sorted(set(layer(signs).numpy().tolist()))
    [-1.0, 1.0]
    """

    _drop = staticmethod(ops.sign_dropout)


def set_progress(model: Module, progress: float) -> None:
    """Set the training progress, from 0 to 1, of all quantizers in `model`.

    Call it before each step if a quantizer changes during training ("ede_sign").

    Examples
    --------
    >>> from cupybnn import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Sign(ste="ede_sign"), nn.BinaryLinear(3, 2))
    >>> nn.set_progress(model, 0.5)
    >>> model[1].quantizer.progress
    0.5
    """
    for _, module in model.named_modules():
        quantizer = getattr(module, "quantizer", None)
        if isinstance(quantizer, Quantizer):
            quantizer.progress = progress
