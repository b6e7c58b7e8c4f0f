"""An inference benchmark's record as a chart: time of a call over the batch size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cupybnn.benchmark.chart import needs_matplotlib, new_figure, write
from cupybnn.errors import SettingError

__all__ = ["draw"]

_COLORS = {"cupybnn": ("#0b5cad", "#5fa8e8"), "PyTorch": ("#c77700", "#e0a030", "#b0b0b0"),
           "onnxruntime": ("#5b8c5a",)}  # fmt: skip


def draw(record: dict[str, Any], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draw a panel for each width, a line for each way, and write the chart as SVG and PNG.

    Parameters
    ----------
    record : dict
        What `cupybnn.benchmark.inference.record.run` returned.
    path : path-like
        Where to write; the ending is replaced by .svg and .png.

    Returns
    -------
    tuple of Path
        The files written.

    Raises
    ------
    ValueError
        If nothing was measured, or matplotlib is not installed.
    """
    needs_matplotlib()
    points: dict[int, dict[tuple[str, str, str], list[tuple[int, float]]]] = {}
    for found in record["sizes"]:
        for row in found["rows"]:
            if "error" in row or found["disturbed"]:
                continue
            way = (row["library"], row["how"], row["precision"])
            line = points.setdefault(found["hidden"], {}).setdefault(way, [])
            line.append((found["batch"], row["call"]["median"] * 1e6))
    if not points:
        raise SettingError("The record holds no predictions to draw.")
    width = 4.4 * len(points) + 0.6
    figure, whole = new_figure(width, 4.6, record, "Predictions of a packed network on one")
    figure.suptitle(whole.get_title("left"), fontsize=11)
    whole.remove()
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    ways = list(dict.fromkeys(way for lines in points.values() for way in lines))
    handles = {}
    for panel, (hidden, lines) in zip(panels, sorted(points.items()), strict=True):
        for way in ways:
            if way not in lines:
                continue
            alike = [w for w in ways if w[0] == way[0]]
            colors = _COLORS.get(way[0], ("#777777",))
            (handles[way],) = panel.loglog(
                *zip(*sorted(lines[way]), strict=True), marker="o", markersize=4,
                color=colors[alike.index(way) % len(colors)],
                linewidth=2.2 if way[0] == "cupybnn" else 1.3,
            )  # fmt: skip
        panel.set_title(f"784-{hidden}-{hidden}-{hidden}-10", fontsize=10)
        panel.set_xlabel("batch")
        panel.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)
    panels[0].set_ylabel("microseconds of a call")
    labels = [f"{library} {how}, {precision}" for library, how, precision in handles]
    figure.legend(
        handles.values(), labels, frameon=False, fontsize=9, loc="outside lower center", ncols=2
    )
    return write(figure, path)
