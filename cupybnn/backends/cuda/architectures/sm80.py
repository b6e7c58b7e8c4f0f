"""Tensor cores through mma.sync, from Ampere on."""

from __future__ import annotations

from cupybnn.backends.cuda.configs import Config, Problem

CAPABILITIES = range(80, 1000)
TARGET = None

_TILES = ((2, 2, 2, 4, 4), (2, 4, 4, 4, 2), (2, 4, 4, 4, 3), (4, 2, 4, 8, 2), (4, 2, 4, 8, 3))


def config(
    warps_m: int, warps_n: int, blocks_m: int, blocks_n: int, stages: int, group: int = 8
) -> Config:
    """Return a configuration; a warp has 16·blocks_m x 8·blocks_n results."""
    tile_m, tile_n = 16 * blocks_m * warps_m, 8 * blocks_n * warps_n
    defines = (
        ("BLOCKS_M", blocks_m),
        ("BLOCKS_N", blocks_n),
        ("STAGES", stages),
        ("WARPS_M", warps_m),
        ("WARPS_N", warps_n),
    )
    shared = stages * (tile_m + tile_n) * 128  # terms are in static shared memory
    return Config(
        "sm80", defines, tile_m, tile_n, 32 * warps_m * warps_n, shared, shared, stages,
        group=group,
    )  # fmt: skip


def _shared_memory(problem: Problem) -> int:
    """Return a lower bound of the shared memory per block, in bytes."""
    large = problem.capability in (80, 87, 90) or 100 <= problem.capability < 120
    return (163 if large else 99) * 1024


def choose(problem: Problem) -> Config:
    """Return the configuration for a problem."""
    large = config(4, 2, 4, 8, 3)
    if large.shared <= _shared_memory(problem) and problem.tiles(256, 128) >= 100:
        return large
    if problem.tiles(128, 128) >= 60:
        return config(2, 4, 4, 4, 3)
    return config(2, 2, 2, 4, 4)


def candidates(problem: Problem) -> list[Config]:
    """Return the configurations worth measuring for a problem."""
    return [c for c in (config(*t) for t in _TILES) if c.shared <= _shared_memory(problem)]
