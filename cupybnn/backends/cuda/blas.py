"""Dense products: the only access to cuBLAS, inside and outside of CUDA graph capture.

NVIDIA's bindings (the package nvmath-python) can be captured; CuPy's refuse. Without nvmath-python,
CuPy's are used, and a training step is launched kernel by kernel.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import numpy as np

__all__ = ["PRECISIONS", "Blas", "capturable", "failures", "operand_dtype"]

#: Precisions of dense products, with their minimum compute capability. All accumulate in float32.
PRECISIONS = {"float32": 0, "tf32": 80, "bfloat16": 80}

_WORKSPACE = 32 << 20  # bytes, as cuBLAS recommends for Hopper
# cudaDataType and cublasComputeType_t. bfloat16 bit patterns are kept as uint16, because NumPy has
# no bfloat16.
_TYPES = {"float32": 0, "uint16": 14}
_COMPUTE = {"float32": 68, "tf32": 77, "bfloat16": 68}
_DEFAULT_ALGORITHM = -1


def operand_dtype(precision: str) -> np.dtype:
    """Return the dtype of operands: float32, or uint16 for bfloat16 bit patterns."""
    return np.dtype(np.uint16 if precision == "bfloat16" else np.float32)


@cache
def _nvmath() -> Any:
    """Return NVIDIA's cuBLAS bindings, or None."""
    try:
        from nvmath.bindings import cublas
    except (ImportError, RuntimeError):
        return None
    return cublas


@cache
def capturable() -> bool:
    """Whether products can be captured: nvmath-python and its cuBLAS are installed."""
    cublas = _nvmath()
    if cublas is None:
        return False
    try:
        cublas.destroy(cublas.create())
    except Exception:  # a missing or outdated library raises various errors
        return False
    return True


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that NVIDIA's bindings raise for cuBLAS errors."""
    cublas = _nvmath()
    return () if cublas is None else (cublas.cuBLASError,)


class Blas:
    """Dense products of one precision, in stream order.

    Products that may run concurrently need separate instances, because they share a workspace.

    Parameters
    ----------
    precision : {"float32", "tf32", "bfloat16"}
        Operand type, and the rounding that tensor cores may apply.
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
            with contextlib.suppress(Exception):  # the process or the driver may be shutting down
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
        a : cupy.ndarray, shape (M, K), or (K, M) with `transpose_a`
            C-contiguous, of `operand_dtype`.
        b : cupy.ndarray, shape (K, N), or (N, K) with `transpose_b`
            Likewise.
        out : cupy.ndarray, shape (M, N)
            C-contiguous; float32, or the operands' dtype.
        scale : float
            Factor of the product.
        """
        m, n = out.shape
        k = a.shape[0] if transpose_a else a.shape[1]
        # cuBLAS is column-major, and so sees the transposes of all three.
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
            # Setting the stream resets the workspace to the library's own.
            self._nvmath.set_workspace(self._handle, self._workspace.data.ptr, _WORKSPACE)
            self._stream = stream
