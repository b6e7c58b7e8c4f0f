"""What the kernels compute of each layer: read from a block of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn import nn, ops
from cupybnn.backends.cuda.blas import operand_dtype
from cupybnn.backends.cuda.fused_arguments import DROP_ACTIVATION, DROP_NONE, DROP_PRODUCT
from cupybnn.training.network import Scale

__all__ = [
    "HeadPlan",
    "HiddenPlan",
    "Unsupported",
    "exact_product_dtype",
    "latent_gate",
    "plan_head",
    "plan_hidden",
    "plan_input",
]


class Unsupported(Exception):
    """The fused step cannot train a model; the message ends a sentence that says why."""


@dataclass(frozen=True)
class HiddenPlan:
    """One hidden layer: its modules, and how the kernels compute it.

    Attributes
    ----------
    name : str
        Of the linear layer within the model.
    linear : Linear
    norm : BatchNorm or None
    dropout : Dropout or None
    product : {"dense", "sign", "xnor"}
        "dense": real weights; "sign": a dense product with the signs of the weights; "xnor": a
        packed product.
    nonlinearity : {"relu", "sign", "none"}
        "none": the last layer alone, where the head reads the product after batch norm.
    gate : {"none", "mask", "clip"}
        How the gradient passes the non-linearity.
    window : float
        Half the width of the window of sign.
    product_dtype : dtype
        Of a packed product the smallest that holds every integer that can occur. Of real numbers
        that are rounded to bfloat16 the same, as uint16: it adds about as much to the rounding as
        the factors' does. Else float32.
    drop : int
        DROP_*: where dropout stands.
    backward : {"dense", "bits"}
        What the products of the backward pass read: the weights, and the activations of the layer
        before, as numbers or as their packed signs. By bits, weights are updated at once.
    activation : {"packed_sign", "both_signs", "sign", "relu", "none"}
        What is stored for the next layer and the backward pass; "both_signs": packed for the one,
        dense for the other. Of the last layer nothing is: the head computes it on the way.
    """

    name: str
    linear: nn.Linear
    norm: nn.BatchNorm | None
    dropout: nn.Dropout | None
    product: str
    nonlinearity: str
    gate: str
    window: float
    product_dtype: np.dtype
    drop: int
    backward: str = "dense"
    activation: str = "none"

    @property
    def inputs(self) -> int:
        """Size of an input."""
        return self.linear.weight.shape[0]

    @property
    def units(self) -> int:
        """Size of a product."""
        return self.linear.weight.shape[1]


@dataclass(frozen=True)
class HeadPlan:
    """The last layer.

    Attributes
    ----------
    linear : Linear
    reads : {"relu", "none", "sign"}
        The non-linearity of the last hidden layer. For "sign" the weights' signs are meant, too.
    norm : BatchNorm or None
    scale : Scale or None
        For "sign", one of the two follows the product.
    """

    linear: nn.Linear
    reads: str
    norm: nn.BatchNorm | None
    scale: Scale | None


def exact_product_dtype(k: int) -> np.dtype:
    """Return the smallest dtype that holds each product of `k` signs by `k` signs.

    These are integers between -k and k that are odd or even as k is: float16 holds them up to 2048,
    and the even ones up to 4096; int16 up to 32767.
    """
    if k <= (4096 if k % 2 == 0 else 2048):
        return np.dtype(np.float16)
    return np.dtype(np.int16 if k < 2**15 else np.float32)


def plan_input(modules: Sequence[nn.Module]) -> nn.Dropout | None:
    """Return the dropout of the input, the only layer that may stand before the first product."""
    take = _Taker("the input", modules)
    dropout = take(nn.Dropout)
    take.finish()
    return dropout


class _Taker:
    """Takes the modules after a product one by one, in the order that the kernels compute."""

    def __init__(self, name: str, modules: Sequence[nn.Module]) -> None:
        self._name, self._left = name, list(modules)

    def __call__(self, kind: type) -> Any:
        """Return the next module if it is of a kind, else None; dropout that drops nothing goes."""
        while self._left and type(self._left[0]) is nn.Dropout and self._left[0].keep_prob == 1:
            del self._left[0]
        return self._left.pop(0) if self._left and type(self._left[0]) is kind else None

    def finish(self) -> None:
        """Raise unless all were taken."""
        self(object)
        if self._left:
            kind = type(self._left[0]).__name__
            raise Unsupported(f"it does not know the layer {kind} at its place after {self._name}")


def plan_hidden(block: nn.Block, precision: str) -> HiddenPlan:
    """Plan a hidden layer by itself; what depends on its neighbours comes later."""
    product = _product(block.linear)
    take = _Taker(block.name, block.rest)
    drop, dropout = DROP_PRODUCT, take(nn.Dropout)
    norm = take(nn.BatchNorm)
    gate, window, nonlinearity = "none", 0.0, "none"
    sign = take(nn.Sign)
    if sign is not None:
        quantizer = _known(sign.quantizer)
        nonlinearity, window = "sign", quantizer.window or 0.0
        gate = _gate(quantizer, "mask")
    elif dropout is None and take(nn.ReLU) is not None:
        nonlinearity, gate = "relu", "mask"
        drop, dropout = DROP_ACTIVATION, take(nn.Dropout)
    take.finish()
    kept = np.dtype(np.float32)
    if product == "xnor":
        kept = exact_product_dtype(block.linear.weight.shape[0])
    elif product == "dense":
        kept = operand_dtype(precision)
    return HiddenPlan(
        name=block.name,
        linear=block.linear,
        norm=norm,
        dropout=dropout,
        product=product,
        nonlinearity=nonlinearity,
        gate=gate,
        window=window,
        product_dtype=kept,
        drop=DROP_NONE if dropout is None else drop,
    )


def _product(linear: nn.Linear) -> str:
    if not isinstance(linear, nn.BinaryLinear):
        return "dense"
    _latent(linear)
    return "xnor" if linear.binary_input and linear.xnor else "sign"


def plan_head(block: nn.Block, last: HiddenPlan) -> HeadPlan:
    """Plan the last layer, after the last hidden one."""
    take = _Taker(block.name, block.rest)
    norm, scale = take(nn.BatchNorm), take(Scale)
    take.finish()
    binary = isinstance(block.linear, nn.BinaryLinear)
    if binary:
        _latent(block.linear)
    if binary != (last.nonlinearity == "sign"):
        raise Unsupported("of the last layer's weights and inputs it takes both or none as signs")
    if binary == (norm is None and scale is None) or (norm is not None and scale is not None):
        wanted = "batch norm or a scale must" if binary else "nothing may"
        raise Unsupported(f"{wanted} follow the last layer")
    return HeadPlan(block.linear, last.nonlinearity, norm, scale)


def _known(quantizer: ops.Quantizer) -> ops.Quantizer:
    known = type(quantizer) in (ops.SteSign, ops.ClippedGrad, ops.IdentitySign)
    if not known or getattr(quantizer, "limit", 1.0) != 1.0:
        raise Unsupported(f"it does not know the pseudo-gradient {quantizer!r}")
    return quantizer


def _latent(linear: nn.BinaryLinear) -> None:
    """Raise unless the kernels know the pseudo-gradient of a layer's latent weights."""
    if _known(linear.quantizer).window not in (None, 1.0):
        raise Unsupported(
            f"of latent weights it knows the window 1 alone, not {linear.quantizer!r}"
        )


def _gate(quantizer: ops.Quantizer, window: str) -> str:
    if isinstance(quantizer, ops.SteSign):
        return window
    return "clip" if isinstance(quantizer, ops.ClippedGrad) else "none"


def latent_gate(linear: nn.Linear) -> str:
    """Return how the gradient passes the sign of latent weights: "none", "window" or "clip"."""
    return _gate(linear.quantizer, "window") if isinstance(linear, nn.BinaryLinear) else "none"
