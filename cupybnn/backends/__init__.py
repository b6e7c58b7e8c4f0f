"""The NumPy and CUDA backends: the same functions with the same signatures."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from cupybnn.backends.devices import Device, is_cupy

__all__ = ["get"]


def get(where: Device | Any) -> ModuleType:
    """Return the backend module of a `Device` or of an array's device."""
    on_cuda = where.kind == "cuda" if isinstance(where, Device) else is_cupy(where)
    if on_cuda:
        from cupybnn.backends import cuda

        return cuda
    from cupybnn.backends import numpy_backend

    return numpy_backend
