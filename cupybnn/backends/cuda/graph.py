"""Capture of launches as a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

from cupybnn.backends.cuda import blas

__all__ = ["Fork", "capture"]


def capture(stream: Any, launch: Callable[[], None], pool: Any = None) -> Any:
    """Capture the launches of `launch` as a CUDA graph.

    Parameters
    ----------
    stream : cupy.cuda.Stream
        Not the default stream. It is the current stream while `launch` runs; nothing executes.
    launch : callable
        May use further streams (see `Fork`). Without a `pool` it must not allocate device memory:
        the graph would keep using memory that the pool has since given to others.
    pool : cupy.cuda.MemoryPool, optional
        Where `launch` allocates. It must be used by this graph alone and live as long as the graph.

    Returns
    -------
    cupy.cuda.Graph

    Raises
    ------
    RuntimeError
        If a launch cannot be captured. Nothing has been executed.
    """
    import cupy

    try:
        allocator = _refuse if pool is None else pool.malloc
        with stream, cupy.cuda.using_allocator(allocator), _without_collection():
            stream.begin_capture()
            try:
                launch()
            except BaseException:
                # End the capture, even if it is invalid.
                with contextlib.suppress(Exception):
                    stream.end_capture()
                raise
            return stream.end_capture()
    except (
        NotImplementedError,
        cupy.cuda.runtime.CUDARuntimeError,
        cupy.cuda.driver.CUDADriverError,
        *blas.failures(),
    ) as error:
        raise RuntimeError(f"a CUDA graph cannot be captured: {error}") from error


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Disable Python's garbage collector: a finalizer may wait for the device.

    A cuBLAS handle, for example of an earlier network, does, and that invalidates the capture.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _refuse(size: int) -> Any:
    raise RuntimeError(f"a CUDA graph cannot be captured: it would allocate {size} bytes")


class Fork:
    """Further streams alongside the current one, or none.

    Parameters
    ----------
    *streams : cupy.cuda.Stream or None
        With none (or None), all launches go to the current stream, in order.
    """

    def __init__(self, *streams: Any) -> None:
        self._streams = [stream for stream in streams if stream is not None]
        self._used: dict[int, Any] = {}  # by number: the stream

    def ready(self) -> Any:
        """Return an event after all current work of the first stream, for `aside`."""
        return self._mark() if self._streams else None

    @contextlib.contextmanager
    def aside(self, after: Any = None, number: int = 0) -> Iterator[None]:
        """Context in which launches go to a further stream.

        Parameters
        ----------
        after : event, optional
            From `ready` or `mark`: what they wait for. By default, all current work of the first
            stream.
        number : int
            Of the stream; the last one, if there are fewer.
        """
        if not self._streams:
            yield
            return
        number = self._number(number)
        stream = self._used.setdefault(number, self._streams[number])
        stream.wait_event(self._mark() if after is None else after)
        with stream:
            yield

    def mark(self, number: int = 0) -> Any:
        """Return an event after all current work of a further stream; None if there is none."""
        number = self._number(number)
        if number not in self._used:
            return None
        with self._used[number]:
            return self._mark()

    def wait(self, event: Any) -> None:
        """Make the current stream wait for an event returned by `mark`."""
        if event is not None:
            import cupy

            cupy.cuda.get_current_stream().wait_event(event)

    def join(self) -> None:
        """Make the current stream wait for all work of the others."""
        for number in self._used:
            self.wait(self.mark(number))

    def _number(self, number: int) -> int:
        return min(number, len(self._streams) - 1)

    @staticmethod
    def _mark() -> Any:
        import cupy

        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        return event
