"""Launching a whole packed network for a few rows: one kernel walks all its layers."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import (
    architecture,
    load_kernel,
    multiprocessors,
    shared_memory_limit,
)
from cupybnn.backends.cuda.launching import Launch
from cupybnn.backends.cuda.packing import pack
from cupybnn.backends.cuda.structs import Kernel, Struct, address

__all__ = ["MOST_ROWS", "Layer", "NetworkLaunch", "Team", "choose_team", "unsupported_reason"]

# As sm80_packed_network.cu has them.
PRODUCTS = {"real": 0, "signs": 1, "bits": 2}
STEPS = {"multiply": 0, "add": 1, "relu": 2}
MOST_LAYERS, MOST_STEPS = 16, 4
_TILE, _WARPS = 32, 8
_HELD = (1 << 15, 1 << 14)  # floats in shared memory: the first where a block may have so much
_MOST_BITS = 1 << 14  # of a row in shared memory, where 32 rows are there at a time

#: Rows that one launch takes at most. Beyond, a launch for each layer is faster.
MOST_ROWS = 64
# Multiply-adds of a real layer in one launch; beyond, cuBLAS is faster.
_MOST_REAL = 1 << 28
_LEAST_ARCHITECTURE = 80  # for a product of bits by "and" on the tensor cores
# Architectures with clusters of 16 blocks; units of the widest layer for which these are enough.
_CLUSTERED, _CLUSTER, _CLUSTER_UNITS = range(90, 120), 16, 1024
_MOST_SCRATCH = 16  # streams whose scratch memory is kept

NETWORK_LAYER = Struct(
    "NetworkLayer",
    "ptr weight, pops, threshold, flip; ptr by[4]; i64 kinds, steps;"
    "i64 inputs, units, product, pitch, width",
)
NETWORK = Struct(
    "Network",
    "NetworkLayer layers[16]; i64 count, word_pitch, number_pitch; double factor;"
    "ptr x, out, bits, numbers, arrived; i64 rows",
    NETWORK_LAYER,
)
PACKED_NETWORK = Kernel("sm80_packed_network", "packed_network", "Network p", NETWORK)
_OF_LAUNCH = NETWORK.section("x", "rows")


@dataclass(frozen=True)
class Layer:
    """A layer of a packed network, with its arrays on one device.

    Attributes
    ----------
    product : str
        A key of `PRODUCTS`.
    weight : cupy.ndarray of float32, shape (inputs, units); or PackedMatrix, packed along inputs
        The former for "real" and, holding signs, for "signs".
    inputs, units : int
    threshold, flip : cupy.ndarray or None
        Of int32 for "bits", else of float32; and of bool.
    steps : sequence of (kind, array)
        Kinds are keys of `STEPS`; the array of "relu" is None.
    """

    product: str
    weight: Any
    inputs: int
    units: int
    threshold: Any = None
    flip: Any = None
    steps: Sequence[tuple[str, Any]] = ()

    @property
    def width(self) -> int:
        """Units of a tile: a word of signs, or fewer, so that few units keep more blocks busy."""
        narrow = self.threshold is None and self.product != "bits" and self.units <= 128
        return 4 if narrow else _TILE

    @property
    def tiles(self) -> int:
        """Tiles of a row."""
        return -(-self.units // self.width)


def unsupported_reason(layers: Sequence[Layer], capability: int) -> str:
    """Return why one launch cannot walk these layers; an empty text if it can."""
    if capability < _LEAST_ARCHITECTURE:
        return f"it needs compute capability 8.0; this is {capability / 10}"
    if len(layers) > MOST_LAYERS:
        return f"it takes {MOST_LAYERS} layers at most; there are {len(layers)}"
    for layer in layers:
        if len(layer.steps) > MOST_STEPS:
            return f"it takes {MOST_STEPS} steps after a product; there are {len(layer.steps)}"
        if layer.product == "bits" and layer.inputs > _MOST_BITS:
            return f"it takes {_MOST_BITS} signs a row at most; there are {layer.inputs}"
    return ""


@dataclass(frozen=True)
class Team:
    """How a number of rows is dealt out.

    Attributes
    ----------
    rows : int
        Of a group that a block computes at a time: 8, 16 or 32.
    cluster : int
        Blocks of a cluster with a group of its own; 1: all blocks of the grid work together.
    blocks : int
        Of the grid.
    held : int
        Floats of inputs in a block's shared memory.
    """

    rows: int
    cluster: int
    blocks: int
    held: int = _HELD[0]

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """What the kernel is compiled with, but for the type of inputs."""
        cooperative = int(self.cluster == 1)
        team = (("ROWS", self.rows), ("CLUSTER", self.cluster), ("COOPERATIVE", cooperative))
        return (*team, ("HELD", self.held))

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: inputs, sums of the warps, popcounts."""
        return 4 * (self.held + self.rows * (_WARPS * _TILE + 1))


def choose_team(
    layers: Sequence[Layer], rows: int, capability: int, multiprocessors: int, shared: int
) -> Team:
    """Return how `rows` rows are dealt out on a device with so much shared memory for a block."""
    narrow = max(layer.units for layer in layers) <= _CLUSTER_UNITS
    # Measured on an H200: with more rows than two clusters take, the whole grid is faster.
    if capability in _CLUSTERED and narrow and rows <= 16:
        return Team(8, _CLUSTER, _CLUSTER * -(-rows // 8))
    items = max(layer.tiles * -(-rows // 8) for layer in layers)
    size = next((n for n in (8, 16) if n >= rows), 32)
    team = Team(size, 1, min(multiprocessors, items))
    return team if team.shared <= shared else dataclasses.replace(team, held=_HELD[1])


class _Scratch:
    """Activations between layers, and the count of arrivals: of one launch at a time."""

    def __init__(self, word_pitch: int, number_pitch: int) -> None:
        import cupy

        self.bits = cupy.empty(2 * MOST_ROWS * word_pitch, np.uint32)
        self.numbers = cupy.empty(2 * MOST_ROWS * number_pitch, np.float32)
        self.arrived = cupy.zeros(1, np.uint32)
        self.addresses = tuple(map(address, (self.bits, self.numbers, self.arrived)))


class NetworkLaunch:
    """The one launch of a network, on any stream and from any thread.

    Parameters
    ----------
    layers : sequence of Layer
        With no `unsupported_reason`.
    factor : float
        What whole numbers, pixels, are multiplied by.
    device : int
        Number of the CUDA device, which must be the current one, now and at each call.
    """

    def __init__(self, layers: Sequence[Layer], factor: float, device: int) -> None:
        self._layers, self._device = tuple(layers), device
        self._kept: list[Any] = []
        packed = [self._packed(layer) for layer in layers]
        hidden = layers[:-1]
        words = (-(-y.units // 32) for y in hidden if y.threshold is not None)
        numbers = (_round_up(y.units) for y in hidden if y.threshold is None)
        self._pitches = max(words, default=0), max(numbers, default=0)
        self._argument = NETWORK.pack(
            layers=b"".join(packed), count=len(packed), word_pitch=self._pitches[0],
            number_pitch=self._pitches[1], factor=factor, x=0, out=0, bits=0, numbers=0, arrived=0,
            rows=0,
        )  # fmt: skip
        real = max((y.inputs * y.units for y in layers if y.product != "bits"), default=0)
        self.most_rows = min(MOST_ROWS, _MOST_REAL // max(real, 1))
        self._ways: dict[tuple[int, str], Launch] = {}
        self._scratch: OrderedDict[tuple[int, int], _Scratch] = OrderedDict()
        self._lock = threading.Lock()

    def _packed(self, layer: Layer) -> bytes:
        """Return a layer's struct; its arrays are kept."""
        weight, pops, pitch = layer.weight, None, 0
        if layer.product == "bits":
            weight, pops = layer.weight.words, layer.weight.popcounts
        elif layer.product == "signs":
            weight, _ = pack(layer.weight, -1)
        else:
            pitch = _round_up(layer.units)
            if pitch != layer.units or weight.data.ptr % 16 or not weight.flags.c_contiguous:
                import cupy

                padded = cupy.zeros((layer.inputs, pitch), np.float32)
                padded[:, : layer.units] = weight
                weight = padded
        by = [array for _, array in layer.steps]
        self._kept += [layer, weight, *by]
        kinds = sum(STEPS[kind] << 4 * i for i, (kind, _) in enumerate(layer.steps))
        return NETWORK_LAYER.pack(
            weight=weight, pops=pops, threshold=layer.threshold, flip=layer.flip,
            by=np.array([address(x) for x in by], np.uint64).tobytes(), kinds=kinds,
            steps=len(by), inputs=layer.inputs, units=layer.units, pitch=pitch,
            product=PRODUCTS[layer.product], width=layer.width,
        )  # fmt: skip

    def __call__(self, x: Any, out: Any) -> None:
        """Compute the logits of some rows on the current stream.

        Parameters
        ----------
        x : cupy.ndarray of float32 or uint8, shape (rows, inputs), C-contiguous
            At least one row, and at most `most_rows`.
        out : cupy.ndarray of float32, shape (rows, units of the last layer), C-contiguous
        """
        rows = len(x)
        import cupy

        launch = self._ways.get((rows, x.dtype.char)) or self._way(rows, x.dtype.char)
        stream = cupy.cuda.get_current_stream()
        scratch = self._scratch_memory(stream)  # kept until the launch has been issued
        launch.go(stream.ptr, x.data.ptr, out.data.ptr, *scratch.addresses, rows)

    def _way(self, rows: int, char: str) -> Launch:
        device = self._device
        team = choose_team(
            self._layers, rows, architecture(device), multiprocessors(device),
            shared_memory_limit(device),
        )  # fmt: skip
        return self.use(team, rows, char)

    def use(self, team: Team, rows: int, char: str) -> Launch:
        """Let a team compute so many rows of a type ("f" or "B") from now on."""
        defines = (*team.defines, ("PIXELS", int(char == "B")))
        source, function = PACKED_NETWORK.source, PACKED_NETWORK.function
        kernel = load_kernel(source, function, defines, self._device, team.shared)
        way = self._ways[rows, char] = Launch(
            kernel, team.blocks, 32 * _WARPS, team.shared, self._argument, _OF_LAUNCH,
            cooperative=team.cluster == 1,
        )  # fmt: skip
        return way

    def _scratch_memory(self, stream: Any) -> _Scratch:
        """Return scratch memory for the current stream, whose launches follow each other."""
        if stream.is_capturing():
            # A graph may run at any time: memory of its own, for as long as the network lives.
            scratch = _Scratch(*self._pitches)
            self._kept.append(scratch)
            return scratch
        # The default stream of each thread has the same address in all threads.
        key = stream.ptr, threading.get_ident()
        known = self._scratch.get(key)
        if known is not None:
            return known
        with self._lock:
            made = self._scratch[key] = _Scratch(*self._pitches)
            if len(self._scratch) > _MOST_SCRATCH:
                self._scratch.popitem(last=False)
        return made


def _round_up(units: int) -> int:
    return (units + 3) & ~3
