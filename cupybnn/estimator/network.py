"""The network of an estimator: the model that is trained, and the bits that predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.backends.devices import CPU, Device, device_of
from cupybnn.deploy import PackedNetwork, file
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PackedLayer
from cupybnn.estimator.examples import row_blocks
from cupybnn.estimator.scaling import Scaling
from cupybnn.packed import PackedMatrix, pack
from cupybnn.training.config import TrainConfig
from cupybnn.training.network import LayerMaker

__all__ = ["Predictor", "build_model", "packed_arrays"]


def build_model(
    config: TrainConfig, features: int, classes: int, sizes: Sequence[int]
) -> nn.Sequential:
    """Return an initialized network, on the CPU.

    Each hidden layer is product, batch norm, sign; all but the first have binary weights, and with
    ``config.first`` the first one, too. The last layer has real weights and signs as its input;
    with ``config.last`` binary weights, with batch norm after it.

    Parameters
    ----------
    config : TrainConfig
        With `binary`; its settings `ste`, `xnor`, `first`, `last`, `seed` and `dtype`.
    features, classes : int
    sizes : sequence of int
        Units of each hidden layer.
    """
    make = LayerMaker(config)
    layers: dict[str, nn.Module | None] = {}
    inputs = features
    for number, units in enumerate(sizes, 1):
        binary = number > 1 or config.first
        layers[f"fc{number}"] = make.linear(inputs, units, binary, number > 1)
        layers[f"bn{number}"] = make.batch_norm(units)
        layers[f"sign{number}"] = nn.Sign(make.quantizer())
        inputs = units
    layers["fcout"] = make.linear(inputs, classes, config.last, True)
    if config.last:
        layers["bnout"] = make.batch_norm(classes)
    return nn.Sequential(**{name: layer for name, layer in layers.items() if layer is not None})


def packed_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Return a trained model as arrays on the host: bits, thresholds, real weights.

    Parameters
    ----------
    model : Module
        With parameters in float32.
    """
    net = PackedNetwork.from_model(model).to(CPU)
    return file.to_arrays(net.layers, net.inputs, net.classes)


class Predictor:
    """Predictions of a packed network from unscaled inputs, on the device of the input.

    The first layer's product is one of real numbers. It is computed in float64, so that a hidden
    unit does not depend on how many examples are predicted together; the layers after it are exact.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        From `packed_arrays`.
    scaling : Scaling
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], scaling: Scaling) -> None:
        layers, self.inputs, _ = file.from_arrays(arrays)
        self.layers = tuple(layers)
        self.scaling = scaling
        self._on: dict[Device, tuple[tuple[PackedLayer, ...], Any]] = {}

    def logits(self, x: Any) -> Any:
        """Return the logits of unscaled inputs; float32, shape (examples, classes)."""

        def rest(signs: PackedMatrix, layers: Sequence[PackedLayer]) -> Any:
            for layer in layers:
                signs = layer(signs)
            return signs

        return self._by_blocks(x, rest, np.float32, self.layers[-1].units)

    def hidden(self, x: Any) -> Any:
        """Return the units of the last hidden layer, 1 for +1 and 0 for -1; uint8."""

        def rest(signs: PackedMatrix, layers: Sequence[PackedLayer]) -> Any:
            for layer in layers[:-1]:
                signs = layer(signs)
            return signs.unpack(np.int8) > 0

        return self._by_blocks(x, rest, np.uint8, self.layers[-1].inputs)

    def _by_blocks(self, x: Any, rest: Any, dtype: Any, width: int) -> Any:
        device = device_of(x)
        with device.scope():
            layers, weight = self._layers(device)
            out = device.xp.empty((len(x), width), dtype)
            mean, scale = (device.xp.asarray(a) for a in (self.scaling.mean, self.scaling.scale))
            first = layers[0]
            for place, part in row_blocks(x):
                part -= mean
                part /= scale
                signs = pack((part @ weight >= first.threshold) != first.flip)
                out[place] = rest(signs, layers[1:])
        return out

    def _layers(self, device: Device) -> tuple[tuple[PackedLayer, ...], Any]:
        """Return the layers on a device, and the weights of the first one in float64."""
        if device not in self._on:
            layers = tuple(layer.to(device) for layer in self.layers)
            self._on[device] = layers, _weight(layers[0]).astype(np.float64)
        return self._on[device]

    def network(
        self, classes: Any, pixel_max: float, image_shape: tuple[int, ...] | None
    ) -> PackedNetwork:
        """Return a network that takes unscaled whole numbers, on the CPU.

        The scaling becomes a part of the first layer. Binary weights stay so if all features have
        one scale. Floats are whole numbers divided by `pixel_max`.
        """
        first = self.layers[0]
        mean, scale = self.scaling.mean / pixel_max, self.scaling.scale / pixel_max
        weight = _weight(first).astype(np.float64)
        shift = (mean / scale) @ weight
        if first.binary and (scale == scale[0]).all():
            threshold = (first.threshold + shift) * scale[0]
            first = replace(first, threshold=threshold.astype(np.float32))
        else:
            first = PackedLayer(
                first.name,
                "real",
                (weight / scale[:, None]).astype(np.float32),
                (),
                (first.threshold + shift).astype(np.float32),
                first.flip,
            )
        spec = InputSpec(self.inputs.features, image_shape, pixel_max)
        return PackedNetwork((first, *self.layers[1:]), spec, classes)

    def coefficients(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return weights and intercepts of each layer, with thresholds and scales in them."""
        weights, intercepts = [], []
        for number, layer in enumerate(self.layers):
            weight = _weight(layer).astype(np.float64)
            intercept = np.zeros(layer.units)
            for step in layer.steps:
                if step.kind == "multiply":
                    weight, intercept = weight * step.by, intercept * step.by
                else:
                    intercept = intercept + step.by
            if layer.threshold is not None:
                side = np.where(layer.flip, -1.0, 1.0)
                # Sums of signs are integers: half a step from the threshold.
                half = 0.5 if layer.product == "bits" else 0.0
                weight, intercept = weight * side, side * (half - layer.threshold)
            if number == 0:
                weight = weight / self.scaling.scale[:, None]
                intercept = intercept - self.scaling.mean @ weight
            weights.append(weight)
            intercepts.append(intercept)
        return weights, intercepts


def _weight(layer: PackedLayer) -> Any:
    """Return a layer's weights as numbers."""
    if layer.signs is not None:
        return layer.signs
    return layer.weight.unpack(np.float32) if layer.binary else layer.weight
