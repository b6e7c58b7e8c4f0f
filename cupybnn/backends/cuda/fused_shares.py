"""Launches for weights of which each rank of a run updates a share (smxx_gathered_signs.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cupybnn.backends.cuda.compiler import load_kernel
from cupybnn.backends.cuda.structs import Kernel, address

__all__ = ["PlaceSigns"]

PLACE_SIGNS = Kernel(
    "smxx_gathered_signs",
    "place_signs",
    "ptr gathered; i64 of_rank, groups, rows, cols; ptr words, pops, dense",
)
_REAL = {"float32": "float", "uint16": "bfloat16_bits"}
_THREADS, _COLUMNS = 256, 32


@dataclass(frozen=True, kw_only=True)
class PlaceSigns:
    """Put a weight's signs, which all ranks have sent, where the next products read them."""

    #: uint32, (ranks, n): what each has sent; this weight's words begin at `start`.
    gathered: Any
    start: int
    groups: int  # of 32 rows in a share; of each there is a word for every column
    shape: tuple[int, int]  # of the weight
    packed: Any = None  # PackedMatrix along the first axis
    dense: Any = None  # of the weight's shape: receives +1 and -1, in float32 or as bfloat16

    def launch(self, device: int) -> None:
        """Launch on the current stream."""
        rows, cols = self.shape
        real = "float32" if self.dense is None else self.dense.dtype.name
        arguments = PLACE_SIGNS.arguments(
            gathered=address(self.gathered) + self.start * self.gathered.itemsize,
            of_rank=self.gathered.shape[1], groups=self.groups, rows=rows, cols=cols,
            words=getattr(self.packed, "words", None),
            pops=getattr(self.packed, "popcounts", None), dense=self.dense,
        )  # fmt: skip
        kernel = load_kernel(
            PLACE_SIGNS.source, PLACE_SIGNS.function, (("REAL", _REAL[real]),), device, 0
        )
        kernel((-(-cols // _COLUMNS),), (_THREADS,), arguments)
