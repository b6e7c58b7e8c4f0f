"""How fused kernels traverse a layer in strips (strips.cuh): grids and macros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cupybnn.backends.cuda.compiler import (
    Defines,
    architecture,
    multiprocessors,
    shared_memory_limit,
)

if TYPE_CHECKING:
    from cupybnn.backends.cuda.fused_layers import Layer

__all__ = ["Strips", "Sums", "Walk"]

_WARPS, _COLS = 8, 32
# Without clusters, threads of four columns take wider strips: words of signs and masks are then
# written four at a time.
_WIDE = 128
# With more blocks of clusters per multiprocessor than this, two launches that only read and write
# are faster than one that waits for its sums, although they read everything twice.
_MOST_ROUNDS = 4
# With few blocks and many rows per thread, use more threads.
_FEW_BLOCKS, _MANY_ROWS = 1, 8  # blocks per multiprocessor, rows per thread


@dataclass(frozen=True)
class Sums:
    """The sums over rows of a kernel, and what it holds in shared memory between its passes."""

    count: int  # sums per column
    itemsize: int = 0  # of the array held in addition to the products; 0 for none
    row_bytes: int = 0  # other bytes held per row
    block_bytes: int = 0  # other bytes of a block
    most_warps: int = _WARPS  # 16 if registers allow two such blocks per multiprocessor
    always_clustered: bool = False  # for large layers, too
    width: int = _WIDE  # columns of a strip without clusters, if threads have four


@dataclass(frozen=True)
class Strips:
    """The traversal of a layer in strips of columns."""

    defines: Defines
    grid: tuple[int, int]
    clustered: bool  # whether the blocks of a strip are a cluster
    threads: int  # per block
    cols: int  # of the layer
    shared: int = 0  # bytes of dynamic shared memory

    @property
    def whole(self) -> bool:
        """Whether every strip, and every thread's part of it, is whole: see strips.cuh."""
        return bool(dict(self.defines)["WHOLE"])

    def partials(self, sums: int) -> int:
        """Return how many partial results the blocks write for `sums` sums per column."""
        return 0 if self.clustered else self.grid[1] * sums * self.cols


class Walk:
    """The choice of strips for layers on a CUDA device.

    Parameters
    ----------
    device : int
    clusters : bool
        Whether a kernel may go on with its sums. Not if they are added up over ranks in between.
    """

    def __init__(self, device: int, clusters: bool = True) -> None:
        self._multiprocessors = multiprocessors(device)
        self._shared = shared_memory_limit(device)
        self._has_clusters = clusters and architecture(device) >= 90
        # Data-center Hopper runs clusters of 16 blocks; elsewhere only 8 are guaranteed.
        self._has_large_clusters = architecture(device) == 90

    def strips(self, layer: Layer, sums: Sums | None = None, vector: int = 4) -> Strips:
        """Return the strips for a layer; clusters help only if there are sums.

        A thread has `vector` columns, halved until they divide the layer's.
        """
        rows, cols = layer.shape
        while cols % vector:
            vector //= 2
        at_once = _rows_at_once(_WARPS, vector)
        blocks, warps, held, shared = 1, _WARPS, 0, 0
        width, turns = _COLS, 0
        if sums is not None and self._has_clusters:
            while blocks < min(self._most_blocks(layer, sums, at_once), -(-rows // at_once)):
                blocks *= 2
            rounds = -(-cols // _COLS) * blocks / self._multiprocessors
            if rounds > _MOST_ROUNDS and not sums.always_clustered:
                blocks = 1
        clustered = blocks > 1
        if sums is not None and clustered:
            if rounds <= _FEW_BLOCKS and rows >= _MANY_ROWS * blocks * at_once:
                warps = sums.most_warps
            held, shared = self._held(layer, sums, vector, warps, blocks)
            turns = held
        else:
            width = self.width(cols, vector)
            width = width if sums is None else min(width, sums.width)
            blocks = self._blocks_of(rows, cols, vector, width)
            turns = 8
        at_once = _rows_at_once(warps, vector, width)
        whole = turns > 0 and cols % width == 0 and rows % (turns * at_once * blocks) == 0
        defines = (
            ("BLOCK_WARPS", warps),
            ("CLUSTER", blocks if clustered else 1),
            ("COLS", width),
            *layer.defines(),
            ("HELD", held),
            ("VECTOR", vector),
            ("WHOLE", int(whole)),
        )
        return Strips(defines, (-(-cols // width), blocks), clustered, 32 * warps, cols, shared)

    def _held(
        self, layer: Layer, sums: Sums, vector: int, warps: int, blocks: int
    ) -> tuple[int, int]:
        """Return how many of a thread's rows are held, all or none, and their bytes."""
        at_once = _rows_at_once(warps, vector)
        turns = -(-layer.shape[0] // (blocks * at_once))
        itemsize = layer.product.dtype.itemsize
        if vector * min(itemsize, sums.itemsize or itemsize) < 4:
            return 0, 0  # too small for an asynchronous copy
        # The kernels' loops process 8 rows at a time, or a divisor of 8.
        held = -(-turns // 8) * 8 if turns > 4 else 1 << (turns - 1).bit_length()
        row_bytes, own = self._bytes(layer, sums, itemsize, warps)
        shared = held * at_once * row_bytes
        return (held, shared) if shared + own <= self._shared else (0, 0)

    @staticmethod
    def _bytes(layer: Layer, sums: Sums, itemsize: int, warps: int = _WARPS) -> tuple[int, int]:
        """Return the bytes held per row of a strip, and those a block needs in addition."""
        row = _COLS * (itemsize + sums.itemsize) + sums.row_bytes + 4 * (layer.drop != 0)
        # Sums of warps (float) and of the cluster (double), plus a margin.
        return row, sums.count * _COLS * (4 * warps + 8) + sums.block_bytes + 4096

    def _most_blocks(self, layer: Layer, sums: Sums, at_once: int) -> int:
        """Return the maximum blocks per cluster: 8, or 16 if two blocks would not fit an SM.

        With two, one block computes while the other waits for its rows. The number is the same for
        every product type, because the order of summation depends on it.
        """
        row_bytes, own = self._bytes(layer, sums, 4)
        turns = -(-layer.shape[0] // (8 * at_once))
        fits = 2 * (turns * at_once * row_bytes + own + 1024) <= self._shared + 1024
        return 16 if self._has_large_clusters and not fits else 8

    def most_partials(self, rows: int, cols: int, sums: int) -> int:
        """Return the maximum of `Strips.partials` for a layer of this shape."""
        return max(self.row_blocks(rows, cols, vector) for vector in (1, 2, 4)) * sums * cols

    @staticmethod
    def width(cols: int, vector: int) -> int:
        """Return the columns of a strip, without clusters."""
        return _WIDE if vector == 4 and cols >= _WIDE else _COLS

    def row_blocks(self, rows: int, cols: int, vector: int) -> int:
        """Return the number of blocks that share the rows of a strip, without clusters.

        A power of two, so that layers whose shapes are powers of two need no checks.
        """
        return self._blocks_of(rows, cols, vector, self.width(cols, vector))

    def _blocks_of(self, rows: int, cols: int, vector: int, width: int) -> int:
        fill = -(-8 * self._multiprocessors // -(-cols // width))
        most = max(1, min(rows // (2 * _rows_at_once(_WARPS, vector, width)), fill))
        return 1 << (most.bit_length() - 1)


def _rows_at_once(warps: int, vector: int, width: int = _COLS) -> int:
    return 32 * warps * vector // width
