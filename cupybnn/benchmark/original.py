"""The table of the original program: matmul and xnor_gemm on square float32 arrays."""

from __future__ import annotations

from typing import Any

from cupybnn.backends.devices import Device
from cupybnn.benchmark.clock import Clock
from cupybnn.benchmark.methods import random_floats, record_error
from cupybnn.benchmark.products import release
from cupybnn.gemm import xnor_gemm

__all__ = ["original_table"]


def original_table(
    device: Device, clock: Clock, sizes: tuple[int, ...], runs: int
) -> list[dict[str, Any]]:
    """Time single calls of both, from arrays to arrays, on an idle device.

    Returns
    -------
    list of dict
        A row for each size: N, runs, both timings, and the speedup of average and median.
    """
    xp = device.xp
    rows = []
    for n in sizes:
        row: dict[str, Any] = {"n": n, "runs": runs}
        with record_error(row):  # for example, too little memory for the largest
            pairs = [(random_floats(device, (n, n)), random_floats(device, (n, n))) for _ in "12"]
            timings = {}
            for name, multiply in (("matmul", xp.matmul), ("xnor_gemm", xnor_gemm)):
                calls = [lambda a=a, b=b, f=multiply: f(a, b) for a, b in pairs]
                timings[name] = clock.latency(calls, runs)
                row[name] = timings[name].as_dict()
            row["speedup_average"] = timings["matmul"].mean / timings["xnor_gemm"].mean
            row["speedup_median"] = timings["matmul"].median / timings["xnor_gemm"].median
            del pairs, calls
        release(device)
        rows.append(row)
    return rows
