"""Launches of the head: last layer, loss, and the gradient of the last hidden product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cupybnn.backends.cuda.compiler import Defines
from cupybnn.backends.cuda.fused import WARPS, Launcher
from cupybnn.backends.cuda.fused_layers import (
    DROP_ACTIVATION,
    GATES,
    LAYER,
    BatchNorm,
    Greatest,
    Layer,
    greatest_of,
)
from cupybnn.backends.cuda.fused_walk import Sums
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = ["LOSSES", "READS", "Head"]

# As in loss.cuh and smxx_head.cu.
LOSSES = {"cross_entropy": 0, "squared_hinge": 1, "divergence": 2}
READS = {"none": 0, "relu": 1, "sign": 2}
_SUMS, _LOSS, _GRADIENT = 1, 2, 3  # as in smxx_output_norm.cu

BACK = Struct(
    "Back",
    "ptr weight, grad, out; double window; ptr partials, mean_loss, grad_factor; i64 partial_count;"
    "double share",
)
OUTPUT_NORM = Struct(
    "OutputNorm",
    "ptr logits, grad, labels, gamma, beta, running_mean, running_variance, grad_gamma, grad_beta;"
    "ptr mean_loss, totals, whole_gamma, whole_beta; i64 rows;"
    "double share, loss_share, decay, eps, smoothing",
)
LOGITS = Kernel(
    "smxx_head",
    "logits",
    "Layer p; ptr weight, labels; float smoothing, share; ptr factor, out, grad, partials",
    LAYER,
)
HEAD_SUMS = Kernel(
    "smxx_head",
    "head_sums",
    "Layer p; Back back; ptr partials, tickets, grad_weight, grad_gamma, grad_beta",
    LAYER,
    BACK,
)
HEAD_GRADIENT = Kernel(
    "smxx_head",
    "head_gradient",
    "Layer p; Back back; ptr grad_gamma, grad_beta, row_most, col_most",
    LAYER,
    BACK,
)
NORMALISE_OUTPUT = Kernel("smxx_output_norm", "output_norm", "OutputNorm p", OUTPUT_NORM)

_ROUNDS = 2  # a warp takes more rows at a time if this many blocks per SM remain


@dataclass(frozen=True, kw_only=True)
class Head:
    """Logits and loss of a batch, and the gradients of the last weights and hidden product.

    Arrays are float32 unless noted otherwise.
    """

    layer: Layer  # the last hidden layer; its batch norm receives gradients
    reads: str  # a key of READS; "sign": signs, multiplied by the signs of the (latent) weights
    weight: Any  # (units, classes)
    grad_weight: Any  # (units, classes)
    labels: Any  # int64, (batch,); or probabilities, float32, (batch, classes)
    loss: str  # a key of LOSSES
    smoothing: float  # of the labels
    logits: Any  # (batch, classes)
    # (batch, classes rounded up to a multiple of 4): receives the gradient of the last product,
    # before factor or norm.
    grad_logits: Any
    mean_loss: Any  # (1,)
    factor: Any = None  # (1,): scales the logits; for "sign" there is a factor or a norm
    grad_factor: Any = None  # (1,)
    norm: BatchNorm | None = None  # of the logits
    gate: str  # for "sign" a key of GATES, where "mask" means the window
    window: float
    # (batch, units), a dense operand: receives the gradient of the layer's product. It may share
    # the product's memory if elements have the same size.
    out: Any
    examples: int | None = None  # of the mean loss, if others are on other ranks

    def __post_init__(self) -> None:
        followed = (self.factor is not None) + (self.norm is not None)
        assert followed == (self.reads == "sign"), "signs are followed by a factor or a norm"
        assert (self.factor is None) == (self.grad_factor is None)
        assert self._soft or self.loss != "divergence"

    @property
    def _soft(self) -> bool:
        return len(self.labels.shape) == 2

    @property
    def _share(self) -> float:
        """Of an example in the mean loss."""
        return 1 / (self.layer.shape[0] if self.examples is None else self.examples)

    @property
    def _classes(self) -> int:
        return int(self.logits.shape[1])

    def _defines(self) -> Defines:
        return (
            ("CLASSES", self._classes),
            ("HEAD", READS[self.reads]),
            ("LOSS", LOSSES[self.loss]),
            ("SOFT", int(self._soft)),
            ("OUTPUT_NORM", int(self.norm is not None)),
        )

    def _rows_of_warp(self, launcher: Launcher) -> int:
        """Return the rows of logits that a warp computes at a time."""
        rows, cols = self.layer.shape
        most = 4 if cols % 4 == 0 else 1
        enough = _ROUNDS * WARPS * launcher.multiprocessors
        return next(n for n in (4, 2, 1) if n == 1 or (n <= most and rows >= enough * (n // 2)))

    def _loss_blocks(self, launcher: Launcher) -> int:
        """Return the number of blocks of `logits`, each of which writes a part of the loss."""
        return -(-self.layer.shape[0] // (WARPS * self._rows_of_warp(launcher)))

    def launch_logits(self, launcher: Launcher) -> None:
        """Compute the logits and the gradient of the last product, on the current stream."""
        layer, blocks = self.layer, self._loss_blocks(launcher)
        vector = 4 if layer.shape[1] % 4 == 0 else 1
        arguments = {
            "p": layer.pack(), "weight": self.weight, "labels": self.labels,
            "smoothing": self.smoothing, "share": self._share, "factor": self.factor,
            "out": self.logits, "grad": self.grad_logits, "partials": launcher.losses(blocks),
        }  # fmt: skip
        ways = (("VECTOR", vector), ("ROWS", self._rows_of_warp(launcher)))
        defines = (*layer.defines(), *self._defines(), *ways)
        launcher.launch(LOGITS, arguments, grid=(blocks,), defines=defines)
        if self.norm is not None:
            self._launch_norm(launcher, self.norm)

    def _launch_norm(self, launcher: Launcher, norm: BatchNorm) -> None:
        """Normalize the logits over the batch, compute the loss and both gradients."""
        rows, whole = self.logits.shape[0], norm.whole
        of_whole = {"grad_gamma": None, "grad_beta": None}
        of_whole = of_whole if whole is None else whole.arrays(self._classes)
        packed = OUTPUT_NORM.pack(
            logits=self.logits, grad=self.grad_logits, labels=self.labels, gamma=norm.gamma,
            beta=norm.beta, running_mean=norm.running_mean, running_variance=norm.running_variance,
            **norm.gradients(), mean_loss=self.mean_loss,
            totals=None if whole is None else whole.sums, whole_gamma=of_whole["grad_gamma"],
            whole_beta=of_whole["grad_beta"], rows=rows, share=1 / norm.rows(rows),
            loss_share=self._share, decay=norm.decay, eps=norm.eps, smoothing=self.smoothing,
        )  # fmt: skip
        defines = (
            ("CLASSES", self._classes),
            ("LOSS", LOSSES[self.loss]),
            ("SOFT", int(self._soft)),
        )

        def launch(*part: tuple[str, int]) -> None:
            launcher.launch(NORMALISE_OUTPUT, {"p": packed}, grid=(1,), defines=(*defines, *part))

        if whole is None:
            launch()
            return
        launch(("PART", _SUMS))
        whole.add_up(whole.sums, whole.sums)
        launch(("PART", _LOSS))
        norm.sum_gradients()
        launch(("PART", _GRADIENT))

    def launch_gradient(self, launcher: Launcher, greatest: Greatest | None = None) -> bool:
        """Compute the gradients and, without `norm`, sum the loss. Call after `launch_logits`.

        Returns
        -------
        bool
            Whether `greatest` receives the greatest magnitudes of `out`; see `ActivationGradient`.
        """
        layer, walk, blocks = self.layer, launcher.walk, self._loss_blocks(launcher)
        few = self._classes <= 12
        widest = 2 if few else 1  # wider would need too many registers
        # Fewer sums are enough for the gradients of a linear head; see smxx_head.cu.
        linear = layer.norm is not None and self.reads == "none" and layer.drop != DROP_ACTIVATION
        back = BACK.pack(
            weight=self.weight, grad=self.grad_logits, out=self.out, window=self.window,
            partials=launcher.losses(blocks), mean_loss=self.mean_loss,
            grad_factor=self.grad_factor, partial_count=blocks, share=self._share,
        )  # fmt: skip
        arguments = {"p": layer.pack(), "back": back, **layer.gradients()}
        gate = ("GATE", GATES[self.gate] if self.reads == "sign" else 0)
        held = 4 * self.grad_logits.shape[1]
        sums = Sums(
            self._classes + 2 * (layer.norm is not None),
            row_bytes=held,
            block_bytes=128 * self._classes * linear,  # the weights of a strip
            width=64,  # wider would need too much shared memory
        )
        # Other heads compute more than they read, and so do those of many classes.
        clustered = replace(sums, always_clustered=True)
        columns = 2 * widest if linear else widest
        strips = walk.strips(layer, sums if linear and few else clustered, columns)
        if linear and not (strips.clustered or (few and strips.whole)):
            strips = walk.strips(layer, clustered, columns)
            if not strips.clustered:
                columns = widest
                strips = walk.strips(layer, clustered, columns)
        scratch = launcher.sums_over_rows(strips, sums.count)
        launcher.launch(
            HEAD_SUMS, {**arguments, **scratch, "grad_weight": self.grad_weight},
            grid=(strips.grid[0] + 1, strips.grid[1]),  # one extra strip, for the loss
            defines=(*strips.defines, *self._defines(), gate),
            threads=strips.threads, shared=strips.shared,
        )  # fmt: skip
        if strips.clustered:
            return False
        if layer.norm is not None:
            arguments |= layer.norm.sum_gradients()
        found, kind = greatest_of(greatest)
        defines = (*strips.defines, *self._defines(), gate, *kind)
        launcher.launch(HEAD_GRADIENT, arguments | found, grid=strips.grid, defines=defines)
        return greatest is not None
