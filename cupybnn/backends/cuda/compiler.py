"""Compiling kernels at run time through CuPy, and properties of the device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

from cupybnn.backends.cuda import architectures
from cupybnn.backends.cuda.sources import translation_unit

__all__ = ["architecture", "load_kernel", "multiprocessors", "shared_memory_limit"]

Defines = Sequence[tuple[str, int | str]]

# Every GPU with clusters allows this many blocks in one; a kernel must ask for more
# (CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED).
_PORTABLE_CLUSTER, _LARGE_CLUSTERS = 8, 14
_PLENTY = 48 * 1024  # bytes of shared memory that every launch may have

_lock = threading.Lock()
# By source, function, defines and device: the kernel, and the most dynamic shared memory that its
# launches may ask for so far. An entry is replaced as a whole, so that it is read without the lock.
_kernels: dict[tuple[Any, ...], tuple[Any, int]] = {}


@cache
def architecture(device: int) -> int:
    """Compute capability of CUDA device number `device`, as major * 10 + minor: 90 for 9.0."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability)


@cache
def multiprocessors(device: int) -> int:
    """Multiprocessors of CUDA device number `device`."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@cache
def shared_memory_limit(device: int) -> int:
    """Bytes of shared memory that a block may have on CUDA device number `device`."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


def load_kernel(source: str, function: str, defines: Defines, device: int, shared: int = 0) -> Any:
    """Return a compiled kernel, ready to launch on `device`.

    Compiled once a process and device, and once a machine: CuPy keeps the binary on disk, keyed by
    the whole text of the translation unit. Any thread may call this.

    Parameters
    ----------
    source, function : str
        Name of the file in ``kernels/`` and of the kernel in it.
    defines : tuple of (name, value)
        What the translation unit defines.
    device : int
        Number of the CUDA device, which must be the current one.
    shared : int
        Bytes of dynamic shared memory that the next launch asks for. They may differ from one
        launch to the next.

    Raises
    ------
    ValueError
        If the device has less shared memory for a block.
    """
    key = (source, function, tuple(defines), device)
    kernel, allowed = _kernels.get(key, (None, -1))
    if shared > allowed:
        with _lock:
            kernel, allowed = _kernels.get(key, (None, -1))
            if kernel is None:
                kernel = _compile(source, function, dict(defines))
            if shared > allowed:
                _allow_shared_memory(kernel, function, shared, device)
                _kernels[key] = kernel, shared
    return kernel


def _compile(source: str, function: str, defines: dict[str, int | str]) -> Any:
    import cupy

    options = ["--std=c++17"]
    flag = architectures.compiler_target(source)
    if flag is not None:
        options.append(f"-arch={flag}")
    # A cooperative launch is refused unless all its blocks can run at a time.
    cooperative = {"enable_cooperative_groups": True} if defines.get("COOPERATIVE") else {}
    module = cupy.RawModule(
        code=translation_unit(source, defines), options=tuple(options), backend="nvrtc",
        **cooperative,
    )  # fmt: skip
    kernel = module.get_function(function)
    if int(defines.get("CLUSTER", 1)) > _PORTABLE_CLUSTER:
        from cupy_backends.cuda.api import driver  # type: ignore[import-untyped]

        driver.funcSetAttribute(kernel.kernel.ptr, _LARGE_CLUSTERS, 1)
    return kernel


def _allow_shared_memory(kernel: Any, function: str, shared: int, device: int) -> None:
    """Let launches of a kernel ask for `shared` bytes. The limit is a state of the kernel."""
    if shared == 0:
        return
    if shared > shared_memory_limit(device):
        raise ValueError(
            f"The kernel {function} needs {shared} bytes of shared memory for each block, and this "
            f"device has {shared_memory_limit(device)}. Use smaller images or layers."
        )
    # For small amounts, too: with what the kernel declares itself they may exceed the default.
    kernel.max_dynamic_shared_size_bytes = shared
    if shared > _PLENTY:  # as many blocks on a multiprocessor as it allows
        kernel.preferred_shared_memory_carveout = 100
