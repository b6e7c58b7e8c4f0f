"""Capturing launches as a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

from cupybnn.backends.cuda import blas

__all__ = ["Fork", "capture"]


def capture(stream: Any, launch: Callable[[], None], pool: Any = None) -> Any:
    """Return the CUDA graph of what `launch` does.

    Parameters
    ----------
    stream : cupy.cuda.Stream
        Not the default one; it is the current one while `launch` runs, which does not execute
        anything.
    launch : callable
        May use further streams (see `Fork`). Without a `pool` it must not allocate device memory: a
        graph would go on using what the pool has given to others since.
    pool : cupy.cuda.MemoryPool, optional
        Where `launch` allocates; of this graph alone, and kept as long as the graph.

    Returns
    -------
    cupy.cuda.Graph

    Raises
    ------
    RuntimeError
        If something cannot be captured. Nothing has been executed.
    """
    import cupy

    try:
        allocator = _refuse if pool is None else pool.malloc
        with stream, cupy.cuda.using_allocator(allocator), _without_collection():
            stream.begin_capture()
            try:
                launch()
            except BaseException:
                # The capture must end, whatever is left of it.
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
    """Keep Python's garbage collector out: what it finds may wait for the device when it goes.

    A handle of cuBLAS does, say one of an earlier network, and that breaks a capture off.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _refuse(size: int) -> Any:
    raise RuntimeError(f"a CUDA graph cannot be captured: {size} bytes were to be allocated")


class Fork:
    """A second stream beside the current one, or none.

    Parameters
    ----------
    stream : cupy.cuda.Stream or None
        None: what would go to it goes to the current stream, in order.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._used = False

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Context in which launches go to the second stream, after all before it on the first."""
        if self._stream is None:
            yield
            return
        self._stream.wait_event(self._mark())
        self._used = True
        with self._stream:
            yield

    def mark(self) -> Any:
        """Return an event after all that the second stream has so far; None if that is nothing."""
        if not self._used:
            return None
        with self._stream:
            return self._mark()

    def wait(self, event: Any) -> None:
        """Let the current stream wait for an event that `mark` returned."""
        if event is not None:
            import cupy

            cupy.cuda.get_current_stream().wait_event(event)

    def join(self) -> None:
        """Let the current stream wait for all that the second has."""
        self.wait(self.mark())

    @staticmethod
    def _mark() -> Any:
        import cupy

        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        return event
