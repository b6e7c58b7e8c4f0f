"""Forward passes that are kept as CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from cupybnn.backends.cuda.graph import capture

__all__ = ["Graph", "Recent"]


class Graph:
    """The graph of a forward pass for arrays of one shape and dtype.

    Parameters
    ----------
    forward : callable(x) -> cupy.ndarray
    example : cupy.ndarray
        What it is warmed up with.

    Raises
    ------
    RuntimeError
        If it cannot be captured.
    """

    def __init__(self, forward: Callable[[Any], Any], example: Any) -> None:
        import cupy

        # All that is allocated on the way is of this graph alone, also where it is free again.
        self._pool = cupy.cuda.MemoryPool()
        stream = cupy.cuda.Stream(non_blocking=True)
        stream.wait_event(cupy.cuda.get_current_stream().record())
        with stream, cupy.cuda.using_allocator(self._pool.malloc):
            self._x = example.copy()
            del_later = forward(self._x)  # compiles, and takes the memory that the graph will use
        stream.synchronize()
        del del_later
        results: list[Any] = []
        self._graph = capture(stream, lambda: results.append(forward(self._x)), self._pool)
        self._logits = results[0]

    def __call__(self, x: Any) -> Any:
        """Return what the forward pass makes of `x`, on the current stream, in new memory."""
        self._x.data.copy_from_device_async(x.data, x.nbytes)
        self._graph.launch()
        return self._logits.copy()


class Recent:
    """Values by key, of which the least recently used go.

    Parameters
    ----------
    most : int
        Values that are kept.
    most_size : int
        Sum of the sizes of those that are kept.
    """

    def __init__(self, most: int, most_size: int) -> None:
        self._most, self._most_size = most, most_size
        self._values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Any) -> Any:
        """Return a value, or None; it is now the one used last."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Keep a value, the one used last, and let go of others for it."""
        self._values.pop(key, None)
        self._values[key] = value, size
        while len(self) > 1 and (
            len(self) > self._most or sum(s for _, s in self._values.values()) > self._most_size
        ):
            self._values.popitem(last=False)
