"""The ways to compile and launch a product kernel: kernels, and configurations of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KERNELS", "Config", "default_kernel", "kernels_for", "sm75", "sm80", "sm90", "smxx"]

# Kernels by the source file's prefix, fastest first, with the compute capabilities they run on.
KERNELS = {
    "sm90": range(90, 100),
    "sm80": range(80, 1000),
    "sm75": range(75, 1000),
    "smxx": range(0, 1000),
}


@dataclass(frozen=True)
class Config:
    """One way to compile and launch a product kernel.

    Attributes
    ----------
    kernel : str
        A key of `KERNELS`; the source is ``kernels/<kernel>_xnor_gemm.cu``.
    defines : tuple of (name, int)
        What the translation unit defines, beside the kind of output.
    tile_m, tile_n : int
        Results of a block.
    cluster_m, cluster_n : int
        Blocks that share the tiles they load.
    split_k : int
        Blocks that share a tile's K.
    threads : int
        Of a block.
    slot_bytes, stages : int
        Dynamic shared memory for operands: bytes of a slot, and slots. 0 where none is asked for.
    persistent : bool
        Whether a block goes on to further tiles, so that the GPU is filled only once.
    swap : bool
        Whether the operands change places, so that a narrow result becomes a flat one.
    group : int
        Tiles of m that are walked together.
    """

    kernel: str
    defines: tuple[tuple[str, int], ...]
    tile_m: int
    tile_n: int
    threads: int
    slot_bytes: int = 0
    stages: int = 0
    cluster_m: int = 1
    cluster_n: int = 1
    split_k: int = 1
    persistent: bool = False
    swap: bool = False
    group: int = 8

    def __str__(self) -> str:
        cluster = self.cluster_m * self.cluster_n
        return (
            f"{self.kernel} {self.tile_m}x{self.tile_n}"
            + (f" cluster {self.cluster_m}x{self.cluster_n}" if cluster > 1 else "")
            + (f" split-K {self.split_k}" if self.split_k > 1 else "")
            + (" swapped" if self.swap else "")
            + (f" group {self.group}" if self.group != 8 else "")
            + (" deferred" if self.deferred else "")
            + (f", {self.stages} stages" if self.stages else "")
        )

    @property
    def deferred(self) -> bool:
        """Whether a tile is written out while the next one is multiplied."""
        return ("DEFERRED", 1) in self.defines

    def shared_bytes(self, scaled: bool) -> int:
        """Bytes of dynamic shared memory that a block asks for."""
        if self.kernel != "sm90":
            return self.stages * self.slot_bytes
        # struct Shared of sm90_xnor_gemm.cu: slots, barriers, terms.
        terms = (12 if scaled else 4) * (self.tile_m + self.tile_n) + 4 * -(-self.tile_n // 32)
        tiles = 2 if self.deferred else 1
        return self.stages * (self.slot_bytes + 16) + tiles * (16 + (terms + 15 & ~15))

    def blocks(self, m: int, n: int, batch: int, multiprocessors: int) -> int:
        """Blocks to launch for `batch` products of m x n results (after any swap)."""
        cluster = self.cluster_m * self.cluster_n
        tiles = (
            -(-m // (self.tile_m * self.cluster_m))
            * -(-n // (self.tile_n * self.cluster_n))
            * batch
        )
        if self.persistent:
            return min(tiles, multiprocessors // cluster) * cluster
        return tiles * self.split_k


def smxx() -> Config:
    """Population counts, on any GPU."""
    return Config("smxx", (), 64, 64, 256)


def sm75() -> Config:
    """Tensor cores by XOR, from Turing on."""
    return Config("sm75", (), 64, 64, 128)


def sm80(
    warps_m: int, warps_n: int, blocks_m: int, blocks_n: int, stages: int, group: int = 8
) -> Config:
    """Tensor cores by mma.sync; a warp has 16·blocks_m x 8·blocks_n results."""
    tile_m, tile_n = 16 * blocks_m * warps_m, 8 * blocks_n * warps_n
    defines = (
        ("BLOCKS_M", blocks_m),
        ("BLOCKS_N", blocks_n),
        ("STAGES", stages),
        ("WARPS_M", warps_m),
        ("WARPS_N", warps_n),
    )
    slot = (tile_m + tile_n) * 128
    return Config("sm80", defines, tile_m, tile_n, 32 * warps_m * warps_n, slot, stages)


def sm90(
    blocks_m: int,
    tile_n: int,
    stages: int,
    *,
    consumers: int = 2,
    cluster: tuple[int, int] = (1, 1),
    split_k: int = 1,
    deferred: bool = False,
    swap: bool = False,
    group: int = 8,
) -> Config:
    """Hopper's tensor cores by wgmma; a consumer has 64·blocks_m x tile_n results."""
    tile_m = 64 * blocks_m * consumers
    defines = (
        ("BLOCKS_M", blocks_m),
        ("CLUSTER_M", cluster[0]),
        ("CLUSTER_N", cluster[1]),
        ("CONSUMERS", consumers),
        ("DEFERRED", int(deferred)),
        ("SPLIT_K", split_k),
        ("STAGES", stages),
        ("TILE_N", tile_n),
    )
    slot = (tile_m + tile_n) * 128
    return Config(
        "sm90", defines, tile_m, tile_n, 128 * (consumers + 1), slot, stages,
        cluster[0], cluster[1], split_k, split_k == 1, swap, group,
    )  # fmt: skip


def kernels_for(capability: int) -> list[str]:
    """Return the kernels that run on a compute capability (90 for 9.0), fastest first."""
    return [name for name, capabilities in KERNELS.items() if capability in capabilities]


def default_kernel(capability: int) -> str:
    """Return the kernel that products use on a compute capability unless told otherwise."""
    applicable = kernels_for(capability)
    # From Hopper on XOR is emulated, slower than counting bits; sm75 is for sm_75 alone.
    return next(name for name in applicable if name != "sm75" or "sm80" not in applicable)
