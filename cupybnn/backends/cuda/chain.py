"""Kernels one after the other as a CUDA graph: one call of the driver's, for few of the host's µs.

Each may begin while the one before it ends, and waits for that itself (launch.cuh).
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cupybnn.backends.cuda.launching import Launch
from cupybnn.backends.cuda.structs import Section

__all__ = ["Chain", "Link", "can_chain"]


@dataclass(frozen=True)
class Link:
    """A kernel's launch.

    Attributes
    ----------
    kernel : cupy.RawKernel or function of a cupy.RawModule
    grid, block, shared : int
        Blocks, threads of each, and bytes of dynamic shared memory.
    argument : bytes
        Its one argument, a struct.
    changing : Section or None
        Those fields that each launch sets.
    """

    kernel: Any
    grid: int
    block: int
    shared: int
    argument: bytes
    changing: Section | None = None

    def launch(self) -> Launch:
        """Return the launch by itself."""
        changing = () if self.changing is None else (self.changing,)
        return Launch(
            self.kernel, self.grid, self.block, self.shared, self.argument, *changing, overlap=True
        )


class _Params(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h."""

    _fields_ = (
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint), ("arguments", ctypes.c_void_p), ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p), ("context", ctypes.c_void_p),
    )  # fmt: skip


class _Edge(ctypes.Structure):
    """CUgraphEdgeData of cuda.h."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte), ("to_port", ctypes.c_ubyte), ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )  # fmt: skip


# CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
_EDGE = _Edge(from_port=1, type=1)


@lru_cache(maxsize=1)
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@lru_cache(maxsize=1)
def can_chain() -> bool:
    """Whether the driver knows graphs whose kernels overlap: from CUDA 12.3 on."""
    return hasattr(_driver(), "cuGraphAddDependencies_v2")


def _check(error: int) -> None:
    if error:
        raise sys.modules["cupy"].cuda.driver.CUDADriverError(error)


class Chain:
    """Launches one after the other.

    For one thread and one stream at a time.

    Parameters
    ----------
    links : sequence of Link
        At least one.

    Raises
    ------
    cupy.cuda.driver.CUDADriverError
        If the driver reports an error, now or at a launch.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        driver = _driver()
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuGraphCreate(ctypes.byref(graph), 0))
        before = None
        self._kept: list[Any] = []
        self._changing: list[tuple[Any, ...]] = []
        for link in links:
            data = ctypes.create_string_buffer(link.argument, len(link.argument))
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(data))
            params = _Params(
                function=link.kernel.kernel.ptr, grid=(link.grid, 1, 1), block=(link.block, 1, 1),
                shared=link.shared, arguments=ctypes.addressof(pointers),
            )  # fmt: skip
            node = ctypes.c_void_p()
            _check(
                driver.cuGraphAddKernelNode_v2(
                    ctypes.byref(node), graph, None, ctypes.c_size_t(0), ctypes.byref(params)
                )
            )
            if before is not None:
                _check(
                    driver.cuGraphAddDependencies_v2(
                        graph, ctypes.byref(before), ctypes.byref(node), ctypes.byref(_EDGE),
                        ctypes.c_size_t(1),
                    )
                )  # fmt: skip
            before = node
            self._kept += [link, data, pointers, params]
            if link.changing is not None:
                pack, offset = link.changing.fields.pack_into, link.changing.offset
                self._changing.append((pack, data, offset, node, ctypes.byref(params)))
        _check(
            driver.cuGraphInstantiateWithFlags(
                ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
            )
        )
        driver.cuGraphDestroy(graph)
        self._last: list[tuple[int, ...] | None] = [None] * len(self._changing)
        self._executable = executable
        self._set, self._launch = driver.cuGraphExecKernelNodeSetParams_v2, driver.cuGraphLaunch
        weakref.finalize(self, driver.cuGraphExecDestroy, executable)

    def go(self, stream: int, *values: tuple[int, ...]) -> None:
        """Launch on a stream, given by its handle, with the values of each link that changes."""
        last = self._last
        for i, (pack, data, offset, node, params) in enumerate(self._changing):
            given = values[i]
            if given != last[i]:
                pack(data, offset, *given)
                _check(self._set(self._executable, node, params))
                last[i] = given
        error = self._launch(self._executable, ctypes.c_void_p(stream))
        if error:
            _check(error)
