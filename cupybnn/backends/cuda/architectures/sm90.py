"""Hopper's tensor cores by wgmma."""

from __future__ import annotations

from cupybnn.backends.cuda.configs import Config, Problem

CAPABILITIES = range(90, 100)
TARGET = "sm_90a"  # wgmma and setmaxnreg need code specific to Hopper

_SPLITS = (1, 2, 4, 8)


def config(
    blocks_m: int,
    tile_n: int,
    stages: int,
    *,
    consumers: int = 2,
    cluster: tuple[int, int] = (1, 1),
    split_k: int = 1,
    parts: int = 1,
    deferred: bool = False,
    swap: bool = False,
    group: int = 8,
) -> Config:
    """Return a configuration; a consumer has 64·blocks_m x tile_n results."""
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

    def shared(scaled: bool) -> int:
        # struct Shared of sm90_xnor_gemm.cu: slots, barriers, terms.
        terms = (12 if scaled else 4) * (tile_m + tile_n) + 4 * -(-tile_n // 32)
        tiles = 2 if deferred else 1
        return stages * ((tile_m + tile_n) * 128 + 16) + tiles * (16 + (terms + 15 & ~15)) + 16

    # Small tiles take few registers, and two blocks of little shared memory fit a multiprocessor.
    small = blocks_m * tile_n <= 64 and shared(True) <= 113 * 1024
    return Config(
        "sm90", defines, tile_m, tile_n, 128 * (consumers + 1), shared(False), shared(True),
        stages, cluster[0], cluster[1], split_k, parts, split_k == 1, 2 if small else 1, True,
        swap, group,
    )  # fmt: skip


def _narrow(problem: Problem) -> tuple[bool, int] | None:
    """Return whether to swap, and the tile's columns, for a narrow result; None for others."""
    swap = problem.m <= 64 and not problem.packed
    narrow = problem.m if swap else problem.n
    if narrow > 64:
        return None
    return swap, next(t for t in ((32, 64) if problem.packed else (16, 32, 64)) if t >= narrow)


def choose(problem: Problem) -> Config:
    """Return the configuration for a problem."""
    chunks, multiprocessors = problem.chunks, problem.multiprocessors
    narrow = _narrow(problem)
    if narrow is not None:
        swap, tile_n = narrow
        tiles = -(-(problem.n if swap else problem.m) // 128) * problem.batch
        return config(1, tile_n, 8, split_k=_split(tiles, problem), swap=swap)
    tiles = problem.tiles(128, 128)
    if tiles * 2 <= multiprocessors and chunks == 1:
        # One slot is loaded, multiplied and written out: smaller blocks finish sooner.
        return config(1, 64, 8, consumers=1 if tiles * 4 <= multiprocessors else 2)
    if tiles * 2 <= multiprocessors:
        return config(1, 128, 6, split_k=_split(tiles, problem))
    if tiles <= multiprocessors or (tiles <= 2 * multiprocessors and not problem.packed):
        return config(1, 128, 6)
    # Measured at 4096, 8192 and 16384 cubed (bench/NOTES.md). With a long K the tensor cores take
    # most of the time, and the tile with the least traffic wins; with a short K writing out does,
    # which deferring hides. It needs accumulators that fit 16 bits and at least four products.
    if problem.k >= 12288 or chunks < 4:
        return config(2, 128 if problem.scaled else 192, 4)
    if problem.packed and problem.k < 6144:
        return config(2, 128, 4, deferred=True)
    return config(1, 256, 4, deferred=True, group=16)


def _split(tiles: int, problem: Problem) -> int:
    """Return how many parts of K fill the GPU: a power of two, at most the number of chunks."""
    split = 1
    while (
        split < 8 and 2 * split <= problem.chunks and 2 * split * tiles <= problem.multiprocessors
    ):
        split *= 2
    return split


def candidates(problem: Problem) -> list[Config]:
    """Return the configurations worth measuring for a problem."""
    splits = [s for s in _SPLITS if s <= problem.chunks]
    narrow = _narrow(problem)
    if narrow is not None:
        swap, tile_n = narrow
        return [
            config(1, tile_n, stages, consumers=consumers, split_k=split, swap=swap)
            for consumers, stages in ((1, 10), (2, 8))
            for split in splits
        ]
    small = [config(1, 128, 6, split_k=split) for split in splits]
    small += [
        config(1, 64, 8, consumers=consumers, split_k=split)
        for consumers in (2, 1)
        for split in splits
    ]
    large = [
        config(blocks_m, tile_n, 4, cluster=cluster, deferred=deferred, group=group)
        for blocks_m, tile_n, deferred in (
            (1, 256, True), (2, 128, True), (1, 256, False), (2, 128, False), (2, 192, False),
        )
        for cluster in ((1, 1), (2, 1), (1, 2))
        for group in (8, 16)
        if not deferred or 4 <= problem.chunks <= 63
    ]  # fmt: skip
    return small if problem.m * problem.n <= 1024 * 1024 else small[:1] + large
