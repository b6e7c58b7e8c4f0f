"""The CUDA backend: the kernels in ``kernels/*.cu``, compiled at run time by CuPy."""

from collections.abc import Callable
from typing import Any

from cupybnn.backends.cuda import architectures
from cupybnn.backends.cuda.compiler import architecture
from cupybnn.backends.cuda.dispatch import force_kernel
from cupybnn.backends.cuda.order import fill_order
from cupybnn.backends.cuda.packing import (
    from_canonical,
    from_lines,
    pack,
    select,
    sign,
    to_canonical,
    unpack,
)
from cupybnn.backends.cuda.planes import pack_levels, quantize_gradient, unpack_levels
from cupybnn.backends.cuda.product import gemm, gemm_packed, matmul
from cupybnn.backends.cuda.random import random_words, uniform
from cupybnn.backends.devices import Device

__all__ = [
    "fill_order",
    "force_kernel",
    "from_canonical",
    "from_lines",
    "gemm",
    "gemm_packed",
    "kernels_for",
    "matmul",
    "pack",
    "pack_levels",
    "parallel_for",
    "parallel_parts",
    "passes",
    "quantize_gradient",
    "random_words",
    "select",
    "sign",
    "to_canonical",
    "uniform",
    "unpack",
    "unpack_levels",
]


def kernels_for(device: Device) -> list[str]:
    """Return the names of the product kernels that run on a CUDA device, fastest first."""
    return architectures.kernels_for(architecture(device.index))


def parallel_for(
    size: int, elements: int, work: Callable[[int, int], None], most: int | None = None
) -> None:
    """Call ``work(0, size)``: kernels need no threads on the host."""
    work(0, size)


def parallel_parts(x: Any, axis: int, work: Callable[[Any], None]) -> None:
    """Call ``work(...)``, with the index of all of `x`: kernels need no threads on the host."""
    work(...)


def passes(x: Any, *others: Any) -> None:
    """Return None: what compiled code passes over on a CPU, CuPy's operations do here."""
