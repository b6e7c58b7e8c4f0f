"""Launches at the start of a training step: its batch, and dropout masks (smxx_batch.cu)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = ["ALL_KEPT", "Attack", "Deformation", "Draw", "DropoutMask", "Gather"]

BATCH = Struct(
    "Batch",
    "ptr images, all_labels, order, step, x, labels, pops; i64 ring, rows, cols, pop_count;"
    "i64 first, whole; u64 seed; i64 draw, last",
)
DEFORMATION = Struct(
    "Deformation",
    "i64 height, width; u64 seed; double shift, rotation, scale, shear, elastic;"
    "double bump_height, bump_width; i64 knots_down, knots_right, flip",
)
GATHER = Kernel("smxx_batch", "gather", "Batch p", BATCH)
GATHER_DEFORMED = Kernel(
    "smxx_batch", "gather_deformed", "Batch p; Deformation d", BATCH, DEFORMATION
)
ATTACK = Kernel("smxx_batch", "attack", "Batch p; ptr gradient; float amount", BATCH)
DROPOUT_MASK = Kernel(
    "smxx_batch",
    "dropout_mask",
    "ptr step; i64 rows, cols, first; u64 seed; i64 draw; u32 last; ptr kept",
)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Random numbers of one dropout layer."""

    seed: int
    offset: int  # the counter of a draw is the step number plus this
    keep_prob: float

    def fields(self) -> dict[str, int]:
        """Return the kernels' fields: seed, offset, and the largest word that is kept."""
        # As in cupybnn.backends.random.bernoulli.
        last = max(round(self.keep_prob * 2**32), 1) - 1
        return {"seed": self.seed, "draw": self.offset, "last": last}


#: A draw that drops nothing.
ALL_KEPT = Draw(seed=0, offset=0, keep_prob=1.0)


@dataclass(frozen=True, kw_only=True)
class Deformation:
    """Amounts of image deformation; see `cupybnn.data.Augmentation`."""

    shape: tuple[int, int]  # height and width
    seed: int  # combined with the step number, so that each step differs
    shift: float
    rotation: float
    scale: float
    shear: float
    elastic: float = 0.0
    flip: bool = False
    bumps: tuple[tuple[float, int], ...] = ((1.0, 0), (1.0, 0))  # width and number: down, right

    def pack(self) -> bytes:
        """Return struct Deformation."""
        height, width = self.shape
        (bump_height, knots_down), (bump_width, knots_right) = self.bumps
        return DEFORMATION.pack(
            height=height, width=width, seed=self.seed, shift=self.shift,
            rotation=math.radians(self.rotation), scale=self.scale, shear=self.shear,
            elastic=self.elastic, bump_height=bump_height, bump_width=bump_width,
            knots_down=knots_down, knots_right=knots_right, flip=self.flip,
        )  # fmt: skip

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block needs: the elastic field's numbers, and the image."""
        (height, width), ((_, down), (_, right)) = self.shape, self.bumps
        field = 2 * down * right + height * down + width * right + 2 * height * right
        return height * width + (4 * field if self.elastic > 0 else 0)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Common fields of `Gather` and `Attack`."""

    step: Any  # int64, (1,): the step number, on the device
    x: Any  # (batch, pixels): receives the pixels
    first: int = 0  # place of its first row in the whole batch, of which it may be a part
    whole: int | None = None  # images of the whole batch; None: as many as rows
    drop: Draw | None = None  # dropout of pixels; kept ones are not scaled
    pops: Any = None  # int32: set to 0

    def _pack(self, **arrays: Any) -> bytes:
        rows, cols = self.x.shape
        order = arrays["order"]
        return BATCH.pack(
            **arrays, step=self.step, x=self.x, pops=self.pops,
            ring=0 if order is None else order.shape[0], rows=rows, cols=cols,
            pop_count=0 if self.pops is None else self.pops.size, first=self.first,
            whole=rows if self.whole is None else self.whole, **(self.drop or ALL_KEPT).fields(),
        )  # fmt: skip

    def _defines(self, vector: int) -> tuple[tuple[str, int], ...]:
        return ("DROP", int(self.drop is not None)), ("VECTOR", vector)

    def _vector(self, *widths: int) -> int:
        return next(v for v in widths if self.x.shape[1] % v == 0)


@dataclass(frozen=True, kw_only=True)
class Gather(_Batch):
    """Copy the batch of a step: integers, unless they are deformed."""

    images: Any  # uint8, (images, pixels)
    all_labels: Any  # int64, (images,)
    order: Any  # int32, (ring, batch): indices of the images of step s in row s % ring
    labels: Any  # int64, (batch,): receives the labels
    deformation: Deformation | None = None

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        rows, cols = self.x.shape
        batch = self._pack(
            images=self.images, all_labels=self.all_labels, order=self.order, labels=self.labels
        )
        if self.deformation is not None:
            arguments = {"p": batch, "d": self.deformation.pack()}
            defines = self._defines(1)
            shared = self.deformation.shared
            launcher.launch(
                GATHER_DEFORMED, arguments, grid=(rows,), defines=defines, shared=shared
            )
            return
        # Stores of 16 bytes a thread: of more, each instruction would write parts of sectors.
        vector = self._vector(*(v for v in (8, 4, 1) if v * launcher.itemsize <= 16))
        # No more blocks than run at once: the latency of a second round costs more than its work.
        grid = launcher.flat_grid(rows * cols // vector, 8)
        launcher.launch(GATHER, {"p": batch}, grid=grid, defines=self._defines(vector))


@dataclass(frozen=True, kw_only=True)
class Attack(_Batch):
    """Move a batch's pixels, in place, by `amount` in the direction of their gradient."""

    gradient: Any  # (batch, pixels)
    amount: float

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream. With the same `drop` as `Gather`, dropped pixels stay 0."""
        vector = self._vector(4, 1)
        batch = self._pack(images=None, all_labels=None, order=None, labels=None)
        arguments = {"p": batch, "gradient": self.gradient, "amount": self.amount}
        grid = launcher.flat_grid(self.x.size // vector)
        launcher.launch(ATTACK, arguments, grid=grid, defines=self._defines(vector))


@dataclass(frozen=True, kw_only=True)
class DropoutMask:
    """Draw which elements of a layer are kept."""

    step: Any  # int64, (1,)
    draw: Draw
    shape: tuple[int, int]  # (batch, units)
    out: Any  # uint32, fused_layers.mask_shape: receives one bit per element
    first: int = 0  # place of the first row in the whole batch

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        rows, cols = self.shape
        fields = {**self.draw.fields(), "step": self.step, "rows": rows, "cols": cols}
        fields["first"] = self.first
        grid = launcher.flat_grid(self.out.size)
        defines = (("DROP", 0), ("VECTOR", 1))
        launcher.launch(DROPOUT_MASK, {**fields, "kept": self.out}, grid=grid, defines=defines)
