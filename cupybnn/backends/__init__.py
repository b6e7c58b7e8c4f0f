"""The two backends, NumPy and CUDA: the same functions under the same names and signatures."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from cupybnn.backends.devices import Device, is_cupy

__all__ = ["get"]


def get(where: Device | Any) -> ModuleType:
    """Return the backend module for a `Device` or for an array's device."""
    on_cuda = where.kind == "cuda" if isinstance(where, Device) else is_cupy(where)
    if on_cuda:
        from cupybnn.backends import cuda

        return cuda
    from cupybnn.backends import numpy_backend

    return numpy_backend
