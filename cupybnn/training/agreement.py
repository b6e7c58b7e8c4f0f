"""What the ranks of a run must have in common: decisions, and arrays after a step.

All ranks call these functions at the same time.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cupybnn.backends.devices import CPU, to_device
from cupybnn.errors import RankError
from cupybnn.parallel import Ranks

__all__ = ["check_equal", "first_reason", "true_on_all"]


def true_on_all(ranks: Ranks, here: bool) -> bool:
    """Whether something is true on every rank."""
    return bool(ranks.sums([float(here)])[0] == ranks.size)


def first_reason(ranks: Ranks, reason: str | None) -> str | None:
    """Return the reason against something of the lowest rank that has one; None if none has."""
    for rank, found in enumerate(ranks.gather_bytes((reason or "").encode())):
        if found:
            text = found.decode()
            return text if text == reason else f"on rank {rank}, {text}"
    return None


def check_equal(ranks: Ranks, arrays: Mapping[str, Any]) -> None:
    """Raise RankError unless all ranks have the same arrays, by their checksums.

    Parameters
    ----------
    ranks : Ranks
    arrays : mapping of str to array
        By name; on any device.

    Raises
    ------
    RankError
        Naming the first array and rank that differ.
    """
    sums = []
    for array in arrays.values():
        sums.append(zlib.crc32(np.ascontiguousarray(to_device(array, CPU)).tobytes()))
    gathered = ranks.gather_bytes(np.array(sums, np.uint32).tobytes())
    first, *others = (np.frombuffer(each, np.uint32) for each in gathered)
    for rank, other in enumerate(others, 1):
        if (differs := np.flatnonzero(first != other)).size:
            raise RankError(
                f"All ranks must have the same weights after a step; the "
                f"{list(arrays)[differs[0]]} differs between rank 0 and rank {rank}.",
                report=ranks.rank == 0,
            )
