"""How a product is divided among threads, and by which kernel it is computed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cupybnn import settings
from cupybnn.backends.cpu import kernels
from cupybnn.backends.cpu.addresses import address
from cupybnn.backends.cpu.cache import features
from cupybnn.backends.cpu.operands import PARTS_A_THREAD, aligned

__all__ = ["METHOD", "Plan", "plan", "threads_for"]

# With at most so many lines in one operand, lines are compared one by one.
FEW_LANES = 4
# With fewer lines than this in one operand, it decides which is taken as lanes.
FEW_ROWS = 64
# A multiplication takes so many times as long if lines are compared one by one.
LONGER_BY_LINE = 4
# What is worth a second thread: multiplications (70 microseconds by table lookups).
PRODUCTS_A_THREAD = 1 << 25

_table = aligned(1 << 13)
_table[:] = kernels.table().reshape(-1)
_TABLE = address(_table)

_features = features()[1]
#: How a product of more than a few lines is computed on this processor.
METHOD = (
    kernels.LOOKUP if "avx2" in _features and "avx512vpopcntdq" not in _features else kernels.COUNT
)


def threads_for(m: int, n: int, k: int) -> int:
    """Return with how many threads a product is computed."""
    products = m * n * k
    if m <= FEW_LANES or n <= FEW_LANES:
        products *= LONGER_BY_LINE
    wanted = products // PRODUCTS_A_THREAD
    return wanted if wanted < 2 else min(settings.kernel_threads(), wanted)


class Plan:
    """What a kernel needs to know about operands of a kind; see `plan`."""

    __slots__ = ("address", "memory", "parts", "swapped", "threads", "words")

    def __init__(self, numbers: dict[str, int], threads: int) -> None:
        self.memory = np.array([numbers[name] for name in kernels.PLAN], np.int64)
        self.address = address(self.memory)
        self.parts, self.threads, self.swapped = numbers["parts"], threads, numbers["swapped"]
        #: Words of lines that the kernel packs.
        words = -(-numbers["k"] // 64)
        self.words = sum(
            numbers[side + "s"] * words
            for side in ("unit", "lane")
            if numbers[side + "_kind"] != kernels.PACKED
        )


_SIDE = ("s", "_stride", "_k", "_kind", "_size")


@lru_cache(maxsize=1024)
def plan(
    a: tuple[int, ...], b: tuple[int, ...], k: int, strides: tuple[int, int], kind: int,
    threads: int, way: int,
) -> Plan:  # fmt: skip
    """Return the plan of a product.

    Parameters
    ----------
    a, b : tuple of int
        Lines of the operands: see `operands.Side`.
    strides : (int, int)
        Of the result.
    way : int
        `METHOD`.
    """
    m, n = a[0], b[0]
    few = min(m, n) <= FEW_LANES
    if min(m, n) >= FEW_ROWS:
        swapped = kind != kernels.BITS and abs(strides[0]) < abs(strides[1])
    else:  # a tile takes 32 lanes or 16, but 4 units or one
        swapped = n > m if few or way != kernels.LOOKUP else m > n
    units, lanes = (b, a) if swapped else (a, b)
    numbers = dict(zip(["unit" + name for name in _SIDE], units, strict=True))
    numbers |= zip(["lane" + name for name in _SIDE], lanes, strict=True)
    out_unit, out_lane = strides[::-1] if swapped else strides
    block = kernels.block_of(-(-k // 64))
    u_step, l_step = max(units[0], 1), max(lanes[0], 1)
    if threads > 1:
        u_step, l_step = _steps(units[0], lanes[0], block, threads)
    numbers |= {
        "parts": -(-units[0] // u_step) * -(-lanes[0] // l_step),
        "method": kernels.FEW if few else way,
        "table": _TABLE,
        "block": block,
        "k": k,
        "kind": kind,
        "swapped": int(swapped),
        "out_unit": out_unit,
        "out_lane": out_lane,
        "unit_step": u_step,
        "lane_step": l_step,
    }
    return Plan(numbers, threads)


def _steps(units: int, lanes: int, block: int, threads: int) -> tuple[int, int]:
    """Return the units and lanes of a part: as many parts as threads need, no smaller."""
    wanted = PARTS_A_THREAD * threads
    u_step, l_step = min(units, block), lanes
    rows = -(-units // u_step)
    if rows < wanted:  # first by lanes, whose parts share the block of units
        tiles = -(-lanes // kernels.LANES)
        l_step = max(1, tiles * rows // wanted) * kernels.LANES
        columns = -(-lanes // l_step)
        if rows * columns < wanted:
            u_step = -(-u_step * rows * columns // (wanted * 64)) * 64
    return u_step, l_step
