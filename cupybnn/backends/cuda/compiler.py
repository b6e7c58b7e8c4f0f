"""Run-time compilation of kernels through CuPy, and device properties."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

from cupybnn.backends.cuda import architectures
from cupybnn.backends.cuda.sources import translation_unit

__all__ = ["architecture", "load_kernel", "multiprocessors", "shared_memory_limit"]

Defines = Sequence[tuple[str, int | str]]

# Every GPU with clusters allows this many blocks per cluster; a kernel must opt in to more
# (CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED).
_PORTABLE_CLUSTER, _LARGE_CLUSTERS = 8, 14
_DEFAULT_SHARED = 48 * 1024  # bytes of shared memory that every launch may use

_lock = threading.Lock()
# By source, function, defines and device: the kernel, and the dynamic shared memory allowed for its
# launches so far. Entries are replaced as a whole, so reading needs no lock.
_kernels: dict[tuple[Any, ...], tuple[Any, int]] = {}


@cache
def architecture(device: int) -> int:
    """Return the compute capability of a CUDA device as major * 10 + minor: 90 for 9.0."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability)


@cache
def multiprocessors(device: int) -> int:
    """Return the number of multiprocessors of a CUDA device."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@cache
def shared_memory_limit(device: int) -> int:
    """Return the maximum bytes of shared memory per block on a CUDA device."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


def load_kernel(source: str, function: str, defines: Defines, device: int, shared: int = 0) -> Any:
    """Return a compiled kernel, ready to launch on `device`.

    Compiled once per process and device, and once per machine: CuPy caches the binary on disk,
    keyed by the full text of the translation unit. Thread-safe.

    Parameters
    ----------
    source, function : str
        Name of the file in ``kernels/`` and of the kernel in it.
    defines : tuple of (name, value)
        Macros of the translation unit.
    device : int
        Index of the CUDA device, which must be the current one.
    shared : int
        Bytes of dynamic shared memory of the next launch. They may differ between launches.

    Raises
    ------
    ValueError
        If the device has less shared memory per block.
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
    """Allow launches of a kernel to use `shared` bytes. The limit is a state of the kernel."""
    if shared == 0:
        return
    if shared > shared_memory_limit(device):
        raise ValueError(
            f"The kernel {function} needs {shared} bytes of shared memory per block, but this "
            f"device has {shared_memory_limit(device)}. Use smaller images or layers."
        )
    # For small amounts too: with the kernel's static memory they may exceed the default.
    kernel.max_dynamic_shared_size_bytes = shared
    if shared > _DEFAULT_SHARED:  # as many blocks per multiprocessor as possible
        kernel.preferred_shared_memory_carveout = 100
