"""Launching the fused kernels of a training step: one method a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import Defines, architecture, load_kernel

__all__ = [
    "DROP_ACTIVATION",
    "DROP_NONE",
    "DROP_PRODUCT",
    "GATES",
    "HEADS",
    "LOSSES",
    "OUTPUTS",
    "Activations",
    "Deformation",
    "Draw",
    "Launcher",
    "Layer",
    "address",
    "mask_shape",
]

# As training.cuh and the kernels name them.
DROP_NONE, DROP_PRODUCT, DROP_ACTIVATION = range(3)
GATES = {"none": 0, "mask": 1, "clip": 2}
LOSSES = {"cross_entropy": 0, "squared_hinge": 1}
OUTPUTS = {"packed_sign": 0, "sign": 1, "relu": 2, "none": 3}
HEADS = {"none": 0, "relu": 1, "sign": 2}

_THREADS, _WARPS = 256, 8
_REAL = {"float32": "float", "uint16": "bfloat16_bits"}
_PRODUCT = {"float32": "float", "float16": "float16_bits"}

_LAYER = np.dtype((np.void, 8 * 10))  # struct Layer of training.cuh
_ACTIVATIONS = np.dtype((np.void, 8 * 5))  # struct Activations of smxx_activation.cu
_BACK = np.dtype((np.void, 8 * 8))  # struct Back of smxx_head.cu
_BATCH = np.dtype((np.void, 8 * 14))  # struct Batch of smxx_batch.cu
_DEFORMATION = np.dtype((np.void, 8 * 7))  # struct Deformation of smxx_batch.cu


def mask_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of the uint32 words of a mask of one bit an element."""
    return rows, -(-cols // 32)


@dataclass(frozen=True)
class Draw:
    """Random numbers of one dropout.

    Attributes
    ----------
    seed : int
    offset : int
        The counter of a draw is the number of the step and this.
    keep_prob : float
    """

    seed: int
    offset: int
    keep_prob: float

    def arguments(self) -> tuple[int, int, int]:
        """Return what kernels are given: seed, offset and the greatest word that is kept."""
        # As cupybnn.backends.random.chosen has it.
        return self.seed, self.offset, max(round(self.keep_prob * 2**32), 1) - 1


@dataclass(frozen=True)
class Deformation:
    """How images are deformed; see `cupybnn.data.Augmentation`.

    Attributes
    ----------
    shape : tuple of int
        (height, width).
    seed : int
        Each step deforms anew, by its number.
    shift, rotation, scale, shear : float
    """

    shape: tuple[int, int]
    seed: int
    shift: float
    rotation: float
    scale: float
    shear: float

    def argument(self) -> Any:
        """Return struct Deformation, as a kernel is given it."""
        numbers = (self.shift, math.radians(self.rotation), self.scale, self.shear)
        return _struct([*self.shape, self.seed, *numbers], _DEFORMATION)


@dataclass
class Layer:
    """A hidden layer's product, and what stands between it and the activation.

    Attributes
    ----------
    product : cupy.ndarray of float32 or float16, shape (batch, units)
    kept : cupy.ndarray of uint32 or None
        Mask of what dropout keeps.
    norm : tuple of cupy.ndarray or None
        Mean, inverse deviation, gamma and beta, shape (units,) each; None without batch norm.
    drop : int
        DROP_*: where dropout stands.
    keep_prob : float
    """

    product: Any
    kept: Any = None
    norm: tuple[Any, Any, Any, Any] | None = None
    drop: int = DROP_NONE
    keep_prob: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, units)."""
        rows, cols = self.product.shape
        return rows, cols

    def argument(self) -> Any:
        """Return struct Layer, as a kernel is given it."""
        arrays = [self.product, self.kept, *(self.norm or (None,) * 4)]
        numbers = [*self.shape, 1 / self.keep_prob, 1 / self.shape[0]]
        return _struct([*arrays, *numbers], _LAYER)


@dataclass
class Activations:
    """Where a layer's activations go.

    Attributes
    ----------
    output : str
        A key of `OUTPUTS`.
    dense : cupy.ndarray or None
        Gets the activations, where they are not packed.
    packed : PackedMatrix or None
        Gets the signs, packed along the last axis; its popcounts must be 0.
    gate : cupy.ndarray of uint32, shape `mask_shape`, or None
        Gets where the gradient passes.
    window : float
        Half the width of the window in which sign has a pseudo-gradient.
    """

    output: str = "none"
    dense: Any = None
    packed: Any = None
    gate: Any = None
    window: float = 0.0

    def defines(self) -> Defines:
        """Return what the translation unit is to define for them."""
        return (("GATE", int(self.gate is not None)), ("OUTPUT", OUTPUTS[self.output]))

    def argument(self) -> Any:
        """Return struct Activations, as a kernel is given it."""
        packed = (None, None) if self.packed is None else (self.packed.words, self.packed.popcounts)
        return _struct([self.dense, *packed, self.gate, self.window], _ACTIVATIONS)


def address(x: Any) -> int:
    """Return where an array lies on the device; 0 for None."""
    return 0 if x is None else int(x.data.ptr)


def _struct(fields: list[Any], dtype: np.dtype) -> Any:
    """Return fields of 8 bytes as a kernel's argument: arrays (None: no address) and numbers."""
    values = np.zeros(len(fields), np.int64)
    for i, field in enumerate(fields):
        if isinstance(field, float):
            values[i : i + 1].view(np.float64)[0] = field
        elif isinstance(field, int):
            values[i : i + 1].view(np.uint64)[0] = field % 2**64
        else:
            values[i] = address(field)
    return values.view(dtype)


class Launcher:
    """Launches on the current stream of one device.

    Parameters
    ----------
    device : int
        Number of the CUDA device, which must be the current one.
    real : dtype
        Of dense operands: float32, or uint16 for bfloat16.
    batch, columns : int
        Rows, and the widest layer: they decide the size of the room for sums over rows.
    classes : int
    """

    def __init__(self, device: int, real: np.dtype, batch: int, columns: int, classes: int) -> None:
        import cupy

        self.device = device
        self.real = _REAL[real.name]
        self.classes = classes
        self._multiprocessors = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
        self._has_clusters = architecture(device) >= 90
        slabs = max(self._row_blocks(batch, columns, vector) for vector in (1, 2, 4))
        sums = slabs * (classes + 2) * columns
        self._partials = cupy.empty(sums, np.float32)
        self._tickets = cupy.zeros(-(-columns // 32), np.uint32)
        self._loss_blocks = 0
        self._losses = cupy.empty(2 * -(-batch // _WARPS), np.float32)

    # What shapes decide ------------------------------------------------------------------------

    def _strips(
        self, layer: Layer, sums: bool, vector: int = 4
    ) -> tuple[Defines, tuple[int, int], bool]:
        """Return defines of a layer walked by strips, the grid, and whether a cluster has a strip.

        Parameters
        ----------
        layer : Layer
        sums : bool
            Whether there are sums over rows: only then clusters are of use.
        vector : int
            Columns of a thread, where they divide the number of columns.
        """
        rows, cols = layer.shape
        while cols % vector:
            vector //= 2
        strips, blocks = -(-cols // 32), 1
        if sums and self._has_clusters:
            at_once = _THREADS * vector // 32
            while blocks < min(8, -(-rows // at_once)):
                blocks *= 2
        else:
            blocks = self._row_blocks(rows, cols, vector)
        clustered = sums and self._has_clusters and blocks > 1
        defines = (
            ("CLUSTER", blocks if clustered else 1),
            ("COLS", 32),
            ("DROP", layer.drop),
            ("NORM", int(layer.norm is not None)),
            ("PRODUCT", _PRODUCT[layer.product.dtype.name]),
            ("VECTOR", vector),
        )
        return defines, (strips, blocks), clustered

    def _row_blocks(self, rows: int, cols: int, vector: int) -> int:
        """Return how many blocks share the rows of a strip, without clusters."""
        fill = -(-8 * self._multiprocessors // -(-cols // 32))
        return max(1, min(rows // (16 * vector), fill))

    def _flat(self, count: int) -> int:
        return max(1, min(-(-count // _THREADS), 16 * self._multiprocessors))

    def launch(
        self,
        source: str,
        function: str,
        defines: Defines,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared: int = 0,
    ) -> None:
        """Launch blocks of 256 threads of a kernel of a file for the element type of `real`."""
        kernel = load_kernel(source, function, (("REAL", self.real), *defines), self.device)
        kernel(grid, (_THREADS,), arguments, shared_mem=shared)

    # The batch ---------------------------------------------------------------------------------

    def gather(
        self, images: Any, labels: Any, order: Any, step: Any, draw: Draw | None, out: Any,
        out_labels: Any, pops: Any = None, deformation: Deformation | None = None,
    ) -> None:  # fmt: skip
        """Copy the batch of a step.

        Parameters
        ----------
        images : cupy.ndarray of uint8, shape (images, pixels)
        labels : cupy.ndarray of int64, shape (images,)
        order : cupy.ndarray of int32, shape (ring, batch)
            Numbers of the images of step s in row ``s % ring``.
        step : cupy.ndarray of int64, shape (1,)
        draw : Draw or None
            Dropout of pixels; what is kept stays as it is.
        out : cupy.ndarray, shape (batch, pixels)
            Gets the pixels, whole numbers unless they are deformed.
        out_labels : cupy.ndarray of int64, shape (batch,)
        pops : cupy.ndarray of int32 or None
            Set to 0 on the way.
        deformation : Deformation or None
        """
        rows, cols = out.shape
        vector = next(v for v in (16, 4, 1) if cols % v == 0)
        ring, count = order.shape[0], 0 if pops is None else pops.size
        arrays = [images, labels, order, step, out, out_labels, pops]
        numbers = [ring, rows, cols, count, *(draw or Draw(0, 0, 1.0)).arguments()]
        batch = _struct([*arrays, *numbers], _BATCH)
        drop = ("DROP", int(draw is not None))
        if deformation is not None:
            self.launch(
                "smxx_batch",
                "gather_deformed",
                (drop, ("VECTOR", 1)),
                (rows,),
                (batch, deformation.argument()),
                shared=cols,
            )
            return
        grid = (self._flat(rows * cols // vector),)
        self.launch("smxx_batch", "gather", (drop, ("VECTOR", vector)), grid, (batch,))

    def attack(
        self, gradient: Any, step: Any, draw: Draw | None, amount: float, x: Any, pops: Any = None
    ) -> None:
        """Move what is in a batch's pixels by `amount` in the direction of their gradient.

        Parameters
        ----------
        gradient : cupy.ndarray, shape (batch, pixels)
        step : cupy.ndarray of int64, shape (1,)
        draw : Draw or None
            As `gather` had it: what is dropped stays 0.
        amount : float
        x : cupy.ndarray, shape (batch, pixels)
            Worked on in place.
        pops : cupy.ndarray of int32 or None
            Set to 0 on the way.
        """
        rows, cols = x.shape
        vector = next(v for v in (4, 1) if cols % v == 0)
        count = 0 if pops is None else pops.size
        numbers = [0, rows, cols, count, *(draw or Draw(0, 0, 1.0)).arguments()]
        batch = _struct([None, None, None, step, x, None, pops, *numbers], _BATCH)
        self.launch(
            "smxx_batch",
            "attack",
            (("DROP", int(draw is not None)), ("VECTOR", vector)),
            (self._flat(rows * cols // vector),),
            (batch, gradient, np.float32(amount)),
        )

    def dropout_mask(self, step: Any, draw: Draw, shape: tuple[int, int], out: Any) -> None:
        """Draw which elements of a (batch, units) array are kept, one bit each."""
        rows, cols = shape
        seed, offset, last = draw.arguments()
        self.launch(
            "smxx_batch",
            "dropout_mask",
            (("DROP", 0), ("VECTOR", 1)),
            (self._flat(out.size),),
            (
                step, np.int64(rows), np.int64(cols), np.uint64(seed), np.int64(offset),
                np.uint32(last), out,
            ),
        )  # fmt: skip

    # Forward -----------------------------------------------------------------------------------

    def normalise(
        self, layer: Layer, running: tuple[Any, Any], decay: float, eps: float, to: Activations
    ) -> None:
        """Compute each column's mean and inverse deviation, and then the activations.

        Parameters
        ----------
        layer : Layer
            With batch norm.
        running : (cupy.ndarray, cupy.ndarray)
            Running mean and variance, which are updated.
        decay, eps : float
        to : Activations
            Output "none": only the statistics.
        """
        assert layer.norm is not None
        kind, grid, clustered = self._strips(layer, sums=True)
        self.launch(
            "smxx_activation",
            "normalise",
            (*kind, *to.defines()),
            grid,
            (
                layer.argument(), self._partials, self._tickets, *layer.norm[:2], *running,
                np.float32(decay), np.float32(1 - decay), np.float32(eps), to.argument(),
            ),
        )  # fmt: skip
        if not clustered:
            self.activate(layer, to)

    def activate(self, layer: Layer, to: Activations) -> None:
        """Normalise by statistics that are there, take the sign or ReLU."""
        if to.output == "none":
            return
        kind, grid, _ = self._strips(layer, sums=False)
        arguments = (layer.argument(), to.argument())
        self.launch("smxx_activation", "activate", (*kind, *to.defines()), grid, arguments)

    def unpack_rows(self, packed: Any, out: Any) -> None:
        """Write packed signs as +1 and -1."""
        rows, cols = out.shape
        self.launch(
            "smxx_unpack_rows",
            "unpack_rows",
            (("VECTOR", 8 if cols % 8 == 0 else 1),),
            (min(-(-rows * -(-cols // 8) // _THREADS), 1 << 20),),
            (packed.words, np.int64(rows), np.int64(cols), out),
        )

    # Backward ----------------------------------------------------------------------------------

    def gradient(self, layer: Layer, gate: str, mask: Any, grad: Any, grads: Any) -> None:
        """Turn the gradient of activations into that of products, in place.

        Parameters
        ----------
        layer : Layer
        gate : str
            A key of `GATES`.
        mask : cupy.ndarray or None
            What `Activations.gate` got.
        grad : cupy.ndarray, shape (batch, units)
        grads : (cupy.ndarray, cupy.ndarray) or None
            Get the gradients of gamma and beta.
        """
        source, gate_define = "smxx_activation_gradient", ("GATE", GATES[gate])
        arguments = (layer.argument(), grad, np.uintp(address(mask)))
        if layer.norm is not None:
            kind, grid, clustered = self._strips(layer, sums=True)
            rest = (self._partials, self._tickets, *grads)
            self.launch(
                source, "gradient_sums", (*kind, gate_define), grid, (*arguments, *rest)
            )  # fmt: skip
            if clustered:
                return
        kind, grid, _ = self._strips(layer, sums=False)
        addresses = [np.uintp(address(x)) for x in grads or (None, None)]
        self.launch(source, "gradient", (*kind, gate_define), grid, (*arguments, *addresses))

    # The head ----------------------------------------------------------------------------------

    def _head(self, head: str, loss: str) -> Defines:
        return (("CLASSES", self.classes), ("HEAD", HEADS[head]), ("LOSS", LOSSES[loss]))

    def logits(
        self, layer: Layer, head: str, weight: Any, labels: Any, loss: str, smoothing: float,
        factor: Any, out: Any, grad: Any,
    ) -> None:  # fmt: skip
        """Compute logits and the loss's gradient for what `head_gradient` goes on from.

        Parameters
        ----------
        layer : Layer
            The last hidden one.
        head : str
            A key of `HEADS`: what the last layer reads.
        weight : cupy.ndarray of float32, shape (units, classes)
            For "sign" the latent ones.
        labels : cupy.ndarray of int64, shape (batch,)
        loss : str
            A key of `LOSSES`.
        smoothing : float
            Of the labels.
        factor : cupy.ndarray of float32, shape (1,), or None
            Of the logits, for "sign".
        out : cupy.ndarray of float32, shape (batch, classes)
        grad : cupy.ndarray of float32, shape (batch, classes up to a multiple of 4)
            The gradient for the product before the factor.
        """
        rows, cols = layer.shape
        vector = 4 if cols % 4 == 0 else 1
        at_a_time = 1
        while (
            at_a_time < 4 and vector == 4 and rows >= 4 * at_a_time * _WARPS * self._multiprocessors
        ):
            at_a_time *= 2
        self._loss_blocks = -(-rows // (_WARPS * at_a_time))
        kind = (
            ("DROP", layer.drop),
            ("NORM", int(layer.norm is not None)),
            ("PRODUCT", _PRODUCT[layer.product.dtype.name]),
            ("VECTOR", vector),
        )
        self.launch(
            "smxx_head",
            "logits",
            (*kind, *self._head(head, loss), ("ROWS", at_a_time)),
            (self._loss_blocks,),
            (
                layer.argument(), weight, labels, np.float32(smoothing),
                np.uintp(address(factor)), out, grad, self._losses,
            ),
        )  # fmt: skip

    def head_gradient(
        self, layer: Layer, head: str, loss: str, weight: Any, of_logits: Any, gate: str,
        window: float, grad_weight: Any, grads: Any, out: Any, mean_loss: Any, grad_factor: Any,
    ) -> None:  # fmt: skip
        """Go from the logits' gradient to those of the last weights and the last hidden product.

        Also adds up the loss of `logits`.

        Parameters
        ----------
        gate, window
            For the head "sign": a key of `GATES`, where "mask" stands for the window.
        mean_loss : cupy.ndarray of float32, shape (1,)
        grad_factor : cupy.ndarray of float32, shape (1,), or None
        """
        widest = 2 if self.classes <= 12 else 1  # more would need too many registers
        kind, grid, clustered = self._strips(layer, sums=True, vector=widest)
        end = (*self._head(head, loss), ("GATE", GATES[gate] if head == "sign" else 0))
        loss_parts = [self._losses, mean_loss, grad_factor, self._loss_blocks]
        back = _struct([weight, of_logits, out, float(window), *loss_parts], _BACK)
        addresses = tuple(np.uintp(address(x)) for x in grads or (None, None))
        rest = (self._partials, self._tickets, grad_weight, *addresses)
        arguments = (layer.argument(), back)
        grid = (grid[0] + 1, grid[1])  # one more strip, for the loss
        self.launch("smxx_head", "head_sums", (*kind, *end), grid, (*arguments, *rest))
        if not clustered:
            kind, grid, _ = self._strips(layer, sums=False, vector=widest)
            self.launch(
                "smxx_head", "head_gradient", (*kind, *end), grid, (*arguments, *addresses)
            )  # fmt: skip
