"""Compiling kernels: at run time for this device by CuPy, or anywhere for any architecture."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from cupybnn.backends.cuda.sources import translation_unit

__all__ = ["Resources", "architecture", "compile_cubin", "load_kernel", "multiprocessors"]

Defines = Sequence[tuple[str, int | str]]

# wgmma and setmaxnreg exist only in code that runs on Hopper alone.
_ARCHITECTURE_SPECIFIC = {"sm90_sign_gemm": "sm_90a", "sm90_xnor_gemm": "sm_90a"}

# Blocks that a cluster may have on every GPU that has clusters; a kernel must ask for more
# (CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED).
_PORTABLE_CLUSTER, _LARGE_CLUSTERS = 8, 14

_lock = threading.Lock()
_kernels: dict[tuple[Any, ...], Any] = {}


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


def load_kernel(source: str, function: str, defines: Defines, device: int, shared: int = 0) -> Any:
    """Return a compiled kernel, ready to launch on `device`.

    Compiled once a process and device, and once a machine: CuPy keeps the binary on disk, keyed by
    the whole text of the translation unit.

    Parameters
    ----------
    source, function : str
        Name of the file in ``kernels/`` and of the kernel in it.
    defines : tuple of (name, value)
        What the translation unit is to define.
    device : int
        Number of the CUDA device, which must be the current one.
    shared : int
        Bytes of dynamic shared memory that launches will ask for.
    """
    key = (source, function, tuple(defines), device)
    kernel = _kernels.get(key)
    if kernel is None:
        import cupy

        with _lock:
            kernel = _kernels.get(key)
            if kernel is None:
                options = ["--std=c++17"]
                if source in _ARCHITECTURE_SPECIFIC:
                    options.append(f"-arch={_ARCHITECTURE_SPECIFIC[source]}")
                module = cupy.RawModule(
                    code=translation_unit(source, dict(defines)),
                    options=tuple(options),
                    backend="nvrtc",
                )
                kernel = module.get_function(function)
                if shared:  # beside what the kernel has of its own, that may be over the limit
                    kernel.max_dynamic_shared_size_bytes = shared
                if shared > 48 * 1024:  # as many blocks a multiprocessor as it allows
                    kernel.preferred_shared_memory_carveout = 100
                if int(dict(defines).get("CLUSTER", 1)) > _PORTABLE_CLUSTER:
                    from cupy_backends.cuda.api import driver  # type: ignore[import-untyped]

                    driver.funcSetAttribute(kernel.kernel.ptr, _LARGE_CLUSTERS, 1)
                _kernels[key] = kernel
    return kernel


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel: registers, stack and spilled bytes of a thread.

    `shared_bytes` are those of a block that the kernel declares, beside what a launch asks for.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    serialized_wgmma: bool


def compile_cubin(
    source: str, arch: str, defines: Mapping[str, int | str] | None = None
) -> tuple[bytes, Resources]:
    """Compile a kernel file by NVRTC, which needs no GPU.

    Parameters
    ----------
    source : str
        Name of the file in ``kernels/``.
    arch : str
        "sm_80", "sm_90a", ...
    defines : mapping
        What the translation unit is to define.

    Returns
    -------
    cubin : bytes
    resources : Resources

    Raises
    ------
    RuntimeError
        With the compiler's words, if it does not compile.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(translation_unit(source, defines), f"{source}.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, (f"-arch={arch}", "--std=c++17", "--ptxas-options=-v"))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(
                f"{source}.cu does not compile for {arch}: {nvrtc.getProgramLog(program)}"
            ) from error
        log = nvrtc.getProgramLog(program)
        return nvrtc.getCUBIN(program), _resources(log)
    finally:
        nvrtc.destroyProgram(program)


def _resources(log: str) -> Resources:
    def largest(pattern: str) -> int:
        return max((int(x) for x in re.findall(pattern, log)), default=0)

    return Resources(
        registers=largest(r"Used (\d+) registers"),
        stack_bytes=largest(r"(\d+) bytes stack frame"),
        spill_bytes=largest(r"(\d+) bytes spill stores"),
        shared_bytes=largest(r"(\d+) bytes smem"),
        serialized_wgmma="instructions are serialized" in log,
    )
