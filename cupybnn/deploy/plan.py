"""A packed network as an exporter writes it: which products are of integers, and from what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PackedLayer, Step
from cupybnn.errors import SettingError
from cupybnn.fold import LIMIT
from cupybnn.packed import PackedMatrix

__all__ = ["GREATEST_PIXEL", "Planned", "check_pixels", "plan", "scale_factor"]

GREATEST_PIXEL = 255  # a byte


@dataclass(frozen=True)
class Planned:
    """A layer for an exporter, with its arrays in NumPy.

    Attributes
    ----------
    name : str
        That of the packed layer, or one made of it where two layers share a name.
    source : {"pixels", "numbers", "signs"}
        What comes in. Pixels are bytes, still to be scaled where the product is of numbers.
    inputs, units : int
    plus : array of bool, shape (inputs, units), or None
        Which weights are +1; None for real weights.
    weight : array of float32, shape (inputs, units), or None
        Real weights.
    integer : bool
        Whether the product is one of integers: of signs, or of pixels that are not scaled.
    threshold : array, shape (units,), or None
        The sign of a unit is +1 where ``(product >= threshold) != flip``. int64, from `least` to
        ``-least + 1``, for a product of integers; else float32.
    flip : array of bool, shape (units,), or None
    steps : tuple of Step
        On the product as float32, where there is no threshold.
    """

    name: str
    source: str
    inputs: int
    units: int
    plus: np.ndarray | None
    weight: np.ndarray | None
    integer: bool
    threshold: np.ndarray | None
    flip: np.ndarray | None
    steps: tuple[Step, ...]

    @property
    def signs(self) -> bool:
        """Whether signs come out, not numbers."""
        return self.threshold is not None

    @property
    def least(self) -> int:
        """The least value that a product of integers can have; the greatest is its negative."""
        return _least(self.source, self.inputs)


def scale_factor(inputs: InputSpec) -> np.float32:
    """Return what pixels are multiplied by before they enter the network."""
    assert inputs.pixel_max is not None
    return np.float32(1.0 / inputs.pixel_max)


def check_pixels(inputs: InputSpec) -> None:
    """Check that a network takes pixels of a byte each.

    Raises
    ------
    SettingError
        If it does not; the message says why.
    """
    if inputs.pixel_max is None:
        raise SettingError(
            "A C header, and ONNX with inputs='pixels', must be of a network that takes pixels of "
            "a byte each; got one that takes numbers. If they are pixels divided by 255, for one, "
            "pack it with pixel_max=255; otherwise write ONNX, which takes numbers."
        )
    if not 1 <= inputs.pixel_max <= GREATEST_PIXEL:
        raise SettingError(
            f"The greatest pixel of the network must fit in a byte, from 1 to {GREATEST_PIXEL}; "
            f"got {inputs.pixel_max:g}."
        )


def plan(layers: Sequence[PackedLayer], inputs: InputSpec, pixels: bool) -> list[Planned]:
    """Return the layers of a network as exporters write them.

    Where binary weights meet pixels, the product is one of integers and its threshold too: the sum
    of ± pixels is compared with the threshold of the scaled sum in exact arithmetic. A
    `PackedNetwork` adds scaled pixels in float32 instead, so the sign of a unit can differ where
    the exact sum lies within the rounding error of its threshold, and nowhere else. It never
    differs if `pixel_max` is a power of two, because those sums are exact.

    Parameters
    ----------
    layers : sequence of PackedLayer
        On the CPU.
    inputs : InputSpec
    pixels : bool
        Whether pixels come in, or numbers that are scaled already.
    """
    planned: list[Planned] = []
    source = "pixels" if pixels else "numbers"
    for layer in layers:
        planned.append(_planned(layer, _new_name(layer.name, planned), source, inputs))
        source = "signs" if planned[-1].signs else "numbers"
    return planned


def _new_name(name: str, before: Sequence[Planned]) -> str:
    taken = {layer.name for layer in before}
    number, new = 2, name
    while new in taken:
        number, new = number + 1, f"{name} ({number})"
    return new


def _least(source: str, inputs: int) -> int:
    return -inputs * (GREATEST_PIXEL if source == "pixels" else 1)


def _planned(layer: PackedLayer, name: str, source: str, inputs: InputSpec) -> Planned:
    integer = layer.binary and source != "numbers"
    if source == "pixels":  # as far as float32 counts, which some targets multiply in
        integer = integer and -_least(source, layer.inputs) < LIMIT
    plus = weight = None
    if isinstance(layer.weight, PackedMatrix):
        plus = layer.weight.unpack(np.int8) > 0
    else:
        weight = layer.weight
    threshold, steps = layer.threshold, layer.steps
    if integer:
        factor = scale_factor(inputs) if source == "pixels" else np.float32(1)
        if threshold is not None:
            threshold = _whole(threshold, factor, _least(source, layer.inputs))
        elif source == "pixels":
            steps = (Step("multiply", np.full(layer.units, factor)), *steps)
    return Planned(
        name,
        source,
        layer.inputs,
        layer.units,
        plus,
        weight,
        integer,
        threshold,
        layer.flip,
        steps,
    )


def _whole(threshold: Any, factor: np.float32, least: int) -> np.ndarray:
    """Return the smallest integers that, times `factor`, are at least `threshold`.

    All that can be reached, from `least` to ``-least``, is above a result of `least`, and nothing
    above one of ``-least + 1``.
    """
    by = np.float64(factor)
    with np.errstate(over="ignore", invalid="ignore"):  # of a damaged file, NaN that signals
        wanted = threshold.astype(np.float64)
        found = np.ceil(np.clip(wanted / by, least, 1 - least))
    # A quotient is rounded. Products are not: 24 bits times 24 fit in a float64.
    found = np.where((found - 1) * by >= wanted, found - 1, found)
    found = np.where(found * by < wanted, found + 1, found)
    found = np.where(np.isnan(wanted), 1 - least, found)  # which nothing is at least
    return np.clip(found, least, 1 - least).astype(np.int64)
