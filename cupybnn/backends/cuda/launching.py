"""Prepared launches, and memory that holds zeros when a kernel starts.

Host time dominates a small product, so what does not change between calls is prepared once.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

from cupybnn.backends.cuda.compiler import is_dry_run
from cupybnn.backends.cuda.structs import Section

__all__ = ["Launch", "Plans", "alloc", "current_stream", "driver_error", "empty", "zeros"]


class Launch:
    """A kernel with its grid, block and argument: a struct of which a few fields change.

    It takes the least of the host's time: all else is laid out beforehand in the driver's
    structures (CUDA driver API, cuLaunchKernelEx). Any thread may call it.

    Parameters
    ----------
    kernel : cupy.RawKernel or function of a cupy.RawModule
        For the current device; a cluster's size is part of it.
    grid, block, shared : int
        Blocks, threads of each, and bytes of dynamic shared memory.
    argument : bytes
        The struct.
    *changing : Section
        Those of its fields that each launch sets.
    cooperative : bool
        Whether all blocks must run at a time.
    overlap : bool
        Whether the kernel may begin before the one ahead of it has ended: it waits for that itself
        (launch.cuh). Not so in a graph, where blocks that wait would take the place of blocks that
        work on other branches.

    Attributes
    ----------
    go : callable(stream, *values)
        Launches on a stream, given by its handle, with the values of the changing fields in order.
        A call of the object does the same, 0.1 µs later.

    Raises
    ------
    cupy.cuda.driver.CUDADriverError
        At a launch, if the driver reports an error.
    """

    __slots__ = ("go",)

    def __init__(
        self, kernel: Any, grid: int, block: int, shared: int, argument: bytes, *changing: Section,
        cooperative: bool = False, overlap: bool = False,
    ) -> None:  # fmt: skip
        if is_dry_run():
            self.go = lambda stream, *values: None
            return
        data = ctypes.create_string_buffer(argument, len(argument))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(data))
        numbers = [_COOPERATIVE] * cooperative + [_OVERLAP] * overlap
        attributes = (_Attribute * 2)(*(_Attribute(id=number, value=1) for number in numbers))
        count = len(numbers)
        config = _Config(
            grid=(grid, 1, 1), block=(block, 1, 1), shared=shared, attributes=attributes,
            count=count,
        )  # fmt: skip
        arguments = ctypes.byref(config), ctypes.c_void_p(kernel.kernel.ptr), pointers, None
        pack, offset = _writer(changing)
        launch, lock = _launch_function(), threading.Lock()

        def go(stream: int, *values: int) -> None:
            # The driver copies the argument, for which it lets other threads of Python run.
            with lock:
                pack(data, offset, *values)
                config.stream = stream
                if overlap:
                    config.count = count - (stream > 1 and _is_capturing(stream))
                error = launch(*arguments)
                if error == _NO_CONTEXT:  # this thread has not used the device before
                    sys.modules["cupy"].cuda.Device().use()
                    error = launch(*arguments)
            if error:
                _fail(kernel, error)

        self.go = go

    def __call__(self, stream: int, *values: int) -> None:
        """Launch: see `go`."""
        self.go(stream, *values)


def _writer(sections: tuple[Section, ...]) -> tuple[Callable[..., None], int]:
    """Return a function of the struct's memory, an offset and values, and that offset."""
    if not sections:
        return struct.Struct("").pack_into, 0
    if len(sections) == 1:
        return sections[0].fields.pack_into, sections[0].offset
    ends = list(itertools.accumulate(section.fields.size // 8 for section in sections))
    parts = [
        (section.fields.pack_into, section.offset, slice(begin, end))
        for section, begin, end in zip(sections, [0, *ends], [*ends[:-1], None], strict=False)
    ]

    def pack(data: Any, _: int, *values: int) -> None:
        for pack_into, offset, part in parts:
            pack_into(data, offset, *values[part])

    return pack, 0


def _fail(kernel: Any, number: int) -> NoReturn:
    raise driver_error(
        number, f"did not launch {kernel.name}",
        " If earlier work on the GPU failed, that is reported here; with CUDA_LAUNCH_BLOCKING=1 it "
        "is reported where it was launched.",
    )  # fmt: skip


def driver_error(number: int, what: str, more: str = "") -> Exception:
    """Return CuPy's exception for an error of the CUDA driver, and what the driver did not do."""
    error: Exception = sys.modules["cupy"].cuda.driver.CUDADriverError(number)
    error.args = (f"The CUDA driver {what}: {error} (error {number}).{more}",)
    return error


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


# CUlaunchAttributeID: cooperative; programmatic stream serialization.
_COOPERATIVE, _OVERLAP = 2, 6
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, for an attribute whose value is an integer."""

    _fields_ = (
        ("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )  # fmt: skip


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _launch_function() -> Any:
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    # Its arguments are ctypes objects: with `argtypes` each call would check and convert them.
    return library.cuLaunchKernelEx


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
