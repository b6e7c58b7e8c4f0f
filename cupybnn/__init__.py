"""1-bit matrix multiplication and binarized neural networks for NumPy and CuPy."""

__version__ = "0.1.0"

from cupybnn.fold import fold_batch_norm
from cupybnn.gemm import xnor_gemm, xnor_gemm_packed
from cupybnn.packed import PackedMatrix, pack, sign, unpack

__all__ = [
    "PackedMatrix",
    "__version__",
    "fold_batch_norm",
    "pack",
    "sign",
    "unpack",
    "xnor_gemm",
    "xnor_gemm_packed",
]
