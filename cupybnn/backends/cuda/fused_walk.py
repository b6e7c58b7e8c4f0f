"""How fused kernels walk a layer by strips (training.cuh): grids, and what to define."""

from __future__ import annotations

from cupybnn.backends.cuda.compiler import Defines, architecture
from cupybnn.backends.cuda.fused_arguments import Layer

__all__ = ["Walk"]

_THREADS = 256


class Walk:
    """Ways of one device.

    Parameters
    ----------
    device : int
        Number of the CUDA device.
    """

    def __init__(self, device: int) -> None:
        import cupy

        self._multiprocessors = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
        self._has_clusters = architecture(device) >= 90

    def strips(
        self, layer: Layer, sums: bool, vector: int = 4
    ) -> tuple[Defines, tuple[int, int], bool]:
        """Return defines of a layer walked by strips, the grid, and whether a cluster has a strip.

        Parameters
        ----------
        layer : Layer
        sums : bool
            Whether there are sums over rows: only then clusters are of use.
        vector : int
            Columns of a thread, where they divide the number of columns.
        """
        rows, cols = layer.shape
        while cols % vector:
            vector //= 2
        strips, blocks = -(-cols // 32), 1
        if sums and self._has_clusters:
            at_once = _THREADS * vector // 32
            while blocks < min(8, -(-rows // at_once)):
                blocks *= 2
        else:
            blocks = self.row_blocks(rows, cols, vector)
        clustered = sums and self._has_clusters and blocks > 1
        defines = (
            ("CLUSTER", blocks if clustered else 1),
            ("COLS", 32),
            *layer.defines(),
            ("VECTOR", vector),
        )
        return defines, (strips, blocks), clustered

    def row_blocks(self, rows: int, cols: int, vector: int) -> int:
        """Return how many blocks share the rows of a strip, without clusters."""
        fill = -(-8 * self._multiprocessors // -(-cols // 32))
        return max(1, min(rows // (16 * vector), fill))
