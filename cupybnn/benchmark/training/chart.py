"""A training benchmark's record as a chart: throughput relative to the fastest PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cupybnn.benchmark.chart import needs_matplotlib, new_figure, write
from cupybnn.errors import SettingError

__all__ = ["draw"]

#: Kinds of bars, from left to right: name, library, product, end of `how`, color.
_KINDS = (
    ("cupybnn, gradients of 1 bit", "cupybnn", "1 plane", "", "#00695c"),
    ("cupybnn, gradients of 4 bits", "cupybnn", "4 planes", "", "#26a08c"),
    ("cupybnn, xnor", "cupybnn", "xnor", "", "#0b5cad"),
    ("cupybnn, dense products", "cupybnn", "matmul", "", "#7fb8ec"),
    ("PyTorch, compiled + CUDA graph", "PyTorch", "matmul", "compiled + graph", "#c77700"),
    ("PyTorch, CUDA graph", "PyTorch", "matmul", "graph", "#e0a030"),
    ("PyTorch, eager", "PyTorch", "matmul", "eager", "#cfcfcf"),
)


def _fastest(found: dict[str, Any], library: str, product: str, how: str) -> float | None:
    """Return ex/s of the fastest row of a kind at one size."""
    return max(
        (
            row["examples_per_second"]["median"]
            for row in found["rows"]
            if "error" not in row
            and (row["library"], row["product"]) == (library, product)
            and how in ("", row["how"])
        ),
        default=None,
    )


def _unit(found: dict[str, Any]) -> tuple[str, float]:
    """Return the name and ex/s of the reference for the bars of a size."""
    for kind, name in (("PyTorch", "the fastest PyTorch"), ("matmul", "dense products")):
        if kind in found["best"]:
            row = found["rows"][found["best"][kind]]
            return name, row["examples_per_second"]["median"]
    return "", 0.0


def draw(record: dict[str, Any], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draw a group of bars for each size and write the chart as SVG and PNG.

    Parameters
    ----------
    record : dict
        What `cupybnn.benchmark.training.record.run` returned.
    path : path-like
        Where to write; the suffix is replaced by .svg and .png.

    Returns
    -------
    tuple of Path
        The files written.

    Raises
    ------
    ValueError
        If the record has nothing to compare, or matplotlib is not installed.
    """
    needs_matplotlib()
    sizes = [found for found in record["sizes"] if _unit(found)[1] and not found.get("disturbed")]
    if not sizes:
        raise SettingError("The record contains no training steps to draw.")
    rates = {kind[0]: [_fastest(found, *kind[1:4]) for found in sizes] for kind in _KINDS}
    kinds = [kind for kind in _KINDS if any(rates[kind[0]])]
    width = max(7.0, 1.25 * len(sizes) + 1.5)
    figure, axes = new_figure(width, 4.8, record, "Training a binarized network on one")
    width = 0.8 / len(kinds)
    for number, (name, *_, color) in enumerate(kinds):
        left = (number - (len(kinds) - 1) / 2) * width
        places, heights, texts = [], [], []
        for place, (found, rate) in enumerate(zip(sizes, rates[name], strict=True)):
            if rate is not None:
                places.append(place + left)
                heights.append(rate / _unit(found)[1])
                texts.append(_short(rate))
        axes.bar(places, heights, width * 0.92, color=color, label=name)
        for x, y, text in zip(places, heights, texts, strict=True):
            axes.annotate(
                text, (x, y), xytext=(0, 3), textcoords="offset points", fontsize=7,
                ha="center", va="bottom", rotation=90,
            )  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(range(len(sizes)), [f"{f['hidden']}\n{f['batch']}" for f in sizes])
    axes.set_xlabel("units per hidden layer, examples per step; above the bars: examples a second")
    axes.set_ylabel(f"throughput relative to {_unit(sizes[0])[0]}")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.1)  # room for the numbers above the bars
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    return write(figure, path)


def _short(rate: float) -> str:
    """Format ex/s in a few characters: 23.0 M, 412 k."""
    for unit, scale in ((" M", 1e6), (" k", 1e3)):
        if rate >= scale:
            return f"{rate / scale:.3g}{unit}"
    return f"{rate:.3g}"
