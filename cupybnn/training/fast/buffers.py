"""The memory of a fused step, all of it taken once: a captured graph goes on using it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.backends.cuda import fused_arguments
from cupybnn.backends.cuda.blas import operand_dtype
from cupybnn.backends.cuda.packing import words_shape
from cupybnn.backends.devices import Device
from cupybnn.packed import PackedMatrix, pack, sign
from cupybnn.training.fast.plan import HiddenPlan, NetworkPlan

__all__ = ["Buffers", "HiddenBuffers"]


class HiddenBuffers:
    """What one hidden layer keeps from the forward pass for the backward pass.

    Attributes
    ----------
    plan : HiddenPlan
    layer : fused_arguments.Layer
        Product, dropout mask, batch norm.
    activations : fused_arguments.Activations
        Where the layer's activations go: to `dense`, `packed` and `mask`.
    dense : cupy.ndarray or None
        Activations in the operands' dtype, unless they are only packed.
    packed : PackedMatrix or None
        Activations that are packed.
    mask : cupy.ndarray or None
        Where the gradient passes, a bit each.
    weight : cupy.ndarray or None
        What dense products read as the weights: themselves, rounded, or their signs. None: the
        signs are only packed.
    packed_weight : PackedMatrix or None
    copied : bool
        Whether `weight` is other memory than the parameter's.
    """

    def __init__(
        self, plan: HiddenPlan, network: NetworkPlan, model: nn.Module, device: Device, pops: Any
    ) -> None:
        import cupy

        self.plan = plan
        shape = (network.batch, plan.units)
        real = operand_dtype(network.precision)
        drop = fused_arguments.DROP_NONE
        if network.keep_prob < 1:
            drop = fused_arguments.DROP_ACTIVATION if network.relu else fused_arguments.DROP_PRODUCT
        norm = None
        if network.batch_norm:
            batch_norm = getattr(model, f"bn{plan.number}")
            own = (cupy.empty(plan.units, np.float32) for _ in range(2))
            norm = (*own, batch_norm.gamma._data, batch_norm.beta._data)
        mask_shape = fused_arguments.mask_shape(*shape)
        self.layer = fused_arguments.Layer(
            cupy.empty(shape, plan.product_dtype),
            cupy.empty(mask_shape, np.uint32) if drop else None,
            norm,
            drop,
            network.keep_prob,
        )
        self.dense = self.packed = self.mask = None
        if plan.activation in ("packed_sign", "both_signs"):
            # Zeros stay where no row and no column is.
            words = cupy.zeros(words_shape(1, *shape), np.uint32)
            self.packed = PackedMatrix._of(words, pops, shape, -1, device)
        if plan.activation not in ("packed_sign", "none"):
            self.dense = cupy.empty(shape, real)
        if plan.activation != "none" and plan.gate == "mask":
            self.mask = cupy.empty(mask_shape, np.uint32)
        self.activations = fused_arguments.Activations(
            plan.activation, self.dense, self.packed, self.mask, plan.window
        )
        latent = getattr(model, f"fc{plan.number}").weight._data
        only_packed = plan.product == "xnor" and (plan.backward == "bits" or not network.roomy)
        self.copied = not only_packed and (plan.product != "dense" or real != latent.dtype)
        self.weight = latent
        if self.copied:
            self.weight = cupy.empty(latent.shape, real)
        elif only_packed:
            self.weight = None
        self.packed_weight = pack(latent, axis=-2) if plan.product == "xnor" else None
        self.refresh(latent)

    def refresh(self, latent: Any) -> None:
        """Make what products read anew from the latent weights."""
        import cupy

        if self.packed_weight is not None:
            packed = pack(latent, axis=-2)
            self.packed_weight.words[...] = packed.words
            self.packed_weight.popcounts[...] = packed.popcounts
        if not self.copied:
            return
        value = latent
        if self.plan.product != "dense":
            value = sign(latent)
        if self.weight.dtype == np.uint16:
            # To nearest even, on the bit patterns; a NaN stays one.
            bits = value.view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
            quiet = (bits >> 16) | np.uint32(0x40)
            value = cupy.where(cupy.isnan(value), quiet, rounded).astype(np.uint16)
        self.weight[...] = value


class Buffers:
    """Everything that a step writes beside parameters and optimiser state.

    Parameters
    ----------
    plan : NetworkPlan
    model : Module
    device : Device
    recorded : bool
        Whether someone looks at each gradient.

    Attributes
    ----------
    inputs : cupy.ndarray, shape (batch, features)
        Pixels as whole numbers, in the operands' dtype.
    of_inputs : cupy.ndarray or None
        The loss's gradient for them, up to a factor, where they are moved by it.
    labels : cupy.ndarray of int64, shape (batch,)
    logits : cupy.ndarray of float32, shape (batch, classes)
    of_logits : cupy.ndarray of float32, shape (batch, classes up to a multiple of 4)
        The loss's gradient for them.
    mean_loss, loss : cupy.ndarray of float32, shape (1,)
        Without and with the penalty.
    pops : cupy.ndarray of int32, shape (layers, batch)
        Popcounts of packed activations, to be cleared before each forward pass.
    hidden : list of HiddenBuffers
    gradients : dict of str to cupy.ndarray
        By the parameter's name. Those of hidden layers' weights, which dense products write, are in
        the operands' dtype, and where memory is spared all in `scratch`; those that are never
        stored are None.
    left : dict of str to cupy.ndarray
        Gradients in float32 that stay as they are until the next step; None for others.
    signs : cupy.ndarray, shape (batch, units), or None
        For activations that are only packed, where dense products read them: one layer's at a time
        are unpacked there.
    """

    def __init__(
        self, plan: NetworkPlan, model: nn.Module, device: Device, recorded: bool
    ) -> None:  # fmt: skip
        import cupy

        self._precision = plan.precision
        real = operand_dtype(plan.precision)
        self.inputs = cupy.empty((plan.batch, plan.features), real)
        self.of_inputs = cupy.empty_like(self.inputs) if plan.adversarial else None
        self.labels = cupy.empty(plan.batch, np.int64)
        self.logits = cupy.empty((plan.batch, plan.classes), np.float32)
        self.of_logits = cupy.zeros((plan.batch, -(-plan.classes // 4) * 4), np.float32)
        self.mean_loss = cupy.zeros(1, np.float32)
        self.loss = cupy.zeros(1, np.float32)
        self.pops = cupy.zeros((len(plan.hidden), plan.batch), np.int32)
        self.hidden = [
            HiddenBuffers(hidden, plan, model, device, pops)
            for hidden, pops in zip(plan.hidden, self.pops, strict=True)
        ]
        self._scratch = None
        if not plan.roomy:
            dense = [hidden for hidden in plan.hidden if hidden.backward == "dense"]
            size = max(hidden.inputs * hidden.units for hidden in dense)
            self._scratch = cupy.empty(size, real)
        products = {f"fc{hidden.number}.weight": hidden for hidden in plan.hidden}
        self.gradients, self.left = {}, {}
        for name, parameter in model.named_parameters():
            stays = True
            if name not in products:
                gradient = cupy.zeros(parameter.shape, np.float32)
            elif products[name].backward == "bits":
                gradient, stays = None, False
            elif plan.roomy:
                gradient = cupy.zeros(parameter.shape, real)
            else:
                gradient, stays = self.scratch(parameter.shape), False
            left = gradient if stays and gradient.dtype == np.float32 else None
            if left is None and recorded:
                left = cupy.zeros(parameter.shape, np.float32)
            self.gradients[name], self.left[name] = gradient, left
        units = plan.hidden[-1].units
        # Where elements are as large, a product's gradient takes its place.
        self._in_place = [h.layer.product.dtype.itemsize == real.itemsize for h in self.hidden]
        self._arriving = cupy.empty((plan.batch, units), real) if any(self._in_place) else None
        # Elsewhere it has a buffer, which two products read and which is written over when both are
        # done: two are enough, one for each layer saves waiting.
        count = self._in_place.count(False)
        count = count if plan.roomy else min(count, 2)
        self._gradients = [cupy.empty((plan.batch, units), real) for _ in range(count)]
        only_packed = [h.packed is not None and h.dense is None for h in self.hidden]
        self.signs = None
        if any(only_packed) and plan.hidden[-1].backward == "dense":
            # What arrived has been read by then.
            free = all(there for there, p in zip(self._in_place, only_packed, strict=True) if p)
            self.signs = self._arriving if free else cupy.empty((plan.batch, units), real)

    def scratch(self, shape: tuple[int, ...]) -> Any:
        """Return memory that layers share, for what one needs at a time of the weights' shape."""
        assert self._scratch is not None
        return self._scratch[: math.prod(shape)].reshape(shape)

    def gradient_of(self, number: int) -> tuple[int | None, Any]:
        """Return the buffer for the gradient of hidden product `number`, from 0.

        With the buffer's number; None for one that no other layer uses.
        """
        if self._in_place[number]:
            product = self.hidden[number].layer.product
            return None, product.view(operand_dtype(self._precision))
        which = self._in_place[:number].count(False) % len(self._gradients)
        return which, self._gradients[which]

    def arriving_at(self, number: int) -> Any:
        """Return the buffer for the gradient of the activations of hidden layer `number`."""
        return self._arriving if self._in_place[number] else self.gradient_of(number)[1]
