"""How the kernels compute each layer, derived from a block of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn import nn, ops
from cupybnn.backends.cuda.blas import operand_dtype
from cupybnn.backends.cuda.fused_layers import DROP_ACTIVATION, DROP_NONE, DROP_PRODUCT

__all__ = [
    "HeadPlan",
    "HiddenPlan",
    "Unsupported",
    "exact_product_dtype",
    "grad_quantizer",
    "latent_gate",
    "plan_head",
    "plan_hidden",
    "plan_input",
]


class Unsupported(Exception):
    """The fused step cannot train a model; the message gives the reason, to end a sentence."""


@dataclass(frozen=True)
class HiddenPlan:
    """One hidden layer: its modules, and how the kernels compute it.

    Attributes
    ----------
    name : str
        Name of the linear layer within the model.
    linear : Linear
    norm : BatchNorm or None
    dropout : Dropout or None
    product : {"dense", "sign", "xnor"}
        "dense": real weights; "sign": a dense product with the signs of the weights; "xnor": a
        packed product.
    nonlinearity : {"relu", "sign", "none"}
        "none": only in the last hidden layer; the head reads the product after batch norm.
    gate : {"none", "mask", "clip"}
        How the gradient passes the non-linearity.
    window : float
        Half the width of the window of sign.
    product_dtype : dtype
        For a packed product, the smallest dtype that holds every possible value. For real operands
        rounded to bfloat16, bfloat16 too (as uint16): its rounding error is about as large as
        theirs. Otherwise float32.
    drop : int
        DROP_*: where dropout is applied.
    backward : {"dense", "bits", "parts", "planes", "fused_planes"}
        Whether the products of the backward pass read the weights, and the previous layer's
        activations, as dense numbers or as packed signs. With "planes", the gradient is rounded,
        and they read its bit planes. With "bits" and "fused_planes", the product that computes the
        gradient of the weights also updates them. With "parts", the gradient of the weights reads
        packed signs, in parts of the batch that are added up, and that of the inputs dense weights.
    activation : {"packed_sign", "both_signs", "sign", "relu", "none"}
        What is stored for the next layer and the backward pass; "both_signs": packed for the
        former, dense for the latter. "none" for the last layer: the head computes its activations.
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
    def rounded(self) -> bool:
        """Whether the gradient is rounded."""
        return self.backward in ("planes", "fused_planes")

    @property
    def updates(self) -> bool:
        """Whether the product that computes the gradient of the weights updates them."""
        return self.backward in ("bits", "fused_planes")

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.linear.weight.shape[0]

    @property
    def units(self) -> int:
        """Number of units."""
        return self.linear.weight.shape[1]


@dataclass(frozen=True)
class HeadPlan:
    """The last layer.

    Attributes
    ----------
    linear : Linear
    reads : {"relu", "none", "sign"}
        The non-linearity of the last hidden layer. With "sign", the weights are signs too.
    norm : BatchNorm or None
    scale : nn.Scale or None
        With "sign", exactly one of the two follows the product.
    """

    linear: nn.Linear
    reads: str
    norm: nn.BatchNorm | None
    scale: nn.Scale | None


def exact_product_dtype(k: int) -> np.dtype:
    """Return the smallest dtype that exactly holds any dot product of `k` signs with `k` signs.

    These are integers from -k to k with the parity of k: float16 holds them up to 2048, and even
    ones up to 4096; int16 up to 32767.
    """
    if k <= (4096 if k % 2 == 0 else 2048):
        return np.dtype(np.float16)
    return np.dtype(np.int16 if k < 2**15 else np.float32)


def plan_input(modules: Sequence[nn.Module]) -> nn.Dropout | None:
    """Return the dropout of the input, the only layer allowed before the first product."""
    rest = _ModuleQueue("the input", modules)
    dropout = rest.take(nn.Dropout)
    rest.finish()
    return dropout


def _does_nothing(module: nn.Module) -> bool:
    if type(module) is nn.Dropout:
        return module.keep_prob == 1
    return type(module) in (nn.Identity, nn.Flatten)  # of a matrix


class _ModuleQueue:
    """The modules after a product, taken one by one in the order in which kernels compute them."""

    def __init__(self, name: str, modules: Sequence[nn.Module]) -> None:
        self._name, self._modules = name, list(modules)

    def take(self, kind: type) -> Any:
        """Return the next module if it has type `kind`, else None; skip those that do nothing."""
        while self._modules and _does_nothing(self._modules[0]):
            del self._modules[0]
        found = self._modules and type(self._modules[0]) is kind
        return self._modules.pop(0) if found else None

    def finish(self) -> None:
        """Raise unless all have been taken."""
        self.take(object)
        if self._modules:
            kind = type(self._modules[0]).__name__
            raise Unsupported(f"a {kind} layer is not supported at its place after {self._name}")


def plan_hidden(block: nn.Block, precision: str) -> HiddenPlan:
    """Plan a hidden layer by itself; what depends on its neighbors is decided later."""
    product = _product(block.linear)
    rest = _ModuleQueue(block.name, block.rest)
    drop, dropout = DROP_PRODUCT, rest.take(nn.Dropout)
    norm = rest.take(nn.BatchNorm)
    gate, window, nonlinearity = "none", 0.0, "none"
    sign = rest.take(nn.Sign)
    if sign is not None:
        quantizer = _supported(sign.quantizer)
        nonlinearity, window = "sign", quantizer.window or 0.0
        gate = _gate(quantizer, "mask")
    elif dropout is None and rest.take(nn.ReLU) is not None:
        nonlinearity, gate = "relu", "mask"
        drop, dropout = DROP_ACTIVATION, rest.take(nn.Dropout)
    rest.finish()
    product_dtype = np.dtype(np.float32)
    if product == "xnor":
        product_dtype = exact_product_dtype(block.linear.weight.shape[0])
    elif product == "dense":
        product_dtype = operand_dtype(precision)
    return HiddenPlan(
        name=block.name,
        linear=block.linear,
        norm=norm,
        dropout=dropout,
        product=product,
        nonlinearity=nonlinearity,
        gate=gate,
        window=window,
        product_dtype=product_dtype,
        drop=DROP_NONE if dropout is None else drop,
    )


def _product(linear: nn.Linear) -> str:
    if not isinstance(linear, nn.BinaryLinear):
        return "dense"
    _check_latent(linear)
    return "xnor" if linear.binary_input and linear.xnor else "sign"


def grad_quantizer(linear: nn.Linear) -> ops.GradientQuantizer | None:
    """Return what rounds the gradient of a layer's products, or None."""
    rounding = linear.rounding if isinstance(linear, nn.BinaryLinear) else None
    return None if rounding is None else rounding.quantizer


def plan_head(block: nn.Block, last: HiddenPlan) -> HeadPlan:
    """Plan the last layer, which follows the hidden layer `last`."""
    if grad_quantizer(block.linear) is not None:
        raise Unsupported(f"the gradient of the last layer, {block.name}, is rounded")
    rest = _ModuleQueue(block.name, block.rest)
    norm, scale = rest.take(nn.BatchNorm), rest.take(nn.Scale)
    rest.finish()
    if binary := isinstance(block.linear, nn.BinaryLinear):
        _product(block.linear)
    if binary != (last.nonlinearity == "sign"):
        raise Unsupported("the last layer must have binary weights and inputs, or neither")
    if binary == (norm is None and scale is None) or (norm is not None and scale is not None):
        wanted = "batch norm or a scale must" if binary else "nothing may"
        raise Unsupported(f"{wanted} follow the last layer")
    return HeadPlan(block.linear, last.nonlinearity, norm, scale)


def _supported(quantizer: ops.Quantizer) -> ops.Quantizer:
    known = type(quantizer) in (ops.SteSign, ops.ClippedGrad, ops.IdentitySign)
    if not known or getattr(quantizer, "limit", 1.0) != 1.0:
        raise Unsupported(f"the pseudo-gradient {quantizer!r} is not supported")
    return quantizer


def _check_latent(linear: nn.BinaryLinear) -> None:
    """Raise unless the kernels support the pseudo-gradient of a layer's latent weights."""
    if _supported(linear.quantizer).window not in (None, 1.0):
        raise Unsupported(
            f"the quantizer of latent weights must have the window 1; got {linear.quantizer!r}"
        )


def _gate(quantizer: ops.Quantizer, window: str) -> str:
    if isinstance(quantizer, ops.SteSign):
        return window
    return "clip" if isinstance(quantizer, ops.ClippedGrad) else "none"


def latent_gate(linear: nn.Linear) -> str:
    """Return how the gradient passes the sign of latent weights: "none", "window" or "clip"."""
    return _gate(linear.quantizer, "window") if isinstance(linear, nn.BinaryLinear) else "none"
