"""Compiling kernels by NVRTC, which needs no GPU, for any architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

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
