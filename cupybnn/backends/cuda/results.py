"""The usual calls of a network, and memory for their results, for the least of the host's time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Results", "Run", "usual_calls"]

#: Of a CuPy array of pixels and the handle of the current stream, logits or None.
Run = Callable[[Any, int], Any]

_BLOCK, _MOST_RESULTS, _MOST_BLOCKS = 1 << 15, 64, 64


class Results:
    """New arrays of one shape; if they are small, many of them share an allocation.

    An allocation takes 2 µs of the host's time, a place in one less than half of that. Its memory
    is free again when none of its arrays is left.

    Parameters
    ----------
    shape : tuple of int
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        import cupy

        self._array, self._alloc, self._shape = cupy.ndarray, cupy.cuda.alloc, shape
        self._dtype = np.dtype(np.float32)
        # 512 bytes, as the pool aligns what it hands out.
        self._size = -(-4 * int(np.prod(shape)) // 512) * 512
        self._count = min(_BLOCK // max(self._size, 1), _MOST_RESULTS)
        # Memory comes back to the stream that it was taken for.
        self._blocks: dict[tuple[int, int], list[Any]] = {}

    def new(self, stream: int) -> Any:
        """Return an array of float32 for work on the current stream, given by its handle."""
        if self._count < 2:
            return self._array(self._shape, self._dtype)
        key = stream, threading.get_ident()
        places = self._blocks.get(key)
        if not places:
            if len(self._blocks) >= _MOST_BLOCKS:
                self._blocks.clear()
            memory = self._alloc(self._size * self._count)
            places = [memory + self._size * i for i in range(self._count)]
            self._blocks[key] = places
        return self._array(self._shape, self._dtype, places.pop())


def usual_calls(runs: dict[tuple[int, ...], Run], device: int) -> Callable[[Any], Any]:
    """Return a function that takes the usual calls.

    It is given anything, and returns logits, or None where the call is not of the usual kind: a
    CuPy array of uint8, C-contiguous, on this device, the current one, of a shape that `runs` has,
    and no capture.

    Parameters
    ----------
    runs : dict
        By the shape of pixels, for calls like some before. It may change.
    device : int
    """
    import cupy

    ndarray, pixel = cupy.ndarray, np.dtype(np.uint8)
    current_device, current_stream = cupy.cuda.runtime.getDevice, cupy.cuda.get_current_stream
    is_capturing = cupy.cuda.runtime.streamIsCapturing

    def logits(x: Any) -> Any:
        if type(x) is not ndarray:
            return None
        run = runs.get(x.shape)
        if run is None or x.dtype is not pixel or not x._c_contiguous:
            return None
        if x.data.device_id != device or current_device() != device:
            return None
        stream = current_stream().ptr
        if stream > 1 and is_capturing(stream):  # the default stream never is
            return None
        return run(x, stream)

    return logits
