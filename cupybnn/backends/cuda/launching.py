"""Prepared launches, and memory that holds zeros when a kernel starts.

Host time dominates a small product, so what does not change between calls is prepared once.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import lru_cache
from typing import Any

from cupybnn.backends.cuda.compiler import is_dry_run

__all__ = ["Launch", "Plans", "alloc", "current_stream", "empty", "zeros"]


class Launch:
    """A kernel with its grid, block and argument, a struct whose addresses change.

    For one thread: the argument's memory is read by the launch itself, without the interpreter's
    lock.

    Parameters
    ----------
    kernel : cupy.RawKernel
    blocks, threads : int
        Of the grid, and of a block.
    shared : int
        Dynamic shared memory of a block, in bytes.
    argument : bytes
        The struct.
    overlap : bool
        Whether the kernel may begin before the one ahead of it has ended: it waits for that itself
        (launch.cuh).

    Attributes
    ----------
    argument : ctypes array of char
        The struct's memory, to be changed by `struct.Struct.pack_into` before a call.
    """

    __slots__ = ("_address", "_config", "_function", "_kernel", "_numbers", "_pointer", "argument")

    def __init__(
        self, kernel: Any, blocks: int, threads: int, shared: int, argument: bytes,
        overlap: bool = False,
    ) -> None:  # fmt: skip
        self.argument = ctypes.create_string_buffer(argument, len(argument))
        self._pointer = ctypes.c_void_p(ctypes.addressof(self.argument))
        self._address = ctypes.addressof(self._pointer)  # of an array of one pointer
        self._kernel = kernel  # keeps the function loaded
        self._function = kernel.kernel.ptr
        self._numbers = (blocks, 1, 1, threads, 1, 1, shared)
        self._config = None
        if overlap and _launch_overlapping() is not None:
            self._config = _LaunchConfig(*self._numbers, 0, ctypes.addressof(_OVERLAP), 1)

    def __call__(self, stream: int) -> None:
        """Launch on a stream, given by its handle."""
        if not self._function:  # in a dry run
            return
        config = self._config
        # In a graph, blocks that wait would take the place of blocks that work on other branches.
        if config is not None and not (stream > 1 and _is_capturing(stream)):
            config.stream = stream
            status = _launch_overlapping()(
                ctypes.addressof(config), self._function, self._address, None
            )
            if status:
                raise sys.modules["cupy"].cuda.driver.CUDADriverError(status)
            return
        _launch()(self._function, *self._numbers, stream, self._address, 0)


class Plans(threading.local):
    """Prepared launches of a thread, by everything that they depend on."""

    def __init__(self) -> None:
        self._plans: dict[tuple[Any, ...], Any] = {}

    def get(self, key: tuple[Any, ...]) -> Any:
        """Return a plan, or None; in a dry run None, since a plan would launch."""
        return None if is_dry_run() else self._plans.get(key)

    def keep(self, key: tuple[Any, ...], plan: Any) -> Any:
        """Keep a plan, and return it; in a dry run it has no kernels, and is not kept."""
        if is_dry_run():
            return plan
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[key] = plan
        return plan


_MOST_PLANS = 10_000  # bounds memory in a program whose shapes never repeat


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, for an attribute whose value is an integer."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_OVERLAP = _LaunchAttribute(id=6, value=(1,))


@lru_cache(maxsize=1)
def _launch_overlapping() -> Any:
    """Return cuLaunchKernelEx, or None where it is missing."""
    try:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        function = ctypes.CDLL(name).cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p,) * 4
    return function


@lru_cache(maxsize=1)
def _launch() -> Any:
    # A RawKernel's own call takes twice as long.
    from cupy_backends.cuda.api import driver  # type: ignore[import-untyped]

    return driver.launchKernel


def current_stream() -> int:
    """Return the handle of the current stream."""
    return int(_get_current_stream()().ptr)


@lru_cache(maxsize=1)
def _get_current_stream() -> Any:
    import cupy

    return cupy.cuda.get_current_stream


def alloc(size: int) -> Any:
    """Return `size` bytes of memory."""
    return sys.modules["cupy"].cuda.alloc(size)


def empty(shape: tuple[int, ...], dtype: Any, memory: Any = None) -> Any:
    """Return an array in new memory, or in given memory."""
    return sys.modules["cupy"].ndarray(shape, dtype, memory)


# Zeros are handed out in pieces of blocks that are cleared as a whole: a block has room for so many
# requests like the one that it was made for, in at most so many bytes.
_REQUESTS, _MOST_BYTES = 32, 1 << 21
_LARGE = 1 << 17  # bytes that are cleared for themselves


class _Blocks(threading.local):
    """Blocks of a thread by device and stream: the memory, and the bytes handed out."""

    def __init__(self) -> None:
        self.of: dict[tuple[int, int], list[Any]] = {}


_blocks = _Blocks()


def zeros(size: int, device: int, stream: int) -> Any:
    """Return `size` bytes of memory that are zero for later work on a stream.

    Clearing takes a launch, which is shared by many requests, unless the stream is being captured:
    a graph must clear its memory whenever it is replayed.

    Parameters
    ----------
    size : int
    device : int
        The current device.
    stream : int
        Handle of the current stream.

    Returns
    -------
    cupy.cuda.MemoryPointer
    """
    size = (size + 255) & ~255
    if size <= _LARGE:
        block = _blocks.of.get((device, stream))
        # The default stream, 0 or 1, cannot be captured.
        if not (stream > 1 and _is_capturing(stream)):
            if block is None or block[1] + size > block[0].mem.size:
                memory = _cleared(min(_REQUESTS * size, _MOST_BYTES), stream)
                block = _blocks.of[device, stream] = [memory, 0]
            start = block[1]
            block[1] = start + size
            return block[0] + start
    return _cleared(size, stream)


def _cleared(size: int, stream: int) -> Any:
    memory = alloc(size)
    sys.modules["cupy"].cuda.runtime.memsetAsync(memory.ptr, 0, size, stream)
    return memory


def _is_capturing(stream: int) -> bool:
    return bool(sys.modules["cupy"].cuda.runtime.streamIsCapturing(stream))
