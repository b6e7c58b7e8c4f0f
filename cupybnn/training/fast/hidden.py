"""The memory of a hidden layer in a fused step, and of the gradients that kernels write."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

__all__ = [
    "HiddenBuffers",
    "SmallGradients",
    "Whole",
    "extra_norm",
    "norm_arguments",
    "rounded",
]

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
        self,
        plan: HiddenPlan,
        network: NetworkPlan,
        device: Device,
        pops: Any,
        new: New,
        whole: Whole | None,
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
            norm=None
            if plan.norm is None
            else norm_arguments(plan.norm, new, statistics=True, whole=whole),
            drop=plan.drop,
            keep_prob=1.0 if plan.dropout is None else plan.dropout.keep_prob,
        )
        self._make_activations(0, pops)
        latent = plan.linear.weight._data
        dense_copy = network.keep_dense_copies and plan.backward in ("dense", "parts")
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

    def second_pass(self, pops: Any, new: New, whole: Whole | None) -> HiddenBuffers:
        """Return the same layer with the memory of the second pass, which has the same dropout."""
        second, batch = copy.copy(self), self.layer.shape[0]
        norm = self.plan.norm
        second.layer = replace(
            self.layer,
            product=self.products[batch:],
            norm=None if norm is None else extra_norm(norm, new, statistics=True, whole=whole),
        )
        second._make_activations(1, pops)
        return second

    def copies(self) -> dict[str, Any]:
        """Return the copies of the weights that products read, by name."""
        found = {}
        if self.packed_weight is not None:
            found[f"packed signs of {self.plan.name}"] = self.packed_weight.words
            found[f"popcounts of {self.plan.name}"] = self.packed_weight.popcounts
        if self.copied:
            found[f"copy of {self.plan.name}.weight"] = self.weight
        return found

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
    norm: nn.BatchNorm,
    new: New,
    *,
    statistics: bool = False,
    whole: Whole | None = None,
) -> fused_layers.BatchNorm:
    """Return a batch norm as a kernel argument, with new memory for its gradients.

    Parameters
    ----------
    norm : BatchNorm
    new : callable
        Returns memory for a gradient of a given shape.
    statistics : bool
        Whether there is memory for the batch's statistics.
    whole : Whole, optional
        If the batch has rows on other ranks.
    """
    import cupy

    mean, inverse = (cupy.empty(norm.gamma.shape, np.float32) for _ in range(2))
    columns = norm.gamma.size
    both = new((2, -(-columns // 4) * 4))  # kernels load four at a time
    return fused_layers.BatchNorm(
        gamma=norm.gamma._data,
        beta=norm.beta._data,
        grad_gamma=both[0, :columns],
        grad_beta=both[1, :columns],
        running_mean=norm.mean,
        running_variance=norm.variance,
        mean=mean if statistics else None,
        inverse=inverse if statistics else None,
        decay=norm.decay,
        eps=norm.eps,
        whole=None if whole is None else whole.of(both, columns),
    )


def extra_norm(norm: nn.BatchNorm, new: New, **options: Any) -> fused_layers.BatchNorm:
    """Return `norm_arguments` for a pass that leaves the running statistics as they are."""
    return replace(norm_arguments(norm, new, **options), decay=1.0)


@dataclass(frozen=True)
class Whole:
    """How batch norm adds up over the ranks of a run.

    Attributes
    ----------
    rows : int
        Of the whole batch.
    add_up : callable
        Writes the sum over all ranks of its first argument into the second.
    """

    rows: int
    add_up: Callable[[Any, Any], None]

    def of(self, both: Any, columns: int) -> fused_layers.WholeBatch:
        """Return what a batch norm needs; `both` has its gradients on this rank."""
        import cupy

        return fused_layers.WholeBatch(
            rows=self.rows,
            sums=cupy.empty((2, columns), np.float64),
            mine=both,
            gradients=cupy.empty_like(both),
            add_up=self.add_up,
        )


class SmallGradients:
    """The gradients of a layer that kernels write in float32, of all passes, to be added up.

    Parameters
    ----------
    memory : cupy.ndarray of float32, shape (passes, n)
        With n from `size`.
    """

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self._ends = [0] * len(memory)

    @classmethod
    def size(cls, shapes: Sequence[tuple[int, ...]]) -> int:
        """Return the memory for what `new` will be asked for in each pass."""
        return sum(map(cls._size, shapes))

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
