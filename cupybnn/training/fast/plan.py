"""How the fused step computes a model: its layers, and decisions that involve several of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cupybnn import nn, settings
from cupybnn.backends.cuda import plane_gemm, sign_gemm
from cupybnn.backends.cuda.blas import operand_dtype
from cupybnn.data import Augmentation
from cupybnn.training.config import TrainConfig
from cupybnn.training.fast.layers import (
    HeadPlan,
    HiddenPlan,
    Unsupported,
    grad_quantizer,
    plan_head,
    plan_hidden,
    plan_input,
)
from cupybnn.training.images import augmentation

__all__ = ["NetworkPlan"]

_MAX_CLASSES = 32
_MAX_ELEMENTS = 2**31 - 1
#: Keep a dense copy of a layer's activations alongside the packed signs up to this many bytes.
_DENSE_COPY_BYTES = 32 << 20


@dataclass(frozen=True)
class NetworkPlan:
    """How the fused step computes a model.

    Attributes
    ----------
    batch, features, classes : int
        `batch` is the number of images that this process has of a batch.
    first, whole : int
        Place of the first of them in the whole batch, and the number of images of that.
    precision : {"float32", "tf32", "bfloat16"}
        Precision of dense products.
    input_dropout : Dropout or None
    hidden : tuple of HiddenPlan
    head : HeadPlan
    augment : Augmentation
        How images are deformed.
    neighbors : int
        Among how many neighbors each image is moved; 0 if none is.
    adversarial : float
        How far each pixel is moved to increase the loss; 0 disables adversarial training.
    vat, vat_xi : float
        Distances of virtual adversarial training; 0 disables it.
    mix : {"none", "some", "uniform"}
        Which images are mixed in pairs.
    taught : bool
        Whether teachers' predictions are learned.
    keep_dense_copies : bool
        Whether buffers are small enough that each layer has its own. If not, layers share them and
        a step runs on one stream: dense products of that size fill the GPU anyway.
    """

    batch: int
    first: int
    whole: int
    features: int
    classes: int
    precision: str
    input_dropout: nn.Dropout | None
    hidden: tuple[HiddenPlan, ...]
    head: HeadPlan
    augment: Augmentation
    neighbors: int
    adversarial: float
    vat: float
    vat_xi: float
    mix: str
    taught: bool
    keep_dense_copies: bool

    @property
    def further(self) -> int:
        """Images needed beyond those of this process: mixing reads the one after the last."""
        return int(self.mix != "none" and self.batch < self.whole)

    @property
    def updates_together(self) -> bool:
        """Whether the first two hidden layers are updated together, at the end of the step.

        Otherwise the last update waits for that of the second layer, which begins shortly before
        it. Not possible if the layers' gradients share memory.
        """
        if len(self.hidden) < 2:
            return False
        return self.keep_dense_copies or self.hidden[1].updates

    @property
    def passes(self) -> int:
        """Number of passes through the network that are kept for the gradient."""
        return 2 if self.vat else 1

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: TrainConfig,
        device: int | None = None,
        rows: slice | None = None,
        most: int | None = None,
    ) -> NetworkPlan:
        """Plan the steps of a model.

        Parameters
        ----------
        model : Module
            A chain of layers; see `cupybnn.nn.Chain`.
        config : TrainConfig
            Its settings of the step; those of the network are ignored.
        device : int, optional
            Index of the CUDA device; without one, only features that every device has are used.
        rows : slice, optional
            The images of a batch that this process has, one of several; by default all.
        most : int, optional
            The greatest number of images that one of these processes has. It decides what all must
            do alike.

        Raises
        ------
        Unsupported
            If the kernels cannot compute the model.
        """
        first, last = (0, config.batch_size) if rows is None else (rows.start, rows.stop)
        batch = last - first
        chain = _chain(model)
        hidden = [plan_hidden(block, config.dtype) for block in chain.blocks[:-1]]
        if not hidden:
            raise Unsupported("the model has no hidden layer")
        if any(layer.nonlinearity == "none" for layer in hidden[:-1]):
            raise Unsupported("a hidden layer before the last has neither sign nor ReLU")
        for before, layer in zip([None, *hidden], hidden, strict=False):
            signs = before is not None and before.nonlinearity == "sign"
            if getattr(layer.linear, "binary_input", False) and not signs:
                raise Unsupported(f"the input of {layer.name} must be signs")
        head = plan_head(chain.blocks[-1], hidden[-1])
        widest = max(layer.units for layer in hidden)
        itemsize = operand_dtype(config.dtype).itemsize
        # Virtual adversarial training keeps two passes through the network until both have their
        # gradients, which one product then adds up: no layer can share its memory.
        rows_of_any = batch if most is None else most
        dense_copies = config.vat > 0 or rows_of_any * widest * itemsize <= _DENSE_COPY_BYTES
        hidden = _plan_backward(hidden, config, batch, device)
        following = [*hidden[1:], None]
        features, classes = hidden[0].inputs, head.linear.weight.shape[1]
        largest = max(features, widest)
        if classes > _MAX_CLASSES:
            raise Unsupported(f"more than {_MAX_CLASSES} classes are not supported")
        if max(batch, widest) * largest > _MAX_ELEMENTS:
            raise Unsupported("an array would have more than 2**31 - 1 elements")
        return cls(
            batch=batch,
            first=first,
            whole=config.batch_size,
            features=features,
            classes=classes,
            precision=config.dtype,
            input_dropout=plan_input(chain.inputs),
            hidden=tuple(
                replace(layer, activation=_stored_activation(layer, after, dense_copies))
                for layer, after in zip(hidden, following, strict=True)
            ),
            head=head,
            augment=augmentation(config),
            neighbors=config.neighbors if config.neighbor_noise else 0,
            adversarial=config.adversarial,
            vat=config.vat,
            vat_xi=config.vat_xi,
            mix=config.mix,
            taught=bool(config.teacher),
            keep_dense_copies=dense_copies,
        )


def _chain(model: nn.Module) -> nn.Chain:
    try:
        chain = nn.Chain.of(model)
    except ValueError:
        raise Unsupported("the model is not a chain of layers, an nn.Sequential") from None
    for name, parameter in model.named_parameters():
        if parameter.dtype != np.float32:
            raise Unsupported(f"{name} is in {parameter.dtype}, not float32")
        if not parameter.requires_grad:
            raise Unsupported(f"{name} has requires_grad=False")
    modules = [*chain.inputs, *(m for block in chain.blocks for m in (block.linear, *block.rest))]
    if len({id(module) for module in modules}) < len(modules):
        raise Unsupported("a layer occurs more than once in the model")
    for block in chain.blocks:
        if block.linear.bias is not None:
            raise Unsupported(f"{block.name} has a bias")
        if type(block.linear) not in (nn.Linear, nn.BinaryLinear):
            raise Unsupported(f"a {type(block.linear).__name__} layer is not supported")
    return chain


def _plan_backward(
    hidden: Sequence[HiddenPlan], config: TrainConfig, batch: int, device: int | None
) -> list[HiddenPlan]:
    """Decide which layers' backward products read packed signs."""
    planned = []
    for layer in hidden:
        backward = "dense"
        if grad_quantizer(layer.linear) is not None:
            backward = _plan_rounded(layer, config, batch, device)
        elif layer.product == "xnor" and device is not None:
            reason = sign_gemm.unsupported_reason(device, config.dtype, layer.inputs, layer.units)
            if reason is None and config.vat:
                reason = "one product adds up the gradients of two passes"
            how = "packed signs"
            backward = "bits"
            if reason is None and not sign_gemm.pays(device, batch, layer.inputs, layer.units):
                number = sign_gemm.parts(device, batch, layer.inputs, layer.units)
                backward, how = "parts", f"of weights by packed signs, {number} parts of the batch"
                if not number:
                    reason = "its products have fewer tiles than the device has multiprocessors"
            if reason is not None:
                backward, how = "dense", f"dense products, because {reason}"
            if settings.debug():
                print(
                    f"cupybnn: backward pass of {layer.name}, {layer.inputs} × {layer.units}, "
                    f"{batch} examples: {how}",
                    file=sys.stderr,
                )
        planned.append(replace(layer, backward=backward))
    return planned


def _plan_rounded(layer: HiddenPlan, config: TrainConfig, batch: int, device: int | None) -> str:
    """Return how the kernels compute the backward pass of a layer with rounded gradients."""
    if layer.product != "xnor":
        raise Unsupported(
            f"rounded gradients need packed products, as with xnor; {layer.name} has dense ones"
        )
    if config.vat:
        raise Unsupported("rounded gradients are not supported with two passes through the network")
    if device is None:
        return "planes"
    shape = layer.inputs, layer.units
    reason = sign_gemm.unsupported_layer(device, config.dtype, *shape)
    if reason is None and not plane_gemm.pays(device, batch, *shape):
        reason = "its products have fewer tiles than the device has multiprocessors"
    if settings.debug():
        how = "product" if reason is None else f"launch of its own, because {reason}"
        print(
            f"cupybnn: backward pass of {layer.name}: bit planes, the update by a {how}",
            file=sys.stderr,
        )
    return "fused_planes" if reason is None else "planes"


def _stored_activation(layer: HiddenPlan, following: HiddenPlan | None, dense_copies: bool) -> str:
    """Return how a layer's activations are stored."""
    if following is None:
        return "none"
    if following.product != "xnor":
        return layer.nonlinearity
    # The next product reads packed signs, the gradient of its weights dense ones.
    return "both_signs" if dense_copies and following.backward == "dense" else "packed_sign"
