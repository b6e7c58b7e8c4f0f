"""Base class of operations: forward and backward side by side, for NumPy and CuPy alike."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from cupybnn.autograd.context import Context
from cupybnn.autograd.debug import place
from cupybnn.autograd.state import checking, recording
from cupybnn.autograd.storage import Storage, module_of, same_memory
from cupybnn.autograd.tensor import Tensor, tensor_or_number
from cupybnn.backends.devices import is_cupy

__all__ = ["Function"]


class Function:
    """Base class of differentiable operations.

    A subclass defines two static methods that work on NumPy and CuPy arrays alike:
    ``forward(ctx, *arrays, **params)`` returns an array, ``backward(ctx, grad)`` returns the
    gradient of every operand (a tuple if there are several; None where ``ctx.needs`` is False). A
    gradient has its operand's shape and dtype. It may be `grad` itself, a view of it, an array that
    the function keeps, or the same array for two operands: the engine writes to none of them. In
    turn, a function must not write to `grad` or to the saved arrays. NumPy's floating-point
    warnings and errors are off in both methods.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.autograd import Function, Tensor
    >>> class Square(Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.save(x)
    ...         return x * x
    ...
    ...     @staticmethod
    ...     def backward(ctx, grad):
    ...         (x,) = ctx.saved
    ...         return 2 * x * grad
    >>> x = Tensor(np.array([1.0, 2.0]), requires_grad=True)
    >>> Square.apply(x).sum().backward()
    >>> x.grad
    array([2., 4.])
    """

    name = "function"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @staticmethod
    def forward(ctx: Context, *arrays: Any, **params: Any) -> Any:
        """Compute the result's array from the operands' arrays."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        """Compute the operands' gradients from the gradient of the result."""
        raise NotImplementedError

    @classmethod
    def apply(cls, *operands: Any, **params: Any) -> Tensor:
        """Compute the operation and record it if a gradient may be needed.

        Parameters
        ----------
        *operands : Tensor, array or number
            Numbers are passed to `forward` unchanged, so that they do not widen the dtype.
        **params
            Passed to `forward`.

        Raises
        ------
        ValueError, TypeError, IndexError
            If the operands do not match; the message names the operation and the shapes.
        """
        return _apply(cls, operands, params)


def _apply(function: type[Function], operands: tuple[Any, ...], params: dict[str, Any]) -> Tensor:
    operands = tuple([tensor_or_number(x, function.name) for x in operands])
    tensors = tuple([x for x in operands if isinstance(x, Tensor)])
    arrays = [x._data if isinstance(x, Tensor) else x for x in operands]
    xp = _common_module(function, tensors)
    needs = tuple([isinstance(x, Tensor) and x.requires_grad for x in operands])
    recorded = recording.get() and any(needs)
    ctx = Context(function, xp, needs if recorded else (False,) * len(needs))
    try:
        if xp is np:
            # Follow IEEE 754 on both backends, whatever np.seterr() the caller has set;
            # `debug.check_finite` finds where a NaN began.
            with np.errstate(all="ignore"):
                array = function.forward(ctx, *arrays, **params)
        else:
            ctx.device = tensors[0]._data.device
            with ctx.device:
                array = function.forward(ctx, *arrays, **params)
    except (ValueError, TypeError, IndexError) as error:
        raise _with_operands(error, function, operands) from error
    if xp is np and not isinstance(array, np.ndarray) and not is_cupy(array):
        # A reduction to one number gives a NumPy scalar; a move to a GPU gives a CuPy array.
        array = np.asarray(array)
    check = checking.get()
    if check is not None:
        ctx.place = place()
        check(function.name, array, "forward value", ctx.place)
    result = Tensor._of(array, _shared_storage(array, tensors), ctx if recorded else None)
    if recorded:
        ctx.shape = array.shape
        ctx.dtype = array.dtype
        ctx.edges = tuple(
            [(x._node or x) if need else None for x, need in zip(operands, needs, strict=True)]
        )
        if ctx.saved:
            ctx.guard((*tensors, result))
    return result


def _common_module(function: type[Function], tensors: tuple[Tensor, ...]) -> Any:
    """Return the array module of all `tensors`; refuse operands on different devices."""
    if all(type(tensor._data) is np.ndarray for tensor in tensors):
        return np
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise TypeError(
            f"The operands of {function.name} must be on one device; got "
            f"{' and '.join(str(tensor.device) for tensor in tensors)}. Move one with .to(device)."
        )
    return module_of(tensors[0]._data)


def _shared_storage(array: Any, tensors: tuple[Tensor, ...]) -> Storage | None:
    """Return the storage of the operand that the result is, or is a view of, if any."""
    for tensor in tensors:
        operand = tensor._data
        if array is operand or (array.base is not None and same_memory(array, operand)):
            return tensor._storage
    return None


def _with_operands(
    error: Exception, function: type[Function], operands: tuple[Any, ...]
) -> ValueError | TypeError | IndexError:
    """Return `error` with the operation's name and operand shapes in front of its message."""
    kind = next(k for k in (ValueError, TypeError, IndexError) if isinstance(error, k))
    shapes = ", ".join(
        f"{tuple(x.shape)} {x.dtype}" if hasattr(x, "shape") else repr(x) for x in operands
    )
    return kind(f"{function.name} of {shapes}: {error}")
