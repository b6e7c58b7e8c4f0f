"""The epilogue of a product: scales, bias and conversion of its integers to the result.

This is the reference: every CUDA kernel's epilogue gives bit-identical results.
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
    into the dtype of the result. A part that is None is skipped. The two scales are the K and the
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

    def broadcast(self, shape: tuple[int, ...]) -> Epilogue:
        """Broadcast all parts to a product of shape (..., M, N)."""
        columns = (*shape[:-2], 1, shape[-1])
        return Epilogue(
            _map(np.broadcast_to, self.row_scale, (*shape[:-1], 1)),
            _map(np.broadcast_to, self.col_scale, columns),
            _map(np.broadcast_to, self.bias, columns),
        )

    def part(self, lead: tuple[Any, ...], rows: slice, cols: slice) -> Epilogue:
        """Return the epilogue of one panel; `lead` indexes the leading axes."""
        row_index, column_index = (*lead, ..., rows, slice(None)), (*lead, ..., slice(None), cols)
        return Epilogue(
            _map(np.ndarray.__getitem__, self.row_scale, row_index),
            _map(np.ndarray.__getitem__, self.col_scale, column_index),
            _map(np.ndarray.__getitem__, self.bias, column_index),
        )


def _map(function: Any, x: Any, argument: Any) -> Any:
    return None if x is None else function(x, argument)


def apply(acc: np.ndarray, epilogue: Epilogue | None, out: np.ndarray) -> None:
    """Write the exact product `acc` into `out` through `epilogue`.

    Parameters
    ----------
    acc : ndarray, shape (..., M, N)
        The integers of the product, in a dtype that holds them exactly.
    epilogue : Epilogue or None
        None converts the integers straight to the dtype of `out`.
    out : ndarray, shape (..., M, N)

    Notes
    -----
    Overflow gives an infinity and NaN stays NaN, without warnings or errors whatever
    `numpy.errstate` says, as on a GPU, so that a program behaves the same on both.
    """
    with np.errstate(all="ignore"):
        if epilogue is not None:
            wide = out.dtype.kind == "f" and out.dtype.itemsize >= 8
            work = np.dtype(np.float64 if wide else np.float32)
            acc = acc.astype(work)
            for scale in (epilogue.row_scale, epilogue.col_scale):
                if scale is not None:
                    acc = acc * scale.astype(work, copy=False)
            if epilogue.bias is not None:
                acc = acc + epilogue.bias.astype(work, copy=False)
        out[...] = acc
