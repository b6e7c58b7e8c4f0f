"""Zero-copy conversion of other libraries' arrays.

GPU tensors (PyTorch, JAX, Numba, ...) become CuPy arrays and CPU tensors NumPy arrays, through
DLPack or the CUDA array interface. Anything else that NumPy can convert becomes a NumPy array.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cupybnn.backends.devices import cuda_status, is_cupy

__all__ = ["as_native", "bfloat16_dtype", "type_name"]

# DLPack device types (dlpack.h): memory accessible from the host, and from CUDA.
_DLPACK_HOST = {1}
_DLPACK_CUDA = {2, 3, 13}  # CUDA, CUDA pinned host, CUDA managed


def type_name(x: object) -> str:
    """Return the type name of `x` as users write it: numpy.ndarray, torch.Tensor, list."""
    kind = type(x)
    module = kind.__module__.partition(".")[0]
    if module in ("builtins", "__main__"):
        return kind.__qualname__
    return f"{module.lstrip('_')}.{kind.__qualname__}"


def bfloat16_dtype() -> np.dtype | None:
    """Return the bfloat16 dtype of the package ml_dtypes, or None without it."""
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        return None
    return np.dtype(ml_dtypes.bfloat16)


def as_native(x: Any, what: str) -> Any:
    """Return `x` as a plain NumPy or CuPy array, sharing memory if it is already an array.

    Parameters
    ----------
    x : array_like
        A NumPy or CuPy array, an object with ``__dlpack__`` or ``__cuda_array_interface__``, or
        anything that `numpy.asarray` accepts.
    what : str
        Name of `x` in error messages, such as "'a' of xnor_gemm".

    Returns
    -------
    numpy.ndarray or cupy.ndarray

    Raises
    ------
    TypeError
        If `x` is a masked array, a tensor that records gradients, or cannot be exported.
    """
    if type(x) is np.ndarray or is_cupy(x):
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"The {what} must be an array without a mask, because a masked element has no "
            f"sign; got numpy.ma.MaskedArray. Fill it first: x.filled(value)."
        )
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x)
    exports = hasattr(type(x), "__dlpack__") or hasattr(type(x), "__array__")
    if exports and getattr(x, "requires_grad", False) is True:
        raise TypeError(
            f"The {what} must be a tensor that records no gradients; got a {type_name(x)} with "
            f"requires_grad=True. Pass x.detach()."
        )
    if hasattr(type(x), "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _from_dlpack(x, what)
    if hasattr(x, "__cuda_array_interface__"):
        return _cupy_for(x, what).asarray(x)
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"The {what} must be an array or something that numpy.asarray accepts; "
            f"got {type_name(x)} ({error})."
        ) from error


def _cupy_for(x: Any, what: str) -> Any:
    """Import cupy to convert the GPU tensor `x`; TypeError with the reason if that fails."""
    status = cuda_status()
    if not status.available:
        raise TypeError(f"The {what} is a {type_name(x)} on a GPU and needs CuPy. {status.reason}")
    import cupy

    return cupy


def _from_dlpack(x: Any, what: str) -> Any:
    is_negated = getattr(
        x, "is_neg", None
    )  # PyTorch's z.conj().imag: memory holds the negated values
    if callable(is_negated) and is_negated():
        x = x.resolve_neg()
    try:
        device_type = int(x.__dlpack_device__()[0])
        if device_type in _DLPACK_CUDA:
            return _cupy_for(x, what).from_dlpack(x)
        if device_type in _DLPACK_HOST:
            return _host_from_dlpack(x, what)
    except (BufferError, RuntimeError, ValueError) as error:
        raise TypeError(
            f"The {what} must be a tensor that DLPack can export; got a {type_name(x)} of "
            f"dtype {getattr(x, 'dtype', 'unknown')} ({error})."
        ) from error
    raise TypeError(
        f"The {what} must be in host memory or on a CUDA device; got a {type_name(x)} "
        f"on DLPack device type {device_type}. Move it there first."
    )


def _by_dlpack_or_array(x: Any) -> np.ndarray:
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, ValueError):
        # NumPy's DLPack lacks bfloat16, for example; JAX exports it as an ml_dtypes array.
        if not hasattr(type(x), "__array__"):
            raise
        try:
            return np.asarray(x)
        except (TypeError, ValueError, RuntimeError):
            pass
        raise


def _host_from_dlpack(x: Any, what: str) -> np.ndarray:
    torch = sys.modules.get("torch")
    if torch is None or getattr(x, "dtype", None) is not torch.bfloat16:
        return _by_dlpack_or_array(x)
    # NumPy itself has no bfloat16: pass the bits as int16 and view them as bfloat16.
    bfloat16 = bfloat16_dtype()
    if bfloat16 is None:
        raise TypeError(
            f"The {what} is a bfloat16 tensor, which NumPy reads only with the package ml_dtypes. "
            f"Install ml_dtypes, or pass x.float()."
        )
    return np.from_dlpack(x.view(torch.int16)).view(bfloat16)
