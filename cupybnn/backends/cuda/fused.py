"""Launching the fused kernels of a training step: one method a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import Defines, load_kernel

__all__ = [
    "DROP_ACTIVATION",
    "DROP_NONE",
    "DROP_PRODUCT",
    "GATES",
    "LOSSES",
    "OUTPUTS",
    "PENALTIES",
    "Draw",
    "Launcher",
    "Layer",
    "Rates",
    "Updated",
    "mask_shape",
]

# As training.cuh and the kernels name them.
DROP_NONE, DROP_PRODUCT, DROP_ACTIVATION = range(3)
GATES = {"none": 0, "mask": 1, "clip": 2}
LOSSES = {"cross_entropy": 0, "squared_hinge": 1}
OUTPUTS = {"packed_sign": 0, "sign": 1, "relu": 2}
PENALTIES = {"none": 0, "l1": 1, "bipolar": 2}
_BINARY, _CLIPPED, _WINDOW, _ALIGNED = 1, 2, 4, 8

_THREADS, _WARPS = 256, 8
_REAL = {"float32": "float", "uint16": "bfloat16_bits"}
_PRODUCT = {"float32": "float", "float16": "float16_bits"}
_TILE_ROWS, _TILE_COLS = 32, 128  # of smxx_adam.cu

_LAYER = np.dtype((np.void, 8 * 10))  # struct Layer of training.cuh
_PARAMETER = np.dtype(
    [(n, np.int64) for n in ("weight", "grad", "mean", "square", "copy", "words", "pops")]
    + [(n, np.int64) for n in ("rows", "cols", "count", "first_block", "flags")]
    + [(n, np.float64) for n in ("limit", "lr_scale", "penalty", "weight_decay")]
)
#: struct Rates of smxx_adam.cu: learning rate, its factor, Adam's eps, and padding.
Rates = np.dtype((np.float32, 4))


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

    def arguments(self) -> tuple[Any, ...]:
        """Return what kernels are given: seed, offset and the greatest word that is kept."""
        # As cupybnn.backends.random.chosen has it.
        last = max(round(self.keep_prob * 2**32), 1) - 1
        return np.uint64(self.seed), np.int64(self.offset), np.uint32(last)


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
        addresses = [self.product, self.kept, *(self.norm or (None,) * 4)]
        fields = np.zeros(10, np.int64)
        fields[:6] = [0 if x is None else x.data.ptr for x in addresses]
        fields[6:8] = self.shape
        fields[8:].view(np.float64)[:] = 1 / self.keep_prob, 1 / self.shape[0]
        return fields.view(_LAYER)


@dataclass
class Updated:
    """A parameter, for `Launcher.adam`.

    Attributes
    ----------
    weight, grad, mean, square : cupy.ndarray of float32, of one shape
        The parameter, its gradient, the optimiser's two means.
    copy : cupy.ndarray or None
        What products read instead: the weight in their dtype, or its sign.
    packed : PackedMatrix or None
        The packed signs, along the first axis.
    binary : bool
        Whether signs are meant.
    gate : {"none", "window", "clip"}
        Pseudo-gradient of a latent weight.
    limit : float or None
        Magnitude that the weight is held to.
    lr_scale, penalty, weight_decay : float
    """

    weight: Any
    grad: Any
    mean: Any
    square: Any
    copy: Any = None
    packed: Any = None
    binary: bool = False
    gate: str = "none"
    limit: float | None = None
    lr_scale: float = 1.0
    penalty: float = 0.0
    weight_decay: float = 0.0

    def geometry(self) -> tuple[int, int]:
        """Return rows and columns as the kernel walks them."""
        if self.packed is not None:
            rows, cols = self.weight.shape
            return rows, cols
        return -(-self.weight.size // _TILE_COLS), _TILE_COLS

    def blocks(self) -> int:
        """Blocks that take this parameter."""
        rows, cols = self.geometry()
        return -(-rows // _TILE_ROWS) * -(-cols // _TILE_COLS)


def _address(x: Any) -> int:
    return 0 if x is None else int(x.data.ptr)


class Launcher:
    """Launches on the current stream of one device.

    Parameters
    ----------
    device : int
        Number of the CUDA device, which must be the current one.
    real : dtype
        Of dense operands: float32, or uint16 for bfloat16.
    columns : int
        The widest layer: decides the size of the room for sums over rows.
    """

    def __init__(self, device: int, real: np.dtype, batch: int, columns: int, classes: int) -> None:
        import cupy

        self.device = device
        self.real = _REAL[real.name]
        self.classes = classes
        self._multiprocessors = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
        slabs = max(self._grid(batch, columns, v)[1] for v in (1, 2, 4))
        sums = slabs * (classes + 2) * columns
        self._partials = cupy.empty(max(sums, -(-batch // _WARPS)), np.float32)
        self._tickets = cupy.zeros(-(-columns // 32), np.uint32)
        self._update: tuple[Any, Any, Any, int] | None = None

    # What shapes decide ------------------------------------------------------------------------

    def _vector(self, cols: int, widest: int = 4) -> int:
        """Neighbouring columns of a lane: one where more would leave too few warps."""
        return widest if cols >= 2048 and cols % widest == 0 else 1

    def _grid(self, rows: int, cols: int, vector: int) -> tuple[int, int]:
        """Groups of columns, and blocks that share the rows of each."""
        groups = -(-cols // (32 * vector))
        fill = -(-(8 if vector == 1 else 4) * self._multiprocessors // groups)
        return groups, max(1, min(fill, -(-rows // (4 * _WARPS))))

    def _flat(self, count: int) -> int:
        return max(1, min(-(-count // _THREADS), 16 * self._multiprocessors))

    def _launch(
        self, source: str, function: str, defines: Defines, grid: Any, arguments: Any
    ) -> None:
        kernel = load_kernel(source, function, (("REAL", self.real), *defines), self.device)
        kernel(grid, (_THREADS,), arguments)

    @staticmethod
    def _kind(layer: Layer, vector: int) -> Defines:
        return (
            ("DROP", layer.drop),
            ("NORM", int(layer.norm is not None)),
            ("PRODUCT", _PRODUCT[layer.product.dtype.name]),
            ("VECTOR", vector),
        )

    # The batch ---------------------------------------------------------------------------------

    def gather(
        self, images: Any, labels: Any, order: Any, step: Any, draw: Draw | None, out: Any,
        out_labels: Any,
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
            Gets the pixels as whole numbers.
        out_labels : cupy.ndarray of int64, shape (batch,)
        """
        rows, cols = out.shape
        vector = 4 if cols % 4 == 0 else 1
        draw_arguments = (draw or Draw(0, 0, 1.0)).arguments()
        self._launch(
            "smxx_batch",
            "gather",
            (("DROP", int(draw is not None)), ("VECTOR", vector)),
            (self._flat(rows * cols // vector),),
            (
                images, labels, order, np.int64(order.shape[0]), step, np.int64(rows),
                np.int64(cols), *draw_arguments, out, out_labels,
            ),
        )  # fmt: skip

    def dropout_mask(self, step: Any, draw: Draw, shape: tuple[int, int], out: Any) -> None:
        """Draw which elements of a (batch, units) array are kept, one bit each."""
        rows, cols = shape
        self._launch(
            "smxx_batch",
            "dropout_mask",
            (("DROP", 0), ("VECTOR", 1)),
            (self._flat(out.size),),
            (step, np.int64(rows), np.int64(cols), *draw.arguments(), out),
        )

    # Forward -----------------------------------------------------------------------------------

    def statistics(self, layer: Layer, running: tuple[Any, Any], decay: float, eps: float) -> None:
        """Compute mean and inverse deviation of each column; update the running statistics."""
        assert layer.norm is not None
        vector = self._vector(layer.shape[1])
        self._launch(
            "smxx_activation",
            "statistics",
            self._kind(layer, vector),
            self._grid(*layer.shape, vector),
            (
                layer.argument(), self._partials, self._tickets, *layer.norm[:2], *running,
                np.float32(decay), np.float32(1 - decay), np.float32(eps),
            ),
        )  # fmt: skip

    def activate(
        self, layer: Layer, output: str, dense: Any, packed: Any, gate: Any, window: float
    ) -> None:
        """Normalise, take the sign or ReLU, and keep where the gradient passes.

        Parameters
        ----------
        layer : Layer
        output : str
            A key of `OUTPUTS`.
        dense : cupy.ndarray or None
            Gets the activations, where they are not packed.
        packed : PackedMatrix or None
            Gets the signs, packed along the last axis.
        gate : cupy.ndarray of uint32, shape `mask_shape`, or None
        window : float
            Half the width of the window in which sign has a pseudo-gradient.
        """
        rows, cols = layer.shape
        vector = 4 if cols % 4 == 0 else 1
        steps = -(-cols // (32 * vector))
        parts = 1
        # Enough warps to fill the GPU, and none without columns.
        while parts < 8 and 2 * parts <= steps and rows * parts < 32 * self._multiprocessors:
            parts *= 2
        enough = rows * parts >= 128 * self._multiprocessors
        at_a_time = 4 if enough and cols >= 1024 else 1
        defines = (
            ("GATE", int(gate is not None)),
            ("OUTPUT", OUTPUTS[output]),
            ("PARTS", parts),
            ("ROWS", at_a_time),
        )
        words, pops = (packed.words, packed.popcounts) if packed is not None else (None, None)
        self._launch(
            "smxx_activation",
            "activate",
            (*self._kind(layer, vector), *defines),
            (-(-rows // (_WARPS // parts * at_a_time)),),
            (
                layer.argument(),
                *(np.uintp(_address(x)) for x in (dense, words, pops, gate)),
                np.float32(window),
            ),
        )

    def unpack_rows(self, packed: Any, out: Any) -> None:
        """Write packed signs as +1 and -1."""
        rows, cols = out.shape
        self._launch(
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
            What `activate` kept.
        grad : cupy.ndarray, shape (batch, units)
        grads : (cupy.ndarray, cupy.ndarray) or None
            Get the gradients of gamma and beta.
        """
        vector = self._vector(layer.shape[1])
        defines = (*self._kind(layer, vector), ("GATE", GATES[gate]))
        grid = self._grid(*layer.shape, vector)
        arguments = (layer.argument(), grad, np.uintp(_address(mask)))
        source = "smxx_activation_gradient"
        if layer.norm is not None:
            self._launch(
                source,
                "gradient_sums",
                defines,
                grid,
                (*arguments, self._partials, self._tickets, *grads),
            )
        addresses = [np.uintp(_address(x)) for x in grads or (None, None)]
        self._launch(source, "gradient", defines, grid, (*arguments, *addresses))

    # The head ----------------------------------------------------------------------------------

    def _head(self, layer: Layer, relu: bool, loss: str, vector: int) -> Defines:
        head = (("CLASSES", self.classes), ("LOSS", LOSSES[loss]), ("RELU", int(relu)))
        return (*self._kind(layer, vector), *head)

    def logits(
        self, layer: Layer, relu: bool, weight: Any, labels: Any, loss: str, smoothing: float,
        out: Any, grad: Any, mean_loss: Any,
    ) -> None:  # fmt: skip
        """Compute logits, the mean loss and its gradient for the logits.

        Parameters
        ----------
        layer : Layer
            The last hidden one.
        relu : bool
            Whether its activation is ReLU; none otherwise.
        weight : cupy.ndarray of float32, shape (units, classes)
        labels : cupy.ndarray of int64, shape (batch,)
        loss : str
            A key of `LOSSES`.
        smoothing : float
            Of the labels.
        out, grad : cupy.ndarray of float32, shape (batch, classes)
        mean_loss : cupy.ndarray of float32, shape (1,)
        """
        rows, cols = layer.shape
        vector = 4 if cols % 4 == 0 else 1
        at_a_time = 1
        while at_a_time < 4 and rows >= 4 * at_a_time * _WARPS * self._multiprocessors:
            at_a_time *= 2
        self._launch(
            "smxx_head",
            "logits",
            (*self._head(layer, relu, loss, vector), ("ROWS", at_a_time)),
            (-(-rows // (_WARPS * at_a_time)),),
            (
                layer.argument(), weight, labels, np.float32(smoothing), out, grad,
                self._partials, self._tickets, mean_loss,
            ),
        )  # fmt: skip

    def head_gradient(
        self, layer: Layer, relu: bool, loss: str, weight: Any, of_logits: Any, grad_weight: Any,
        grads: Any, out: Any,
    ) -> None:  # fmt: skip
        """Go from the logits' gradient to those of the last weights and the last hidden product."""
        vector = self._vector(layer.shape[1], 2)
        defines = self._head(layer, relu, loss, vector)
        grid = self._grid(*layer.shape, vector)
        arguments = (layer.argument(), weight, of_logits)
        addresses = [np.uintp(_address(x)) for x in grads or (None, None)]
        self._launch(
            "smxx_head",
            "head_sums",
            defines,
            grid,
            (*arguments, self._partials, self._tickets, grad_weight, *addresses),
        )
        self._launch("smxx_head", "head_gradient", defines, grid, (*arguments, *addresses, out))

    # The update --------------------------------------------------------------------------------

    def plan_update(self, parameters: Sequence[Updated]) -> None:
        """Take note of the parameters that `adam` is to update."""
        import cupy

        table = np.zeros(len(parameters), _PARAMETER)
        blocks = 0
        for entry, p in zip(table, parameters, strict=True):
            arrays = (p.weight, p.grad, p.mean, p.square, p.copy)
            for name, array in zip(
                ("weight", "grad", "mean", "square", "copy"), arrays, strict=True
            ):
                entry[name] = _address(array)
            if p.packed is not None:
                entry["words"] = _address(p.packed.words)
                entry["pops"] = _address(p.packed.popcounts)
            rows, cols = p.geometry()
            entry["rows"], entry["cols"], entry["count"] = rows, cols, p.weight.size
            entry["first_block"] = blocks
            aligned = cols % 4 == 0 and not any(_address(x) % 16 for x in arrays)
            entry["flags"] = (
                _BINARY * p.binary
                + _CLIPPED * (p.gate == "clip")
                + _WINDOW * (p.gate == "window")
                + _ALIGNED * aligned
            )
            entry["limit"] = p.limit or 0.0
            entry["lr_scale"], entry["penalty"] = p.lr_scale, p.penalty
            entry["weight_decay"] = p.weight_decay
            blocks += p.blocks()
        self._update = (
            cupy.asarray(table.view(np.uint8)),
            cupy.empty(blocks, np.float32),
            cupy.zeros(1, np.uint32),
            blocks,
        )
        self._count = len(parameters)

    def adam(
        self, rates: Any, step: Any, betas: tuple[float, float], penalty: str,
        write_gradient: bool, mean_loss: Any, loss: Any,
    ) -> None:  # fmt: skip
        """Update the parameters of `plan_update`, compute the loss with penalty, count the step.

        Parameters
        ----------
        rates : cupy.ndarray of float32, shape (ring, 4)
            `Rates` of step s in row ``s % ring``.
        step : cupy.ndarray of int64, shape (1,)
            Raised by one.
        betas : (float, float)
            Decay of the optimiser's means.
        penalty : str
            A key of `PENALTIES`.
        write_gradient : bool
            Whether gradients are left with the penalty's part in them.
        mean_loss, loss : cupy.ndarray of float32, shape (1,)
            Without and with the penalty.
        """
        assert self._update is not None
        table, partials, ticket, blocks = self._update
        self._launch(
            "smxx_adam",
            "adam",
            (("PENALTY", PENALTIES[penalty]), ("WRITE_GRADIENT", int(write_gradient))),
            (blocks,),
            (
                table, np.int32(self._count), rates, np.int64(rates.shape[0]), step,
                np.float32(1 - betas[0]), np.float32(1 - betas[1]), mean_loss, loss, partials,
                ticket,
            ),
        )  # fmt: skip
