"""Measure steps of several ranks, in processes that a library and a number of ranks share."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from cupybnn.backends.devices import Device
from cupybnn.benchmark.record import new_record
from cupybnn.benchmark.training.variants import Size
from cupybnn.parallel.locks import LAUNCHER, hold, user_prefix
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
_TIMEOUT, _TIMEOUT_TO_LEAVE = 900.0, 60.0
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
                            "seconds": 0.05 if quick else 0.1,
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
    tasks = tasks_for(device, counts, sizes, quick)
    # On one rank, weak and strong scaling are the same.
    cases = [json.dumps({**task, "kind": None}) for task in tasks]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for case, task in zip(cases, tasks, strict=True):
        groups.setdefault((task["library"], task["ranks"]), {})[case] = task
    found: dict[str, dict[str, Any]] = {}
    # PyTorch last: it compiles for minutes.
    for _, group in sorted(groups.items(), key=lambda each: (each[0][0] != "cupybnn", each[0][1])):
        for case, figures in zip(group, measure(list(group.values())), strict=True):
            found[case] = figures
            record["rows"] = [
                {name: task[name] for name in _NAMES} | found[case]
                for case, task in zip(cases, tasks, strict=True)
                if case in found
            ]
            compare(record)
            record["seconds"] = time.perf_counter() - began
            report(record, "row")
    return record


def measure(tasks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measure tasks of one library and number of ranks, in the same processes.

    Yields
    ------
    dict
        For each task its figures, or an "error" if a rank failed. Other processes then measure the
        rest.
    """
    rest = list(tasks)
    while rest:
        with contextlib.closing(_in_processes(rest)) as results:
            for figures in results:
                task = rest.pop(0)
                if "error" not in figures:
                    seconds = figures["step"]["median"]
                    figures["examples_per_second"] = task["batch"] / seconds
                    figures["exposed"] = seconds - figures["alone"]
                yield figures


def _in_processes(tasks: Sequence[dict[str, Any]]) -> Generator[dict[str, Any]]:
    """Yield figures of tasks as they come; after an "error", of no further ones."""
    size = tasks[0]["ranks"]
    command = [sys.executable, "-m", "cupybnn.benchmark.scaling.worker", json.dumps(tasks)]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=user_prefix(), ignore_cleanup_errors=True)
        )
        lock = hold(Path(folder) / LAUNCHER)  # if this process is killed, the ranks end, too
        stack.callback(os.close, lock)
        complaints = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(size)]
        processes = [
            subprocess.Popen(
                command,
                env=rank_environment(rank, size, Path(folder)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                stderr=complaint,
                text=True,
            )
            for rank, complaint in enumerate(complaints)
        ]
        stack.callback(_end, processes)
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_forward, args=(processes[0].stdout, lines), daemon=True).start()
        for _ in tasks:
            try:
                line = lines.get(timeout=_TIMEOUT)
            except queue.Empty:
                yield {"error": f"no result within {_TIMEOUT:.0f} seconds", "failed": True}
                return
            if not line:
                yield {"error": _complaint(processes, complaints), "failed": True}
                return
            yield json.loads(line)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TIMEOUT_TO_LEAVE)


def _forward(stream: Any, lines: queue.Queue[str]) -> None:
    """Pass on the lines of results, and an empty one at their end."""
    for line in stream:
        if line.startswith("{"):
            lines.put(line)
    lines.put("")


def _complaint(processes: Sequence[Any], complaints: Sequence[Any]) -> str:
    """Return the last line that a rank which failed has printed."""
    for process, file in zip(processes, complaints, strict=True):
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(_TIMEOUT_TO_LEAVE) == 0:
                continue
        file.seek(0)
        if said := file.read().strip().splitlines():
            return str(said[-1][:500])
    return "no message"


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


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
