"""Launches that take little of the host's time: by the driver's own call, prepared once.

`cupy.RawKernel` takes 5 µs for a launch. Here all but the stream and a few fields of the argument
is laid out beforehand in the driver's structures (CUDA driver API, cuLaunchKernelEx).
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

__all__ = ["FastLaunch"]

_COOPERATIVE = 2  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, with an int for its value."""

    _fields_ = (
        ("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )  # fmt: skip


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )  # fmt: skip


@cache
def _launch_function() -> Any:
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    # Its arguments are ctypes objects: with `argtypes` each call would check and convert them.
    return library.cuLaunchKernelEx


class FastLaunch:
    """Launches of a kernel that takes one struct.

    Parameters
    ----------
    kernel : cupy.RawKernel or function of a cupy.RawModule
        For the current device; a cluster's size is part of it.
    grid, block, shared : int
        Blocks, threads of each, and bytes of dynamic shared memory.
    argument : bytes
        The struct.
    cooperative : bool
        Whether all blocks must run at a time.

    Raises
    ------
    RuntimeError
        At a call, if the driver refuses the launch.
    """

    def __init__(
        self, kernel: Any, grid: int, block: int, shared: int, argument: bytes, *,
        cooperative: bool = False,
    ) -> None:  # fmt: skip
        self._kernel, self._lock = kernel, threading.Lock()
        self._data = ctypes.create_string_buffer(argument, len(argument))
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._data))
        self._attributes = (_Attribute * 1)(_Attribute(id=_COOPERATIVE, value=1))
        self._config = _Config(
            grid=(grid, 1, 1), block=(block, 1, 1), shared=shared, attributes=self._attributes,
            count=int(cooperative),
        )  # fmt: skip
        self._arguments = (
            ctypes.c_void_p(ctypes.addressof(self._config)),
            ctypes.c_void_p(kernel.kernel.ptr),
            ctypes.c_void_p(ctypes.addressof(self._pointers)),
            ctypes.c_void_p(0),
        )
        self._launch = _launch_function()

    def __call__(
        self, stream: int, section: struct.Struct | None = None, offset: int = 0, *values: Any
    ) -> None:
        """Launch on a stream, with some fields of the struct set.

        Parameters
        ----------
        stream : int
            Its address.
        section : struct.Struct, optional
            See `cupybnn.backends.cuda.structs.Struct.section`.
        offset : int
            Where these fields are in the struct.
        *values : int
            Their values.
        """
        with self._lock:
            if section is not None:
                section.pack_into(self._data, offset, *values)
            self._config.stream = stream
            error = self._launch(*self._arguments)
        if error:
            _refused(error)

    def bound(self, section: struct.Struct, offset: int) -> Callable[..., None]:
        """Return a function of the stream and the values that a call takes, which is faster."""
        lock, pack, data, config = self._lock, section.pack_into, self._data, self._config
        launch, arguments = self._launch, self._arguments

        def go(stream: int, *values: Any) -> None:
            with lock:
                pack(data, offset, *values)
                config.stream = stream
                error = launch(*arguments)
            if error:
                _refused(error)

        return go


def _refused(error: int) -> NoReturn:
    raise RuntimeError(f"the CUDA driver refused a launch with error {error}")
