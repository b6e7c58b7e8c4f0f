"""Starting ranks on this machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["rank_environment"]


def rank_environment(rank: int, size: int, folder: Path) -> dict[str, str]:
    """Return the environment of a process that is to be one of `size` ranks of this machine.

    The ranks share its processors evenly, unless ``OMP_NUM_THREADS`` says otherwise.

    Parameters
    ----------
    rank, size : int
    folder : Path
        Where they meet.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, processors // size)),
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "CUPYBNN_RENDEZVOUS": str(folder),
    }
