"""Which kernel, with which tile, multiplies a shape on an architecture: data, and its look-up."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from cupybnn import settings

__all__ = [
    "KERNELS",
    "Config",
    "candidates",
    "choose",
    "default_kernel",
    "force_kernel",
    "kernels_for",
]

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


def _sm90(m: int, n: int, k: int, batch: int, packed: bool, scaled: bool) -> Config:
    chunks = -(-k // 1024)
    if min(m, n) <= 64:
        swap = m <= 64 and not packed
        narrow, wide = (m, n) if swap else (n, m)
        if narrow <= 64:
            least = 32 if packed else 16
            tile_n = next(t for t in (16, 32, 64) if t >= max(narrow, least))
            tiles = -(-wide // 128) * batch
            split = _split(tiles, chunks)
            return sm90(1, tile_n, 8, split_k=split, swap=swap)
    tiles = -(-m // 128) * -(-n // 128) * batch
    if tiles * 2 <= 132 and chunks > 1:
        return sm90(1, 128, 6, split_k=_split(tiles, chunks))
    if tiles <= 132 or (tiles <= 264 and not packed):
        return sm90(1, 128, 6)
    # Measured at 4096, 8192 and 16384 cubed (bench/NOTES.md). With a long K the tensor cores take
    # most of the time, and the tile with the least traffic wins; with a short one writing out does,
    # which deferring hides. Deferred, an accumulator must fit 16 bits and four products follow.
    if k >= 12288 or chunks < 4:
        return sm90(2, 128 if scaled else 192, 4)
    if packed and k < 6144:
        return sm90(2, 128, 4, deferred=True)
    return sm90(1, 256, 4, deferred=True, group=16 if packed else 8)


def _split(tiles: int, chunks: int) -> int:
    """Parts of K that fill the GPU: a power of two, no more than there are chunks."""
    split = 1
    while split < 8 and 2 * split <= chunks and 2 * split * tiles <= 132:
        split *= 2
    return split


def _sm80(capability: int, m: int, n: int, batch: int) -> Config:
    # sm_86, sm_89 and sm_12x have 99 KiB of shared memory a block, the others at least 163.
    roomy = capability in (80, 87, 90) or 100 <= capability < 120
    tiles = -(-m // 256) * -(-n // 128) * batch
    if roomy and tiles >= 100:
        return sm80(4, 2, 4, 8, 3)
    if -(-m // 128) * -(-n // 128) * batch >= 60:
        return sm80(2, 4, 4, 4, 3)
    return sm80(2, 2, 2, 4, 4)


def shipped(
    kernel: str, capability: int, m: int, n: int, k: int, batch: int, packed: bool, scaled: bool
) -> Config:
    """Return the configuration that the shipped table has for a shape."""
    if kernel == "sm90":
        return _sm90(m, n, k, batch, packed, scaled)
    if kernel == "sm80":
        return _sm80(capability, m, n, batch)
    return sm75() if kernel == "sm75" else smxx()


def candidates(kernel: str, capability: int, m: int, n: int, k: int, packed: bool) -> list[Config]:
    """Return the configurations of a kernel worth measuring for a shape."""
    chunks = -(-k // 1024)
    splits = [s for s in (1, 2, 4, 8) if s <= chunks]
    if kernel == "sm90":
        narrow = min(m, n)
        if narrow <= 64 and (m > 64 or not packed or n <= 64):
            swap = m <= 64 and not packed
            least = 32 if packed else 16
            tile_n = next(t for t in (16, 32, 64) if t >= max(narrow, least))
            if swap or n <= 64:
                return [
                    sm90(1, tile_n, stages, consumers=consumers, split_k=split, swap=swap)
                    for consumers, stages in ((1, 10), (2, 8))
                    for split in splits
                ]
        small = [sm90(1, 128, 6, split_k=split) for split in splits]
        small += [sm90(1, 64, 8, split_k=split) for split in splits]
        large = [
            sm90(blocks_m, tile_n, 4, cluster=cluster, deferred=deferred, group=group)
            for blocks_m, tile_n, deferred in (
                (1, 256, True), (2, 128, True), (1, 256, False), (2, 128, False), (2, 192, False),
            )
            for cluster in ((1, 1), (2, 1), (1, 2))
            for group in (8, 16)
            if not deferred or 4 <= chunks <= 63
        ]  # fmt: skip
        return small if m * n <= 1024 * 1024 else small[:1] + large
    if kernel == "sm80":
        tiles = [
            (2, 2, 2, 4, 4),
            (2, 4, 4, 4, 2),
            (2, 4, 4, 4, 3),
            (4, 2, 4, 8, 2),
            (4, 2, 4, 8, 3),
        ]
        room = 99 * 1024 if capability in (86, 89) or capability >= 120 else 163 * 1024
        return [c for c in (sm80(*t) for t in tiles) if c.shared_bytes(False) <= room]
    return [shipped(kernel, capability, m, n, k, 1, packed, False)]


_local = threading.local()


@contextlib.contextmanager
def force_kernel(name: str | Config | None) -> Iterator[None]:
    """Use one kernel, or one configuration, for all products of this thread inside the context.

    For tests, measurements and `cupybnn verify`; ``CUPYBNN_KERNEL`` does it for a whole process.

    Raises
    ------
    ValueError
        If there is no kernel of that name.
    """
    if isinstance(name, str):
        _check(name)
    before = forced()
    _local.forced = name
    try:
        yield
    finally:
        _local.forced = before


def _check(name: str) -> str:
    if name not in KERNELS:
        raise ValueError(f"The kernel must be one of {', '.join(KERNELS)}; got {name!r}.")
    return name


_from_environment = settings.kernel_override()


def forced() -> str | Config | None:
    """Return what `force_kernel` or the environment asks for, or None."""
    return getattr(_local, "forced", _from_environment)


def choose(
    capability: int,
    m: int,
    n: int,
    k: int,
    batch: int,
    packed: bool,
    scaled: bool,
    tuned: dict[str, Config],
) -> Config:
    """Return the configuration for `batch` products of (m, k) by (k, n).

    What is forced comes first, then what `cupybnn bench --tune` has measured on this GPU, then the
    shipped table. A compute capability that nobody planned for gets the portable kernel.

    Parameters
    ----------
    capability : int
        90 for 9.0.
    packed, scaled : bool
        Whether the result is packed, or scaled.
    tuned : dict
        Measured winners by `tuning.shape_key`.
    """
    asked = forced()
    if isinstance(asked, Config):
        config = asked
    else:
        applicable = kernels_for(capability)
        kernel = _check(asked) if asked else default_kernel(capability)
        if kernel not in applicable:
            raise ValueError(
                f"The kernel {kernel!r} does not run on compute capability "
                f"{capability // 10}.{capability % 10}; here run {', '.join(applicable)}."
            )
        config = shipped(kernel, capability, m, n, k, batch, packed, scaled)
        measured = tuned.get(shape_key(m, n, k, batch, packed))
        # A file may say anything: only a configuration that could have been measured is launched.
        if (
            measured is not None
            and not (asked or scaled)
            and measured in candidates(kernel, capability, m, n, k, packed)
        ):
            config = measured
    if settings.debug():
        print(
            f"cupybnn: {batch} x ({m}, {k}) @ ({k}, {n}){' packed' if packed else ''}: {config}",
            file=sys.stderr,
        )
    return config


def shape_key(m: int, n: int, k: int, batch: int, packed: bool) -> str:
    """Name of a shape in a tuned table."""
    return f"{batch}x{m}x{n}x{k}{'p' if packed else ''}"
