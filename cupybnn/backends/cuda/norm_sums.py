"""The sums of batch norm's backward pass, by the product that computes its gradient.

See ``kernels/include/tile_sums.cuh``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import Defines
from cupybnn.backends.cuda.fused_layers import GATES, ActivationGradient
from cupybnn.backends.cuda.structs import Struct

__all__ = ["NORM_SUMS", "NormScratch", "arguments_of", "shared_bytes"]

_COLS, _LEAST_ROWS, _WRITERS = 128, 128, 3  # of a tile; warps, as in the kernels

NORM_SUMS = Struct("NormSums", "ptr gate, partials, tickets, grad_gamma, grad_beta")


class NormScratch:
    """Memory for launches that add up, one after the other.

    Parameters
    ----------
    batch, units : int
        The most of a layer.
    """

    def __init__(self, batch: int, units: int) -> None:
        import cupy

        self.partials = cupy.empty(-(-batch // _LEAST_ROWS) * 2 * units, np.float32)
        self.tickets = cupy.zeros(-(-units // _COLS), np.uint32)  # 0 between launches


def arguments_of(
    below: ActivationGradient | None, scratch: NormScratch | None
) -> tuple[dict[str, Any], Defines]:
    """Return a kernel's arguments and macros to compute the first sums of `below`, too.

    Parameters
    ----------
    below : ActivationGradient, optional
        Of the layer whose activations' gradient the product is; it `can_be_summed`.
    scratch : NormScratch, optional
    """
    if below is None:
        return {}, ()
    assert scratch is not None
    to = NORM_SUMS.pack(
        gate=below.mask, partials=scratch.partials, tickets=scratch.tickets,
        **below.layer.gradients(),
    )  # fmt: skip
    defines = (("SUMS", 1), ("GATE", GATES[below.gate]), *below.layer.defines())
    return {"layer": below.layer.pack(), "to": to}, defines


def shared_bytes(below: ActivationGradient | None) -> int:
    """Return the bytes of shared memory that this takes of a block."""
    return 0 if below is None else _WRITERS * 2 * _COLS * 4 + 8
