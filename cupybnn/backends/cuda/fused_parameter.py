"""A parameter of the fused update, and the kernels' struct for it (adam.cuh)."""

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
#: A row of the rate table.
RATES = Struct("Rates", "float lr, factor, eps, unused")

_BINARY, _CLIPPED, _WINDOW, _ALIGNED, _ROUNDED, _SENT = 1, 2, 4, 8, 16, 32
_TILE_ROWS, _TILE_COLS = 32, 128


@dataclass(frozen=True, kw_only=True)
class ParameterUpdate:
    """A parameter for `Update`. Arrays are float32 and of one shape, except for `grad`."""

    weight: Any
    grad: Any  # may have the operands' dtype; None: the product that computes it also updates
    mean: Any  # the optimizer's means of the gradient and its square
    square: Any
    kept_grad: Any = None  # receives the gradient, including the penalty, if gradients are kept
    copy: Any = None  # the copy that products read: the weight in their dtype, or its sign
    packed: Any = None  # PackedMatrix of the signs, along the first axis
    sent: Any = None  # uint32, (rows / 32, columns): receives the signs of 32 rows each, to be sent
    binary: bool = False  # whether `copy`, `packed` and `sent` hold signs
    gate: str = "none"  # pseudo-gradient of a latent weight: "none", "window" or "clip"
    limit: float | None = None  # the weight is clipped to [-limit, limit]
    lr_scale: float = 1.0
    penalty: float = 0.0
    weight_decay: float = 0.0
    #: By rank, if the gradient is the sum of all ranks', in the operands' dtype: what is to be
    #: added to the address of `grad` to find theirs.
    distances: tuple[int, ...] = ()

    def geometry(self) -> tuple[int, int]:
        """Return the rows and columns that the kernel iterates over."""
        if self.binary:  # packed or not, so that the penalty is summed in the same order
            rows, cols = self.weight.shape
            return rows, cols
        return -(-self.weight.size // _TILE_COLS), _TILE_COLS

    def blocks(self) -> int:
        """Return the number of blocks for this parameter."""
        rows, cols = self.geometry()
        return -(-rows // _TILE_ROWS) * -(-cols // _TILE_COLS)

    def pack(self, first_block: int) -> bytes:
        """Return struct Parameter; `first_block` is the index of its first block in the launch."""
        names = ("weight", "grad", "mean", "square", "copy", "kept_grad")
        arrays = {name: address(getattr(self, name)) for name in names}
        rows, cols = self.geometry()
        flags = (
            _BINARY * self.binary
            + _CLIPPED * (self.gate == "clip")
            + _WINDOW * (self.gate == "window")
            + _ALIGNED * (cols % 4 == 0 and not any(x % 16 for x in arrays.values()))
            + _ROUNDED * (self.grad is not None and self.grad.dtype != np.float32)
            + _SENT * (self.sent is not None)
        )
        words = getattr(self.packed, "words", None) if self.sent is None else self.sent
        return PARAMETER.pack(
            **arrays, words=words,
            pops=getattr(self.packed, "popcounts", None), rows=rows, cols=cols,
            count=self.weight.size, first_block=first_block, flags=flags, limit=self.limit or 0.0,
            lr_scale=self.lr_scale, penalty=self.penalty, weight_decay=self.weight_decay,
        )  # fmt: skip
