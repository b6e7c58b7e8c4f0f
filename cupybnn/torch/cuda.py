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
from cupybnn.backends.cuda.product_launch import OUTPUTS, ProductLaunch
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
_plans = launching.Plans()


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
    at = weight.data_ptr()
    key = (
        x.shape, x.stride(), x.dtype, x.data_ptr() & 15, weight.shape, weight.stride(),
        weight.dtype, at & 15, dtype, x.device, dispatch.forced(),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _Plan(x, weight.t(), weight.shape[0], dtype))
    return plan(x, at)


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
    key = (
        x.shape, x.stride(), x.dtype, x.data_ptr() & 15, popcounts.shape, dtype, x.device,
        dispatch.forced(),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _Plan(x, None, popcounts.shape[0], dtype))
    return plan(x, (words.data_ptr(), popcounts.data_ptr()))


class _Plan:
    """All that is the same in each product of operands of a kind.

    Parameters
    ----------
    x : torch.Tensor, shape (..., in_features)
    right : torch.Tensor, shape (in_features, outputs), or None for packed weights
    outputs : int
    dtype : torch.dtype
        Of the result.
    """

    def __init__(self, x: Any, right: Any, outputs: int, dtype: Any) -> None:
        self._shape = (*x.shape[:-1], outputs)
        self._dtype = dtype
        self._native = dtype if dtype in _OUTPUTS else torch.int32
        self._features, self._matrix = x.shape[-1], x.dim() == 2
        self._device = x.device.index
        self._launch: ProductLaunch | None = None
        if self._features and x.numel() and outputs:
            rows = x if self._matrix else x.reshape(-1, self._features)
            b = _Packed((self._features, outputs)) if right is None else _Operand(right)
            with scope(self._device):
                self._launch = ProductLaunch(
                    _Operand(rows), b, batch_shape=(), strides=(outputs, 1, 0),
                    output=_OUTPUTS[self._native], scaled=False, device=self._device,
                )  # fmt: skip

    def __call__(self, x: Any, weight: Any) -> Any:
        """Return the product of an `x` of the kind and weights, given by their address."""
        y = x.new_empty(self._shape, dtype=self._native)
        launch = self._launch
        if launch is None:
            y.zero_()  # no elements, or sums of none
        else:
            rows = x if self._matrix else x.reshape(-1, self._features)
            device = self._device
            # Freed on return, for reuse by later work on the stream.
            workspace = x.new_empty(launch.workspace_bytes, dtype=torch.uint8)
            addresses = [rows.data_ptr(), weight], workspace.data_ptr(), (y.data_ptr(), 0)
            stream = torch._C._cuda_getCurrentRawStream(device)
            if torch._C._cuda_getDevice() == device:
                launch.launch(*addresses, stream)
            else:
                with scope(device):
                    launch.launch(*addresses, stream)
        return y if self._native is self._dtype else y.to(self._dtype)


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
