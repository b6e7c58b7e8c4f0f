"""The backward pass: walk the graph from a result to its leaves and accumulate gradients."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.autograd.context import Context
from cupybnn.autograd.state import checking
from cupybnn.autograd.storage import module_of
from cupybnn.backends.devices import device_of
from cupybnn.errors import GraphError

if TYPE_CHECKING:
    from cupybnn.autograd.tensor import Tensor

__all__ = ["backward"]


Completed = Callable[["Tensor"], None]


def backward(
    root: Tensor, gradient: Any, retain_graph: bool, completed: Completed | None = None
) -> None:
    """Add the gradients of `root` to the leaves of its graph; see `Tensor.backward`."""
    with np.errstate(all="ignore"):  # as in the forward pass: see `cupybnn.autograd.function`
        _backward(root, gradient, retain_graph, completed)


def _backward(root: Tensor, gradient: Any, retain_graph: bool, completed: Completed | None) -> None:
    if not root.requires_grad:
        raise GraphError(
            f"backward() needs a tensor that depends on one with requires_grad=True; this one, of "
            f"shape {root.shape}, does not (or was computed under no_grad)."
        )
    gradient = _start(root, gradient)
    if root._node is None:
        _add_to_leaf(root, gradient, adopt=False)
        if completed is not None:
            completed(root)
        return
    order = _topological_order(root._node)
    for node in order:
        node.verify()
    pending = {root._node: (gradient, False)}
    left = None if completed is None else _uses(order)
    for node in order:
        grad, _ = pending.pop(node)
        with node.scope():
            _step(node, grad, pending)
        if left is not None and completed is not None:
            for leaf in _leaves(node):
                left[leaf] -= 1
                if not left[leaf]:
                    completed(leaf)
        if not retain_graph:
            node.free()


def _leaves(node: Context) -> list[Tensor]:
    return [edge for edge in node.edges if edge is not None and not isinstance(edge, Context)]


def _uses(order: list[Context]) -> Counter[Tensor]:
    """Count how often the nodes refer to each leaf."""
    return Counter(leaf for node in order for leaf in _leaves(node))


def _start(root: Tensor, gradient: Any) -> Any:
    """Return the initial gradient, checked against the root."""
    xp = module_of(root._data)
    if gradient is None:
        if root.size != 1:
            raise GraphError(
                f"backward() without a gradient needs a tensor of one element; this one has shape "
                f"{root.shape}. Reduce it (.sum(), .mean()) or pass the gradient."
            )
        with device_of(root._data).scope():
            return xp.ones_like(root._data)
    if hasattr(gradient, "_data"):
        gradient = gradient._data
    if isinstance(gradient, np.generic) and xp is np:
        gradient = np.asarray(gradient)
    if not isinstance(gradient, xp.ndarray):
        raise TypeError(
            f"The 'gradient' of backward() must be a {xp.__name__} array like the tensor's; got "
            f"{type(gradient).__name__}."
        )
    if not gradient.dtype.isnative:
        gradient = gradient.astype(gradient.dtype.newbyteorder("="))
    if gradient.shape != root.shape or gradient.dtype != root.dtype:
        raise ValueError(
            f"The 'gradient' of backward() must have the tensor's shape {root.shape} and dtype "
            f"{root.dtype}; got {gradient.shape} and {gradient.dtype}."
        )
    return gradient


def _topological_order(root: Context) -> list[Context]:
    """Return `root` and the nodes it depends on, each before its own inputs."""
    finished: list[Context] = []
    seen = {root}
    stack = [(root, iter(root.edges))]
    while stack:
        node, edges = stack[-1]
        for edge in edges:
            if isinstance(edge, Context) and edge not in seen:
                seen.add(edge)
                stack.append((edge, iter(edge.edges)))
                break
        else:
            finished.append(node)
            stack.pop()
    return finished[::-1]


def _step(node: Context, grad: Any, pending: dict[Context, tuple[Any, bool]]) -> None:
    """Run one backward function and pass its gradients on.

    `pending` holds, for every node, the sum of the gradients received so far, and whether the
    engine may add to that array in place (the first one may be shared with another operand).
    """
    if node.retain is not None:
        _add_to_leaf(node.retain, grad, adopt=False)
    returned = node.function.backward(node, grad)
    grads = list(returned) if isinstance(returned, tuple) else [returned]
    del returned  # `grads` is now the only thing here that refers to the gradients
    if len(grads) != len(node.edges):
        raise GraphError(
            f"The backward of {node} must return {len(node.edges)} gradient(s), one for each "
            f"operand; it returned {len(grads)}."
        )
    for i, edge in enumerate(node.edges):
        if edge is None:
            continue
        unshared = _unshared(grads, i)
        got = grads[i]
        if node.xp is np and type(got) is not np.ndarray and got is not None:
            got = np.asarray(got)  # NumPy turns 0-d results into scalars
        if got is None or got.shape != edge.shape or got.dtype != edge.dtype:
            raise GraphError(
                f"The backward of {node} must return for operand {i} a gradient of shape "
                f"{edge.shape} and dtype {edge.dtype}; it returned "
                + ("None." if got is None else f"shape {got.shape} and dtype {got.dtype}.")
            )
        check = checking.get()
        if check is not None:
            check(node.function.name, got, f"gradient of {_operand(edge, i)}", node.place)
        if not isinstance(edge, Context):
            _add_to_leaf(edge, got, adopt=unshared)
        elif edge not in pending:
            pending[edge] = (got, False)
        else:
            total, owned = pending[edge]
            if owned:
                total += got
            else:
                total = node.xp.asarray(total + got)
            pending[edge] = (total, True)


def _references(arrays: list[Any], i: int) -> int:
    return sys.getrefcount(arrays[i])


# The reference count of an object that only a list holds. It depends on the Python version, so
# measure it.
_ONLY_THE_LIST = _references([object()], 0)


def _unshared(grads: list[Any], i: int) -> bool:
    """Whether `grads` alone refers to its gradient `i`, and to that gradient's memory.

    A backward function may return one array for two operands, views of one array, the incoming
    gradient, or an array that it keeps. Each of these adds a reference to it or
    sets its base.
    """
    return _references(grads, i) <= _ONLY_THE_LIST and getattr(grads[i], "base", None) is None


def _add_to_leaf(leaf: Tensor, grad: Any, adopt: bool) -> None:
    """Add `grad` to a leaf's gradient; with `adopt`, nothing else holds its memory."""
    if leaf.grad is None:
        leaf.grad = grad if adopt else grad.copy()
    else:
        leaf.grad += grad


def _operand(edge: Any, i: int) -> str:
    """Name an operand in a message: the tensor's name, or its number."""
    return getattr(edge, "name", None) or f"operand {i}"
