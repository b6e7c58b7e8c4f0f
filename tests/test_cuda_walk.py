"""How fused kernels walk a layer, with no GPU: grids and what fits a block."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cupybnn.backends.cuda import fused_walk
from cupybnn.backends.cuda.fused_layers import DROP_NONE, Layer
from cupybnn.backends.cuda.fused_walk import Sums, Walk

MULTIPROCESSORS, SHARED = 132, 232448
SIZES = (1, 31, 32, 33, 100, 512, 513, 1024, 2048, 4096, 4500, 8192, 9000)
UNITS = (1, 2, 45, 96, 512, 514, 1024, 4096, 8192)
SUMS = {
    "statistics": Sums(2, most_warps=16),
    "gradient": Sums(2, 2, 4, most_warps=16),
    "head": Sums(12, 0, 48, width=64),
    "another head": Sums(12, 0, 48, always_clustered=True),
}


def walk_of(monkeypatch, capability: int) -> Walk:
    shared = SHARED if capability >= 90 else 101376
    monkeypatch.setattr(fused_walk, "shared_memory_limit", lambda number: shared)
    monkeypatch.setattr(fused_walk, "architecture", lambda number: capability)
    monkeypatch.setattr(fused_walk, "multiprocessors", lambda number: MULTIPROCESSORS)
    return Walk(0)


def layer_of(rows: int, units: int, dtype: str) -> Layer:
    return Layer(product=np.empty((rows, units), dtype), drop=DROP_NONE)


@pytest.mark.parametrize("capability", [75, 80, 90, 100, 120])
@pytest.mark.parametrize("name", SUMS)
def test_every_row_has_a_thread_and_what_is_held_fits(monkeypatch, capability, name):
    walk, sums = walk_of(monkeypatch, capability), SUMS[name]
    for rows, units, dtype in itertools.product(SIZES, UNITS, ("int16", "float32")):
        way = walk.strips(layer_of(rows, units, dtype), sums)
        defines, (strips, blocks) = dict(way.defines), way.grid
        assert way.threads == 32 * defines["BLOCK_WARPS"]
        width = defines["COLS"]
        assert (strips - 1) * width < units <= strips * width
        assert units % defines["VECTOR"] == 0
        assert way.partials(3) == (0 if way.clustered else blocks * 3 * units)
        assert way.partials(3) <= walk.most_partials(rows, units, 3)
        assert defines["CLUSTER"] == (blocks if way.clustered else 1)
        if way.clustered:
            assert capability >= 90
            assert blocks <= (16 if capability == 90 else 8)
        at_once = way.threads * defines["VECTOR"] // width
        if defines["HELD"]:
            assert way.clustered
            assert defines["HELD"] * at_once * blocks >= rows
            assert defines["HELD"] % 8 == 0 or defines["HELD"] in (1, 2, 4)
            row_bytes = 32 * (np.dtype(dtype).itemsize + sums.itemsize) + sums.row_bytes
            assert defines["HELD"] * at_once * row_bytes == way.shared
            assert way.shared + sums.count * 32 * (way.threads // 8 + 8) <= SHARED
        else:
            assert way.shared == 0
        # Threads without held rows take eight at a time.
        turns = defines["HELD"] or 8 * (not way.clustered)
        whole = turns and rows % (turns * at_once * blocks) == 0 and units % width == 0
        assert defines["WHOLE"] == whole


@pytest.mark.parametrize("name", SUMS)
def test_the_order_of_summation_does_not_depend_on_the_type_of_products(monkeypatch, name):
    """Steps with packed and with dense products must give the same numbers."""
    walk = walk_of(monkeypatch, 90)
    for rows, units in itertools.product(SIZES, UNITS):
        ways = {
            (way.grid, way.threads, dict(way.defines)["VECTOR"])
            for way in (
                walk.strips(layer_of(rows, units, dtype), SUMS[name])
                for dtype in ("int16", "float16", "float32")
            )
        }
        assert len(ways) == 1, (rows, units)


@pytest.mark.parametrize("name", SUMS)
def test_large_layers_are_walked_without_clusters(monkeypatch, name):
    walk = walk_of(monkeypatch, 90)
    for rows, units in ((512, 512), (8192, 512), (1024, 1024), (4096, 1024)):
        assert walk.strips(layer_of(rows, units, "int16"), SUMS[name]).clustered
    for rows, units in ((4096, 4096), (8192, 8192), (8191, 8188)):
        way = walk.strips(layer_of(rows, units, "int16"), SUMS[name])
        assert way.clustered == (name == "another head")
        if not way.clustered:
            assert dict(way.defines)["COLS"] == min(128, SUMS[name].width)
            assert way.whole == (rows % 2 == 0)
            assert way.grid[0] * way.grid[1] >= 4 * MULTIPROCESSORS


def test_more_threads_only_where_blocks_are_few_and_rows_many(monkeypatch):
    walk = walk_of(monkeypatch, 90)

    def threads(rows: int, units: int, name: str = "gradient") -> int:
        return walk.strips(layer_of(rows, units, "int16"), SUMS[name]).threads

    assert threads(2048, 512) == threads(4096, 512) == 512
    assert threads(1024, 512) == 256  # four rows a thread
    assert threads(8192, 512) == threads(4096, 4096) == 256  # two blocks a multiprocessor, and more
    assert threads(4096, 512, "head") == 256  # registers
