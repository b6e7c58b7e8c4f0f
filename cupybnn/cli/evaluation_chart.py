"""The chart of ``cupybnn evaluate``: the confusion matrix, and the worst mistakes as images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.benchmark.chart import needs_matplotlib, write

if TYPE_CHECKING:
    from cupybnn.data import Dataset
    from cupybnn.deploy import ClassificationReport

__all__ = ["draw"]

_RIGHT, _WRONG, _GREY = "#0b5cad", "#b02a37", "#555555"
_ROWS, _COLUMNS = 4, 5  # of the mistakes
_NUMBERED = 20  # classes up to which each cell of the matrix has its number


def draw(
    report: ClassificationReport, data: Dataset, path: str | os.PathLike[str]
) -> tuple[Path, Path]:
    """Draw a report and write the chart as SVG and PNG.

    Parameters
    ----------
    report : ClassificationReport
        Of all test images of `data`, in their order.
    data : Dataset
        Its images are shown where they have a shape.
    path : path-like
        Where to write; the ending is replaced by .svg and .png.

    Returns
    -------
    tuple of Path
        The files written.
    """
    needs_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mistakes = report.mistakes(_ROWS * _COLUMNS) if data.image_shape is not None else np.array([])
    shown = len(mistakes) > 0
    figure: Any = Figure(figsize=(12.6 if shown else 6.2, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, 1 + shown, squeeze=False)[0]
    _draw_matrix(grid[0], report, data)
    if shown:
        _draw_mistakes(grid[1], report, data, mistakes)
    return write(figure, path)


def _draw_matrix(axes: Any, report: ClassificationReport, data: Dataset) -> None:
    """Draw a square for each pair of classes: what is right in blue, what is wrong in red."""
    from matplotlib.colors import LinearSegmentedColormap

    confusion = report.confusion
    count = len(confusion)
    right = np.eye(count, dtype=bool)
    colors = np.ones((count, count, 4))
    # The square root shows single mistakes alongside frequent ones.
    for cells, color in ((right, _RIGHT), (~right, _WRONG)):
        shares = np.sqrt(confusion / max(1, confusion[cells].max(initial=0)))
        colormap = LinearSegmentedColormap.from_list("", ["#ffffff", color])
        colors[cells] = colormap(shares[cells] * 0.9)
    axes.imshow(colors)
    if count <= _NUMBERED:
        size = 10 if count <= 12 else 7
        for true, predicted in np.argwhere(confusion):
            light = colors[true, predicted, :3].mean() > 0.62
            axes.text(
                predicted,
                true,
                f"{confusion[true, predicted]}",
                ha="center",
                va="center",
                fontsize=size,
                color="#222222" if light else "white",
            )
    names = [str(name) for name in report.classes]
    axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(count), names)
    axes.tick_params(length=0, labelsize=10 if count <= _NUMBERED else 6)
    axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_color("#cccccc")
    axes.set_xlabel("predicted class", color=_GREY)
    axes.set_ylabel("true class", color=_GREY)
    axes.set_title(
        f"{report.accuracy:.2%} of {len(report.labels):,} test images of {data.name} are right",
        loc="left",
        fontsize=12,
    )


def _draw_mistakes(
    axes: Any, report: ClassificationReport, data: Dataset, mistakes: np.ndarray
) -> None:
    """Draw the most confident wrong predictions, as ink on paper, row by row."""
    from matplotlib.patches import Rectangle

    assert data.image_shape is not None
    height, width = np.array(data.image_shape) / max(data.image_shape)
    down = height + 0.46  # from one row to the next; an image is at most 1 wide and high
    for place, i in enumerate(mistakes):
        row, column = divmod(place, _COLUMNS)
        left, top = column * 1.2 + (1 - width) / 2, row * down
        image = data.test_images[i].reshape(data.image_shape)
        axes.imshow(
            image,
            "gray_r",
            vmin=0,
            vmax=data.pixel_max,
            interpolation="nearest",
            extent=(left, left + width, top + height, top),
        )
        axes.add_patch(Rectangle((left, top), width, height, fill=False, ec="#cccccc", lw=0.8))
        true, predicted = (report.classes[k[i]] for k in (report.labels, report.predicted))
        middle = left + width / 2
        axes.text(middle, top - 0.05, f"{true}, not {predicted}", fontsize=11, ha="center")
        axes.text(
            middle,
            top + height + 0.04,
            f"{report.confidence[i]:.1%} sure",
            fontsize=9,
            ha="center",
            va="top",
            color=_WRONG,
        )
    axes.set(xlim=(-0.05, _COLUMNS * 1.2 - 0.15), ylim=(_ROWS * down - 0.2, -0.24), aspect="equal")
    axes.set_axis_off()
    axes.set_title("The most confident mistakes", loc="left", fontsize=12)
