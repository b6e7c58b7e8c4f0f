"""Hopper's tensor cores by wgmma."""

from __future__ import annotations

import dataclasses

from cupybnn.backends.cuda.configs import Config, Problem

CAPABILITIES = range(90, 100)
TARGET = "sm_90a"  # wgmma and setmaxnreg need code specific to Hopper


def config(
    blocks_m: int,
    tile_n: int,
    stages: int,
    *,
    consumers: int = 2,
    cluster: tuple[int, int] = (1, 1),
    split_k: int = 1,
    parts: int = 1,
    deferred: int = 0,
    swap: bool = False,
    group: int = 8,
) -> Config:
    """Return a configuration; a consumer has 64·blocks_m x tile_n results.

    `deferred` is the number of pieces that a tile is written in while the next one is multiplied.
    """
    tile_m = 64 * blocks_m * consumers
    defines = (
        ("BLOCKS_M", blocks_m),
        ("CLUSTER_M", cluster[0]),
        ("CLUSTER_N", cluster[1]),
        ("CONSUMERS", consumers),
        ("DEFERRED", deferred),
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


# Products of few tiles. A tile of 64 lines has one consumer: its blocks are smaller. There are as
# many slots as shared memory holds or, for two blocks on a multiprocessor, half as many.
FINE = config(1, 32, 16, consumers=1)  # 64 x 32
SMALL = config(1, 64, 12, consumers=1)  # 64 x 64
SMALL_TWICE = config(1, 64, 6, consumers=1)
MIDDLE = config(1, 64, 8)  # 128 x 64
LARGE = config(1, 128, 6)  # 128 x 128
LARGER = config(2, 128, 4)  # 256 x 128
FLAT = config(1, 16, 10, swap=True)  # 16 x 128
SPLIT = config(1, 64, 6, consumers=1, split_k=4)
LONG = config(1, 128, 6, split_k=8)


def choose(problem: Problem) -> Config:
    """Return the configuration for a problem."""
    multiprocessors = problem.multiprocessors
    split = _split(problem) if problem.planes == 1 else None  # which needs counts of 16 bits
    if split is not None:
        return split
    # The smallest tiles that are no more than the multiprocessors, as measured on a grid of shapes
    # (bench/NOTES.md).
    if problem.m <= 16 and not problem.packed:
        return FLAT
    if problem.tiles(64, 32) <= multiprocessors // 2:
        return FINE
    if problem.tiles(64, 64) <= multiprocessors:
        return SMALL
    if min(problem.m, problem.n) <= 64:
        return SMALL_TWICE
    if problem.tiles(128, 64) <= multiprocessors:
        return MIDDLE
    if problem.tiles(128, 128) <= multiprocessors:
        return LARGE
    if problem.tiles(256, 128) <= multiprocessors:
        wide = problem.packed or problem.chunks == 1 or problem.chunks >= 12
        return LARGER if wide else LARGE
    return _many_tiles(problem)


def _many_tiles(problem: Problem) -> Config:
    # Deferring hides the writing (bench/NOTES.md), but needs signs, accumulators that fit 16 bits
    # and at least four products. Wider tiles, unless the last round of them leaves more of the GPU
    # idle.
    narrow, wide = (
        -(-problem.tiles(256, width) // problem.multiprocessors) * width for width in (128, 192)
    )
    fits = problem.planes == 1 and 4 <= problem.chunks <= 63
    if fits and (problem.chunks < 12 or narrow <= 1.1 * wide):
        return config(1, 256, 4, deferred=4, group=16)
    return LARGER if problem.scaled or narrow < wide else config(2, 192, 4)


def _split(problem: Problem) -> Config | None:
    """Return a configuration that splits K, for a long K and few tiles; None for others."""
    chunks, multiprocessors = problem.chunks, problem.multiprocessors
    # Clusters do not fill every multiprocessor.
    blocks = multiprocessors * 7 // 8
    if chunks >= 256 and (tiles := problem.tiles(128, 128)) * 8 <= blocks:
        return dataclasses.replace(LONG, parts=min(blocks // (8 * tiles), chunks // 64))
    if chunks >= 16 and (tiles := problem.tiles(64, 64)) <= multiprocessors // 8:
        return dataclasses.replace(SPLIT, parts=max(1, min(blocks // (4 * tiles), chunks // 32)))
    return None


def candidates(problem: Problem) -> list[Config]:
    """Return the configurations worth measuring for a problem."""
    found = _candidates(problem)
    if problem.planes > 1:
        found = [config for config in found if config.split_k == 1 and not config.deferred]
    return found


def _candidates(problem: Problem) -> list[Config]:
    found = [SMALL_TWICE]
    if problem.m <= 16 and not problem.packed:
        found.append(FLAT)
    if problem.tiles(64, 64) <= 2 * problem.multiprocessors:
        found += [FINE, SMALL]
    if problem.chunks >= 8:
        found += [SPLIT, dataclasses.replace(SPLIT, parts=2)]
    if problem.chunks >= 64:
        found += [dataclasses.replace(LONG, parts=parts) for parts in (2, 7, 14)]
    if problem.m > 64 and problem.n > 64:
        found += [MIDDLE, LARGE, LARGER]
    if problem.m * problem.n <= 1024 * 1024:
        return found
    return [LARGE] + [
        config(blocks_m, tile_n, 4, cluster=cluster, deferred=deferred, group=group)
        for blocks_m, tile_n, deferred in (
            (1, 256, 4), (2, 128, 4), (1, 256, 0), (2, 128, 0), (2, 192, 0),
        )
        for cluster in ((1, 1), (2, 1), (1, 2))
        for group in (8, 16)
        if not deferred or 4 <= problem.chunks <= 63
    ]  # fmt: skip
