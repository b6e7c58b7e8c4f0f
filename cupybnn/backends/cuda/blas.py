"""Dense products: the one way to cuBLAS, inside a CUDA graph that is being captured or outside.

NVIDIA's bindings (the package nvmath-python) can be captured; CuPy's own refuse. Where the former
are not installed CuPy's serve, and a training step is launched kernel by kernel.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import numpy as np

__all__ = ["PRECISIONS", "Blas", "capturable", "failures", "operand_dtype"]

#: How dense products are computed, with the least compute capability for it; results are summed in
#: float32 in each case.
PRECISIONS = {"float32": 0, "tf32": 80, "bfloat16": 80}

_WORKSPACE = 32 << 20  # bytes; what cuBLAS recommends for Hopper
# cudaDataType and cublasComputeType_t. Bit patterns of bfloat16 are kept as uint16: NumPy has no
# such type of its own.
_TYPES = {"float32": 0, "uint16": 14}
_COMPUTE = {"float32": 68, "tf32": 77, "bfloat16": 68}
_DEFAULT_ALGORITHM = -1


def operand_dtype(precision: str) -> np.dtype:
    """Return the dtype of operands: float32, or uint16 that holds bit patterns of bfloat16."""
    return np.dtype(np.uint16 if precision == "bfloat16" else np.float32)


@cache
def _nvmath() -> Any:
    """Return NVIDIA's bindings of cuBLAS, or None."""
    try:
        from nvmath.bindings import cublas
    except (ImportError, RuntimeError):
        return None
    return cublas


@cache
def capturable() -> bool:
    """Whether products can be captured: nvmath-python and its cuBLAS are here."""
    cublas = _nvmath()
    if cublas is None:
        return False
    try:
        cublas.destroy(cublas.create())
    except Exception:  # a library that is missing or too old is told in several ways
        return False
    return True


def failures() -> tuple[type[Exception], ...]:
    """Return what NVIDIA's bindings raise when cuBLAS refuses."""
    cublas = _nvmath()
    return () if cublas is None else (cublas.cuBLASError,)


class Blas:
    """Dense products of one precision, in the order of one stream.

    Products that may run at the same time need a `Blas` each: a workspace serves one at a time.

    Parameters
    ----------
    precision : {"float32", "tf32", "bfloat16"}
        The type of operands, and how the tensor cores may round them.
    """

    def __init__(self, precision: str) -> None:
        import cupy

        self.precision = precision
        self._compute = _COMPUTE[precision]
        self._stream: int | None = None
        self._nvmath: Any = _nvmath() if capturable() else None
        self._handle = 0
        if self._nvmath is not None:
            self._handle = self._nvmath.create()
            self._workspace = cupy.empty(_WORKSPACE, np.uint8)

    def __del__(self) -> None:
        if getattr(self, "_handle", 0):
            with contextlib.suppress(Exception):  # the process, or the driver, may be ending
                self._nvmath.destroy(self._handle)

    def multiply(
        self,
        a: Any,
        b: Any,
        out: Any,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        scale: float = 1.0,
    ) -> None:
        """Compute ``out = scale * a @ b`` on the current stream.

        Parameters
        ----------
        a : cupy.ndarray, shape (M, K), or (K, M) where `transpose_a`
            C-contiguous, of `operand_dtype`.
        b : cupy.ndarray, shape (K, N), or (N, K) where `transpose_b`
            Likewise.
        out : cupy.ndarray, shape (M, N)
            C-contiguous; float32, or the operands' dtype.
        scale : float
            Factor of the product.
        """
        m, n = out.shape
        k = a.shape[0] if transpose_a else a.shape[1]
        # cuBLAS counts columns first, and so sees the transposes of all three.
        factors = np.array([scale, 0.0], np.float32)
        arguments = (
            int(transpose_b), int(transpose_a), n, m, k, factors.ctypes.data,
            b.data.ptr, _TYPES[b.dtype.name], b.shape[1],
            a.data.ptr, _TYPES[a.dtype.name], a.shape[1], factors.ctypes.data + 4,
            out.data.ptr, _TYPES[out.dtype.name], n, self._compute, _DEFAULT_ALGORITHM,
        )  # fmt: skip
        if self._nvmath is None:
            from cupy.cuda import get_cublas_handle  # type: ignore[attr-defined]
            from cupy_backends.cuda.libs import cublas  # type: ignore[import-untyped]

            cublas.gemmEx(get_cublas_handle(), *arguments)
            return
        self._use_current_stream()
        self._nvmath.gemm_ex(self._handle, *arguments)

    def _use_current_stream(self) -> None:
        import cupy

        stream = cupy.cuda.get_current_stream().ptr
        if stream != self._stream:
            self._nvmath.set_stream(self._handle, stream)
            # A change of the stream brings back the library's own workspace.
            self._nvmath.set_workspace(self._handle, self._workspace.data.ptr, _WORKSPACE)
            self._stream = stream
