"""The steps after the last product of a packed network, as kernels take them (steps.cuh)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupybnn.backends.cuda.structs import Struct, address

__all__ = ["MOST_STEPS", "STEPS", "pack_steps"]

KINDS = {"multiply": 0, "add": 1, "relu": 2}
MOST_STEPS = 4

STEPS = Struct("Steps", "ptr by[4]; i64 kinds, count")


def pack_steps(steps: Sequence[tuple[str, Any]]) -> bytes:
    """Return the struct of steps, at most `MOST_STEPS`; the caller keeps their arrays.

    Parameters
    ----------
    steps : sequence of (kind, cupy.ndarray or None)
        Kinds are keys of `KINDS`; the array of "relu" is None.
    """
    by = np.array([address(array) for _, array in steps], np.uint64).tobytes()
    kinds = sum(KINDS[kind] << 4 * i for i, (kind, _) in enumerate(steps))
    return STEPS.pack(by=by, kinds=kinds, count=len(steps))
