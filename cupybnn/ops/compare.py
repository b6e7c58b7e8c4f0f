"""Comparisons, argmax and argmin: plain bool and integer arrays, without gradients."""

from __future__ import annotations

from typing import Any

from cupybnn.autograd import Context, Function, Tensor, no_grad
from cupybnn.ops.axes import as_axis

__all__ = [
    "argmax",
    "argmin",
    "equal",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "not_equal",
]


class _Comparison(Function):
    """A comparison, computed by the array module's function of the same name."""

    @classmethod
    def forward(cls, ctx: Context, a: Any, b: Any) -> Any:
        return getattr(ctx.xp, cls.name)(a, b)

    @classmethod
    def of(cls, a: Any, b: Any) -> Any:
        """Return the result's array, outside any graph."""
        with no_grad():
            return cls.apply(a, b)._data


class Equal(_Comparison):
    """a == b."""


class NotEqual(_Comparison):
    """a != b."""


class Less(_Comparison):
    """a < b."""


class LessEqual(_Comparison):
    """a <= b."""


class Greater(_Comparison):
    """a > b."""


class GreaterEqual(_Comparison):
    """a >= b."""


class _ArgExtreme(Function):
    """Argmax or argmin, computed by the array module's function of the same name."""

    @classmethod
    def forward(cls, ctx: Context, x: Any, axis: int | None) -> Any:
        return getattr(ctx.xp, cls.name)(x, axis=axis)

    @classmethod
    def of(cls, x: Any, axis: int | None) -> Any:
        """Return the result's array, outside any graph."""
        with no_grad():
            return cls.apply(x, axis=None if axis is None else as_axis(axis, cls.name))._data


class Argmax(_ArgExtreme):
    """Index of the largest element."""


class Argmin(_ArgExtreme):
    """Index of the smallest element."""


def equal(a: Any, b: Any) -> Any:
    """Return ``a == b`` element by element, as an array of bool.

    Parameters
    ----------
    a, b : Tensor, array or number
        Of shapes that broadcast, on one device.

    Returns
    -------
    numpy.ndarray or cupy.ndarray of bool
        A plain array: a comparison has no gradient.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.equal(Tensor([1.0, 2.0]), 2)
    array([False,  True])
    """
    return Equal.of(a, b)


def not_equal(a: Any, b: Any) -> Any:
    """Return ``a != b`` element by element, as an array of bool; see `equal`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 4.0]))
    >>> ops.not_equal(x, 2.0)
    array([ True, False,  True])
    """
    return NotEqual.of(a, b)


def less(a: Any, b: Any) -> Any:
    """Return ``a < b`` element by element, as an array of bool; see `equal`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 4.0]))
    >>> ops.less(x, 2.0)
    array([ True, False, False])
    """
    return Less.of(a, b)


def less_equal(a: Any, b: Any) -> Any:
    """Return ``a <= b`` element by element, as an array of bool; see `equal`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 4.0]))
    >>> ops.less_equal(x, 2.0)
    array([ True,  True, False])
    """
    return LessEqual.of(a, b)


def greater(a: Any, b: Any) -> Any:
    """Return ``a > b`` element by element, as an array of bool; see `equal`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 4.0]))
    >>> ops.greater(x, 2.0)
    array([False, False,  True])
    """
    return Greater.of(a, b)


def greater_equal(a: Any, b: Any) -> Any:
    """Return ``a >= b`` element by element, as an array of bool; see `equal`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 4.0]))
    >>> ops.greater_equal(x, 2.0)
    array([False,  True,  True])
    """
    return GreaterEqual.of(a, b)


def argmax(x: Tensor, axis: int | None = None) -> Any:
    """Return the index of the largest element along `axis`; the first one in a tie.

    Parameters
    ----------
    x : Tensor
        Any shape, not empty.
    axis : int, optional
        By default, the index is that of the flattened tensor.

    Returns
    -------
    numpy.ndarray or cupy.ndarray of int64
        A plain array: an index has no gradient.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor, ops
    >>> logits = Tensor([[0.5, 2.0], [3.0, 1.0]])
    >>> ops.argmax(logits, axis=1)
    array([1, 0])
    """
    return Argmax.of(x, axis)


def argmin(x: Tensor, axis: int | None = None) -> Any:
    """Return the index of the smallest element along `axis`, the first in a tie; see `argmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> ops.argmin(Tensor(np.array([[3.0, 1.0], [0.0, 2.0]])), axis=1)
    array([1, 0])
    """
    return Argmin.of(x, axis)
