"""Whether the legends of a figure lie on what it shows; the notebooks are run with `watch`."""

from __future__ import annotations

import functools
import sys
from typing import Any

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox


def covering(figure: Figure) -> list[str]:
    """Return a sentence for each legend that covers a line, marker or bar of a drawn figure."""
    found = []
    for axes in figure.axes:
        legend = axes.get_legend()
        if legend is not None:
            box = legend.get_window_extent()
            if any(_lies_under(other, box) for other in figure.axes):
                found.append(f"the legend of {axes.get_title()!r} covers what is shown")
    return found


def _lies_under(axes: Any, box: Bbox) -> bool:
    seen = Bbox.intersection(box, axes.bbox)  # the rest of a line is clipped away
    if seen is None:
        return False
    for line in axes.get_lines():
        if line.get_transform() != axes.transData:  # axhline and axvline go all the way
            continue
        path = line.get_transform().transform_path(line.get_path())
        joined = line.get_linestyle() not in ("None", " ", "")
        if joined and path.intersects_bbox(seen, filled=False):
            return True
        if any(seen.contains(*point) for point in path.vertices):
            return True
    return any(
        patch.get_transform()
        .transform_path(patch.get_path())
        .intersects_bbox(seen, filled=patch.get_fill())
        for patch in axes.patches
    )


def watch() -> None:
    """Write to stderr, whenever a figure is drawn, what its legends cover."""
    draw = FigureCanvasBase.print_figure

    @functools.wraps(draw)
    def print_figure(self: Any, *args: Any, **options: Any) -> Any:
        result = draw(self, *args, **options)
        for sentence in covering(self.figure):
            print(sentence, file=sys.stderr)
        return result

    FigureCanvasBase.print_figure = print_figure
