"""A scaling benchmark's record as tables for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from cupybnn.benchmark import tables
from cupybnn.benchmark.tables import percent, times
from cupybnn.text_table import table

__all__ = ["cases", "heading", "lines", "row", "summary"]


def heading(record: dict[str, Any]) -> Iterator[str]:
    """Yield device, versions, date and method."""
    yield from tables.heading(record)
    for what, how in record["method"].items():
        yield from textwrap.wrap(f"{what}: {how}", 100, subsequent_indent="  ")


def row(found: dict[str, Any]) -> str:
    """Return a line about one measurement, as it is made."""
    where = f"{found['library']}, {found['kind']}, {_ranks(found)}, {found['hidden']} units"
    if "error" in found:
        return f"{where}: {found['error']}"
    rate = f"{found['examples_per_second']:,.0f} ex/s"
    return f"{where}, {found['batch']} images: {tables.time(found['step']['median'])}, {rate}"


def cases(record: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each comparison's title and rows: a network, its images, and weak or strong."""
    keys = dict.fromkeys((r["hidden"], r["size"], r["kind"]) for r in record["rows"])
    for hidden, size, kind in keys:
        what = "a rank" if kind == "weak" else "in all"
        title = f"{kind} scaling: 784-{'-'.join([str(hidden)] * 3)}-10, {size} images {what}"
        rows = [r for r in record["rows"] if (r["hidden"], r["size"], r["kind"]) == (
            hidden, size, kind)]  # fmt: skip
        yield title, rows


def summary(record: dict[str, Any]) -> Iterator[str]:
    """Yield a table for each comparison."""
    header = ["", "ranks", "step", "ex/s", "speedup", "efficiency", "exposed", "state", "/PyTorch"]
    for number, (title, rows) in enumerate(cases(record)):
        if number:
            yield ""
        yield title
        cells, errors = [], []
        for found in rows:
            name = f"  {found['library']}, {found.get('how', '')}, {found['precision']}"
            if "error" in found:
                errors.append(f"  {found['library']}, {_ranks(found)}: {found['error']}")
                continue
            cells.append(
                [
                    name,
                    str(found["ranks"]),
                    tables.time(found["step"]["median"]),
                    f"{found['examples_per_second']:,.0f}",
                    times(found.get("speedup")),
                    percent(found.get("efficiency")),
                    _signed(found["exposed"]),
                    f"{found['state_bytes'] / 2**20:,.1f} MiB",
                    times(found.get("over_pytorch")),
                ]
            )
        if cells:
            yield from table(header, cells)
        yield from errors


def _ranks(found: dict[str, Any]) -> str:
    return f"{found['ranks']} rank{'s' if found['ranks'] > 1 else ''}"


def _signed(seconds: float) -> str:
    return ("-" if seconds < 0 else "") + tables.time(abs(seconds))


def lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield the whole record."""
    yield from heading(record)
    yield ""
    yield from summary(record)
