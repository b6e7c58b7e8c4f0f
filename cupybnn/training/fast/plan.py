"""Which networks and settings the fused step can train, and what it must do for one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cupybnn import nn, ops, optim, settings
from cupybnn.backends.cuda import sign_gemm
from cupybnn.backends.cuda.blas import PRECISIONS, operand_dtype
from cupybnn.training.config import TrainConfig
from cupybnn.training.network import Perceptron

__all__ = ["HiddenPlan", "NetworkPlan", "exact_product_dtype", "obstacle"]

_MAX_CLASSES = 32
_MAX_ELEMENTS = 2**31 - 1
#: Bytes of a layer's activations up to which memory is not spared.
_ROOM = 32 << 20
#: Settings that the fused step follows, or that are judged or done outside of it.
_KNOWN = (
    "data_dir dataset log_dir n_hidden reg lr batch_size max_steps eval_every_n binary xnor "
    "batch_norm debug keep_prob first last restore device seed ste dtype validation hidden_layers "
    "input_keep_prob loss label_smoothing penalty optimizer momentum weight_decay lr_scale "
    "schedule final_lr warm_up fused graph latent_lr bop_rate bop_threshold milestones "
    "milestone_factor average average_decay average_from "
    "augment_shift augment_rotation augment_scale augment_shear adversarial"
)


@dataclass(frozen=True)
class HiddenPlan:
    """One hidden layer.

    Attributes
    ----------
    number : int
        From 1.
    inputs, units : int
    product : {"dense", "sign", "xnor"}
        "dense": real weights; "sign": a dense product with the signs of the weights; "xnor": a
        packed product.
    activation : {"packed_sign", "both_signs", "sign", "relu", "none"}
        What is stored for the next layer and the backward pass; "both_signs": packed for the one,
        dense for the other. Of the last layer nothing is: see `NetworkPlan.head`.
    backward : {"dense", "bits"}
        What the products of the backward pass read: the weights, and the activations of the layer
        before, as numbers or as their packed signs. By bits, weights are updated at once.
    gate : {"none", "mask", "clip"}
        How the gradient comes through the activation.
    window : float
        Half the width of the window of sign.
    product_dtype : dtype
        Of a packed product the smallest that holds every integer that can occur. Of real numbers
        that are rounded to bfloat16 the same, as uint16: it adds about as much to the rounding as
        the factors' does. Else float32.
    """

    number: int
    inputs: int
    units: int
    product: str
    activation: str
    backward: str
    gate: str
    window: float
    product_dtype: np.dtype


def exact_product_dtype(k: int) -> np.dtype:
    """Return the smallest dtype that holds each product of `k` signs by `k` signs.

    These are integers between -k and k that are odd or even as k is: float16 holds them up to 2048,
    and the even ones up to 4096; int16 up to 32767.
    """
    if k <= (4096 if k % 2 == 0 else 2048):
        return np.dtype(np.float16)
    return np.dtype(np.int16 if k < 2**15 else np.float32)


@dataclass(frozen=True)
class NetworkPlan:
    """What the fused step does for a network, from its settings and, as to bits, its device.

    Attributes
    ----------
    batch, features, classes : int
    hidden : tuple of HiddenPlan
    precision : {"float32", "tf32", "bfloat16"}
        Of dense products.
    batch_norm : bool
    relu : bool
        Full precision: dropout comes after ReLU. Otherwise before batch norm.
    head : {"relu", "none", "sign"}
        What the last layer reads: the last activation; "none": the last product, after batch norm.
    latent_gate : {"none", "window", "clip"}
        Pseudo-gradient of latent weights.
    augment : tuple of float
        Greatest shift, rotation, scale and shear of the images.
    adversarial : float
        How far inputs are moved against the network; 0: they are not.
    keep_prob, input_keep_prob : float
    roomy : bool
        Whether buffers are small enough not to be shared. Where they are not, a step goes one
        launch after the other: dense products then fill the GPU, and nothing runs beside them.
    """

    batch: int
    features: int
    classes: int
    hidden: tuple[HiddenPlan, ...]
    precision: str
    batch_norm: bool
    relu: bool
    head: str
    latent_gate: str
    augment: tuple[float, float, float, float]
    adversarial: float
    keep_prob: float
    input_keep_prob: float
    roomy: bool

    @classmethod
    def of(
        cls, config: TrainConfig, features: int, classes: int, device: int | None = None
    ) -> NetworkPlan:
        """Plan a network of `config` that `obstacle` has nothing against.

        `device` is the number of the CUDA device; without one nothing that only some have is used.
        """
        itemsize = operand_dtype(config.dtype).itemsize
        roomy = config.batch_size * config.n_hidden * itemsize <= _ROOM
        by_bits = device is not None and _backward_by_bits(config, device)
        hidden = tuple(
            _hidden(config, number, features, roomy, by_bits) for number in _numbers(config)
        )
        return cls(
            batch=config.batch_size,
            features=features,
            classes=classes,
            hidden=hidden,
            precision=config.dtype,
            batch_norm=config.batch_norm,
            relu=not config.binary,
            head="relu" if not config.binary else "sign" if config.last else "none",
            latent_gate=_gate(ops.get_quantizer(config.ste), "window"),
            augment=(
                config.augment_shift,
                config.augment_rotation,
                config.augment_scale,
                config.augment_shear,
            ),
            adversarial=config.adversarial,
            keep_prob=config.keep_prob,
            input_keep_prob=config.input_keep_prob,
            roomy=roomy,
        )


def _numbers(config: TrainConfig) -> Iterator[int]:
    return iter(range(1, config.hidden_layers + 1))


def _backward_by_bits(config: TrainConfig, device: int) -> bool:
    """Whether products between hidden layers go backward by bits."""
    if not (config.binary and config.xnor):
        return False
    batch, units = config.batch_size, config.n_hidden
    reason = sign_gemm.unsupported_reason(device, config.dtype, units, units)
    if reason is None and not sign_gemm.pays(device, batch, units, units):
        reason = "its products have fewer tiles than the device has multiprocessors"
    if settings.debug():
        way = "by bits" if reason is None else f"by dense products, since {reason}"
        print(f"cupybnn: backward pass of {units} units, {batch} examples: {way}", file=sys.stderr)
    return reason is None


def _hidden(
    config: TrainConfig, number: int, features: int, roomy: bool, by_bits: bool
) -> HiddenPlan:
    first, last = number == 1, number == config.hidden_layers
    inputs = features if first else config.n_hidden
    product, activation, gate = "dense", "relu", "mask"
    window = 0.0
    if config.binary:
        quantizer = ops.get_quantizer(config.ste)
        if not first:
            product = "xnor" if config.xnor else "sign"
        elif config.first:
            product = "sign"
        gate, activation = _gate(quantizer, "mask"), "none"
        window = quantizer.window or 0.0
        if not last:
            packed = "both_signs" if roomy and not by_bits else "packed_sign"
            activation = packed if config.xnor else "sign"
    kept = np.dtype(np.float32)
    if product == "xnor":
        kept = exact_product_dtype(inputs)
    elif product == "dense":
        kept = operand_dtype(config.dtype)
    return HiddenPlan(
        number=number,
        inputs=inputs,
        units=config.n_hidden,
        product=product,
        activation=activation,
        backward="bits" if by_bits and product == "xnor" else "dense",
        gate=gate,
        window=window,
        product_dtype=kept,
    )


def _gate(quantizer: ops.Quantizer, window: str) -> str:
    if isinstance(quantizer, ops.SteSign):
        return window
    return "clip" if isinstance(quantizer, ops.ClippedGrad) else "none"


def obstacle(
    config: TrainConfig, model: nn.Module, optimizer: optim.Optimizer, capability: int
) -> str | None:
    """Return why the fused step cannot train this, as the end of a sentence; None if it can.

    Parameters
    ----------
    config : TrainConfig
    model : Module
    optimizer : Optimizer
    capability : int
        Compute capability of the device, 90 for 9.0.
    """
    return next(_obstacles(config, model, optimizer, capability), None)


def _obstacles(
    config: TrainConfig, model: nn.Module, optimizer: Any, capability: int
) -> Iterator[str]:
    if type(model) is not Perceptron:
        yield "it knows only the network of the command line"
        return
    if config.dtype not in PRECISIONS:
        yield f"it has no {config.dtype}"
    elif capability < PRECISIONS[config.dtype]:
        least = PRECISIONS[config.dtype]
        yield (
            f"{config.dtype} needs compute capability {least // 10}.{least % 10}, and this device "
            f"has {capability // 10}.{capability % 10}"
        )
    if config.binary and config.first and not config.batch_norm:
        yield "without batch norm it takes the first layer with real weights"
    if config.binary:
        quantizer = ops.get_quantizer(config.ste)
        if type(quantizer) not in (ops.SteSign, ops.ClippedGrad, ops.IdentitySign):
            yield f"it does not know the pseudo-gradient {config.ste!r}"
    if type(optimizer) not in (optim.Adam, optim.AdamW):
        yield f"it does not know the optimiser {type(optimizer).__name__}"
    elif len(optimizer.groups) != 1:
        yield "it takes one group of parameters"
    # A list of what it knows: a setting that is new is refused until someone thinks of it here.
    for setting in fields(config):
        value = getattr(config, setting.name)
        if setting.name not in _KNOWN.split() and value != setting.default:
            yield f"it does not know the setting {setting.name!r}"
    if config.debug:
        yield "--debug looks at every operation"
    features, classes = next(_ends(model))
    if classes > _MAX_CLASSES:
        yield f"it takes up to {_MAX_CLASSES} classes"
    widest = max(features, config.n_hidden)
    if config.batch_size * widest > _MAX_ELEMENTS or config.n_hidden * widest > _MAX_ELEMENTS:
        yield "its kernels count elements in 32 bits"


def _ends(model: nn.Module) -> Iterator[tuple[int, int]]:
    shapes = [m.weight.shape for _, m in model.named_modules() if isinstance(m, nn.Linear)]
    yield shapes[0][0], shapes[-1][1]
