"""The product kernels, one module each: where a kernel runs, and its configurations.

A module is named after its kernel, ``kernels/<name>_xnor_gemm.cu``, and discovered by that name. It
defines

- ``CAPABILITIES``: the range of compute capabilities that it runs on, 90 for 9.0;
- ``TARGET``: the target of ``kernels/<name>_*.cu``, or None for the device's architecture;
- ``config(...)``: a configuration, including its shared memory;
- ``choose(problem)``: the configuration for a problem;
- ``candidates(problem)``: the configurations worth measuring for it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__all__ = ["KERNELS", "compiler_target", "default_kernel", "kernels_for"]


def _discover() -> dict[str, Any]:
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    # Where several kernels run, the one that needs the newest GPU is fastest.
    newest_first = sorted(modules, key=lambda name: modules[name].CAPABILITIES.start, reverse=True)
    return {name: modules[name] for name in newest_first}


#: Modules by kernel name, fastest first.
KERNELS = _discover()


def kernels_for(capability: int) -> list[str]:
    """Return the kernels that run on a compute capability (90 for 9.0), fastest first."""
    return [name for name, module in KERNELS.items() if capability in module.CAPABILITIES]


def default_kernel(capability: int) -> str:
    """Return the kernel used on a compute capability unless another is forced."""
    return kernels_for(capability)[0]


def compiler_target(source: str) -> str | None:
    """Return the compiler target of a source file: its architecture's `TARGET`."""
    module = KERNELS.get(source.split("_")[0])
    return None if module is None else module.TARGET
