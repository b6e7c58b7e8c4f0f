"""A training benchmark's record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cupybnn.benchmark import size_tables, tables
from cupybnn.benchmark.size_tables import failures, heading
from cupybnn.benchmark.tables import percent, times
from cupybnn.text_table import table

__all__ = ["comparison", "heading", "kernels", "lines", "original", "size", "summary"]


def name_of(row: dict[str, Any]) -> str:
    """Return the name of a row: "xnor, fused + graph", "PyTorch eager"."""
    if row["library"] == "PyTorch":
        return f"PyTorch {row['how']}"
    return f"{row['product']}, {row['how']}"


def _rate(value: float) -> str:
    return f"{value:,.0f}"


def _memory(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**20:,.0f} MiB"


def size(found: dict[str, Any]) -> Iterator[str]:
    """Yield the table of one size, and that of its kernels."""
    yield f"784-{'-'.join([str(found['hidden'])] * 3)}-10, {found['batch']} examples per step"
    rows, errors = [], []
    for row in found["rows"]:
        name = f"  {name_of(row)}"
        if "error" in row:
            errors.append(f"{name}, {row['precision']}: {row['error']}")
            continue
        step, rate = row["step"], row["examples_per_second"]
        rows.append(
            [
                name,
                row["precision"],
                *(tables.time(step[key]) for key in ("median", "min", "p90")),
                _rate(rate["average"]),
                _rate(rate["median"]),
                _memory(row["memory_bytes"]),
                _memory(row["pool_bytes"]),
            ]
        )
    header = ["", "precision", "median", "min", "p90", "ex/s avg", "ex/s med", "memory", "pool"]
    yield from table(header, rows)
    yield from errors
    if found.get("disturbed"):
        busy = max(row.get("others_processors") or 0.0 for row in found["rows"])
        yield (
            f"  NOT COMPARED: other programs used up to {busy:.1f} processors; measure again on an "
            f"idle machine."
        )
    if any("kernels" in row for row in found["rows"]):
        yield ""
        yield from kernels(found)


def kernels(found: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of one step: each kernel's time and its fraction of the sum."""
    rows = [row for row in found["rows"] if "kernels" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["kernels"]))
    sums = [sum(row["kernels"].values()) for row in rows]
    cells = []
    for name in names:
        line = [f"  {name}"]
        for row, total in zip(rows, sums, strict=True):
            seconds = row["kernels"].get(name)
            share = None if seconds is None else seconds / total
            line += ["" if seconds is None else tables.time(seconds), percent(share)]
        cells.append(line)
    cells.append(["  sum", *(c for total in sums for c in (tables.time(total), ""))])
    steps = (c for row in rows for c in (tables.time(row["step"]["median"]), ""))
    cells.append(["  step as a graph", *steps])
    yield "  kernels of one step, launched one after the other"
    header = [c for row in rows for c in (f"{row['product']} {row['precision']}", "")]
    yield from table(["", *header], cells)


def original(record: dict[str, Any]) -> Iterator[str]:
    """Yield the original program's table: ex/s with matmul and with xnor, and the speedup."""
    rows = []
    for found in record["sizes"]:
        done = [r for r in found["rows"] if "error" not in r and r["library"] != "PyTorch"]
        by_kind = {(r["how"], r["precision"], r["product"]): r for r in done}
        for how, precision in dict.fromkeys((r["how"], r["precision"]) for r in done):
            pair = [by_kind.get((how, precision, product)) for product in ("matmul", "xnor")]
            if None in pair:
                continue
            rates = [row["examples_per_second"] for row in pair if row]
            cells = [str(found["hidden"]), str(found["batch"]), how, precision]
            cells += [_rate(rate[key]) for rate in rates for key in ("average", "median")]
            speedups = [rates[1][key] / rates[0][key] for key in ("average", "median")]
            cells += ["" if found.get("disturbed") else times(speedup) for speedup in speedups]
            rows.append(cells)
    yield "training with matmul and with xnor, examples a second"
    header = ["hidden", "batch", "step", "precision", "matmul avg", "matmul med"]
    yield from table([*header, "xnor avg", "xnor med", "speedup avg", "speedup med"], rows)


def comparison(record: dict[str, Any]) -> Iterator[str]:
    """Yield the fastest of each kind, one line per size."""
    rows = []
    for found in record["sizes"]:
        cells = [str(found["hidden"]), str(found["batch"])]
        for kind in ("xnor", "matmul", "PyTorch"):
            row = found["rows"][found["best"][kind]] if kind in found["best"] else None
            if row is None:
                cells += ["-", ""]
            else:
                cells.append(_rate(row["examples_per_second"]["median"]))
                cells.append(f"{row['how']}, {row['precision']}")
        cells += [times(found["xnor_over_matmul"].get("best")), times(found["over_pytorch"])]
        share = found["memory_of_pytorch"]
        rows.append([*cells, "" if share is None else f"{share:.2f} x"])
    yield "fastest of each kind, median examples a second"
    header = ["hidden", "batch", "xnor", "", "matmul", "", "PyTorch", ""]
    yield from table([*header, "xnor/matmul", "ours/PyTorch", "memory/PyTorch"], rows)


def rounded(record: dict[str, Any]) -> Iterator[str]:
    """Yield the steps with rounded gradients, which learn something else; nothing without any."""
    rows = []
    for found in record["sizes"]:
        over = found.get("rounded_over_pytorch", {})
        for row in found["rows"]:
            if "plane" in row["product"] and "error" not in row:
                rate = _rate(row["examples_per_second"]["median"])
                cells = [str(found["hidden"]), str(found["batch"]), row["product"], rate]
                rows.append([*cells, times(over.get(row["product"]))])
    if rows:
        yield "rounded gradients (--grad_bits), median examples a second"
        yield from table(["hidden", "batch", "", "", "over the fastest PyTorch"], rows)


def summary(record: dict[str, Any]) -> Iterator[str]:
    """Yield the tables over all sizes, and failures."""
    yield from original(record)
    yield ""
    yield from comparison(record)
    yield from rounded(record)
    yield from failures(record, name_of)


def lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield the whole record."""
    return size_tables.lines(record, size, summary)
