"""A node of the graph: what one operation keeps for its backward pass."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.autograd.precision import wide_sum
from cupybnn.errors import GraphError

if TYPE_CHECKING:
    from cupybnn.autograd.function import Function
    from cupybnn.autograd.tensor import Tensor

__all__ = ["Context"]


class Context:
    """What one call of a `Function` keeps for its backward pass: a node of the graph.

    Attributes
    ----------
    xp : module
        numpy or cupy, whichever the operands' arrays belong to.
    needs : tuple of bool
        For each operand, whether its gradient is wanted.
    saved : tuple
        The arrays passed to `save`.
    shape, dtype
        Shape and dtype of the result.

    A function may set further attributes in its forward pass for its backward pass.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.autograd import Function, Tensor
    >>> class Scaled(Function):
    ...     @staticmethod
    ...     def forward(ctx, x, *, factor):
    ...         ctx.factor = factor
    ...         return x * factor
    ...
    ...     @staticmethod
    ...     def backward(ctx, grad):
    ...         return grad * ctx.factor
    >>> x = Tensor(np.ones(2), requires_grad=True)
    >>> Scaled.apply(x, factor=3.0).sum().backward()
    >>> x.grad
    array([3., 3.])
    """

    _stamps: Any = ()  # in case __init__ did not finish

    def __init__(self, function: type[Function], xp: Any, needs: tuple[bool, ...]) -> None:
        self.function = function
        self.xp = xp
        self.needs = needs
        self.saved: tuple[Any, ...] = ()
        self.shape: tuple[int, ...] = ()
        self.dtype: np.dtype = np.dtype("f4")
        # Where each operand's gradient goes: a leaf tensor, or the node that computed it.
        self.edges: tuple[Any, ...] = ()
        self.place = ""
        self.freed = False
        self.retain: Tensor | None = None
        self._stamps = []  # of (storage, its version when the array was saved)

    if TYPE_CHECKING:  # for the attributes that functions add

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def save(self, *arrays: Any) -> None:
        """Keep `arrays` for the backward pass, as `saved`.

        Save operands and the result themselves, not views of them: the engine then notices when
        one of them is edited before the backward pass.
        """
        self.saved = arrays

    def fit(self, grad: Any, operand: int) -> Any:
        """Sum `grad` down to the shape of a broadcast operand, and cast it to its dtype."""
        edge = self.edges[operand]
        shape = edge.shape
        if grad.shape != shape:
            lead = grad.ndim - len(shape)
            stretched = tuple(i + lead for i, n in enumerate(shape) if n == 1)
            grad = wide_sum(grad, (*range(lead), *stretched))
            grad = grad if grad.shape == shape else grad.reshape(shape)
        return grad if grad.dtype == edge.dtype else grad.astype(edge.dtype)

    def guard(self, tensors: tuple[Tensor, ...]) -> None:
        """Watch the saved arrays that belong to `tensors` for edits."""
        for tensor in tensors:
            array = tensor._data
            for saved in self.saved:
                if saved is array:
                    storage = tensor._storage
                    self._stamps.append((storage, storage.version()))
                    storage.saves += 1
                    break

    def verify(self) -> None:
        """Raise GraphError if a backward pass would give a wrong gradient."""
        if self.freed:
            raise GraphError(
                f"The graph behind this tensor was freed at {self} by an earlier backward(). "
                f"Compute the forward pass again, or keep the graph with "
                f"backward(retain_graph=True)."
            )
        for storage, version in self._stamps:
            if storage.version() != version:
                raise GraphError(
                    f"An array of shape {storage.array.shape} that {self} saved for its backward "
                    f"pass was edited in place after the forward pass: its gradient would be "
                    f"wrong. Edit a copy, or edit it after backward()."
                )

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which the result's device is the current one."""
        return contextlib.nullcontext() if self.xp is np else self.device

    def free(self) -> None:
        """Release the saved arrays and the rest of the graph."""
        for storage, _ in self._stamps:
            storage.saves -= 1
        self._stamps = []
        self.saved = self.edges = ()
        self.retain = None
        self.freed = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise GraphError(f"The graph at {self} cannot be pickled or copied.")

    def __del__(self) -> None:
        for storage, _ in self._stamps:
            storage.saves -= 1

    def __str__(self) -> str:
        where = f" in {self.place}" if self.place else ""
        return f"{self.function.name}{where} (result of shape {self.shape})"
