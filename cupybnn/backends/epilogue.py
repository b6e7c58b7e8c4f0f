"""What is done to the integers of a product on their way into the result.

This is the reference: every CUDA kernel's epilogue gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Epilogue", "apply"]


@dataclass(frozen=True)
class Epilogue:
    """Scale of rows, scale of columns and bias of columns.

    The value written is ``(float32(acc) * row_scale) * col_scale + bias``, each step rounded to
    float32 (in float64 arithmetic for a float64 or longer result), then rounded to nearest even
    into the dtype of the result. A part that is None is left out. The two scales are the K and the
    alpha of XNOR-Net (Rastegari et al., 2016, https://arxiv.org/abs/1603.05279).

    Parameters
    ----------
    row_scale : array or None
        float32, broadcastable to (..., M, 1).
    col_scale : array or None
        float32, broadcastable to (..., 1, N).
    bias : array or None
        float32, broadcastable to (..., 1, N).
    """

    row_scale: Any = None
    col_scale: Any = None
    bias: Any = None

    def panel(self, batch: tuple[int, ...], rows: slice, cols: slice) -> Epilogue:
        """Return the part that belongs to one panel of one matrix of a batch."""
        return Epilogue(
            _part(self.row_scale, batch, rows, slice(None)),
            _part(self.col_scale, batch, slice(None), cols),
            _part(self.bias, batch, slice(None), cols),
        )


def _part(x: Any, batch: tuple[int, ...], rows: slice, cols: slice) -> Any:
    if x is None:
        return None
    if x.ndim < 2:
        x = x.reshape((1,) * (2 - x.ndim) + x.shape)
    # Line the leading axes up with the batch as broadcasting does: from the right, 1 for any.
    lead = x.ndim - 2
    index = tuple(
        0 if size == 1 else at
        for size, at in zip(x.shape[:lead], batch[len(batch) - lead :], strict=True)
    )
    matrix = x[index]
    return matrix[
        rows if matrix.shape[0] != 1 else slice(None), cols if matrix.shape[1] != 1 else slice(None)
    ]


def apply(acc: np.ndarray, epilogue: Epilogue | None, out: np.ndarray) -> None:
    """Write the exact product `acc` into `out` through `epilogue`.

    Parameters
    ----------
    acc : ndarray, shape (..., M, N)
        The integers of the product, in a dtype that holds them exactly.
    epilogue : Epilogue or None
        None converts the integers straight to the dtype of `out`.
    out : ndarray, shape (..., M, N)
    """
    if epilogue is not None:
        wide = out.dtype.kind == "f" and out.dtype.itemsize >= 8
        work = np.dtype(np.float64 if wide else np.float32)
        acc = acc.astype(work)
        for scale in (epilogue.row_scale, epilogue.col_scale):
            if scale is not None:
                acc = acc * scale.astype(work, copy=False)
        if epilogue.bias is not None:
            acc = acc + epilogue.bias.astype(work, copy=False)
    # A value beyond float16 becomes infinite, as the contract says: no warning.
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = acc
