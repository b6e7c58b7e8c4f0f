"""A benchmark's record as a chart: TOPS of square products, on logarithmic axes."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

from cupybnn.errors import SettingError
from cupybnn.extras import to_install
from cupybnn.files import atomic_write

__all__ = ["draw", "needs_matplotlib", "new_figure", "write"]

#: Color and line style of each method.
_STYLE: dict[str, tuple[str, str]] = {
    "packed -> packed": ("#0b5cad", "-"),
    "packed -> int32": ("#3f97e0", "-"),
    "float32 -> float32": ("#00897b", "-"),
    "torch fp8": ("#8a4f00", "--"),
    "torch int8": ("#c77700", "--"),
    "torch bfloat16": ("#e0a030", "--"),
    "CuPy float16": ("#6b6b6b", "--"),
    "CuPy TF32": ("#8f8f8f", "--"),
    "CuPy float32": ("#b02a37", "--"),
    "NumPy float32": ("#b02a37", "--"),
}


def needs_matplotlib() -> None:
    """Check that charts can be drawn.

    Raises
    ------
    SettingError
        If matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingError(
            f"The '--chart' needs matplotlib, which is not installed: {to_install('bench')}."
        ) from error


def _series(record: dict[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for result in record["products"]:
        if result["group"] != "square":
            continue
        for row in result["rows"]:
            if "tops" in row and row["method"] in _STYLE:
                sizes, tops = series.setdefault(row["method"], ([], []))
                sizes.append(result["n"])
                tops.append(row["tops"])
    return series


def draw(record: dict[str, Any], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draw the square products and write the chart as SVG and PNG.

    Parameters
    ----------
    record : dict
        What `cupybnn.benchmark.record.run` returned.
    path : path-like
        Where to write; the suffix is replaced by .svg and .png.

    Returns
    -------
    tuple of Path
        The files written.

    Raises
    ------
    SettingError
        If the record contains no square products, or matplotlib is not installed.
    """
    needs_matplotlib()
    series = _series(record)
    if not series:
        raise SettingError(
            "The record contains no square products to draw; run the section 'square'."
        )
    figure, axes = new_figure(8.5, 5.2, record, "Matrix products on one")
    ticks = sorted({n for sizes, _ in series.values() for n in sizes})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name, (sizes, tops) in series.items():
        color, line = _STYLE[name]
        axes.plot(sizes, tops, line, color=color, linewidth=2, marker="o", markersize=4)
    peak = record.get("peak_operations_per_second")
    if peak:
        axes.plot(ticks[:: len(ticks) - 1 or 1], [peak / 1e12] * min(2, len(ticks)), "-k", lw=0.8)
        axes.annotate(
            "peak of the 1-bit instruction as measured on an H200",
            (ticks[0], peak / 1e12),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
        )
    _name_lines(axes, series, ticks)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("M = N = K")
    axes.set_ylabel("TOPS (2 M N K / second / 1e12)")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    return write(figure, path)


def new_figure(width: float, height: float, record: dict[str, Any], what: str) -> tuple[Any, Any]:
    """Return a figure and its axes, with a title that names the measurement and the device.

    `what` ends before the device's name: "Rates on one".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    where = record["gpu"]["name"] if record["gpu"] else record["machine"]["cpu"]
    axes.set_title(f"{what} {where}", loc="left", fontsize=11)
    return figure, axes


def write(figure: Any, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a figure as SVG and PNG, reproducibly; return the files' paths."""
    import matplotlib

    stem = Path(path)
    files = stem.with_suffix(".svg"), stem.with_suffix(".png")
    for file in files:
        buffer = io.BytesIO()
        # Without a salt, the element ids of an SVG are random.
        with matplotlib.rc_context({"svg.hashsalt": "cupybnn"}):
            figure.savefig(buffer, format=file.suffix[1:], dpi=160, metadata=_metadata(file))
        with atomic_write(file) as out:
            out.write(buffer.getvalue())
    return files


def _metadata(file: Path) -> dict[str, Any]:
    # Without a date, an SVG does not change when it is drawn again.
    return {"Date": None} if file.suffix == ".svg" else {}


def _name_lines(
    axes: Any, series: dict[str, tuple[list[int], list[float]]], ticks: list[int]
) -> None:
    """Write each line's name at its right end, and move names apart that would overlap."""
    names = sorted(series, key=lambda name: series[name][1][-1])
    low, high = axes.get_ylim()
    # Move logarithms, because a distance on a logarithmic axis is a ratio.
    gap = math.log(high / low) / 22
    places = _apart([math.log(series[name][1][-1]) for name in names], gap)
    for name, place in zip(names, places, strict=True):
        axes.text(
            ticks[-1] * 1.12, math.exp(place), name, color=_STYLE[name][0], fontsize=9, va="center"
        )
    axes.set_ylim(low, max(high, math.exp(places[-1] + gap)))
    # Room for the names, which are inside the axes.
    axes.set_xlim(ticks[0] / 1.12, ticks[-1] * max(4.0, (ticks[-1] / ticks[0]) ** 0.36))


def _apart(places: list[float], gap: float) -> list[float]:
    """Return ascending `places`, moved as little as possible to be at least `gap` apart."""
    groups: list[tuple[float, int]] = []  # middle and size of groups of adjacent names
    for place in places:
        middle, size = place, 1
        while groups and middle - groups[-1][0] < gap * (size + groups[-1][1]) / 2:
            before, count = groups.pop()
            middle = (before * count + middle * size) / (count + size)
            size += count
        groups.append((middle, size))
    return [middle + gap * (i - (size - 1) / 2) for middle, size in groups for i in range(size)]
