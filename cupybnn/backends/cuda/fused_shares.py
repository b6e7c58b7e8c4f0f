"""Launches for weights of which each rank of a run updates a share (smxx_gathered_signs.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.structs import Kernel, Struct, address

__all__ = ["Placing", "place_signs"]

_MOST, _COLUMNS = 8, 32  # weights of a launch, and columns of a block
SHARED_WEIGHT = Struct(
    "SharedWeight",
    "ptr gathered, words, pops, dense; i64 groups, rows, cols, first_block, wide",
)
SHARED_WEIGHTS = Struct(
    "SharedWeights", f"SharedWeight at[{_MOST}]; i64 count, of_rank", SHARED_WEIGHT
)
PLACE_SIGNS = Kernel("smxx_gathered_signs", "place_signs", "SharedWeights weights", SHARED_WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Placing:
    """A weight whose signs are put where the next products read them."""

    start: int  # of its words in what each rank has sent
    groups: int  # of 32 rows in a share; of each there is a word for every column
    shape: tuple[int, int]  # of the weight
    packed: Any = None  # PackedMatrix along the first axis
    dense: Any = None  # of the weight's shape: receives +1 and -1, as float32 or operands

    def blocks(self) -> int:
        """Return the number of blocks for this weight."""
        return -(-self.shape[1] // _COLUMNS)


def place_signs(launcher: Launcher, gathered: Any, weights: Sequence[Placing]) -> None:
    """Put the signs of several weights where the next products read them.

    Parameters
    ----------
    launcher : Launcher
    gathered : cupy.ndarray of uint32, shape (ranks, n)
        What all ranks have sent.
    weights : sequence of Placing
    """
    for first in range(0, len(weights), _MOST):
        table, blocks, some = b"", 0, weights[first : first + _MOST]
        for weight in some:
            rows, cols = weight.shape
            table += SHARED_WEIGHT.pack(
                gathered=address(gathered) + weight.start * gathered.itemsize,
                words=getattr(weight.packed, "words", None),
                pops=getattr(weight.packed, "popcounts", None), dense=weight.dense,
                groups=weight.groups, rows=rows, cols=cols, first_block=blocks,
                wide=weight.dense is not None and weight.dense.dtype == np.float32,
            )  # fmt: skip
            blocks += weight.blocks()
        packed = SHARED_WEIGHTS.pack(at=table, count=len(some), of_rank=gathered.shape[1])
        launcher.launch(PLACE_SIGNS, {"weights": packed}, grid=(blocks,))
