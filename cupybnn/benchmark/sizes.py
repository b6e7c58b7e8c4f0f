"""Measure every variant at every size, again where other programs disturbed a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from cupybnn.backends.devices import Device

__all__ = ["DISTURBED", "TRIALS", "disturbed", "measure_sizes"]

#: Processors that other programs may use during a CPU measurement; above, nothing is compared.
DISTURBED = 0.2
#: How often a variant is measured at most, on a CPU that other programs use.
TRIALS = 3

Row = dict[str, Any]
V = TypeVar("V")


def disturbed(rows: Sequence[Row]) -> bool:
    """Whether other programs kept the processors busy while one of the rows was timed."""
    return any((row.get("others_processors") or 0.0) > DISTURBED for row in rows)


def measure_sizes(
    record: dict[str, Any],
    device: Device,
    sizes: Sequence[Any],
    variants: Sequence[V],
    measure: Callable[[V, Any], Row],
    compare: Callable[[Sequence[Row], bool], dict[str, Any]],
    *,
    began: float,
    starting: Callable[[str, int], None] | None,
    report: Callable[[dict[str, Any], str], None],
) -> None:
    """Add what is measured at each size to ``record["sizes"]``.

    Parameters
    ----------
    record : dict
    device : Device
    sizes : sequence
        With attributes `hidden` and `batch`.
    variants : sequence
    measure : callable(variant, size)
        Returns a row; "others_processors" in it are those that other programs used.
    compare : callable(rows, disturbed)
        Returns what is to be added for a size.
    began : float
        When the run began, by `time.perf_counter`.
    starting : callable(name, total) or None
        Called before each variant is measured, with its name and the total number of variants.
    report : callable(record, done)
        Called after each size, with "size".
    """
    for size in sizes:
        rows = []
        for variant in variants:
            if starting is not None:
                starting(f"{size} {variant}", len(sizes) * len(variants))
            rows.append(_undisturbed(lambda v=variant, s=size: measure(v, s), device))  # type: ignore[misc]
        busy = device.kind == "cpu" and disturbed(rows)
        found = {"hidden": size.hidden, "batch": size.batch, "rows": rows, "disturbed": busy}
        record["sizes"].append(found | compare(rows, busy))
        record["seconds"] = time.perf_counter() - began
        report(record, "size")


def _undisturbed(measure: Callable[[], Row], device: Device) -> Row:
    """Measure until nothing disturbs a CPU, at most `TRIALS` times; return the best row."""
    trials: list[Row] = []
    while len(trials) < TRIALS:
        trials.append(measure())
        if device.kind == "cuda" or not disturbed(trials[-1:]):
            break
    return min(trials, key=lambda row: row.get("others_processors") or 0.0)
