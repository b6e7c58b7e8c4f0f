"""Products of signs of CUDA tensors: on the caller's stream, in memory of PyTorch's allocator.

A launch takes addresses alone, so no array of CuPy is made on the way: on small layers the host's
time decides. That also makes a call safe to capture, because a graph's memory is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from cupybnn.backends.cuda import dispatch, launching
from cupybnn.backends.cuda.product import OUTPUTS, ProductLaunch
from cupybnn.backends.devices import cuda_status
from cupybnn.errors import DeviceError

__all__ = ["check_usable", "packed_product", "product", "scope"]

#: What the kernels write; other dtypes are converted from int32.
_OUTPUTS = {
    torch.int32: OUTPUTS["i"],
    torch.float32: OUTPUTS["f"],
    torch.float16: OUTPUTS["e"],
    torch.bfloat16: OUTPUTS["E"],
}
_launches = launching.Plans()


@lru_cache(maxsize=1)
def check_usable() -> None:
    """Raise DeviceError, with the reason, if CuPy cannot use the GPU."""
    status = cuda_status()
    if not status.available:
        raise DeviceError(f"A layer of cupybnn.torch on a GPU needs CuPy. {status.reason}")


class _Operand:
    """What a launch asks of an array."""

    __slots__ = ("data", "dtype", "itemsize", "ndim", "shape", "strides")

    def __init__(self, x: Any) -> None:
        self.shape, self.ndim, self.itemsize = tuple(x.shape), x.dim(), x.element_size()
        self.strides = tuple(step * self.itemsize for step in x.stride())
        self.dtype = SimpleNamespace(name=str(x.dtype).removeprefix("torch."))
        self.data = SimpleNamespace(ptr=x.data_ptr())


class _Packed:
    """A packed operand: only that it is one, and its shape, matter to a launch."""

    __slots__ = ("shape", "words")

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.words = shape, None


def product(x: Any, weight: Any, dtype: Any) -> Any:
    """Return the product of the signs of `x` and of the rows of `weight`.

    Parameters
    ----------
    x : torch.Tensor, shape (..., in_features)
    weight : torch.Tensor, shape (out_features, in_features)
        Of floating dtype, any strides, on the CUDA device of `x`.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    torch.Tensor, shape (..., out_features)
    """
    kind = (weight.shape, weight.stride(), weight.dtype, weight.data_ptr() & 15)
    return _product(x, weight.t(), kind, weight.data_ptr(), weight.shape[0], dtype)


def packed_product(x: Any, words: Any, popcounts: Any, dtype: Any) -> Any:
    """Return the product of the signs of `x` with packed weights.

    Parameters
    ----------
    x : torch.Tensor, shape (..., in_features)
    words, popcounts : torch.Tensor
        Of the weights, in the layout of the kernels.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    torch.Tensor, shape (..., out_features)
    """
    outputs = popcounts.shape[0]
    address = words.data_ptr(), popcounts.data_ptr()
    return _product(x, None, None, address, outputs, dtype)


def _product(x: Any, right: Any, kind: Any, address: Any, outputs: int, dtype: Any) -> Any:
    features = x.shape[-1]
    native = dtype in _OUTPUTS
    y = x.new_empty((*x.shape[:-1], outputs), dtype=dtype if native else torch.int32)
    if features == 0:
        y.zero_()
    elif y.numel():
        rows = x if x.dim() == 2 else x.reshape(-1, features)
        device, at = x.device.index, rows.data_ptr()
        key = (
            rows.shape, rows.stride(), rows.dtype, at & 15, kind, outputs, y.dtype, device,
            dispatch.forced(),
        )  # fmt: skip
        with scope(device):
            launch = _launches.get(key)
            if launch is None:
                launch = _launches.keep(key, _prepare(rows, right, outputs, y.dtype, device))
            # Freed on return, for reuse by later work on the stream.
            workspace = rows.new_empty(launch.workspace_bytes, dtype=torch.uint8)
            stream = launching.current_stream()
            launch.launch([at, address], workspace.data_ptr(), (y.data_ptr(), 0), stream)
    return y if native else y.to(dtype)


def _prepare(rows: Any, right: Any, outputs: int, dtype: Any, device: int) -> ProductLaunch:
    b = _Packed((rows.shape[1], outputs)) if right is None else _Operand(right)
    return ProductLaunch(
        _Operand(rows), b, batch_shape=(), strides=(outputs, 1, 0), output=_OUTPUTS[dtype],
        scaled=False, device=device,
    )  # fmt: skip


def scope(device: int) -> AbstractContextManager[Any]:
    """Return the context in which CuPy works on a device and on PyTorch's current stream there."""
    check_usable()
    import cupy

    stream = torch._C._cuda_getCurrentRawStream(device)
    if cupy.cuda.runtime.getDevice() != device:
        return _on_device(device, stream)
    if cupy.cuda.get_current_stream().ptr == stream:
        return nullcontext()
    return _stream(stream)


@contextmanager
def _on_device(device: int, stream: int) -> Iterator[None]:
    import cupy

    with cupy.cuda.Device(device), _stream(stream):
        yield


class _External:
    """A stream of PyTorch, as CuPy takes those of other libraries."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def _stream(pointer: int) -> Any:
    import cupy

    # PyTorch's current stream outlives the call, and so the object that CuPy keeps of it.
    stream = cupy.cuda.Stream
    return stream.from_external(_External(pointer)) if pointer else stream.null
