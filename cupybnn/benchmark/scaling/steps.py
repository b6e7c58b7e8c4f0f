"""Timing steps that all ranks make together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from cupybnn.parallel import Ranks

__all__ = ["time_steps"]

_GROUPS = 7
_WARM_UP = 4  # the second fused step captures a graph


def time_steps(
    step: Callable[[], Any], wait: Callable[[], None], ranks: Ranks, seconds: float
) -> dict[str, float]:
    """Return the seconds of a step: median, minimum and 90th percentile of groups of steps.

    All ranks begin a group together, and it ends when the slowest has ended.

    Parameters
    ----------
    step : callable
    wait : callable
        Waits for the device.
    ranks : Ranks
    seconds : float
        Of a group, at least one step.
    """
    for _ in range(_WARM_UP):
        step()
    wait()
    began = time.perf_counter()
    step()
    wait()
    # The same number on every rank.
    once = float(ranks.sums([time.perf_counter() - began])[0]) / ranks.size
    steps = max(1, round(seconds / max(once, 1e-6)))
    groups = []
    for _ in range(_GROUPS):
        ranks.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        ranks.barrier()
        groups.append((time.perf_counter() - began) / steps)
    groups.sort()
    return {"median": statistics.median(groups), "min": groups[0], "p90": groups[-1]}
