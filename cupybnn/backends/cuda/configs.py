"""A product to launch, and a configuration of its kernel."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Config", "Problem"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`batch` products of (m, k) by (k, n), and the GPU that computes them."""

    m: int
    n: int
    k: int
    batch: int = 1
    packed: bool = False  # whether the result is packed, or scaled
    scaled: bool = False
    planes: int = 1  # bit planes of an operand
    capability: int  # compute capability of the device, 90 for 9.0
    multiprocessors: int  # of the device

    @property
    def chunks(self) -> int:
        """Number of 1024-bit chunks in a line."""
        return -(-self.k // 1024)

    def tiles(self, tile_m: int, tile_n: int) -> int:
        """Return the number of tiles of that size in the whole batch."""
        return -(-self.m // tile_m) * -(-self.n // tile_n) * self.batch

    @property
    def key(self) -> str:
        """Name of the shape in a tuned table."""
        return f"{self.batch}x{self.m}x{self.n}x{self.k}{'p' if self.packed else ''}{_planes(self)}"

    def __str__(self) -> str:
        packed = " packed" if self.packed else ""
        planes = f", {self.planes} planes" if self.planes > 1 else ""
        return f"{self.batch} x ({self.m}, {self.k}) @ ({self.k}, {self.n}){packed}{planes}"


def _planes(problem: Problem) -> str:
    return f"b{problem.planes}" if problem.planes > 1 else ""


@dataclass(frozen=True)
class Config:
    """How to compile and launch a product kernel, ``kernels/<kernel>_xnor_gemm.cu``."""

    kernel: str  # a key of architectures.KERNELS
    defines: tuple[tuple[str, int], ...]  # in addition to the output type
    tile_m: int  # results per block
    tile_n: int
    threads: int  # per block
    shared: int = 0  # dynamic shared memory per block in bytes, ...
    shared_scaled: int = 0  # ... and for a scaled result
    stages: int = 0  # slots for operands in shared memory
    cluster_m: int = 1  # blocks that share the tiles they load
    cluster_n: int = 1
    split_k: int = 1  # blocks of a cluster that share a tile's K
    parts: int = 1  # at least so many clusters share a tile's K
    persistent: bool = False  # blocks loop over tiles: the GPU is filled only once
    resident: int = 1  # blocks that a multiprocessor has room for, if persistent
    overlap: bool = False  # the kernel may begin before the previous one has ended
    swap: bool = False  # swap the operands: a narrow result becomes a flat one
    group: int = 8  # tiles of m that are visited together

    def __str__(self) -> str:
        cluster = self.cluster_m * self.cluster_n
        return (
            f"{self.kernel} {self.tile_m}x{self.tile_n}"
            + (f" cluster {self.cluster_m}x{self.cluster_n}" if cluster > 1 else "")
            + (f" split-K {self.split_k}" if self.split_k > 1 else "")
            + (f" by {self.parts}" if self.parts > 1 else "")
            + (" swapped" if self.swap else "")
            + (f" group {self.group}" if self.group != 8 else "")
            + (" deferred" if self.deferred else "")
            + (f", {self.stages} stages" if self.stages else "")
        )

    @property
    def deferred(self) -> bool:
        """Whether a tile is written out while the next one is multiplied."""
        return dict(self.defines).get("DEFERRED", 0) > 0

    def shared_bytes(self, scaled: bool) -> int:
        """Return the bytes of dynamic shared memory per block."""
        return self.shared_scaled if scaled else self.shared

    def tiles(self, m: int, n: int, batch: int) -> int:
        """Return the number of tiles of `batch` products of m x n results (after any swap).

        Blocks that share what they load have one larger tile together.
        """
        tiles_m = -(-m // (self.tile_m * self.cluster_m))
        return tiles_m * -(-n // (self.tile_n * self.cluster_n)) * batch

    def parts_of(self, chunks: int) -> int:
        """Return the number of clusters that share a tile's K of so many chunks.

        A block that splits K has at least one chunk and at most 63: its counts must fit 16 bits.
        """
        if self.split_k == 1:
            return 1
        return max(min(self.parts, chunks // self.split_k), -(-chunks // (63 * self.split_k)))

    def sums_bytes(self, tiles: int, parts: int) -> int:
        """Return the bytes of memory, zero at first, for the sums of tiles that have `parts`."""
        return 4 * tiles * (self.tile_m * self.tile_n + self.split_k) if parts > 1 else 0

    def blocks(self, tiles: int, parts: int, multiprocessors: int) -> int:
        """Return the number of blocks for so many tiles."""
        cluster = self.cluster_m * self.cluster_n
        if self.persistent:
            return min(tiles, self.resident * multiprocessors // cluster) * cluster
        return tiles * self.split_k * parts
