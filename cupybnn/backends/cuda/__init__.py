"""The CUDA backend: kernels of ``kernels/*.cu``, compiled at run time by CuPy."""

from cupybnn.backends.cuda import configs
from cupybnn.backends.cuda.compiler import architecture
from cupybnn.backends.cuda.dispatch import force_kernel
from cupybnn.backends.cuda.packing import (
    from_canonical,
    from_lines,
    pack,
    select,
    sign,
    to_canonical,
    unpack,
)
from cupybnn.backends.cuda.product import gemm, gemm_packed
from cupybnn.backends.devices import Device

__all__ = [
    "force_kernel",
    "from_canonical",
    "from_lines",
    "gemm",
    "gemm_packed",
    "kernels_for",
    "pack",
    "select",
    "sign",
    "to_canonical",
    "unpack",
]


def kernels_for(device: Device) -> list[str]:
    """Return the names of the product kernels that run on a CUDA device, fastest first."""
    return configs.kernels_for(architecture(device.index))
