"""Launcher of the fused training kernels on one device, with their scratch memory.

Each launch is a value with named fields that knows its kernels: the batch (fused_batch.py), a
layer's activation and its gradient (fused_layers.py), the head (fused_head.py), the update
(fused_update.py). For example, ``ActivationGradient(layer=..., ...).launch(launcher)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import Defines, load_kernel, multiprocessors
from cupybnn.backends.cuda.fused_walk import Strips, Walk
from cupybnn.backends.cuda.structs import Kernel

__all__ = ["THREADS", "WARPS", "Launcher"]

#: Threads and warps per block, unless a kernel sets its own.
THREADS, WARPS = 256, 8

_REAL = {"float32": "float", "uint16": "bfloat16_bits"}


class Launcher:
    """Launches on the current stream of one device.

    Parameters
    ----------
    device : int
        Index of the CUDA device, which must be the current one.
    real : dtype
        Dtype of dense operands: float32, or uint16 for bfloat16.
    shapes : sequence of (rows, columns)
        Shapes of the hidden layers: they determine the size of the scratch memory. Not needed if
        nothing is summed over rows.
    classes : int
        Columns of the logits.
    clusters : bool
        As for `Walk`.

    Notes
    -----
    Launches reuse the scratch memory one after another. So within a step, from one `begin_step` to
    the next, all launches that use it must be on one stream; this is asserted. Others, like the
    update and `UnpackRows`, may run concurrently on a second stream.
    """

    def __init__(
        self, device: int, real: np.dtype, *, shapes: Sequence[tuple[int, int]] = (),
        classes: int = 0, clusters: bool = True,
    ) -> None:  # fmt: skip
        import cupy

        self.device, self.itemsize = device, real.itemsize
        self.multiprocessors = multiprocessors(device)
        self.walk = Walk(device, clusters)
        self._real = _REAL[real.name]
        most = max((self.walk.most_partials(*shape, classes + 2) for shape in shapes), default=0)
        strips = max((-(-cols // 32) for _, cols in shapes), default=0)
        self._partials = cupy.empty(most, np.float32)
        self._tickets = cupy.zeros(strips, np.uint32)  # 0 between launches
        rows = max((rows for rows, _ in shapes), default=0)
        self._losses = cupy.empty(2 * -(-rows // WARPS), np.float32)
        self._stream: int | None = None

    def begin_step(self) -> None:
        """Allow the following launches to be on a different stream."""
        self._stream = None

    def sums_over_rows(self, strips: Strips, sums: int) -> dict[str, Any]:
        """Return the scratch arguments of a kernel that computes `sums` sums per column."""
        self._assert_one_stream()
        assert strips.grid[0] <= self._tickets.size, (
            "the layer is wider than any known to the launcher"
        )
        assert strips.partials(sums) <= self._partials.size, (
            "the layer has more sums than any known to the launcher"
        )
        return {"partials": self._partials, "tickets": self._tickets}

    def losses(self, blocks: int) -> Any:
        """Return scratch memory for the loss and the factor's gradient of each block of `logits`.

        The head's gradient reads it. No other launch in between uses it.
        """
        self._assert_one_stream()
        assert 2 * blocks <= self._losses.size, (
            "the layer has more rows than any known to the launcher"
        )
        return self._losses

    def _assert_one_stream(self) -> None:
        import cupy

        stream = cupy.cuda.get_current_stream().ptr
        assert self._stream in (None, stream), "scratch memory is used on two streams"
        self._stream = stream

    def flat_grid(self, count: int, rounds: int = 16) -> tuple[int]:
        """Return a grid with one thread per item, but at most `rounds` blocks per SM."""
        return (max(1, min(-(-count // THREADS), rounds * self.multiprocessors)),)

    def launch(
        self, kernel: Kernel, arguments: dict[str, Any], *, grid: tuple[int, ...],
        defines: Defines = (), threads: int = THREADS, shared: int = 0,
    ) -> None:  # fmt: skip
        """Launch a kernel for the element type of `real`, with a value for each parameter."""
        defines = (("REAL", self._real), *defines)
        loaded = load_kernel(kernel.source, kernel.function, defines, self.device, shared)
        loaded(grid, (threads,), kernel.arguments(**arguments), shared_mem=shared)
