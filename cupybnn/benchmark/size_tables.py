"""What the tables of records that have sizes, of training and inference, share."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from cupybnn.benchmark import tables

__all__ = ["failures", "heading", "lines"]


def heading(record: dict[str, Any]) -> Iterator[str]:
    """Yield device, versions, date and method."""
    yield from tables.heading(record)
    for what, how in record["method"].items():
        yield from textwrap.wrap(f"{what}: {how}", 100, subsequent_indent="  ")


def failures(record: dict[str, Any], name: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """Yield the cupybnn rows that failed, by their names; nothing if there are none."""
    wrong = [
        f"  {found['hidden']}x{found['batch']} {name(row)}, {row['precision']}: {row['error']}"
        for found in record["sizes"]
        for row in found["rows"]
        if row.get("failed") and row["library"] == "cupybnn"
    ]
    if wrong:
        yield f"{len(wrong)} FAILED:"
        yield from wrong


def lines(
    record: dict[str, Any],
    size: Callable[[dict[str, Any]], Iterator[str]],
    summary: Callable[[dict[str, Any]], Iterator[str]],
) -> Iterator[str]:
    """Yield the whole record, with the tables of one size and over all sizes."""
    yield from heading(record)
    for found in record["sizes"]:
        yield ""
        yield from size(found)
    if record["sizes"]:
        yield ""
        yield from summary(record)
