"""From a trained model to the layers of a packed network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.backends.devices import CPU, to_device
from cupybnn.backends.interop import type_name
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PackedLayer, Step
from cupybnn.deploy.thresholds import integer_threshold, real_threshold
from cupybnn.packed import pack
from cupybnn.training.saved import DataDescription

__all__ = ["packed_layers", "packed_model"]

#: Layers that do nothing to a matrix of inputs outside of training.
_IN_TRAINING = (nn.Dropout, nn.Flatten, nn.Identity)


def packed_model(
    model: nn.Module,
    pixel_max: float | None,
    image_shape: tuple[int, ...] | None,
    classes: Iterable[Any] | None,
) -> tuple[tuple[PackedLayer, ...], InputSpec, list[Any] | None]:
    """Return the layers of a model, on the CPU, its inputs, and the names of its classes.

    The parameters are those of `cupybnn.PackedNetwork.from_model`; what is None is taken from what
    the model was trained on, if it knows that.

    Raises
    ------
    TypeError
        If `model` is not a Module.
    ValueError
        If a layer cannot be packed; the message names it. If the image shape does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"The 'model' of PackedNetwork.from_model must be a cupybnn.nn.Module; got "
            f"{type_name(model)}. Of a training result, pass result.model; for a run folder there "
            f"is from_run, for PyTorch from_torch, and for an estimator its method to_packed."
        )
    known: DataDescription | None = vars(model).get("trained_on")
    if known is not None:
        pixel_max = known.pixel_max if pixel_max is None else pixel_max
        image_shape = known.image_shape if image_shape is None else image_shape
        classes = known.class_names if classes is None else classes
    layers = packed_layers(model)
    inputs = InputSpec(layers[0].inputs, image_shape, pixel_max)
    if image_shape is not None and np.prod(image_shape) != inputs.features:
        raise ValueError(
            f"The 'image_shape' must have {inputs.features} pixels, as many as the model has "
            f"inputs; got {image_shape}."
        )
    return layers, inputs, None if classes is None else list(classes)


def packed_layers(model: nn.Module) -> tuple[PackedLayer, ...]:
    """Return the layers of a model, on the CPU.

    Parameters
    ----------
    model : Module
        A chain of layers; see `cupybnn.nn.Chain`. What acts in training alone is left out.

    Raises
    ------
    ValueError
        If a layer cannot be packed; the message names it.
    """
    chain = nn.Chain.of(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype != np.float32:
            raise ValueError(
                f"A packed network must be made of parameters in float32; got {name} in "
                f"{parameter.dtype}."
            )
    _only_in_training("the input", chain.inputs)
    layers: list[PackedLayer] = []
    for block in chain.blocks:
        layers.append(_layer(block, from_signs=bool(layers) and layers[-1].threshold is not None))
    if layers[-1].threshold is not None:
        raise ValueError(
            f"A packed network must end with numbers, its logits; got the sign after "
            f"{layers[-1].name}."
        )
    return tuple(layers)


def _only_in_training(place: str, modules: Sequence[nn.Module]) -> None:
    for module in modules:
        if not isinstance(module, _IN_TRAINING):
            raise _cannot(place, module)


def _cannot(place: str, module: nn.Module) -> ValueError:
    return ValueError(
        f"A packed network must be a chain of linear layers, batch norm, scales, ReLU, signs and "
        f"dropout; got {type(module).__name__} after {place}, which cannot be packed."
    )


def _layer(block: nn.Block, from_signs: bool) -> PackedLayer:
    linear, weight = block.linear, _host(block.linear.weight)
    product, steps = "real", []
    if isinstance(linear, nn.BinaryLinear):
        product = "bits" if linear.binary_input else "signs"
        if linear.binary_input and not from_signs:
            raise ValueError(
                f"The input of {block.name} must be signs, because the layer was trained with "
                f"binary_input=True; got numbers. Put a Sign layer before it."
            )
        scale = linear.quantizer.scale(weight)
        if scale is not None:
            steps.append(Step("multiply", _row(scale, linear)))
    if linear.bias is not None:
        steps.append(Step("add", _host(linear.bias)))
    rest = list(block.rest)
    while rest and not isinstance(rest[0], nn.Sign):
        steps += _steps(block.name, rest.pop(0), linear)
    kept: Any = weight if product == "real" else pack(weight, axis=-2)
    signs = None
    if product == "signs":
        signs = np.where(weight >= 0, np.float32(1), np.float32(-1))
    if not rest:
        return PackedLayer(block.name, product, kept, tuple(steps), signs=signs)
    _only_in_training(f"the sign of {block.name}", rest[1:])
    fold = integer_threshold if product == "bits" else real_threshold
    threshold, flip = fold(steps, weight.shape[1])
    return PackedLayer(block.name, product, kept, (), threshold, flip, signs)


def _steps(place: str, module: nn.Module, linear: nn.Linear) -> list[Step]:
    """Return what a module does outside of training, in the numbers that it computes with."""
    if isinstance(module, nn.BatchNorm):
        gamma, beta = _host(module.gamma), _host(module.beta)
        mean, variance = to_device(module.mean, CPU), to_device(module.variance, CPU)
        with np.errstate(all="ignore"):
            # As `ops.batch_norm` has it, rounding for rounding.
            scale = gamma * (1 / np.sqrt(variance + module.eps))
            return [Step("multiply", scale), Step("add", beta - mean * scale)]
    if isinstance(module, nn.Scale):
        return [Step("multiply", _row(_host(module.factor), linear))]
    if isinstance(module, nn.ReLU):
        return [Step("relu")]
    if isinstance(module, _IN_TRAINING):
        return []
    raise _cannot(place, module)


def _host(parameter: nn.Parameter) -> np.ndarray:
    return np.array(to_device(parameter._data, CPU))


def _row(values: Any, linear: nn.Linear) -> np.ndarray:
    """Return one number for each unit."""
    flat = np.asarray(values, np.float32).reshape(-1)
    return np.ascontiguousarray(np.broadcast_to(flat, linear.weight.shape[1:]))
