"""The exact product of signs on the CPU, on top of NumPy's float32 matmul."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends import epilogue as epilogues
from cupybnn.backends.epilogue import Epilogue


def _signs(x: Any) -> np.ndarray:
    if isinstance(x, np.ndarray):
        bits = x if x.dtype.kind == "b" else x >= x.dtype.type(0)
        return bits * np.float32(2) - np.float32(1)
    return x.unpack(np.float32)


def product(a: Any, b: Any, out: np.ndarray, epilogue: Epilogue | None) -> None:
    """Write the product of the signs of `a` and `b`; see `numpy_backend.gemm`."""
    k = a.shape[-1]
    sa, sb = _signs(a), _signs(b)
    if k > 1 << 24:
        sa, sb = sa.astype(np.float64), sb.astype(np.float64)
    epilogues.apply(sa @ sb, epilogue, out)
