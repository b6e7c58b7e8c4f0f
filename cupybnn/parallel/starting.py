"""What ranks on this machine need: GPUs, and their environment."""

from __future__ import annotations

import os
from pathlib import Path

from cupybnn.backends.devices import cuda_status
from cupybnn.errors import SettingError
from cupybnn.extras import to_install

__all__ = ["check_gpus", "rank_environment", "why_no_gpus"]


def check_gpus(count: int) -> None:
    """Raise SettingError if there are fewer GPUs than ``--gpus`` asks for."""
    status = cuda_status()
    if status.device_count < count:
        why = "" if status.available else f" {why_no_gpus() if count > 1 else status.reason}"
        raise SettingError(
            f"The '--gpus' must be at most the number of GPUs, {status.device_count}; got {count}."
            f"{why}"
        )


def why_no_gpus() -> str:
    """Return why no GPU can be used, and, where CuPy is to be installed, what several need."""
    status = cuda_status()
    if status.installed:
        return status.reason
    return (
        f"{status.reason} Ranks on GPUs need NCCL as well: {to_install('distributed-cuda13')}, or "
        f"the extra distributed-cuda12."
    )


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
