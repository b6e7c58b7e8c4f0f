"""The product kernels, a module each: where it runs, and how it multiplies which shapes.

A module is named like its kernel, ``kernels/<name>_xnor_gemm.cu``, and found by that name. It has

- ``CAPABILITIES``: range of the compute capabilities that it runs on, 90 for 9.0;
- ``TARGET``: what to compile ``kernels/<name>_*.cu`` for, or None for the device's architecture;
- ``config(...)``: a configuration, with the shared memory that it takes;
- ``choose(problem)``: the configuration for a problem;
- ``candidates(problem)``: configurations that are worth measuring for it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__all__ = ["KERNELS", "compiler_target", "default_kernel", "kernels_for"]


def _found() -> dict[str, Any]:
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    # A kernel that needs a newer GPU is the faster one where several run.
    newest_first = sorted(modules, key=lambda name: modules[name].CAPABILITIES.start, reverse=True)
    return {name: modules[name] for name in newest_first}


#: Modules by the kernel's name, fastest first.
KERNELS = _found()


def kernels_for(capability: int) -> list[str]:
    """Return the kernels that run on a compute capability (90 for 9.0), fastest first."""
    return [name for name, module in KERNELS.items() if capability in module.CAPABILITIES]


def default_kernel(capability: int) -> str:
    """Return the kernel that products use on a compute capability unless another is forced."""
    return kernels_for(capability)[0]


def compiler_target(source: str) -> str | None:
    """Return what to compile a source file for: its architecture's `TARGET`."""
    module = KERNELS.get(source.split("_")[0])
    return None if module is None else module.TARGET
