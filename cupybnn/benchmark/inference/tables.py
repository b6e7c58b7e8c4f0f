"""An inference benchmark's record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cupybnn.benchmark import size_tables, tables
from cupybnn.benchmark.size_tables import failures, heading
from cupybnn.benchmark.tables import percent, times
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
    firsts = [False]
    if any(found.get("over_binary_first") for found in record["sizes"]):
        firsts.append(True)
    rows, header = [], ["hidden", "batch"]
    for binary_first in firsts:
        note = ", binary first" if binary_first else ""
        header += [f"cupybnn{note}", *(f"over {name}{note}" for name in others)]
    for found in record["sizes"]:
        cells = [str(found["hidden"]), str(found["batch"])]
        for binary_first in firsts:
            mine = next((r for r in found["rows"] if _is_ours(r, binary_first)), None)
            over = found.get("over_binary_first", {}) if binary_first else found["over"]
            cells.append("-" if mine is None else tables.time(mine["call"]["median"]))
            cells += [times(over.get(name)) for name in others]
        rows.append(cells)
    yield "a call by medians, and how many times as fast as the fastest way of each other library"
    yield from table(header, rows)
    yield from failures(record, name_of)


def _is_ours(row: dict[str, Any], binary_first: bool) -> bool:
    ours = row["library"] == "cupybnn" and "call" in row
    return ours and row.get("binary_first", False) == binary_first


def lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield the whole record."""
    return size_tables.lines(record, size, summary)
