"""Arrays that remember how they were computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn.autograd.context import Context
from cupybnn.autograd.convert import as_number, index_key, new_array
from cupybnn.autograd.engine import backward
from cupybnn.autograd.operators import Operators
from cupybnn.autograd.protocols import Protocols
from cupybnn.autograd.storage import Storage, module_of, same_memory
from cupybnn.backends.devices import Device, device_of, is_cupy, to_device
from cupybnn.errors import GraphError

__all__ = ["Tensor", "tensor_or_number"]


class Tensor(Operators, Protocols):
    """A NumPy or CuPy array with a gradient.

    Parameters
    ----------
    data : array_like, number or Tensor
        Copied, so that later edits of the caller's array cannot reach a recorded graph. Python
        numbers and lists of floats become float32; arrays keep their dtype, in the machine's byte
        order. bfloat16 becomes float32, which holds all its values.
    requires_grad : bool
        Whether `backward` computes this tensor's gradient. Needs a floating dtype.
    name : str, optional
        Used in messages.

    Attributes
    ----------
    grad : numpy.ndarray, cupy.ndarray or None
        Sum of the gradients of all backward passes so far, of the tensor's shape and dtype.
    two_valued : bool
        Whether every element is known to be +1 or -1, as after `cupybnn.ops.sign`. Editing this
        tensor, or another that shares its memory, clears it, on NumPy and CuPy alike. Settable.

    Notes
    -----
    ``==``, ``<`` and the like compare element by element and return plain boolean arrays. In dicts
    and sets, tensors are compared by identity; ``tensor in list`` compares values, so look a tensor
    up with ``any(tensor is other for other in list)``. `numpy.asarray` returns ``data`` itself,
    outside the graph, and refuses tensors on a GPU.

    A leaf can be pickled and deep-copied; a computed tensor, which carries its graph, cannot.

    Examples
    --------
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    array([2., 4., 6.], dtype=float32)
    """

    __slots__ = (
        "__weakref__",
        "_data",
        "_memory",
        "_node",
        "_two_valued_at",
        "grad",
        "name",
        "requires_grad",
    )

    def __init__(self, data: Any, requires_grad: bool = False, name: str | None = None) -> None:
        self._data = _as_array(data)
        self._memory: Storage | None = None
        self._node: Context | None = None
        self.grad: Any = None
        self.name = name
        # The storage version at which the contents were known to be +1 and -1.
        self._two_valued_at: int | None = None
        self.requires_grad = requires_grad
        if requires_grad and self._data.dtype.kind in "biu":
            raise TypeError(
                f"A tensor that requires a gradient must have a floating dtype; got "
                f"{self._data.dtype}."
            )

    @classmethod
    def _of(cls, array: Any, memory: Storage | None = None, node: Context | None = None) -> Tensor:
        """Make a tensor of `array` itself, without copy or checks. Used by the engine."""
        tensor = Tensor.__new__(Tensor)
        tensor._data = array
        tensor._memory = memory
        tensor._node = node
        tensor.grad = None
        tensor.name = None
        tensor._two_valued_at = None
        tensor.requires_grad = node is not None
        return tensor

    @property
    def _storage(self) -> Storage:
        if self._memory is None:
            self._memory = Storage(self._data)
        return self._memory

    @property
    def data(self) -> Any:
        """The values: a NumPy or CuPy array on this tensor's memory, without a copy.

        Writing to it, or assigning (``t.data += 1``, ``t.data = array``), changes the tensor
        outside the graph. `backward` refuses arrays that were edited after they were saved.
        """
        return self._storage.lend(self._data)

    @data.setter
    def data(self, value: Any) -> None:
        xp = module_of(self._data)
        if isinstance(value, xp.ndarray) and same_memory(value, self._data):
            self._storage.touch()  # the last step of an augmented assignment
            return
        array = _as_array(value)
        if self.requires_grad and array.dtype.kind in "biu":
            raise TypeError(
                f"The data of a tensor that requires a gradient must have a floating dtype; got "
                f"{array.dtype}."
            )
        self._data = array
        self._memory = None
        self._two_valued_at = None

    def write(self) -> Any:
        """Return the array for an immediate edit in place.

        Used by optimizers: cheaper than `data`, because it only records that the contents
        change. Do not keep the array.
        """
        if self._memory is not None:
            self._memory.touch()
        return self._data

    @property
    def two_valued(self) -> bool:
        at = self._two_valued_at
        return at is not None and at == self._storage.version()

    @two_valued.setter
    def two_valued(self, known: bool) -> None:
        self._two_valued_at = self._storage.watch() if known else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return self._data.shape

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype of the elements."""
        return self._data.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._data.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._data.size

    @property
    def device(self) -> Device:
        """Device of the array."""
        return device_of(self._data)

    @property
    def is_leaf(self) -> bool:
        """Whether the tensor was created directly rather than by a recorded operation."""
        return self._node is None

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool = False,
        completed: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Add the gradient of this tensor to ``grad`` of every leaf that it depends on.

        Parameters
        ----------
        gradient : array of this tensor's shape and dtype, optional
            The gradient with respect to this tensor; optional if it has one element.
        retain_graph : bool
            Keep the saved arrays for another backward pass through this graph.
        completed : callable, optional
            Called with each leaf as soon as its gradient is complete, while the pass goes on.

        Raises
        ------
        GraphError
            If the tensor depends on nothing that requires a gradient, if it has several elements
            and no `gradient` is passed, if (part of) the graph was freed by an earlier pass, if a
            saved array was edited since, or if an operation returns a gradient of the wrong shape
            or dtype. In the first four cases no gradient has changed.

        Notes
        -----
        Gradients are arrays, not tensors: higher-order derivatives are not supported.
        """
        backward(self, gradient, retain_graph, completed)

    def retain_grad(self) -> Tensor:
        """Make `backward` fill `grad` even if the tensor is not a leaf; return the tensor."""
        if not self.requires_grad:
            raise GraphError("retain_grad() needs a tensor that requires a gradient.")
        if self._node is not None:
            self._node.retain = self
        return self

    def zero_grad(self) -> None:
        """Set the gradient to None."""
        self.grad = None

    def detach(self) -> Tensor:
        """Return a tensor that shares this memory but belongs to no graph."""
        tensor = Tensor._of(self._data, self._storage)
        tensor.two_valued = self.two_valued
        return tensor

    def move(self, device: Device) -> None:
        """Move a leaf, and its gradient, to `device`, in place; `to` returns a new tensor."""
        array = to_device(self._data, device)
        if array is not self._data:
            known = self.two_valued
            self._data = array
            self._memory = None
            self.two_valued = known
        if self.grad is not None:
            self.grad = to_device(self.grad, device)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._node is not None:
            raise GraphError(
                "Elements of a computed tensor cannot be assigned: its graph would not notice. "
                "Assign to a leaf, or to .detach()."
            )
        key = index_key(key, module_of(self._data))
        self.write()[key] = value._data if isinstance(value, Tensor) else value

    def __copy__(self) -> Tensor:
        """Return a tensor on the same memory and in the same graph."""
        twin = type(self).__new__(type(self))
        for name in _slots(type(self)):
            if hasattr(self, name):
                setattr(twin, name, getattr(self, name))
        twin._memory = self._storage
        twin.grad = None if self.grad is None else self.grad.copy()
        getattr(twin, "__dict__", {}).update(getattr(self, "__dict__", {}))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._node is not None:
            raise GraphError(
                f"A computed tensor (shape {self.shape}, made by {self._node.function.name}) "
                f"cannot be pickled or deep-copied, because its graph cannot: use t.detach()."
            )
        storage = self._storage
        if self._data is not storage.array:  # a view: do not pickle its base
            storage = Storage(self._data.copy())
        fields = storage, self.requires_grad, self.name, self.grad, self.two_valued
        subclass_slots = _slots(type(self))[len(_slots(Tensor)) :]
        slots = {name: getattr(self, name) for name in subclass_slots if hasattr(self, name)}
        return _restored, (type(self), *fields), (getattr(self, "__dict__", None), slots)

    def __repr__(self) -> str:
        parts = [str(self._data)]
        if self.dtype != np.float32:
            parts.append(f"dtype={self.dtype}")
        if self.device.kind != "cpu":
            parts.append(f"device={self.device}")
        if self._node is not None:
            parts.append(f"made by {self._node.function.name}")
        elif self.requires_grad:
            parts.append("requires_grad=True")
        if self.name:
            parts.append(f"name={self.name!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _slots(kind: type[Tensor]) -> list[str]:
    """Return the names of a class's slots, starting with those of `Tensor`."""
    found = [name for base in reversed(kind.__mro__) for name in vars(base).get("__slots__", ())]
    return [name for name in found if name not in ("__weakref__", "__dict__")]


def _restored(
    kind: type[Tensor],
    storage: Storage,
    requires_grad: bool,
    name: str | None,
    grad: Any,
    two_valued: bool,
) -> Tensor:
    """Rebuild a leaf from the fields that `Tensor.__reduce_ex__` kept."""
    tensor = kind.__new__(kind)
    tensor._data = storage.array
    tensor._memory = storage
    tensor._node = None
    tensor.grad = grad
    tensor.name = name
    tensor.requires_grad = requires_grad
    tensor.two_valued = two_valued
    return tensor


def _as_array(data: Any) -> Any:
    """Return a new, contiguous NumPy or CuPy array of `data`; see `new_array`."""
    return data._data.copy() if isinstance(data, Tensor) else new_array(data)


def tensor_or_number(value: Any, op: str) -> Any:
    """Turn an operand of the operation named `op` into a tensor or a Python number.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.autograd import tensor_or_number
    >>> tensor_or_number(2.5, "add")
    2.5
    >>> tensor_or_number(np.ones(2), "add").shape
    (2,)
    """
    if isinstance(value, Tensor):
        return value
    number = as_number(value)
    if number is not None:
        return number
    if isinstance(value, np.ndarray) or is_cupy(value):
        return Tensor(value)
    raise TypeError(
        f"The operands of {op} must be tensors, arrays or numbers; got {type(value).__name__}."
    )
