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
from cupybnn.training.fast.layers import HiddenPlan
from cupybnn.training.fast.plan import NetworkPlan

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

    def __init__(self, plan: HiddenPlan, network: NetworkPlan, device: Device, pops: Any) -> None:
        import cupy

        self.plan = plan
        shape = (network.batch, plan.units)
        real = operand_dtype(network.precision)
        norm = None
        if plan.norm is not None:
            own = (cupy.empty(plan.units, np.float32) for _ in range(2))
            norm = (*own, plan.norm.gamma._data, plan.norm.beta._data)
        mask_shape = fused_arguments.mask_shape(*shape)
        self.layer = fused_arguments.Layer(
            cupy.empty(shape, plan.product_dtype),
            cupy.empty(mask_shape, np.uint32) if plan.drop else None,
            norm,
            plan.drop,
            1.0 if plan.dropout is None else plan.dropout.keep_prob,
        )
        self.dense = self.packed = self.mask = None
        if plan.activation in ("packed_sign", "both_signs"):
            # Zeros stay where no row and no column is.
            words = cupy.zeros(words_shape(1, *shape), np.uint32)
            self.packed = PackedMatrix(words, pops, shape, -1, device)
        if plan.activation not in ("packed_sign", "none"):
            self.dense = cupy.empty(shape, real)
        if plan.activation != "none" and plan.gate == "mask":
            self.mask = cupy.empty(mask_shape, np.uint32)
        self.activations = fused_arguments.Activations(
            plan.activation, self.dense, self.packed, self.mask, plan.window
        )
        latent = plan.linear.weight._data
        dense_copy = network.keep_dense_copies and plan.backward == "dense"
        only_packed = plan.product == "xnor" and not dense_copy
        self.copied = not only_packed and (plan.product != "dense" or real != latent.dtype)
        self.weight = latent
        if self.copied:
            self.weight = cupy.empty(latent.shape, real)
        elif only_packed:
            self.weight = None
        self.packed_weight = pack(latent, axis=-2) if plan.product == "xnor" else None
        self.refresh()

    def refresh(self) -> None:
        """Compute what products read from the latent weights."""
        import cupy

        latent = self.plan.linear.weight._data
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
    input_grad : cupy.ndarray or None
        The loss's gradient for them, up to a factor, where they are moved by it.
    labels : cupy.ndarray of int64, shape (batch,)
    logits : cupy.ndarray of float32, shape (batch, classes)
    logits_grad : cupy.ndarray of float32, shape (batch, classes up to a multiple of 4)
        The loss's gradient for them.
    mean_loss, loss : cupy.ndarray of float32, shape (1,)
        Without and with the penalty.
    pops : cupy.ndarray of int32, shape (layers, batch)
        Popcounts of packed activations, to be cleared before each forward pass.
    hidden : list of HiddenBuffers
    gradients : dict of Parameter to cupy.ndarray
        Those of hidden layers' weights, which dense products write, are in the operands' dtype, and
        where memory is spared all in `weight_scratch`; those that are never stored are None.
    kept_grads : dict of Parameter to cupy.ndarray
        Gradients in float32 that stay as they are until the next step; None for others.

    Notes
    -----
    Memory that several layers share is safe to write again because all who use it follow one
    another on one stream. Where a second stream computes gradients of weights, no two layers share
    what it reads, except the gradients of products, which wait for an event; see `FusedStep`.
    """

    def __init__(
        self, plan: NetworkPlan, model: nn.Module, device: Device, recorded: bool
    ) -> None:  # fmt: skip
        import cupy

        self._batch = plan.batch
        self._real = real = operand_dtype(plan.precision)
        self.inputs = cupy.empty((plan.batch, plan.features), real)
        self.input_grad = cupy.empty_like(self.inputs) if plan.adversarial else None
        self.labels = cupy.empty(plan.batch, np.int64)
        self.logits = cupy.empty((plan.batch, plan.classes), np.float32)
        self.logits_grad = cupy.zeros((plan.batch, -(-plan.classes // 4) * 4), np.float32)
        self.mean_loss = cupy.zeros(1, np.float32)
        self.loss = cupy.zeros(1, np.float32)
        self.pops = cupy.zeros((len(plan.hidden), plan.batch), np.int32)
        self.hidden = [
            HiddenBuffers(hidden, plan, device, pops)
            for hidden, pops in zip(plan.hidden, self.pops, strict=True)
        ]
        self._weight_scratch = None
        if not plan.keep_dense_copies:
            dense = [hidden for hidden in plan.hidden if hidden.backward == "dense"]
            sizes = [hidden.inputs * hidden.units for hidden in dense]
            self._weight_scratch = cupy.empty(max(sizes), real)
        products = {hidden.linear.weight: hidden for hidden in plan.hidden}
        self.gradients: dict[nn.Parameter, Any] = {}
        self.kept_grads: dict[nn.Parameter, Any] = {}
        for parameter in model.parameters():
            stays = True
            if parameter not in products:
                gradient = cupy.zeros(parameter.shape, np.float32)
            elif products[parameter].backward == "bits":
                gradient, stays = None, False
            elif plan.keep_dense_copies:
                gradient = cupy.zeros(parameter.shape, real)
            else:
                gradient, stays = self.weight_scratch(parameter.shape), False
            kept = gradient if stays and gradient.dtype == np.float32 else None
            if kept is None and recorded:
                kept = cupy.zeros(parameter.shape, np.float32)
            self.gradients[parameter], self.kept_grads[parameter] = gradient, kept
        rows = plan.batch * max(hidden.units for hidden in plan.hidden)
        # Where elements are as large, a product's gradient takes its place.
        self._in_place = [h.layer.product.dtype.itemsize == real.itemsize for h in self.hidden]
        self._incoming = cupy.empty(rows, real) if any(self._in_place) else None
        # Elsewhere it has a buffer, which two products read and which is written over when both are
        # done: two are enough, one for each layer saves waiting.
        count = self._in_place.count(False)
        count = count if plan.keep_dense_copies else min(count, 2)
        self._gradients = [cupy.empty(rows, real) for _ in range(count)]
        unpacked = [
            i
            for i, (layer, following) in enumerate(zip(plan.hidden, plan.hidden[1:], strict=False))
            if layer.activation == "packed_sign" and following.backward == "dense"
        ]
        self._signs = None
        if unpacked:
            # The incoming gradient has been read by then.
            free = all(self._in_place[i] for i in unpacked)
            self._signs = self._incoming if free else cupy.empty(rows, real)

    def _rows_of(self, memory: Any, number: int) -> Any:
        """Return memory that layers share as a (batch, units) array of hidden layer `number`."""
        shape = (self._batch, self.hidden[number].plan.units)
        return memory[: math.prod(shape)].reshape(shape)

    def weight_scratch(self, shape: tuple[int, ...]) -> Any:
        """Return memory that layers share, for what one needs at a time of the weights' shape."""
        assert self._weight_scratch is not None
        return self._weight_scratch[: math.prod(shape)].reshape(shape)

    def signs(self, number: int) -> Any:
        """Return memory for the unpacked signs of hidden layer `number`, from 0, one at a time."""
        assert self._signs is not None
        return self._rows_of(self._signs, number)

    def product_grad(self, number: int) -> tuple[int | None, Any]:
        """Return the buffer for the gradient of hidden product `number`, from 0.

        With the buffer's number; None for one that no other layer uses.
        """
        if self._in_place[number]:
            product = self.hidden[number].layer.product
            return None, product.view(self._real)
        which = self._in_place[:number].count(False) % len(self._gradients)
        return which, self._rows_of(self._gradients[which], number)

    def incoming_grad(self, number: int) -> Any:
        """Return the buffer for the gradient of the activations of hidden layer `number`."""
        if self._in_place[number]:
            return self._rows_of(self._incoming, number)
        return self.product_grad(number)[1]
