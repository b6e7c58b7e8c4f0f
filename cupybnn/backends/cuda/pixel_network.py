"""Launching a whole packed network of pixels for a few rows: one kernel walks all its layers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.cuda.architectures import sm90
from cupybnn.backends.cuda.compiler import (
    architecture,
    load_kernel,
    multiprocessors,
    shared_memory_limit,
)
from cupybnn.backends.cuda.launching import Launch
from cupybnn.backends.cuda.pixel_tiles import bit_tiles, end_tiles, pixel_tiles
from cupybnn.backends.cuda.results import Results, Run
from cupybnn.backends.cuda.steps import MOST_STEPS, STEPS, pack_steps
from cupybnn.backends.cuda.structs import Kernel, Struct, address

__all__ = ["MOST_ROWS", "PixelNetworkLaunch", "Team", "choose_team"]

# As sm90_pixel_network.cu has them.
MOST_LAYERS, MOST_ROWS = 15, 64
_CLUSTER, _WARPS, _TILE, _PITCH = 16, 8, 32, 36
_FRAGMENT = 512  # bytes of 16 units and a step
#: Classes up to which sums of the last layer are handed round.
MOST_CLASSES = 64
_MOST_SCRATCH = 16  # streams whose scratch memory is kept
_MOST_LAUNCHES = 1 << 31  # with one scratch memory, which numbers them by 32 bits

PIXEL_NETWORK = Struct(
    "PixelNetwork",
    "ptr tiles; i64 tile_bytes, count, steps[16], blocks[16], at[16], team, inputs, classes;"
    "i64 inputs_at, sums_at, last_at; Steps after; ptr x, out, slots, control; i64 rows",
    STEPS,
)
PIXEL_NETWORK_KERNEL = Kernel(
    "sm90_pixel_network", "pixel_network", "PixelNetwork p", PIXEL_NETWORK
)
_ARRAYS = PIXEL_NETWORK.section("x", "out")
_X_TO_CONTROL = PIXEL_NETWORK.section("x", "control")


@dataclass(frozen=True)
class Team:
    """How rows are dealt out.

    Attributes
    ----------
    rows : int
        Of a group: 8, 16, 32 or 64.
    cluster : int
        16: a group is a cluster; 1: the grid is cooperative.
    size : int
        Blocks of a group.
    blocks : int
        Of the grid.
    """

    rows: int
    cluster: int
    size: int
    blocks: int


def choose_team(tiles: int, rows: int, multiprocessors: int) -> Team | None:
    """Return how `rows` rows are dealt out if the widest layer has `tiles` tiles; None if not."""
    if tiles <= _CLUSTER:
        return Team(8, _CLUSTER, _CLUSTER, _CLUSTER * -(-rows // 8))
    for size in (8, 16, 32, 64):
        blocks = tiles * -(-rows // size)
        if blocks <= multiprocessors:
            return Team(size, 1, tiles, blocks)
    return None


class _Scratch:
    """What blocks hand round, and the number of launches: of one launch at a time."""

    def __init__(self, slots: int) -> None:
        import cupy

        self.slots = cupy.zeros(slots, np.uint64)
        self.control = cupy.zeros(2, np.uint32)
        self.addresses = address(self.slots), address(self.control)
        self.launches = 0


class PixelNetworkLaunch:
    """The one launch of a network of pixels, on any stream and from any thread.

    Parameters
    ----------
    layers : sequence
        A `PixelLayer`, any number of `BitLayer`, and a `RealEnd`.
    device : int
        Number of the CUDA device, which must be the current one, now and at each call.

    Raises
    ------
    ValueError
        If there is no launch for these layers on this device.
    """

    def __init__(self, layers: Sequence[Any], device: int) -> None:
        import cupy

        *hidden, end = layers
        if architecture(device) not in sm90.CAPABILITIES:
            raise ValueError("it needs a Hopper GPU")
        self.classes = end.weight.shape[1]
        if len(hidden) > MOST_LAYERS or self.classes > MOST_CLASSES or len(end.steps) > MOST_STEPS:
            raise ValueError("it has too many layers, classes or steps")
        self._device, self._digits = device, len(hidden[0].digits)
        made = [pixel_tiles(hidden[0]), *(bit_tiles(layer) for layer in hidden[1:])]
        parts = [tiles for tiles, _ in made]
        self._steps = [steps for _, steps in made]
        self._blocks = [len(tiles) for tiles in parts]
        self._widest = max(self._blocks)
        #: Whether groups of rows are clusters, not the whole grid.
        self.clustered = self._widest <= _CLUSTER
        team = choose_team(self._widest, MOST_ROWS, multiprocessors(device))
        if team is None:
            raise ValueError("its layers have more tiles than the GPU multiprocessors")
        parts.append(end_tiles(end))
        at = np.cumsum([0, *(part.shape[1] for part in parts)])
        self._at = [4 * int(i) for i in at]
        tiles = np.zeros((team.size, int(at[-1])), np.uint32)
        for part, begin in zip(parts, at.tolist(), strict=False):
            tiles[: len(part), begin : begin + part.shape[1]] = part
        self._tiles = cupy.asarray(tiles)
        self._pitch = (team.size + 1) & ~1
        self._after = tuple(end.steps)
        self._inputs = hidden[0].digits.shape[2] - 2
        #: Largest shared memory of a way to deal rows out.
        for rows in (1, MOST_ROWS):
            chosen = choose_team(self._widest, rows, multiprocessors(device))
            assert chosen is not None
            if self._places(chosen)[-1] > shared_memory_limit(device) - 2048:
                raise ValueError("its layers do not fit in shared memory")
        self._ways: dict[int, Launch] = {}
        #: By the shape of pixels, calls like those before.
        self.runs: dict[tuple[int, ...], Run] = {}
        self._kept: list[_Scratch] = []
        self._scratch: OrderedDict[tuple[int, int], _Scratch] = OrderedDict()
        self._lock = threading.Lock()
        # Launches read the weights before they wait for the work in front of them.
        cupy.cuda.get_current_stream().synchronize()

    def _places(self, team: Team) -> tuple[int, int, int, int]:
        """Return where pixels, sums and last sums are in shared memory, and its size."""

        def pitch(steps: int) -> int:
            return 4 * (8 * steps + 4)

        fragments = self._digits * 2 * self._steps[0] * _FRAGMENT
        parts = team.rows // min(16, max(8, team.rows))
        sums = _WARPS // parts * self._digits * team.rows * _PITCH * 4
        end = (self._at[-1] + 127) & ~127
        sums_at = 0
        if sums > fragments:
            sums_at, end = end, end + sums
        inputs_at = end
        if team.cluster > 1:
            end += team.rows * (pitch(self._steps[0]) + 2 * pitch(_CLUSTER * _TILE // 256))
        else:
            end += team.rows * pitch(max(self._steps))
        last_at = end
        end += 4 * _CLUSTER * self.classes * -(-team.rows // _CLUSTER) if team.cluster > 1 else 0
        return inputs_at, sums_at, last_at, end

    def __call__(self, x: Any, out: Any) -> None:
        """Compute the logits of some rows on the current stream.

        Parameters
        ----------
        x : cupy.ndarray of uint8, shape (rows, inputs), C-contiguous
            At least one row, and at most `MOST_ROWS`.
        out : cupy.ndarray of float32, shape (rows, classes), C-contiguous
        """
        import cupy

        rows = len(x)
        stream = cupy.cuda.get_current_stream()
        captured = stream.ptr > 1 and stream.is_capturing()  # the default stream never is
        launch = self._ways.get(rows) or self._way(rows)
        scratch = self._scratch_memory(stream, captured) if not self.clustered else None
        addresses = () if scratch is None else scratch.addresses
        launch.go(stream.ptr, x.data.ptr, out.data.ptr, *addresses)

    def _run(self, rows: int, launch: Launch) -> Run:
        """Return a function for the calls that follow the first one of so many rows."""
        go, new = launch.go, Results((rows, self.classes)).new
        if self.clustered:

            def in_clusters(x: Any, stream: int) -> Any:
                out = new(stream)
                go(stream, x.data.ptr, out.data.ptr)
                return out

            return in_clusters
        scratches, get_ident = self._scratch, threading.get_ident

        def by_the_grid(x: Any, stream: int) -> Any:
            scratch = scratches.get((stream, get_ident()))
            if scratch is None or scratch.launches >= _MOST_LAUNCHES:
                return None
            scratch.launches += 1
            out = new(stream)
            go(stream, x.data.ptr, out.data.ptr, *scratch.addresses)
            return out

        return by_the_grid

    def _way(self, rows: int) -> Launch:
        team = choose_team(self._widest, rows, multiprocessors(self._device))
        assert team is not None
        inputs_at, sums_at, last_at, shared = self._places(team)
        defines = (("ROWS", team.rows), ("DIGITS", self._digits), ("CLUSTER", team.cluster))
        kernel = load_kernel(
            PIXEL_NETWORK_KERNEL.source, PIXEL_NETWORK_KERNEL.function, defines, self._device,
            shared,
        )  # fmt: skip

        def numbers(values: Sequence[int]) -> bytes:
            return np.array(values, np.int64).tobytes()

        argument = PIXEL_NETWORK.pack(
            tiles=self._tiles, tile_bytes=self._at[-1], count=len(self._steps),
            steps=numbers(self._steps), blocks=numbers(self._blocks), at=numbers(self._at[:-1]),
            team=team.size, inputs=self._inputs, classes=self.classes, inputs_at=inputs_at,
            sums_at=sums_at, last_at=last_at, after=pack_steps(self._after), x=0, out=0, slots=0,
            control=0, rows=rows,
        )  # fmt: skip
        way = self._ways[rows] = Launch(
            kernel, team.blocks, 32 * _WARPS, shared, argument,
            _ARRAYS if team.cluster > 1 else _X_TO_CONTROL, cooperative=team.cluster == 1,
            overlap=team.cluster > 1,  # blocks of a whole grid have no room beside those ahead
        )  # fmt: skip
        self.runs[rows, self._inputs] = self._run(rows, way)
        return way

    def _scratch_memory(self, stream: Any, captured: bool) -> _Scratch:
        """Return scratch memory for the current stream, whose launches follow each other."""
        slots = self._pitch * MOST_ROWS * (len(self._steps) + self.classes)
        if captured:
            # A graph may run at any time: memory of its own, for as long as the network lives.
            scratch = _Scratch(slots)
            self._kept.append(scratch)
            return scratch
        # The default stream of each thread has the same address in all threads.
        key = stream.ptr, threading.get_ident()
        known = self._scratch.get(key)
        if known is not None and known.launches < _MOST_LAUNCHES:
            known.launches += 1
            return known
        with self._lock:
            made = self._scratch[key] = _Scratch(slots)
            if len(self._scratch) > _MOST_SCRATCH:
                self._scratch.popitem(last=False)
        return made
