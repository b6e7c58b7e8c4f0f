"""The memory of a fused step, allocated once, because a captured graph keeps using it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.backends.cuda import fused_layers
from cupybnn.backends.cuda.blas import operand_dtype
from cupybnn.backends.cuda.structs import address
from cupybnn.backends.devices import Device
from cupybnn.training.fast.exchange import Exchange
from cupybnn.training.fast.hidden import (
    HiddenBuffers,
    SmallGradients,
    Whole,
    extra_norm,
    norm_arguments,
)
from cupybnn.training.fast.layers import grad_quantizer
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.fast.rounded import RoundedBackward

__all__ = ["Buffers", "Pass"]


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
    """Everything that a step writes other than parameters and optimizer state.

    Parameters
    ----------
    plan : NetworkPlan
    model : Module
    device : Device
    recorded : bool
        Whether every gradient is recorded.
    exchange : Exchange, optional
        With the other ranks of the run.
    sync : bool
        Whether batch norm is of the whole batch.

    Attributes
    ----------
    passes : list of Pass
        Two with virtual adversarial training, else one. The attributes `inputs`, `hidden`,
        `logits`, `mean_loss` and `pops` are the first's.
    all_inputs : cupy.ndarray, shape (passes * batch, features)
        The inputs of all passes.
    gathered, undropped : cupy.ndarray, shape (batch, features)
        The images before they are mixed, and before pixels are dropped; `inputs` where nothing
        comes between. `gathered` and `all_labels` have the plan's `further` images, too.
    moved, moved_labels, places : cupy.ndarray or None
        Where images are moved among their neighbors: these, uint8 of shape (batch, features), their
        labels, and their indices, which count them. Of as many images as `gathered`.
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
        Hidden layers' weight gradients, which products write, are in the operands' dtype and,
        without `keep_dense_copies`, share `weight_scratch`. Gradients that are never stored are
        None. With an `exchange`, they are those of this rank.
    sums : dict of Parameter to cupy.ndarray
        The gradients over all ranks; of a weight that is shared out, the share's rows.
    vote, votes : cupy.ndarray of float32, shape (1,)
        With other ranks: greater than 0 if this one is to stop, and the sum over all.
    kept_grads : dict of Parameter to cupy.ndarray
        Gradients in float32 that are kept until the next step; None for others.

    Notes
    -----
    Layers can share memory because all kernels that use it run in order on one stream. If a second
    stream computes weight gradients, layers share nothing that it reads, except the gradients of
    products, which are guarded by events; see `Passes`.
    """

    def __init__(
        self,
        plan: NetworkPlan,
        model: nn.Module,
        device: Device,
        recorded: bool,
        exchange: Exchange | None = None,
        sync: bool = False,
    ) -> None:
        import cupy

        self.exchange = exchange
        self._whole = None
        if exchange is not None and sync:
            self._whole = Whole(plan.whole, exchange.add_up)

        self._batch, self._features = plan.batch, plan.features
        self._real = real = operand_dtype(plan.precision)
        self.all_inputs = cupy.empty((plan.passes * plan.batch, plan.features), real)
        attacks = plan.adversarial or plan.vat
        self.input_grad = cupy.empty((plan.batch, plan.features), real) if attacks else None
        self.all_labels = cupy.empty(plan.batch + plan.further, np.int64)
        self.labels = self.all_labels[: plan.batch]
        shapes = [_small_shapes(plan, i) for i in range(len(plan.hidden))]
        ends = np.cumsum([0, *(SmallGradients.size(each) for each in shapes), 4]).tolist()
        #: Small gradients and the loss of each pass, and the vote.
        if exchange is None:
            self._all_small = cupy.zeros((plan.passes, ends[-1]), np.float32)
            self._total = self._all_small[0]
        else:
            self._all_small, self._total = exchange.allocate(plan.passes, ends[-1])
        self._small = [
            SmallGradients(self._all_small[:, a:b]) for a, b in itertools.pairwise(ends[:-1])
        ]
        first = self._make_pass(plan, 0, device, [])
        self.passes = [first]
        if plan.vat:
            self.passes.append(self._make_pass(plan, 1, device, first.hidden))
        self.inputs, self.hidden, self.logits = first.inputs, first.hidden, first.logits
        self.mean_loss, self.pops = first.mean_loss, first.pops
        self.loss = cupy.zeros(1, np.float32)
        self.moved = self.moved_labels = self.places = None
        if plan.neighbors:
            count = plan.batch + plan.further
            self.moved = cupy.empty((count, plan.features), np.uint8)
            self.moved_labels = cupy.empty(count, np.int64)
            self.places = cupy.asarray(np.arange(count, dtype=np.int32)[None])
        soft = plan.taught or plan.mix != "none"
        self.targets = cupy.empty_like(self.logits) if soft else None
        self.predictions = cupy.empty_like(self.logits) if plan.vat else None
        self.undropped = self.inputs
        if soft and plan.input_dropout is not None:
            self.undropped = cupy.empty_like(self.inputs)
        self.gathered = self.undropped
        if plan.mix != "none":
            self.gathered = cupy.empty((plan.batch + plan.further, plan.features), real)
        both = self._all_small[0], self._total
        self.vote, self.votes = (each[ends[-2] :][:1] for each in both)
        small_grads = {**first.norm_gradients(plan), **first.head_gradients}
        self._weight_scratch = None
        if not plan.keep_dense_copies:
            dense = [hidden for hidden in plan.hidden if not hidden.updates]
            sizes = [hidden.inputs * hidden.units for hidden in dense]
            self._weight_scratch = cupy.empty(max(sizes), real)
        products = {hidden.linear.weight: hidden for hidden in plan.hidden}
        self.gradients: dict[nn.Parameter, Any] = {}
        self.sums: dict[nn.Parameter, Any] = {}
        self.kept_grads: dict[nn.Parameter, Any] = {}
        for parameter in model.parameters():
            keeps = True
            if parameter in small_grads:
                gradient = small_grads[parameter]
            elif exchange is not None:
                gradient = exchange.gradient(parameter)
            elif products[parameter].updates:
                gradient, keeps = None, False
            elif plan.keep_dense_copies:
                gradient = cupy.zeros(parameter.shape, real)
            else:
                gradient, keeps = self.weight_scratch(parameter.shape), False
            total = gradient
            if exchange is not None:
                total = self._sum_of(exchange, parameter, small_grads.get(parameter))
                keeps = parameter not in exchange.shared
            kept = total if keeps and total.dtype == np.float32 else None
            if kept is None and recorded:
                kept = cupy.zeros(parameter.shape if total is None else total.shape, np.float32)
            self.gradients[parameter], self.sums[parameter] = gradient, total
            self.kept_grads[parameter] = kept
        rows = plan.batch * max(hidden.units for hidden in plan.hidden)
        # If its elements have the same size, a product's gradient overwrites the product.
        self._in_place = [h.layer.product.dtype.itemsize == real.itemsize for h in self.hidden]
        # One for each pass, because two passes may go back at a time, in layers of different width.
        passes = plan.passes if any(self._in_place) else 0
        self._incoming = [cupy.empty(rows, real) for _ in range(passes)]
        # Otherwise it has a buffer, which two products read and which can be overwritten when both
        # are done. Two buffers are enough; one for each layer avoids waiting.
        count = self._in_place.count(False)
        count = count if plan.keep_dense_copies else min(count, 2)
        self._gradients = [cupy.empty(plan.passes * rows, real) for _ in range(count)]
        unpacked = [
            i
            for i, (layer, following) in enumerate(zip(plan.hidden, plan.hidden[1:], strict=False))
            if layer.activation == "packed_sign" and following.backward == "dense"
        ]
        #: The backward passes of layers whose gradient is rounded, by number, counted from 0.
        self.rounded = {
            i: self._make_rounded(i, device, plan.first)
            for i, layer in enumerate(plan.hidden)
            if layer.rounded
        }
        self._signs = None
        if unpacked:
            # By then the incoming gradient has been read.
            free = all(self._in_place[i] for i in unpacked)
            self._signs = self._incoming[0] if free else cupy.empty(rows, real)

    @property
    def clusters(self) -> bool:
        """Whether kernels that sum over rows may go on; no if ranks add their sums up first."""
        return self._whole is None

    def total_of(self, small: Any) -> Any:
        """Return the sum over all ranks of a small gradient, or of the loss, of the first pass."""
        start = (address(small) - address(self._all_small)) // small.itemsize
        return self._total[start : start + small.size].reshape(small.shape)

    def _sum_of(self, exchange: Exchange, parameter: nn.Parameter, small: Any) -> Any:
        """Return the sum over all ranks of a parameter's gradient, or the share's rows of it."""
        if small is None:
            return exchange.sum_of(parameter)
        total = self.total_of(small)
        return exchange.rows_of(parameter, total) if parameter in exchange.shared else total

    def _make_pass(
        self, plan: NetworkPlan, number: int, device: Device, first: list[HiddenBuffers]
    ) -> Pass:
        """Make the memory of a pass; `first` are the first pass's layers, for the second."""
        import cupy

        pops = cupy.zeros((len(plan.hidden), plan.batch), np.int32)
        new = [partial(small.new, number) for small in self._small]
        if first:
            hidden = [
                h.second_pass(p, n, self._whole) for h, p, n in zip(first, pops, new, strict=True)
            ]
        else:
            layers = zip(plan.hidden, pops, new, strict=True)
            hidden = [
                HiddenBuffers(layer, plan, device, p, n, self._whole) for layer, p, n in layers
            ]
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
            head_norm=None
            if head.norm is None
            else arguments(head.norm, new[-1], whole=self._whole),
            head_gradients={p: new[-1](p.shape) for p in trained},
        )

    def _make_rounded(self, number: int, device: Device, first: int) -> RoundedBackward:
        hidden = self.hidden[number]
        linear, inputs = hidden.plan.linear, self.hidden[number - 1].packed
        quantizer = grad_quantizer(linear)
        assert quantizer is not None
        assert inputs is not None
        assert hidden.packed_weight is not None
        return RoundedBackward(
            quantizer.bits, inputs, hidden.packed_weight, self.incoming_grad(number - 1),
            self.gradients[linear.weight], device, hopper=hidden.plan.updates, first=first,
        )  # fmt: skip

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
            return self._rows_of(self._incoming[which], number)
        return self.product_grad(number, which)[1]
