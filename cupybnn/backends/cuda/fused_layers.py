"""Launches of a hidden layer: product to activation, its gradient, and unpacking of signs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cupybnn.backends.cuda.compiler import Defines
from cupybnn.backends.cuda.fused import THREADS, Launcher
from cupybnn.backends.cuda.fused_walk import Sums
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = [
    "DROP_ACTIVATION",
    "DROP_NONE",
    "DROP_PRODUCT",
    "GATES",
    "OUTPUTS",
    "Activation",
    "ActivationGradient",
    "Activations",
    "BatchNorm",
    "Greatest",
    "Layer",
    "UnpackColumns",
    "UnpackRows",
    "WholeBatch",
    "greatest_of",
    "mask_shape",
]

# As in layer.cuh and the kernels.
DROP_NONE, DROP_PRODUCT, DROP_ACTIVATION = range(3)
GATES = {"none": 0, "mask": 1, "clip": 2}
OUTPUTS = {"packed_sign": 0, "sign": 1, "relu": 2, "none": 3, "both_signs": 4}
_PRODUCT_TYPES = {
    "float32": "float",
    "float16": "float16_bits",
    "int16": "short",
    "uint16": "bfloat16_bits",
}

LAYER = Struct(
    "Layer", "ptr z, kept, mean, inverse, gamma, beta; i64 rows, cols; double keep_scale, share"
)
ACTIVATIONS = Struct("Activations", "ptr dense, words, pops, gate; double window")
NORMALISE = Kernel(
    "smxx_activation",
    "normalise",
    "Layer p; ptr partials, tickets, mean, inverse, running_mean, running_variance, sums_of_rows;"
    "float decay, gain, eps; Activations to",
    LAYER,
    ACTIVATIONS,
)
WHOLE_STATISTICS = Kernel(
    "smxx_activation",
    "whole_statistics",
    "Layer p; ptr sums_of_rows, mean, inverse, running_mean, running_variance;"
    "float decay, gain, eps",
    LAYER,
)
ACTIVATE = Kernel("smxx_activation", "activate", "Layer p; Activations to", LAYER, ACTIVATIONS)
GRADIENT_SUMS = Kernel(
    "smxx_activation_gradient",
    "gradient_sums",
    "Layer p; ptr grad, out, gate, partials, tickets, grad_gamma, grad_beta",
    LAYER,
)
GRADIENT = Kernel(
    "smxx_activation_gradient",
    "gradient",
    "Layer p; ptr grad, out, gate, grad_gamma, grad_beta, row_most, col_most",
    LAYER,
)
UNPACK_ROWS = Kernel("smxx_unpack_signs", "unpack_rows", "ptr words; i64 rows, cols; ptr out")
UNPACK_COLUMNS = Kernel("smxx_unpack_signs", "unpack_columns", "ptr words; i64 rows, cols; ptr out")


def mask_shape(rows: int, cols: int) -> tuple[int, int]:
    """Return the shape of the uint32 words of a mask with one bit per element."""
    return rows, -(-cols // 32)


@dataclass(frozen=True, kw_only=True)
class WholeBatch:
    """What a batch norm needs whose batch has further rows on other ranks."""

    rows: int  # of all ranks
    sums: Any  # float64, (2, columns): receives the sums of products and of their squares
    mine: Any  # float32, (2, n): the gradients of gamma and beta in a row each
    gradients: Any  # likewise: receives the sum of these
    add_up: Callable[[Any, Any], None]  # writes the sum over all ranks of an array into another

    def arrays(self, columns: int) -> dict[str, Any]:
        """Return the gradients of the parameters, by the kernels' names."""
        gamma, beta = self.gradients[:, :columns]
        return {"grad_gamma": gamma, "grad_beta": beta}


@dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """Batch norm: float32 arrays with one element per column."""

    gamma: Any
    beta: Any
    grad_gamma: Any  # receive the parameters' gradients
    grad_beta: Any
    running_mean: Any  # updated by each forward pass
    running_variance: Any
    mean: Any = None  # receive the batch statistics, for a hidden layer
    inverse: Any = None  # 1 / standard deviation
    decay: float
    eps: float
    whole: WholeBatch | None = None

    def gradients(self) -> dict[str, Any]:
        """Return the arrays for the parameters' gradients, by the kernels' names."""
        return {"grad_gamma": self.grad_gamma, "grad_beta": self.grad_beta}

    def sum_gradients(self) -> dict[str, Any]:
        """Return the gradients over all rows that are normalized together, adding up if need be."""
        if self.whole is None:
            return self.gradients()
        self.whole.add_up(self.whole.mine, self.whole.gradients)
        return self.whole.arrays(self.gamma.size)

    def rows(self, rows: int) -> int:
        """Return how many rows are normalized together with `rows` of this rank."""
        return rows if self.whole is None else self.whole.rows


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A hidden layer's product, and the operations between it and the activation."""

    # (batch, units): float32; float16 or int16 that holds its integers; uint16 for bfloat16.
    product: Any
    kept: Any = None  # uint32, mask_shape: elements kept by dropout
    norm: BatchNorm | None = None
    drop: int = DROP_NONE  # DROP_*: position of dropout
    keep_prob: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, units)."""
        rows, cols = self.product.shape
        return rows, cols

    def defines(self) -> Defines:
        """Return the macros of a translation unit for this layer."""
        return (
            ("DROP", self.drop),
            ("NORM", int(self.norm is not None)),
            ("PRODUCT", _PRODUCT_TYPES[self.product.dtype.name]),
        )

    def gradients(self) -> dict[str, Any]:
        """Return the arrays for the gradients of the batch norm, None without one."""
        return self.norm.gradients() if self.norm else {"grad_gamma": None, "grad_beta": None}

    def pack(self) -> bytes:
        """Return struct Layer."""
        rows, cols = self.shape
        together = rows if self.norm is None else self.norm.rows(rows)
        names = ("mean", "inverse", "gamma", "beta")
        return LAYER.pack(
            z=self.product, kept=self.kept, **{n: getattr(self.norm, n, None) for n in names},
            rows=rows, cols=cols, keep_scale=1 / self.keep_prob, share=1 / together,
        )  # fmt: skip


class Greatest(Protocol):
    """Memory for the greatest magnitudes of a gradient's rows and columns, as bits of floats."""

    row_most: Any  # uint32, (batch,): zeros when a kernel adds to them
    col_most: Any  # uint32, (units,)

    def clear(self) -> None:
        """Set all to zeros on the current stream."""


def greatest_of(greatest: Greatest | None) -> tuple[dict[str, Any], Defines]:
    """Return a kernel's arguments and macro to find them, or not; they are cleared for it."""
    if greatest is None:
        return {"row_most": None, "col_most": None}, ()
    greatest.clear()
    arguments = {"row_most": greatest.row_most, "col_most": greatest.col_most}
    return arguments, (("GREATEST", 1),)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Outputs of a layer's activation."""

    output: str = "none"  # a key of OUTPUTS; "none": compute only the batch-norm statistics
    dense: Any = None  # receives the activations, unless they are only packed
    packed: Any = None  # PackedMatrix along the last axis: receives signs; popcounts must be 0
    gate: Any = None  # uint32, mask_shape: receives a mask of where the gradient passes
    window: float = 0.0  # half the width of the window in which sign has a pseudo-gradient

    def defines(self) -> Defines:
        """Return the macros of the translation unit for these outputs."""
        return (("GATE", int(self.gate is not None)), ("OUTPUT", OUTPUTS[self.output]))

    def pack(self) -> bytes:
        """Return struct Activations."""
        words, pops = getattr(self.packed, "words", None), getattr(self.packed, "popcounts", None)
        return ACTIVATIONS.pack(
            dense=self.dense, words=words, pops=pops, gate=self.gate, window=self.window
        )


@dataclass(frozen=True, kw_only=True)
class Activation:
    """Normalize a layer's product over the batch, if it has batch norm, and take sign or ReLU."""

    layer: Layer
    to: Activations

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        layer, norm, to = self.layer, self.layer.norm, self.to
        arguments = {"p": layer.pack(), "to": to.pack()}
        kinds = to.defines()
        if norm is not None:
            whole = norm.whole
            kinds = kinds if whole is None else (*kinds, ("SHARED_BATCH", 1))
            sums = Sums(2, most_warps=16)
            strips = launcher.walk.strips(layer, sums)
            statistics = {
                "sums_of_rows": None if whole is None else whole.sums, "mean": norm.mean,
                "inverse": norm.inverse, "running_mean": norm.running_mean,
                "running_variance": norm.running_variance, "decay": norm.decay,
                "gain": 1 - norm.decay, "eps": norm.eps,
            }  # fmt: skip
            scratch = launcher.sums_over_rows(strips, sums.count)
            launcher.launch(
                NORMALISE, {**arguments, **scratch, **statistics}, grid=strips.grid,
                defines=(*strips.defines, *kinds), threads=strips.threads, shared=strips.shared,
            )  # fmt: skip
            if whole is not None:
                assert not strips.clustered, "the activations follow later"
                whole.add_up(whole.sums, whole.sums)
                launcher.launch(
                    WHOLE_STATISTICS, {"p": arguments["p"], **statistics},
                    grid=(-(-layer.shape[1] // strips.threads),), threads=strips.threads,
                    defines=(*strips.defines, *kinds),
                )  # fmt: skip
            if strips.clustered:  # that kernel also computes the activations
                return
        if to.output != "none":
            strips = launcher.walk.strips(layer)
            defines = (*strips.defines, *kinds)
            launcher.launch(ACTIVATE, arguments, grid=strips.grid, defines=defines)


@dataclass(frozen=True, kw_only=True)
class ActivationGradient:
    """Compute the gradient of a layer's product from that of its activations."""

    layer: Layer  # its batch norm receives gradients, too
    gate: str  # a key of GATES
    mask: Any  # Activations.gate, for the gate "mask"
    grad: Any  # (batch, units)
    out: (
        Any  # (batch, units): may be `grad`, or the product's memory if elements have the same size
    )

    def can_be_summed(self) -> bool:
        """Whether `sign_gemm.transposed_product`, which computes `grad`, can add it up, too."""
        norm = self.layer.norm
        return norm is not None and norm.whole is None and self.layer.drop == DROP_NONE

    def launch(
        self, launcher: Launcher, greatest: Greatest | None = None, summed: bool = False
    ) -> bool:
        """Launch on the current stream.

        Parameters
        ----------
        launcher : Launcher
        greatest : Greatest, optional
            Receives the greatest magnitudes of the result.
        summed : bool
            Whether the gradients of batch norm's parameters have been computed already.

        Returns
        -------
        bool
            Whether it does: large layers' kernels find them.
        """
        layer, walk = self.layer, launcher.walk
        arguments = {"p": layer.pack(), "grad": self.grad, "out": self.out, "gate": self.mask}
        arguments |= layer.gradients()
        gate = ("GATE", GATES[self.gate])
        if layer.norm is not None and not summed:
            sums = Sums(2, launcher.itemsize, 4 * (self.gate == "mask"), most_warps=16)
            strips = walk.strips(layer, sums)
            launcher.launch(
                GRADIENT_SUMS, {**arguments, **launcher.sums_over_rows(strips, sums.count)},
                grid=strips.grid, defines=(*strips.defines, gate), threads=strips.threads,
                shared=strips.shared,
            )  # fmt: skip
            if strips.clustered:  # that kernel also computes the gradient
                return False
            arguments |= layer.norm.sum_gradients()
        strips = walk.strips(layer)
        found, kind = greatest_of(greatest)
        launcher.launch(
            GRADIENT, arguments | found, grid=strips.grid, defines=(*strips.defines, gate, *kind)
        )
        return greatest is not None


@dataclass(frozen=True, kw_only=True)
class UnpackRows:
    """Unpack signs that are packed along the last axis to +1 and -1."""

    packed: Any  # PackedMatrix
    out: Any  # of its shape

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        rows, cols = self.out.shape
        launcher.launch(
            UNPACK_ROWS,
            {"words": self.packed.words, "rows": rows, "cols": cols, "out": self.out},
            grid=(min(-(-rows * -(-cols // 8) // THREADS), 1 << 20),),
            defines=(("VECTOR", 8 if cols % 8 == 0 else 1),),
        )


@dataclass(frozen=True, kw_only=True)
class UnpackColumns:
    """Unpack signs that are packed along the first axis to +1 and -1."""

    packed: Any  # PackedMatrix
    out: Any  # of its shape

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        rows, cols = self.out.shape
        vector = 16 // self.out.itemsize  # the most that a lane can store at once
        while cols % vector:
            vector //= 2
        launcher.launch(
            UNPACK_COLUMNS,
            {"words": self.packed.words, "rows": rows, "cols": cols, "out": self.out},
            grid=(-(-rows // 128) * -(-cols // (THREADS * vector)),),
            defines=(("VECTOR", vector),),
        )
