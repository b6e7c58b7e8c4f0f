"""The launch that moves a training step's images among their neighbors (smxx_neighbors.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = ["MoveAmongNeighbors", "shared_bytes"]

NEIGHBORS = Struct(
    "Neighbors",
    "ptr images, all_labels, order, table, step, out, labels; i64 ring, rows, cols, nearest;"
    "i64 first, whole; u64 seed; i64 factor, brightest",
)
MOVE = Kernel("smxx_neighbors", "move_among_neighbors", "Neighbors p", NEIGHBORS)


@dataclass(frozen=True, kw_only=True)
class MoveAmongNeighbors:
    """Move the images of a step's batch; see `cupybnn.data.NeighborNoise`."""

    images: Any  # uint8, (images, pixels)
    all_labels: Any  # int64, (images,)
    order: Any  # int32, (ring, batch): indices of the images of step s in row s % ring
    table: Any  # int32, (images, neighbors)
    step: Any  # int64, (1,): the step number, on the device
    out: Any  # uint8, (batch, pixels)
    labels: Any  # int64, (batch,): receives the labels
    seed: int
    factor: int  # from random numbers to multiples, in units of 2**-digits
    digits: int
    brightest: int
    first: int = 0  # place of the first row in the whole batch, of which it may be a part
    whole: int | None = None  # images of the whole batch; None: as many as rows

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        rows, cols = self.out.shape
        nearest = self.table.shape[1]
        packed = NEIGHBORS.pack(
            images=self.images, all_labels=self.all_labels, order=self.order, table=self.table,
            step=self.step, out=self.out, labels=self.labels, ring=self.order.shape[0], rows=rows,
            cols=cols, nearest=nearest, first=self.first,
            whole=rows if self.whole is None else self.whole, seed=self.seed, factor=self.factor,
            brightest=self.brightest,
        )  # fmt: skip
        defines = (("VECTOR", next(v for v in (4, 1) if cols % v == 0)), ("DIGITS", self.digits))
        launcher.launch(
            MOVE, {"p": packed}, grid=(rows,), defines=defines, shared=shared_bytes(nearest)
        )


def shared_bytes(nearest: int) -> int:
    """Return the bytes of shared memory that a block needs: neighbors, and multiples."""
    return 8 * nearest
