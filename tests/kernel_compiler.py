"""Compiling kernels by NVRTC, which needs no GPU, for any architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cupybnn.backends.cuda.sources import translation_unit


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

    options = (f"-arch={arch}", "--ptxas-options=-v")
    cubin, log = _compile(source, defines, options, arch, nvrtc.getCUBIN)
    return cubin, _resources(log)


def compile_ptx(
    source: str, arch: str, defines: Mapping[str, int | str] | None = None
) -> str | bytes:
    """Compile a kernel file to PTX, as `compile_cubin` does to a binary."""
    from cupy.cuda import nvrtc

    options = (f"-arch={arch.replace('sm', 'compute')}",)
    return _compile(source, defines, options, arch, nvrtc.getPTX)[0]


def _compile(
    source: str,
    defines: Mapping[str, int | str] | None,
    options: tuple[str, ...],
    arch: str,
    result: Callable[[int], Any],
) -> tuple[Any, str]:
    """Return what `result` takes of the compiled program, and the log."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(translation_unit(source, defines), f"{source}.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, ("--std=c++17", *options))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(
                f"{source}.cu does not compile for {arch}: {nvrtc.getProgramLog(program)}"
            ) from error
        return result(program), nvrtc.getProgramLog(program)
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
