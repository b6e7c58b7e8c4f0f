"""Layers with real weights or pixels as a GPU multiplies them, through integers.

Pixels of a byte meet digits of weights, on Hopper, and signs meet bit planes of weights; see
`cupybnn.deploy.digits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cupybnn.backends.cuda.byte_product import MOST_SIGNS, PixelProduct, PlaneProduct, runs_on
from cupybnn.backends.cuda.compiler import architecture
from cupybnn.backends.cuda.pixel_network import PixelNetworkLaunch
from cupybnn.backends.cuda.pixel_tiles import BitLayer, PixelLayer, RealEnd
from cupybnn.backends.cuda.resident import Weights
from cupybnn.backends.cuda.steps import MOST_STEPS
from cupybnn.backends.devices import CPU, Device, to_device
from cupybnn.deploy import digits
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PackedLayer
from cupybnn.packed import pack

__all__ = [
    "MOST_PLANE_UNITS",
    "PixelParts",
    "are_signs",
    "end_product",
    "pixel_launch",
    "plane_product",
    "resident_layers",
]

#: Units of a layer of real weights up to which signs meet their bit planes.
MOST_PLANE_UNITS = 64


@dataclass(frozen=True)
class PixelParts:
    """A first layer for pixels: what `cupybnn.deploy.digits.pixel_digits` returns."""

    digits: np.ndarray
    least: np.ndarray

    @classmethod
    def of(cls, layer: PackedLayer, inputs: InputSpec, device: Device) -> PixelParts | None:
        """Return the parts of a layer on a device; None if it is not one for pixels there."""
        wanted = inputs.pixel_max is not None and layer.threshold is not None
        wanted = wanted and layer.product != "bits" and layer.inputs <= digits.MOST_INPUTS
        if not wanted or not runs_on(architecture(device.index)):
            return None
        weight = to_device(layer.weight if layer.signs is None else layer.signs, CPU)
        if not np.isfinite(weight).all():
            return None
        if layer.signs is None:
            (whole, shift), count = digits.fixed_point(weight), 3
        else:
            whole, shift, count = weight.astype(np.int64), np.zeros(layer.units, np.int64), 1
        assert inputs.pixel_max is not None
        factor = np.float32(1.0 / inputs.pixel_max)
        threshold = to_device(layer.threshold, CPU)
        return cls(*digits.pixel_digits(whole, shift, threshold, factor, count))


def pixel_launch(
    parts: PixelParts, layers: Sequence[PackedLayer], device: Device
) -> PixelNetworkLaunch | None:
    """Return the one launch of a network, on the current device; None if there is none."""
    first, *hidden, last = layers
    if last.threshold is not None or len(last.steps) > MOST_STEPS or not are_signs(hidden):
        return None
    between = [
        BitLayer(_plus(y), to_device(y.threshold, CPU), to_device(y.flip, CPU)) for y in hidden
    ]
    end = RealEnd(_numbers(last), [(step.kind, step.by) for step in last.steps])
    begin = PixelLayer(parts.digits, parts.least, to_device(first.flip, CPU))
    try:
        return PixelNetworkLaunch([begin, *between, end], device.index)
    except ValueError:  # too wide, for example: the other ways take it
        return None


def _plus(layer: PackedLayer) -> np.ndarray:
    """Return which of a layer's weights are +1."""
    plus: np.ndarray = layer.weight.to_numpy().unpack(np.int8) > 0
    return plus


def _numbers(layer: PackedLayer) -> np.ndarray:
    """Return the weights of a layer, whose input are signs, as numbers."""
    if layer.product == "bits":
        return np.where(_plus(layer), np.float32(1), np.float32(-1))
    weight: np.ndarray = to_device(layer.weight if layer.signs is None else layer.signs, CPU)
    return weight


def are_signs(layers: Sequence[PackedLayer]) -> bool:
    """Whether layers are products of signs with a threshold."""
    return all(layer.product == "bits" and layer.threshold is not None for layer in layers)


def end_product(layer: PackedLayer) -> PlaneProduct | None:
    """Return the product of a last layer with signs for prepared launches; None if there is none.

    Weights that are signs have planes, too: then there is one way for all.
    """
    if layer.threshold is not None or len(layer.steps) > MOST_STEPS:
        return None
    return _planes(layer)


def plane_product(layer: PackedLayer) -> PlaneProduct | None:
    """Return the product of a real layer with signs, on the current device, or None."""
    return _planes(layer) if layer.product == "real" else None


def resident_layers(
    parts: PixelParts, pixels: PixelProduct, layers: Sequence[PackedLayer], device: Device
) -> list[Weights]:
    """Return the layers of a network that has an `end_product`, for a plan."""
    _, *hidden, last = layers
    whole = _whole(last)
    assert whole is not None
    steps = [(step.kind, step.by) for step in last.steps]
    index = device.index
    first = Weights.of_pixels(pixels.words, parts.digits, pixels.threshold, pixels.flip, index)
    between = [Weights.of_signs(y.weight, y.threshold, y.flip, index) for y in hidden]
    return [first, *between, Weights.of_end(*whole, steps, index)]


def _whole(layer: PackedLayer) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the weights of a layer whose inputs are signs as `digits.fixed_point`, or None."""
    if layer.units > MOST_PLANE_UNITS or layer.inputs > MOST_SIGNS:
        return None
    weight = _numbers(layer)
    if not np.isfinite(weight).all():
        return None
    whole, shift = digits.fixed_point(weight)
    if np.abs(shift).max(initial=0) > 126:  # steps that float32 does not have
        return None
    return whole, shift


def _planes(layer: PackedLayer) -> PlaneProduct | None:
    import cupy

    found = _whole(layer)
    if found is None:
        return None
    whole, shift = found
    signs = digits.sign_planes(whole)
    # Whole tiles of results are stored faster.
    padded = np.zeros((layer.inputs, -(-signs.shape[1] // 64) * 64), bool)
    padded[:, : signs.shape[1]] = signs
    return PlaneProduct(pack(cupy.asarray(padded), axis=-2), shift)
