"""A parameter that the fused update moves, and the struct that kernels take (adam.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.cuda.structs import Struct, address

__all__ = ["PARAMETER", "RATES", "ParameterUpdate"]

PARAMETER = Struct(
    "Parameter",
    "ptr weight, grad, mean, square, copy, words, pops, kept_grad;"
    "i64 rows, cols, count, first_block, flags; double limit, lr_scale, penalty, weight_decay",
)
#: A row of the table of rates.
RATES = Struct("Rates", "float lr, factor, eps, unused")

_BINARY, _CLIPPED, _WINDOW, _ALIGNED, _ROUNDED = 1, 2, 4, 8, 16
_TILE_ROWS, _TILE_COLS = 32, 128


@dataclass(frozen=True, kw_only=True)
class ParameterUpdate:
    """A parameter that `Update` moves. Arrays are float32 and of one shape, but for `grad`."""

    weight: Any
    grad: Any  # maybe in the operands' dtype; None: the product that has it updates the parameter
    mean: Any  # of the gradient and of its square, the optimiser's
    square: Any
    kept_grad: Any = None  # gets the gradient, with the penalty's part, where gradients are kept
    copy: Any = None  # what products read instead: the weight in their dtype, or its sign
    packed: Any = None  # PackedMatrix of the signs, along the first axis
    binary: bool = False  # whether `copy` and `packed` hold signs
    gate: str = "none"  # pseudo-gradient of a latent weight: "none", "window" or "clip"
    limit: float | None = None  # magnitude that the weight is clipped to
    lr_scale: float = 1.0
    penalty: float = 0.0
    weight_decay: float = 0.0

    def geometry(self) -> tuple[int, int]:
        """Return rows and columns as the kernel walks them."""
        if self.binary:  # packed or not, so that the penalty is added up in the same order
            rows, cols = self.weight.shape
            return rows, cols
        return -(-self.weight.size // _TILE_COLS), _TILE_COLS

    def blocks(self) -> int:
        """Blocks that take this parameter."""
        rows, cols = self.geometry()
        return -(-rows // _TILE_ROWS) * -(-cols // _TILE_COLS)

    def pack(self, first_block: int) -> bytes:
        """Return struct Parameter, for a launch whose block number `first_block` is its first."""
        names = ("weight", "grad", "mean", "square", "copy", "kept_grad")
        arrays = {name: address(getattr(self, name)) for name in names}
        rows, cols = self.geometry()
        flags = (
            _BINARY * self.binary
            + _CLIPPED * (self.gate == "clip")
            + _WINDOW * (self.gate == "window")
            + _ALIGNED * (cols % 4 == 0 and not any(x % 16 for x in arrays.values()))
            + _ROUNDED * (self.grad is not None and self.grad.dtype != np.float32)
        )
        return PARAMETER.pack(
            **arrays, words=getattr(self.packed, "words", None),
            pops=getattr(self.packed, "popcounts", None), rows=rows, cols=cols,
            count=self.weight.size, first_block=first_block, flags=flags, limit=self.limit or 0.0,
            lr_scale=self.lr_scale, penalty=self.penalty, weight_decay=self.weight_decay,
        )  # fmt: skip
