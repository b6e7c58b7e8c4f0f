"""What the fused kernels of a training step are given: structs of addresses and numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import Defines

__all__ = [
    "BACK",
    "BATCH",
    "DROP_ACTIVATION",
    "DROP_NONE",
    "DROP_PRODUCT",
    "GATES",
    "HEADS",
    "LOSSES",
    "OUTPUTS",
    "OUTPUT_NORM",
    "Activations",
    "Deformation",
    "Draw",
    "Layer",
    "address",
    "mask_shape",
    "struct",
]

# As training.cuh and the kernels name them.
DROP_NONE, DROP_PRODUCT, DROP_ACTIVATION = range(3)
GATES = {"none": 0, "mask": 1, "clip": 2}
LOSSES = {"cross_entropy": 0, "squared_hinge": 1}
OUTPUTS = {"packed_sign": 0, "sign": 1, "relu": 2, "none": 3, "both_signs": 4}
HEADS = {"none": 0, "relu": 1, "sign": 2}

_PRODUCT = {
    "float32": "float",
    "float16": "float16_bits",
    "int16": "short",
    "uint16": "bfloat16_bits",
}

_LAYER = np.dtype((np.void, 8 * 10))  # struct Layer of training.cuh
_ACTIVATIONS = np.dtype((np.void, 8 * 5))  # struct Activations of smxx_activation.cu
BACK = np.dtype((np.void, 8 * 8))  # struct Back of smxx_head.cu
OUTPUT_NORM = np.dtype((np.void, 8 * 15))  # struct OutputNorm of smxx_output_norm.cu
BATCH = np.dtype((np.void, 8 * 14))  # struct Batch of smxx_batch.cu
_DEFORMATION = np.dtype((np.void, 8 * 7))  # struct Deformation of smxx_batch.cu


def mask_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of the uint32 words of a mask of one bit an element."""
    return rows, -(-cols // 32)


@dataclass(frozen=True)
class Draw:
    """Random numbers of one dropout.

    Attributes
    ----------
    seed : int
    offset : int
        The counter of a draw is the number of the step and this.
    keep_prob : float
    """

    seed: int
    offset: int
    keep_prob: float

    def arguments(self) -> tuple[int, int, int]:
        """Return what kernels are given: seed, offset and the greatest word that is kept."""
        # As cupybnn.backends.random.chosen has it.
        return self.seed, self.offset, max(round(self.keep_prob * 2**32), 1) - 1


@dataclass(frozen=True)
class Deformation:
    """How images are deformed; see `cupybnn.data.Augmentation`.

    Attributes
    ----------
    shape : tuple of int
        (height, width).
    seed : int
        Each step deforms anew, by its number.
    shift, rotation, scale, shear : float
    """

    shape: tuple[int, int]
    seed: int
    shift: float
    rotation: float
    scale: float
    shear: float

    def argument(self) -> Any:
        """Return struct Deformation, as a kernel is given it."""
        numbers = (self.shift, math.radians(self.rotation), self.scale, self.shear)
        return struct([*self.shape, self.seed, *numbers], _DEFORMATION)


@dataclass
class Layer:
    """A hidden layer's product, and what stands between it and the activation.

    Attributes
    ----------
    product : cupy.ndarray, shape (batch, units)
        Of a dtype that `HiddenPlan.product_dtype` may be.
    kept : cupy.ndarray of uint32 or None
        Mask of what dropout keeps.
    norm : tuple of cupy.ndarray or None
        Mean, inverse deviation, gamma and beta, shape (units,) each; None without batch norm.
    drop : int
        DROP_*: where dropout stands.
    keep_prob : float
    """

    product: Any
    kept: Any = None
    norm: tuple[Any, Any, Any, Any] | None = None
    drop: int = DROP_NONE
    keep_prob: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, units)."""
        rows, cols = self.product.shape
        return rows, cols

    def defines(self) -> Defines:
        """Return what a translation unit is to define for it."""
        return (
            ("DROP", self.drop),
            ("NORM", int(self.norm is not None)),
            ("PRODUCT", _PRODUCT[self.product.dtype.name]),
        )

    def argument(self) -> Any:
        """Return struct Layer, as a kernel is given it."""
        arrays = [self.product, self.kept, *(self.norm or (None,) * 4)]
        numbers = [*self.shape, 1 / self.keep_prob, 1 / self.shape[0]]
        return struct([*arrays, *numbers], _LAYER)


@dataclass
class Activations:
    """Where a layer's activations go.

    Attributes
    ----------
    output : str
        A key of `OUTPUTS`.
    dense : cupy.ndarray or None
        Gets the activations, unless they are only packed.
    packed : PackedMatrix or None
        Gets the signs, packed along the last axis; its popcounts must be 0.
    gate : cupy.ndarray of uint32, shape `mask_shape`, or None
        Gets where the gradient passes.
    window : float
        Half the width of the window in which sign has a pseudo-gradient.
    """

    output: str = "none"
    dense: Any = None
    packed: Any = None
    gate: Any = None
    window: float = 0.0

    def defines(self) -> Defines:
        """Return what the translation unit is to define for them."""
        return (("GATE", int(self.gate is not None)), ("OUTPUT", OUTPUTS[self.output]))

    def argument(self) -> Any:
        """Return struct Activations, as a kernel is given it."""
        packed = (None, None) if self.packed is None else (self.packed.words, self.packed.popcounts)
        return struct([self.dense, *packed, self.gate, self.window], _ACTIVATIONS)


def address(x: Any) -> int:
    """Return where an array lies on the device; 0 for None."""
    return 0 if x is None else int(x.data.ptr)


def struct(fields: list[Any], dtype: np.dtype) -> Any:
    """Return fields of 8 bytes as a kernel's argument: arrays (None: no address) and numbers."""
    values = np.zeros(len(fields), np.int64)
    for i, field in enumerate(fields):
        if isinstance(field, float):
            values[i : i + 1].view(np.float64)[0] = field
        elif isinstance(field, int):
            values[i : i + 1].view(np.uint64)[0] = field % 2**64
        else:
            values[i] = address(field)
    return values.view(dtype)
