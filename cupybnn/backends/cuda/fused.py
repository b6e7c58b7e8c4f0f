"""Launching the fused kernels of a training step: one method a kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import Defines, load_kernel, multiprocessors
from cupybnn.backends.cuda.fused_arguments import (
    BACK,
    BATCH,
    GATES,
    HEADS,
    LOSSES,
    OUTPUT_NORM,
    Activations,
    Deformation,
    Draw,
    Layer,
    address,
    struct,
)
from cupybnn.backends.cuda.fused_walk import Sums, Walk

__all__ = ["Launcher"]

_THREADS, _WARPS = 256, 8
_ROUNDS = 2  # of blocks, at least, for a warp to take more rows of logits at a time
_REAL = {"float32": "float", "uint16": "bfloat16_bits"}


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
        self._itemsize = real.itemsize
        self.classes = classes
        self._multiprocessors = multiprocessors(device)
        self._walk = Walk(device)
        slabs = max(self._walk.row_blocks(batch, columns, vector) for vector in (1, 2, 4))
        sums = slabs * (classes + 2) * columns
        self._partials = cupy.empty(sums, np.float32)
        self._tickets = cupy.zeros(-(-columns // 32), np.uint32)
        self._loss_blocks = 0
        self._losses = cupy.empty(2 * -(-batch // _WARPS), np.float32)

    # What shapes decide ------------------------------------------------------------------------

    def _flat(self, count: int) -> int:
        return max(1, min(-(-count // _THREADS), 16 * self._multiprocessors))

    def launch(
        self,
        source: str,
        function: str,
        defines: Defines,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        threads: int = _THREADS,
        shared: int = 0,
    ) -> None:
        """Launch a kernel of a file for the element type of `real`."""
        defines = (("REAL", self.real), *defines)
        kernel = load_kernel(source, function, defines, self.device, shared)
        kernel(grid, (threads,), arguments, shared_mem=shared)

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
        batch = struct([*arrays, *numbers], BATCH)
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
        # No more blocks than run at a time: the latency of a second round costs more than its work.
        grid = (min(self._flat(rows * cols // vector), 8 * self._multiprocessors),)
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
        batch = struct([None, None, None, step, x, None, pops, *numbers], BATCH)
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
        walk = self._walk.strips(layer, Sums(2, most_warps=16))
        self.launch(
            "smxx_activation",
            "normalise",
            (*walk.defines, *to.defines()),
            walk.grid,
            (
                layer.argument(), self._partials, self._tickets, *layer.norm[:2], *running,
                np.float32(decay), np.float32(1 - decay), np.float32(eps), to.argument(),
            ),
            walk.threads,
            walk.shared,
        )  # fmt: skip
        if not walk.clustered:
            self.activate(layer, to)

    def activate(self, layer: Layer, to: Activations) -> None:
        """Normalise by statistics that are there, take the sign or ReLU."""
        if to.output == "none":
            return
        walk = self._walk.strips(layer)
        defines = (*walk.defines, *to.defines())
        arguments = (layer.argument(), to.argument())
        self.launch("smxx_activation", "activate", defines, walk.grid, arguments)

    def unpack_rows(self, packed: Any, out: Any) -> None:
        """Write packed signs as +1 and -1."""
        rows, cols = out.shape
        self.launch(
            "smxx_unpack_signs",
            "unpack_rows",
            (("VECTOR", 8 if cols % 8 == 0 else 1),),
            (min(-(-rows * -(-cols // 8) // _THREADS), 1 << 20),),
            (packed.words, np.int64(rows), np.int64(cols), out),
        )

    def unpack_columns(self, packed: Any, out: Any) -> None:
        """Write signs that are packed along the first axis as +1 and -1."""
        rows, cols = out.shape
        vector = 16 // out.itemsize  # as much as a lane can store at once
        while cols % vector:
            vector //= 2
        self.launch(
            "smxx_unpack_signs",
            "unpack_columns",
            (("VECTOR", vector),),
            (-(-rows // 128) * -(-cols // (_THREADS * vector)),),
            (packed.words, np.int64(rows), np.int64(cols), out),
        )

    # Backward ----------------------------------------------------------------------------------

    def gradient(
        self, layer: Layer, gate: str, mask: Any, grad: Any, out: Any, grads: Any
    ) -> None:  # fmt: skip
        """Turn the gradient of activations into that of products.

        Parameters
        ----------
        layer : Layer
        gate : str
            A key of `GATES`.
        mask : cupy.ndarray or None
            What `Activations.gate` got.
        grad : cupy.ndarray, shape (batch, units)
        out : cupy.ndarray, shape (batch, units)
            May be `grad`, or the memory of the product.
        grads : (cupy.ndarray, cupy.ndarray) or None
            Get the gradients of gamma and beta.
        """
        source, gate_define = "smxx_activation_gradient", ("GATE", GATES[gate])
        arguments = (layer.argument(), grad, out, np.uintp(address(mask)))
        if layer.norm is not None:
            sums = Sums(2, self._itemsize, 4 * (gate == "mask"), most_warps=16)
            walk = self._walk.strips(layer, sums)
            defines = (*walk.defines, gate_define)
            rest = (self._partials, self._tickets, *grads)
            self.launch(
                source, "gradient_sums", defines, walk.grid, (*arguments, *rest), walk.threads,
                walk.shared,
            )  # fmt: skip
            if walk.clustered:
                return
        walk = self._walk.strips(layer)
        addresses = [np.uintp(address(x)) for x in grads or (None, None)]
        defines = (*walk.defines, gate_define)
        self.launch(source, "gradient", defines, walk.grid, (*arguments, *addresses))

    # The head ----------------------------------------------------------------------------------

    def _head(self, head: str, loss: str, output_norm: bool) -> Defines:
        return (
            ("CLASSES", self.classes),
            ("HEAD", HEADS[head]),
            ("LOSS", LOSSES[loss]),
            ("OUTPUT_NORM", int(output_norm)),
        )

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
            Of the logits, for "sign"; None there: they are left to `output_norm`.
        out : cupy.ndarray of float32, shape (batch, classes)
        grad : cupy.ndarray of float32, shape (batch, classes up to a multiple of 4)
            The gradient for the product before the factor.
        """
        rows, cols = layer.shape
        vector = 4 if cols % 4 == 0 else 1
        at_a_time = 1
        while (
            at_a_time < 4
            and vector == 4
            and rows >= _ROUNDS * at_a_time * _WARPS * self._multiprocessors
        ):
            at_a_time *= 2
        self._loss_blocks = -(-rows // (_WARPS * at_a_time))
        normed = head == "sign" and factor is None
        kind = (*layer.defines(), ("VECTOR", vector))
        self.launch(
            "smxx_head",
            "logits",
            (*kind, *self._head(head, loss, normed), ("ROWS", at_a_time)),
            (self._loss_blocks,),
            (
                layer.argument(), weight, labels, np.float32(smoothing),
                np.uintp(address(factor)), out, grad, self._losses,
            ),
        )  # fmt: skip

    def output_norm(
        self, norm: tuple[Any, Any], running: tuple[Any, Any], decay: float, eps: float,
        labels: Any, loss: str, smoothing: float, logits: Any, grad: Any, grads: tuple[Any, Any],
        mean_loss: Any,
    ) -> None:  # fmt: skip
        """Normalise logits over the batch, compute the loss, and go back through both.

        Parameters
        ----------
        norm : (cupy.ndarray, cupy.ndarray)
            Gamma and beta, shape (classes,) each.
        running : (cupy.ndarray, cupy.ndarray)
            Running mean and variance, which are updated.
        decay, eps : float
        labels, loss, smoothing
            As for `logits`.
        logits : cupy.ndarray of float32, shape (batch, classes)
            The last products; worked on in place.
        grad : cupy.ndarray of float32, shape (batch, classes up to a multiple of 4)
            Gets the gradient for the products.
        grads : (cupy.ndarray, cupy.ndarray)
            Get the gradients of gamma and beta.
        mean_loss : cupy.ndarray of float32, shape (1,)
        """
        rows = logits.shape[0]
        arrays = [logits, grad, labels, *norm, *running, *grads, mean_loss]
        argument = struct([*arrays, rows, 1 / rows, decay, eps, float(smoothing)], OUTPUT_NORM)
        defines = (("CLASSES", self.classes), ("LOSS", LOSSES[loss]))
        self.launch("smxx_output_norm", "output_norm", defines, (1,), (argument,))

    def head_gradient(
        self, layer: Layer, head: str, loss: str, weight: Any, of_logits: Any, gate: str,
        window: float, grad_weight: Any, grads: Any, out: Any, mean_loss: Any, grad_factor: Any,
    ) -> None:  # fmt: skip
        """Go from the logits' gradient to those of the last weights and the last hidden product.

        Also adds up the loss of `logits`, unless `output_norm` has it.

        Parameters
        ----------
        gate, window
            For the head "sign": a key of `GATES`, where "mask" stands for the window.
        out : cupy.ndarray, shape (batch, units)
            May be the memory of the product.
        mean_loss : cupy.ndarray of float32, shape (1,)
        grad_factor : cupy.ndarray of float32, shape (1,), or None
        """
        widest = 2 if self.classes <= 12 else 1  # more would need too many registers
        sums = Sums(self.classes + 2 * (layer.norm is not None), row_bytes=4 * of_logits.shape[1])
        walk = self._walk.strips(layer, sums, widest)
        normed = head == "sign" and grad_factor is None
        end = (*self._head(head, loss, normed), ("GATE", GATES[gate] if head == "sign" else 0))
        loss_parts = [self._losses, mean_loss, grad_factor, self._loss_blocks]
        back = struct([weight, of_logits, out, float(window), *loss_parts], BACK)
        addresses = tuple(np.uintp(address(x)) for x in grads or (None, None))
        rest = (self._partials, self._tickets, grad_weight, *addresses)
        arguments = (layer.argument(), back)
        grid = (walk.grid[0] + 1, walk.grid[1])  # one more strip, for the loss
        defines = (*walk.defines, *end)
        self.launch(
            "smxx_head", "head_sums", defines, grid, (*arguments, *rest), walk.threads, walk.shared
        )
        if not walk.clustered:
            walk = self._walk.strips(layer, None, widest)
            defines = (*walk.defines, *end)
            self.launch(
                "smxx_head", "head_gradient", defines, walk.grid, (*arguments, *addresses)
            )  # fmt: skip
