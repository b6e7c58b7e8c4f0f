"""Run the benchmark's sections and collect the results in one record."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from cupybnn import machine
from cupybnn.backends.devices import Device, cuda_status
from cupybnn.benchmark.clock import make_clock
from cupybnn.benchmark.formats import FORMAT, RULES, RecordError, kind_of
from cupybnn.benchmark.methods import methods_for, summarize_error
from cupybnn.benchmark.original import original_table
from cupybnn.benchmark.overheads import copy_bandwidth, first_call, host_time, packing
from cupybnn.benchmark.products import Limits, measure, peak_operations
from cupybnn.benchmark.shapes import GROUPS, original_sizes, shapes
from cupybnn.benchmark.torch_layers import torch_layers
from cupybnn.files import atomic_write
from cupybnn.paths import checked_path
from cupybnn.schema import SchemaError, parse

__all__ = ["FORMAT", "SECTIONS", "RecordError", "kind_of", "load", "new_record", "run", "save"]

_MOST_BYTES = 1 << 28
SECTIONS = ("original", *GROUPS, "packing", "host", "torch", "first-call")


def new_record(kind: str, device: Device, quick: bool, notes: list[str]) -> dict[str, Any]:
    """Return a record of a kind ("product", "train", ...) with date, machine and device."""
    if device.kind == "cpu" and not cuda_status().available:
        notes = [
            f"NumPy is measured, because there is no usable GPU: {cuda_status().reason}",
            *notes,
        ]
    return {
        "format": FORMAT,
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "device": str(device),
        "gpu": machine.device_facts(device.index) if device.kind == "cuda" else None,
        "quick": quick,
        "notes": notes,
    }


def run(
    device: Device,
    *,
    quick: bool = False,
    only: Iterable[str] | None = None,
    progress: Callable[[dict[str, Any], str], None] | None = None,
) -> dict[str, Any]:
    """Measure and return the record.

    Parameters
    ----------
    device : Device
    quick : bool
        Fewer and smaller products, shorter timing.
    only : iterable of str, optional
        Sections to run, from `SECTIONS`; all by default.
    progress : callable(record, done), optional
        Called after each addition to the record, with the name of what was added.

    Returns
    -------
    dict
        JSON values; times in seconds.

    Raises
    ------
    ValueError
        If `only` is empty or names an unknown section.
    """
    wanted = list(SECTIONS) if only is None else list(only)
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown or not wanted:
        raise ValueError(
            f"The 'only' must name sections of {', '.join(SECTIONS)}; got {', '.join(unknown)!r}."
        )
    report = progress or (lambda record, done: None)
    with device.scope():
        return _run(device, quick, wanted, report)


def _run(
    device: Device, quick: bool, wanted: list[str], report: Callable[[dict[str, Any], str], None]
) -> dict[str, Any]:
    gpu = device.kind == "cuda"
    began = time.perf_counter()
    clock = make_clock(device)
    methods, notes = methods_for(device)
    record = new_record("product", device, quick, notes)
    record["products"] = []  # now, because a run may be interrupted before the first
    facts = record["gpu"]
    copy = copy_bandwidth(device, clock)
    limits = Limits(peak_operations(facts) if facts else None, copy["bytes_per_second"])
    record["copy"] = copy
    record["peak_operations_per_second"] = limits.peak
    report(record, "copy")
    if "original" in wanted:
        sizes = original_sizes(gpu, quick)
        record["original"] = original_table(device, clock, sizes, 5 if quick else 10)
        report(record, "original")
    budget = 0.03 if quick else 0.12
    for shape in shapes(gpu, quick):
        if shape.group in wanted:
            result = measure(shape, methods, device, clock, limits, budget=budget)
            record["products"].append(result)
            report(record, "product")
    size = 8192 if gpu else (512 if quick else 2048)
    sections: dict[str, tuple[str, Callable[[], Any]]] = {
        "packing": (
            "packing",
            lambda: packing(device, clock, limits.bandwidth, size=size, quick=quick),
        ),
        "host": ("host", lambda: host_time(device, clock)),
        "torch": ("torch", lambda: torch_layers(device, clock, quick=quick)),
        "first-call": ("first_call", lambda: first_call(device)),
    }
    for section, (key, work) in sections.items():
        if section in wanted:
            try:
                record[key] = work()
            except Exception as error:  # keep the figures so far even if the GPU has failed
                record["notes"].append(f"{section} failed: {summarize_error(error)}")
                continue
            report(record, section)
    record["seconds"] = time.perf_counter() - began
    return record


def save(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a record as JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a record that `save` wrote.

    Raises
    ------
    RecordError
        If the file is not such a record, or was edited so that it cannot be shown; the message
        names the first fault.
    OSError
        If the file cannot be read.
    """
    with open(checked_path(path), "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    try:
        if len(content) > _MOST_BYTES:
            raise SchemaError(f"it must have at most {_MOST_BYTES:,} bytes")
        record = parse(content)
    except SchemaError as error:
        raise RecordError(
            f"The file '{path}' is not a record of cupybnn bench: {error}."
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(
            f"The file '{path}' must be a record of cupybnn bench, format {FORMAT}; "
            f"got {type(record).__name__} without that format."
        )
    try:
        kind = record.get("kind")
        RULES[kind if isinstance(kind, str) and kind in RULES else "product"](record, "")
    except SchemaError as error:
        raise RecordError(
            f"The file '{path}' must be a complete record of cupybnn bench: {error}."
        ) from error
    return record
