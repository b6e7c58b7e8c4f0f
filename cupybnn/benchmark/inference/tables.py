"""An inference benchmark's record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cupybnn.benchmark import tables
from cupybnn.benchmark.tables import percent, times
from cupybnn.benchmark.training.tables import failures, heading
from cupybnn.text_table import table

__all__ = ["heading", "lines", "size", "summary"]


def name_of(row: dict[str, Any]) -> str:
    """Return the name of a row: "cupybnn net(x)", "PyTorch eager"."""
    return f"{row['library']} {row['how']}"


def size(found: dict[str, Any]) -> Iterator[str]:
    """Yield the table of one size."""
    yield f"784-{'-'.join([str(found['hidden'])] * 3)}-10, batch {found['batch']}"
    rows, errors = [], []
    for row in found["rows"]:
        name = f"  {name_of(row)}"
        if "error" in row:
            errors.append(f"{name}, {row['precision']}: {row['error']}")
        if "call" not in row:
            continue
        call, device = row["call"], row.get("device")
        rows.append(
            [
                name,
                row["precision"],
                *(tables.time(call[key]) for key in ("median", "min", "p90")),
                "" if device is None else tables.time(device["median"]),
                f"{row['examples_per_second']:,.0f}",
                "exact" if row["equal"] else percent(row["same_classes"]),
            ]
        )
    header = ["", "precision", "call med", "min", "p90", "device", "inputs/s", "classes"]
    yield from table(header, rows)
    yield from errors
    if found["disturbed"]:
        busy = max(row.get("others_processors") or 0.0 for row in found["rows"])
        yield (
            f"  NOT COMPARED: other programs used up to {busy:.1f} processors meanwhile; measure "
            f"again on an idle machine."
        )


def summary(record: dict[str, Any]) -> Iterator[str]:
    """Yield one line a size: how many times as fast as the others, and what failed."""
    others = list(dict.fromkeys(name for found in record["sizes"] for name in found["over"]))
    rows = []
    for found in record["sizes"]:
        mine = next((r for r in found["rows"] if r["library"] == "cupybnn" and "call" in r), None)
        cells = [str(found["hidden"]), str(found["batch"])]
        cells.append("-" if mine is None else tables.time(mine["call"]["median"]))
        rows.append([*cells, *(times(found["over"].get(name)) for name in others)])
    yield "a call by medians, and how many times as fast as the fastest way of each other library"
    yield from table(["hidden", "batch", "cupybnn", *(f"over {name}" for name in others)], rows)
    yield from failures(record, name_of)


def lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield the whole record."""
    yield from heading(record)
    for found in record["sizes"]:
        yield ""
        yield from size(found)
    if record["sizes"]:
        yield ""
        yield from summary(record)
