"""A scaling benchmark's record as a chart: rate over that of the fewest ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cupybnn.benchmark.chart import needs_matplotlib, new_figure, write
from cupybnn.benchmark.scaling.tables import cases
from cupybnn.errors import SettingError

__all__ = ["draw"]

_COLORS = ("#0b5cad", "#c77700", "#2d8a4e", "#8a4fbf")


def draw(record: dict[str, Any], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draw a line for each comparison and library and write the chart as SVG and PNG.

    Parameters
    ----------
    record : dict
        What `cupybnn.benchmark.scaling.record.run` returned.
    path : path-like
        Where to write; the suffix is replaced by .svg and .png.

    Raises
    ------
    SettingError
        If the record has nothing to draw, or matplotlib is not installed.
    """
    needs_matplotlib()
    ranks = "GPUs" if record["gpu"] else "ranks"
    figure, axes = new_figure(8.0, 5.0, record, f"Training on several {ranks},")
    drawn = False
    for number, (title, rows) in enumerate(cases(record)):
        for library, line in (("cupybnn", "-"), ("PyTorch", "--")):
            points = [(r["ranks"], r["speedup"]) for r in rows
                      if r["library"] == library and "speedup" in r]  # fmt: skip
            if points:
                drawn = True
                name = f"{library}, {title.replace(' scaling', '')}"
                color = _COLORS[number % len(_COLORS)]
                axes.plot(*zip(*points, strict=True), line, color=color, marker="o", label=name)
    if not drawn:
        raise SettingError("The record contains no steps to draw.")
    counts = record["counts"]
    axes.plot(counts, [n / counts[0] for n in counts], ":", color="black", lw=0.8, label="ideal")
    axes.set_xticks(counts, map(str, counts))
    axes.set_xlabel(ranks)
    axes.set_ylabel(f"examples a second, over those of {counts[0]}")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=1)
    return write(figure, path)
