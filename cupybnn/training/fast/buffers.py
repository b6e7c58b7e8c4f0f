"""The memory of a fused step, allocated once, because a captured graph keeps using it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.backends.cuda import fused_layers
from cupybnn.backends.cuda.blas import operand_dtype
from cupybnn.backends.cuda.packing import words_shape
from cupybnn.backends.devices import Device
from cupybnn.packed import PackedMatrix, pack, sign
from cupybnn.training.fast.layers import HiddenPlan
from cupybnn.training.fast.plan import NetworkPlan

__all__ = ["Buffers", "HiddenBuffers"]


class HiddenBuffers:
    """What a hidden layer keeps from the forward pass for the backward pass.

    Attributes
    ----------
    plan : HiddenPlan
    layer : fused_layers.Layer
        Product, dropout mask, batch norm.
    activations : fused_layers.Activations
        Where the layer's activations are written: `dense`, `packed` and `mask`.
    dense : cupy.ndarray or None
        Activations in the operands' dtype, unless they are only packed.
    packed : PackedMatrix or None
        Packed activations.
    mask : cupy.ndarray or None
        One bit per activation: whether the gradient passes.
    weight : cupy.ndarray or None
        The weights as dense products read them: unchanged, rounded, or as signs. None if the
        signs are only packed.
    packed_weight : PackedMatrix or None
    copied : bool
        Whether `weight` has memory of its own, separate from the parameter's.
    """

    def __init__(self, plan: HiddenPlan, network: NetworkPlan, device: Device, pops: Any) -> None:
        import cupy

        self.plan = plan
        shape = (network.batch, plan.units)
        real = operand_dtype(network.precision)
        statistics = (cupy.empty(plan.units, np.float32) for _ in range(2))
        mask_shape = fused_layers.mask_shape(*shape)
        self.layer = fused_layers.Layer(
            product=cupy.empty(shape, plan.product_dtype),
            kept=cupy.empty(mask_shape, np.uint32) if plan.drop else None,
            norm=None if plan.norm is None else norm_arguments(plan.norm, *statistics),
            drop=plan.drop,
            keep_prob=1.0 if plan.dropout is None else plan.dropout.keep_prob,
        )
        self.dense = self.packed = self.mask = None
        if plan.activation in ("packed_sign", "both_signs"):
            # The padding beyond the last row and column stays zero.
            words = cupy.zeros(words_shape(1, *shape), np.uint32)
            self.packed = PackedMatrix._of(words, pops, shape, -1, device)
        if plan.activation not in ("packed_sign", "none"):
            self.dense = cupy.empty(shape, real)
        if plan.activation != "none" and plan.gate == "mask":
            self.mask = cupy.empty(mask_shape, np.uint32)
        self.activations = fused_layers.Activations(
            output=plan.activation,
            dense=self.dense,
            packed=self.packed,
            gate=self.mask,
            window=plan.window,
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
        """Recompute the copies of the latent weights that products read."""
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
            # Round to nearest even, on the bit patterns; a NaN stays a NaN.
            bits = value.view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
            quiet = (bits >> 16) | np.uint32(0x40)
            value = cupy.where(cupy.isnan(value), quiet, rounded).astype(np.uint16)
        self.weight[...] = value


def norm_arguments(
    norm: nn.BatchNorm, mean: Any = None, inverse: Any = None
) -> fused_layers.BatchNorm:
    """Return a batch norm as a kernel argument, with new memory for its gradients.

    Parameters
    ----------
    norm : BatchNorm
    mean, inverse : cupy.ndarray of float32, shape (units,), or None
        Memory for the batch's statistics.
    """
    import cupy

    return fused_layers.BatchNorm(
        gamma=norm.gamma._data,
        beta=norm.beta._data,
        grad_gamma=cupy.zeros(norm.gamma.shape, np.float32),
        grad_beta=cupy.zeros(norm.beta.shape, np.float32),
        running_mean=norm.mean,
        running_variance=norm.variance,
        mean=mean,
        inverse=inverse,
        decay=norm.decay,
        eps=norm.eps,
    )


class Buffers:
    """Everything that a step writes other than parameters and optimiser state.

    Parameters
    ----------
    plan : NetworkPlan
    model : Module
    device : Device
    recorded : bool
        Whether every gradient is recorded.

    Attributes
    ----------
    inputs : cupy.ndarray, shape (batch, features)
        Pixels as whole numbers, in the operands' dtype.
    input_grad : cupy.ndarray or None
        The loss's gradient with respect to them, up to a factor, for adversarial training.
    labels : cupy.ndarray of int64, shape (batch,)
    logits : cupy.ndarray of float32, shape (batch, classes)
    logits_grad : cupy.ndarray of float32, shape (batch, classes up to a multiple of 4)
        The loss's gradient with respect to the logits.
    mean_loss, loss : cupy.ndarray of float32, shape (1,)
        Without and with the penalty.
    pops : cupy.ndarray of int32, shape (layers, batch)
        Popcounts of packed activations, to be cleared before each forward pass.
    hidden : list of HiddenBuffers
    head_norm : fused_layers.BatchNorm or None
        Of the logits.
    gradients : dict of Parameter to cupy.ndarray
        Hidden layers' weight gradients, which dense products write, are in the operands' dtype and,
        without `keep_dense_copies`, share `weight_scratch`. Gradients that are never stored are
        None.
    kept_grads : dict of Parameter to cupy.ndarray
        Gradients in float32 that are kept until the next step; None for others.

    Notes
    -----
    Layers can share memory because all kernels that use it run in order on one stream. If a second
    stream computes weight gradients, layers share nothing that it reads, except the gradients of
    products, which are guarded by events; see `Passes`.
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
        norm = plan.head.norm
        self.head_norm = None if norm is None else norm_arguments(norm)
        norms = [(h.plan.norm, h.layer.norm) for h in self.hidden]
        norms += [(norm, self.head_norm)]
        norm_grads = {}
        for module, arguments in norms:
            if module is not None and arguments is not None:
                norm_grads[module.gamma] = arguments.grad_gamma
                norm_grads[module.beta] = arguments.grad_beta
        self._weight_scratch = None
        if not plan.keep_dense_copies:
            dense = [hidden for hidden in plan.hidden if hidden.backward == "dense"]
            sizes = [hidden.inputs * hidden.units for hidden in dense]
            self._weight_scratch = cupy.empty(max(sizes), real)
        products = {hidden.linear.weight: hidden for hidden in plan.hidden}
        self.gradients: dict[nn.Parameter, Any] = {}
        self.kept_grads: dict[nn.Parameter, Any] = {}
        for parameter in model.parameters():
            keeps = True
            if parameter in norm_grads:
                gradient = norm_grads[parameter]
            elif parameter not in products:
                gradient = cupy.zeros(parameter.shape, np.float32)
            elif products[parameter].backward == "bits":
                gradient, keeps = None, False
            elif plan.keep_dense_copies:
                gradient = cupy.zeros(parameter.shape, real)
            else:
                gradient, keeps = self.weight_scratch(parameter.shape), False
            kept = gradient if keeps and gradient.dtype == np.float32 else None
            if kept is None and recorded:
                kept = cupy.zeros(parameter.shape, np.float32)
            self.gradients[parameter], self.kept_grads[parameter] = gradient, kept
        rows = plan.batch * max(hidden.units for hidden in plan.hidden)
        # If its elements have the same size, a product's gradient overwrites the product.
        self._in_place = [h.layer.product.dtype.itemsize == real.itemsize for h in self.hidden]
        self._incoming = cupy.empty(rows, real) if any(self._in_place) else None
        # Otherwise it has a buffer, which two products read and which can be overwritten when both
        # are done. Two buffers are enough; one for each layer avoids waiting.
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
            # By then the incoming gradient has been read.
            free = all(self._in_place[i] for i in unpacked)
            self._signs = self._incoming if free else cupy.empty(rows, real)

    def _rows_of(self, memory: Any, number: int) -> Any:
        """View shared memory as a (batch, units) array for hidden layer `number`."""
        shape = (self._batch, self.hidden[number].plan.units)
        return memory[: math.prod(shape)].reshape(shape)

    def weight_scratch(self, shape: tuple[int, ...]) -> Any:
        """Return shared memory of the shape of one layer's weights, used by one layer at a time."""
        assert self._weight_scratch is not None
        return self._weight_scratch[: math.prod(shape)].reshape(shape)

    def signs(self, number: int) -> Any:
        """Return shared memory for the unpacked signs of hidden layer `number`, counted from 0."""
        assert self._signs is not None
        return self._rows_of(self._signs, number)

    def product_grad(self, number: int) -> tuple[int | None, Any]:
        """Return number and memory of the buffer for the gradient of a hidden layer's product.

        The number is None for a buffer that no other layer uses. Layers are counted from 0.
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
