"""The memory of a fused step, allocated once, because a captured graph keeps using it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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

__all__ = ["Buffers", "HiddenBuffers", "Pass", "rounded"]


#: Returns memory for a gradient of a given shape.
New = Callable[[tuple[int, ...]], Any]


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

    def __init__(
        self, plan: HiddenPlan, network: NetworkPlan, device: Device, pops: Any, new: New
    ) -> None:
        import cupy

        self.plan = plan
        self._device = device
        rows, batch = network.passes * network.batch, network.batch
        shape = (batch, plan.units)
        real = operand_dtype(network.precision)
        #: Products, and dense activations, of all passes, one after the other.
        self.products = cupy.empty((rows, plan.units), plan.product_dtype)
        self.all_dense = None
        if plan.activation not in ("packed_sign", "none"):
            self.all_dense = cupy.empty((rows, plan.units), real)
        self.layer = fused_layers.Layer(
            product=self.products[:batch],
            kept=cupy.empty(fused_layers.mask_shape(*shape), np.uint32) if plan.drop else None,
            norm=None if plan.norm is None else norm_arguments(plan.norm, new, statistics=True),
            drop=plan.drop,
            keep_prob=1.0 if plan.dropout is None else plan.dropout.keep_prob,
        )
        self._make_activations(0, pops)
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

    def _make_activations(self, number: int, pops: Any) -> None:
        """Make the memory for the activations of a pass."""
        import cupy

        plan, shape = self.plan, self.layer.shape
        self.dense = self.packed = self.mask = None
        if plan.activation in ("packed_sign", "both_signs"):
            # The padding beyond the last row and column stays zero.
            words = cupy.zeros(words_shape(1, *shape), np.uint32)
            self.packed = PackedMatrix._of(words, pops, shape, -1, self._device)
        if self.all_dense is not None:
            self.dense = self.all_dense[number * shape[0] : (number + 1) * shape[0]]
        if plan.activation != "none" and plan.gate == "mask":
            self.mask = cupy.empty(fused_layers.mask_shape(*shape), np.uint32)
        self.activations = fused_layers.Activations(
            output=plan.activation,
            dense=self.dense,
            packed=self.packed,
            gate=self.mask,
            window=plan.window,
        )

    def second_pass(self, pops: Any, new: New) -> HiddenBuffers:
        """Return the same layer with the memory of the second pass, which has the same dropout."""
        second, batch = copy.copy(self), self.layer.shape[0]
        norm = self.plan.norm
        second.layer = replace(
            self.layer,
            product=self.products[batch:],
            norm=None if norm is None else extra_norm(norm, new, statistics=True),
        )
        second._make_activations(1, pops)
        return second

    def refresh(self) -> None:
        """Recompute the copies of the latent weights that products read."""
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
            value = rounded(value)
        self.weight[...] = value


def rounded(value: Any) -> Any:
    """Return float32 numbers rounded to bfloat16, to nearest even; a NaN stays a NaN."""
    import cupy

    bits = value.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    quiet = (bits >> 16) | np.uint32(0x40)
    return cupy.where(cupy.isnan(value), quiet, near).astype(np.uint16)


def norm_arguments(
    norm: nn.BatchNorm, new: New, *, statistics: bool = False
) -> fused_layers.BatchNorm:
    """Return a batch norm as a kernel argument, with new memory for its gradients.

    Parameters
    ----------
    norm : BatchNorm
    new : callable
        Returns memory for a gradient of a given shape.
    statistics : bool
        Whether there is memory for the batch's statistics.
    """
    import cupy

    mean, inverse = (cupy.empty(norm.gamma.shape, np.float32) for _ in range(2))
    return fused_layers.BatchNorm(
        gamma=norm.gamma._data,
        beta=norm.beta._data,
        grad_gamma=new(norm.gamma.shape),
        grad_beta=new(norm.beta.shape),
        running_mean=norm.mean,
        running_variance=norm.variance,
        mean=mean if statistics else None,
        inverse=inverse if statistics else None,
        decay=norm.decay,
        eps=norm.eps,
    )


def extra_norm(norm: nn.BatchNorm, new: New, *, statistics: bool = False) -> fused_layers.BatchNorm:
    """Return `norm_arguments` for a pass that leaves the running statistics as they are."""
    return replace(norm_arguments(norm, new, statistics=statistics), decay=1.0)


class _SmallGradients:
    """The gradients of a layer that kernels write in float32, of all passes, to be added up.

    Parameters
    ----------
    passes : int
    shapes : sequence of tuple of int
        What `new` will be asked for in each pass.
    """

    def __init__(self, passes: int, shapes: Sequence[tuple[int, ...]]) -> None:
        import cupy

        self.memory = cupy.zeros((passes, sum(map(self._size, shapes))), np.float32)
        self._ends = [0] * passes

    @staticmethod
    def _size(shape: tuple[int, ...]) -> int:
        return -(-math.prod(shape) // 4) * 4  # kernels load four at a time

    def new(self, number: int, shape: tuple[int, ...]) -> Any:
        """Return memory of a pass that has not been given out yet."""
        start = self._ends[number]
        self._ends[number] += self._size(shape)
        return self.memory[number, start : start + math.prod(shape)].reshape(shape)

    def add_up(self) -> None:
        """Add the gradients of the second pass to those of the first."""
        import cupy

        first, second = self.memory
        cupy.add(first, second, out=first)  # of the same object: no copy


def _small_shapes(plan: NetworkPlan, i: int) -> list[tuple[int, ...]]:
    """Return the shapes of a hidden layer's small gradients; the last one has the head's, too."""
    norms = [plan.hidden[i].norm]
    shapes: list[tuple[int, ...]] = []
    if i == len(plan.hidden) - 1:
        norms.append(plan.head.norm)
        shapes += [plan.head.linear.weight.shape, (1,), (1,)]  # weights, factor, loss
    return shapes + [norm.gamma.shape for norm in norms if norm is not None for _ in range(2)]


@dataclass(frozen=True)
class Pass:
    """The memory of one pass through the network, forward and back.

    Attributes
    ----------
    number : int
    inputs : cupy.ndarray, shape (batch, features)
        Pixels as whole numbers, in the operands' dtype.
    hidden : list of HiddenBuffers
    logits : cupy.ndarray of float32, shape (batch, classes)
    logits_grad : cupy.ndarray of float32, shape (batch, classes up to a multiple of 4)
        The loss's gradient with respect to the logits.
    mean_loss : cupy.ndarray of float32, shape (1,)
        Without the penalty.
    pops : cupy.ndarray of int32, shape (layers, batch)
        Popcounts of packed activations, to be cleared before each forward pass.
    head_norm : fused_layers.BatchNorm or None
        Of the logits.
    head_gradients : dict of Parameter to cupy.ndarray
        Of the last layer's weights, and of its factor.
    """

    number: int
    inputs: Any
    hidden: list[HiddenBuffers]
    logits: Any
    logits_grad: Any
    mean_loss: Any
    pops: Any
    head_norm: fused_layers.BatchNorm | None
    head_gradients: dict[nn.Parameter, Any]

    def norm_gradients(self, plan: NetworkPlan) -> dict[nn.Parameter, Any]:
        """Return the gradients of the parameters of batch norms."""
        norms = [(h.plan.norm, h.layer.norm) for h in self.hidden]
        gradients = {}
        for module, arguments in [*norms, (plan.head.norm, self.head_norm)]:
            if module is not None and arguments is not None:
                gradients[module.gamma] = arguments.grad_gamma
                gradients[module.beta] = arguments.grad_beta
        return gradients


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
    passes : list of Pass
        Two with virtual adversarial training, else one. The attributes `inputs`, `hidden`,
        `logits`, `mean_loss` and `pops` are the first's.
    all_inputs : cupy.ndarray, shape (passes * batch, features)
        The inputs of all passes.
    gathered, undropped : cupy.ndarray, shape (batch, features)
        The images before they are mixed, and before pixels are dropped; `inputs` where nothing
        comes between.
    targets : cupy.ndarray of float32, shape (batch, classes), or None
        Class probabilities to be learned instead of labels.
    predictions : cupy.ndarray of float32, shape (batch, classes), or None
        Those of the first pass, for virtual adversarial training.
    input_grad : cupy.ndarray or None
        The loss's gradient with respect to the inputs, up to a factor, for adversarial training.
    labels : cupy.ndarray of int64, shape (batch,)
    loss : cupy.ndarray of float32, shape (1,)
        With the penalty.
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

        self._batch, self._features = plan.batch, plan.features
        self._real = real = operand_dtype(plan.precision)
        self.all_inputs = cupy.empty((plan.passes * plan.batch, plan.features), real)
        attacks = plan.adversarial or plan.vat
        self.input_grad = cupy.empty((plan.batch, plan.features), real) if attacks else None
        self.labels = cupy.empty(plan.batch, np.int64)
        self._small = [
            _SmallGradients(plan.passes, _small_shapes(plan, i)) for i in range(len(plan.hidden))
        ]
        first = self._make_pass(plan, 0, device, [])
        self.passes = [first]
        if plan.vat:
            self.passes.append(self._make_pass(plan, 1, device, first.hidden))
        self.inputs, self.hidden, self.logits = first.inputs, first.hidden, first.logits
        self.mean_loss, self.pops = first.mean_loss, first.pops
        self.loss = cupy.zeros(1, np.float32)
        soft = plan.taught or plan.mix != "none"
        self.targets = cupy.empty_like(self.logits) if soft else None
        self.predictions = cupy.empty_like(self.logits) if plan.vat else None
        self.undropped = self.inputs
        if soft and plan.input_dropout is not None:
            self.undropped = cupy.empty_like(self.inputs)
        self.gathered = self.undropped if plan.mix == "none" else cupy.empty_like(self.inputs)
        small_grads = {**first.norm_gradients(plan), **first.head_gradients}
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
            if parameter in small_grads:
                gradient = small_grads[parameter]
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
        rows = plan.passes * plan.batch * max(hidden.units for hidden in plan.hidden)
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

    def _make_pass(
        self, plan: NetworkPlan, number: int, device: Device, first: list[HiddenBuffers]
    ) -> Pass:
        """Make the memory of a pass; `first` are the first pass's layers, for the second."""
        import cupy

        pops = cupy.zeros((len(plan.hidden), plan.batch), np.int32)
        new = [partial(small.new, number) for small in self._small]
        if first:
            hidden = [h.second_pass(p, n) for h, p, n in zip(first, pops, new, strict=True)]
        else:
            layers = zip(plan.hidden, pops, new, strict=True)
            hidden = [HiddenBuffers(layer, plan, device, p, n) for layer, p, n in layers]
        head = plan.head
        arguments = extra_norm if number else norm_arguments
        trained = [head.linear.weight, *([] if head.scale is None else [head.scale.factor])]
        return Pass(
            number=number,
            inputs=self.all_inputs[number * plan.batch : (number + 1) * plan.batch],
            hidden=hidden,
            logits=cupy.empty((plan.batch, plan.classes), np.float32),
            logits_grad=cupy.zeros((plan.batch, -(-plan.classes // 4) * 4), np.float32),
            mean_loss=new[-1]((1,)),
            pops=pops,
            head_norm=None if head.norm is None else arguments(head.norm, new[-1]),
            head_gradients={p: new[-1](p.shape) for p in trained},
        )

    def _rows_of(self, memory: Any, number: int, which: int | None = 0) -> Any:
        """View shared memory as the rows of a pass in hidden layer `number`; None: of all."""
        units = self.hidden[number].plan.units
        if which is None:
            count = len(self.passes) * self._batch
            return memory[: count * units].reshape(count, units)
        first = which * self._batch * units
        return memory[first : first + self._batch * units].reshape(self._batch, units)

    def add_passes(self, number: int) -> None:
        """Add up the small gradients of all passes, of a hidden layer; of the head with the last.

        Products add up those of the hidden weights.
        """
        if len(self.passes) > 1:
            self._small[number].add_up()

    def weight_scratch(self, shape: tuple[int, ...]) -> Any:
        """Return shared memory of the shape of one layer's weights, used by one layer at a time."""
        assert self._weight_scratch is not None
        return self._weight_scratch[: math.prod(shape)].reshape(shape)

    def signs(self, number: int) -> Any:
        """Return shared memory for the unpacked signs of hidden layer `number`, counted from 0."""
        assert self._signs is not None
        return self._rows_of(self._signs, number)

    def product_grad(self, number: int, which: int | None = 0) -> tuple[int | None, Any]:
        """Return number and memory of the buffer for the gradient of a hidden layer's product.

        The number is None for a buffer that no other layer uses. Layers are counted from 0, and so
        are passes; None as `which`: the rows of all passes.
        """
        if self._in_place[number]:
            products = self.hidden[number].products
            if which is not None:
                products = self.passes[which].hidden[number].layer.product
            return None, products.view(self._real)
        buffer = self._in_place[:number].count(False) % len(self._gradients)
        return buffer, self._rows_of(self._gradients[buffer], number, which)

    def incoming_grad(self, number: int, which: int = 0) -> Any:
        """Return the buffer for the gradient of the activations of hidden layer `number`."""
        if self._in_place[number]:
            return self._rows_of(self._incoming, number, 0)
        return self.product_grad(number, which)[1]
