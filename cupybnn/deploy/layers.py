"""The layers of a packed network: a product each, and what follows it in a few simple steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn import backends, nn
from cupybnn.backends.devices import Device, array_module, to_device
from cupybnn.packed import PackedMatrix, pack

__all__ = ["PRODUCTS", "STEPS", "PackedLayer", "Step", "apply_steps"]

#: What a product multiplies: numbers by real weights, numbers by signs, signs by signs.
PRODUCTS = ("real", "signs", "bits")
#: Steps on real results, an element at a time; each is monotone, rounded or not.
STEPS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "multiply": lambda xp, x, by: xp.multiply(x, by, out=x),
    "add": lambda xp, x, by: xp.add(x, by, out=x),
    "relu": lambda xp, x, by: xp.maximum(x, 0, out=x),
}


@dataclass(frozen=True)
class Step:
    """One step after a product.

    Attributes
    ----------
    kind : str
        A key of `STEPS`.
    by : array of float32, shape (units,), or None
        Factors or summands; None for "relu".
    """

    kind: str
    by: Any = None


def apply_steps(steps: Sequence[Step], x: Any) -> Any:
    """Return `x`, shape (..., units), float32, after the steps; it may be changed in place."""
    xp = array_module(x)
    # A unit may divide by 0 or overflow, as it did in training.
    with np.errstate(all="ignore"):
        for step in steps:
            x = STEPS[step.kind](xp, x, step.by)
    return x


@dataclass(frozen=True)
class PackedLayer:
    """A product and what follows it: steps, or a threshold that makes signs.

    Attributes
    ----------
    name : str
        Of the linear layer in the model.
    product : str
        One of `PRODUCTS`.
    weight : array of float32, shape (inputs, units), or PackedMatrix of that shape
        Real weights, or signs packed along the inputs.
    steps : tuple of Step
        For a layer without a threshold.
    threshold : array, shape (units,), or None
        The sign of a unit is +1 where ``(product >= threshold) != flip``. Of int32 for the product
        "bits", else of float32.
    flip : array of bool, shape (units,), or None
    signs : array of float32, shape (inputs, units), or None
        For the product "signs": the weights unpacked, made once.
    """

    name: str
    product: str
    weight: Any
    steps: tuple[Step, ...] = ()
    threshold: Any = None
    flip: Any = None
    signs: Any = None

    @property
    def inputs(self) -> int:
        """Size of an input."""
        return int(self.weight.shape[0])

    @property
    def units(self) -> int:
        """Size of a result."""
        return int(self.weight.shape[1])

    @property
    def binary(self) -> bool:
        """Whether the weights are signs."""
        return self.product != "real"

    def arrays(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, array) of what belongs to the layer; packed weights are left out."""
        if not self.binary:
            yield "weight", self.weight
        if self.threshold is not None:
            yield "threshold", self.threshold
            yield "flip", self.flip
        for i, step in enumerate(self.steps):
            if step.by is not None:
                yield f"step{i}", step.by

    def __call__(self, x: Any) -> Any:
        """Return what the layer makes of its input.

        Parameters
        ----------
        x : array of float32 or PackedMatrix, shape (batch, inputs)
            Packed for the product "bits".

        Returns
        -------
        PackedMatrix, shape (batch, units), packed along the units, if there is a threshold;
        otherwise an array of float32
        """
        if self.product == "bits":
            # To the backend itself: for a few inputs, checks would take as long as the product.
            backend, shape = backends.get(x.device), (x.shape[0], self.units)
            if self.threshold is not None:
                words, ones = backend.gemm_packed(x, self.weight, self.threshold, self.flip)
                return PackedMatrix._of(words, ones, shape, -1, x.device)
            y = x.device.xp.empty(shape, np.float32)
            backend.gemm(x, self.weight, y, None)
            return apply_steps(self.steps, y)
        if isinstance(x, PackedMatrix):
            x = x.unpack(np.float32)
        y = x @ (self.weight if self.signs is None else self.signs)
        if self.threshold is not None:
            return pack((y >= self.threshold) != self.flip)
        return apply_steps(self.steps, y)

    def row(self) -> nn.Row:
        """Return the layer's row of a summary."""
        weights, others = self.inputs * self.units, 0
        nbytes = -(-weights // 8) if self.binary else 4 * weights
        for name, array in self.arrays():
            if name != "weight":
                others += array.size
                nbytes += -(-array.size // 8) if name == "flip" else array.nbytes
        bits = self.product == "bits"
        return nn.Row(
            name=self.name,
            kind={"real": "real", "signs": "binary, real input", "bits": "binary"}[self.product],
            shape=(self.inputs, self.units),
            bits=1 if self.binary else 32,
            one_bit=weights if self.binary else 0,
            full=others + (0 if self.binary else weights),
            nbytes=nbytes,
            training_nbytes=4 * (weights + others),
            binary_products=weights if bits else 0,
            full_products=0 if bits else weights,
        )

    def to(self, device: Device) -> PackedLayer:
        """Return the layer with its arrays on a device."""

        def move(x: Any) -> Any:
            if isinstance(x, PackedMatrix):
                return x.to_numpy() if device.kind == "cpu" else x.to_cupy()
            return None if x is None else to_device(x, device)

        with device.scope():
            return PackedLayer(
                self.name,
                self.product,
                move(self.weight),
                tuple(Step(step.kind, move(step.by)) for step in self.steps),
                move(self.threshold),
                move(self.flip),
                move(self.signs),
            )
