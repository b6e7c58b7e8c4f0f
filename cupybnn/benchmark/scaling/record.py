"""Measure steps of several ranks, each measurement in processes of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cupybnn.backends.devices import Device
from cupybnn.benchmark.record import new_record
from cupybnn.benchmark.training.variants import Size
from cupybnn.parallel.starting import rank_environment

__all__ = ["compare", "run", "tasks_for"]

METHOD = {
    "network": (
        "784-H-H-H-10 with binary weights and activations, as in 'bench train'; in PyTorch with "
        "DistributedDataParallel, on GPUs compiled, with bfloat16 products and gradients"
    ),
    "scaling": (
        "weak: as many images a rank whatever their number; strong: as many images in all; "
        "efficiency: the rate over that of one rank times the number of ranks"
    ),
    "timing": (
        "seven groups of steps that all ranks begin together, after a warm-up, until the slowest "
        "has ended; medians"
    ),
    "exposed": (
        "the step less one of a single rank with as many images as each rank has, measured on all "
        "ranks at the same time: what exchanging adds, less what sharing out the update saves"
    ),
    "state": "bytes of latent weights and their optimizer's arrays on a rank",
}
_TIMEOUT = 900.0
_NAMES = ("library", "kind", "ranks", "hidden", "size", "batch", "precision")


def tasks_for(
    device: Device, counts: Sequence[int], sizes: Sequence[Size] | None, quick: bool
) -> list[dict[str, Any]]:
    """Return what to measure: a list of settings of `cupybnn.benchmark.scaling.worker`."""
    gpu = device.kind == "cuda"
    if sizes is None:
        sizes = [Size(8192, 8192), Size(512, 8192)] if gpu else [Size(512, 128)]
        sizes = sizes[-1:] if quick else sizes
    libraries = ["cupybnn"]
    if importlib.util.find_spec("torch") is not None:
        libraries.append("PyTorch")
    tasks = []
    for size in sizes:
        for kind in ("weak", "strong"):
            for ranks in counts:
                for library in libraries:
                    tasks.append(
                        {
                            "library": library,
                            "kind": kind,
                            "ranks": ranks,
                            "hidden": size.hidden,
                            "size": size.batch,
                            "batch": size.batch * (ranks if kind == "weak" else 1),
                            "precision": "bfloat16" if gpu else "float32",
                            "device": "cuda" if gpu else "cpu",
                            "images": 60000,
                            "seconds": 0.05 if quick else 0.3,
                        }
                    )
    return tasks


def run(
    device: Device,
    counts: Sequence[int],
    *,
    quick: bool = False,
    sizes: Sequence[Size] | None = None,
    progress: Callable[[dict[str, Any], str], None] | None = None,
) -> dict[str, Any]:
    """Measure and return the record.

    Parameters
    ----------
    device : Device
        Its kind counts: each rank has a device of its own.
    counts : sequence of int
        Numbers of ranks; the first is what the others are compared with.
    quick, sizes, progress
        As in `cupybnn.benchmark.training.record.run`; `progress` is called after each "row".
    """
    report = progress or (lambda record, done: None)
    began = time.perf_counter()
    record = new_record("scaling", device, quick, [])
    record |= {"method": METHOD, "counts": list(counts), "rows": []}
    report(record, "begun")
    measured: dict[str, dict[str, Any]] = {}
    for task in tasks_for(device, counts, sizes, quick):
        case = json.dumps({**task, "kind": None})  # on one rank, weak and strong are the same
        if case not in measured:
            measured[case] = measure(task)
        row = {name: task[name] for name in _NAMES} | measured[case]
        record["rows"].append(row)
        compare(record)
        record["seconds"] = time.perf_counter() - began
        report(record, "row")
    return record


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement; return its figures, or an "error" if a rank failed."""
    with tempfile.TemporaryDirectory(prefix="cupybnn-ranks-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "cupybnn.benchmark.scaling.worker", json.dumps(task)]
        size = task["ranks"]
        processes = [
            subprocess.Popen(
                command,
                env=rank_environment(rank, size, Path(folder)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            outputs = [process.communicate(timeout=_TIMEOUT) for process in processes]
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {_TIMEOUT:.0f} seconds", "failed": True}
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    for process, (_, complaint) in zip(processes, outputs, strict=True):
        if process.returncode:
            last = (complaint.strip().splitlines() or ["no message"])[-1]
            return {"error": last[:500], "failed": True}
    found: dict[str, Any] = json.loads(outputs[0][0].strip().splitlines()[-1])
    seconds = found["step"]["median"]
    found["examples_per_second"] = task["batch"] / seconds
    found["exposed"] = seconds - found["alone"]
    return found


def compare(record: dict[str, Any]) -> None:
    """Add to each row its speedup, efficiency, and ratio to PyTorch's row of the same case."""
    rows = {_case(row): row for row in record["rows"] if "error" not in row}
    for row in rows.values():
        first = rows.get(_case({**row, "ranks": record["counts"][0]}))
        if first is not None:
            row["speedup"] = row["examples_per_second"] / first["examples_per_second"]
            row["efficiency"] = row["speedup"] * first["ranks"] / row["ranks"]
        peer = rows.get(_case({**row, "library": "PyTorch"}))
        if peer is not None and row["library"] == "cupybnn":
            row["over_pytorch"] = row["examples_per_second"] / peer["examples_per_second"]


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a row."""
    return tuple(row[name] for name in ("library", "kind", "ranks", "hidden", "size"))
