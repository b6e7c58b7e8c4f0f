"""Elementwise operations, with broadcasting."""

from __future__ import annotations

from typing import Any

from cupybnn.autograd import Context, Function, Tensor
from cupybnn.autograd.convert import as_number

__all__ = [
    "absolute",
    "add",
    "clip",
    "divide",
    "exp",
    "log",
    "multiply",
    "negative",
    "power",
    "relu",
    "sqrt",
    "subtract",
    "tanh",
]


class Add(Function):
    """a + b."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        return a + b

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return (
            ctx.fit(grad, 0) if ctx.needs[0] else None,
            ctx.fit(grad, 1) if ctx.needs[1] else None,
        )


class Subtract(Function):
    """a - b."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        return a - b

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return (
            ctx.fit(grad, 0) if ctx.needs[0] else None,
            ctx.fit(-grad, 1) if ctx.needs[1] else None,
        )


class Multiply(Function):
    """a * b."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        ctx.save(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        a, b = ctx.saved
        return (
            ctx.fit(grad * b, 0) if ctx.needs[0] else None,
            ctx.fit(grad * a, 1) if ctx.needs[1] else None,
        )


class Divide(Function):
    """a / b."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        out = a / b
        ctx.save(b, out)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        b, out = ctx.saved
        grad = grad / b
        return (
            ctx.fit(grad, 0) if ctx.needs[0] else None,
            ctx.fit(-grad * out, 1) if ctx.needs[1] else None,
        )


class Power(Function):
    """x to a constant power."""

    @staticmethod
    def forward(ctx: Context, x: Any, exponent: float) -> Any:
        ctx.save(x)
        ctx.exponent = exponent
        return x**exponent

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        if ctx.exponent == 0:
            return ctx.xp.zeros_like(x)
        return grad * ctx.exponent * x ** (ctx.exponent - 1)


class Negative(Function):
    """-x."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        return -x

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return -grad


class Absolute(Function):
    """|x|; its gradient at 0 is 0."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        return abs(x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        return grad * ctx.xp.sign(x)


class Exp(Function):
    """e to the power of x."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        out = ctx.xp.exp(x)
        ctx.save(out)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (out,) = ctx.saved
        return grad * out


class Log(Function):
    """Natural logarithm."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        return ctx.xp.log(x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        return grad / x


class Sqrt(Function):
    """Square root."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        out = ctx.xp.sqrt(x)
        ctx.save(out)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (out,) = ctx.saved
        return grad / (out + out)


class Tanh(Function):
    """Hyperbolic tangent."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        out = ctx.xp.tanh(x)
        ctx.save(out)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (out,) = ctx.saved
        return grad * (1 - out * out)


class Relu(Function):
    """max(x, 0); its gradient at 0 is 0."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        out = ctx.xp.maximum(x, 0)
        ctx.save(out)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (out,) = ctx.saved
        return grad * (out > 0)


class Clip(Function):
    """x limited to [low, high]; the gradient passes inside, limits included."""

    @staticmethod
    def forward(ctx: Context, x: Any, low: float, high: float) -> Any:
        ctx.save(x)
        ctx.low, ctx.high = low, high
        return ctx.xp.clip(x, low, high)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        return grad * ((x >= ctx.low) & (x <= ctx.high))


def add(a: Any, b: Any) -> Tensor:
    """Return a + b.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 4.0]))
    >>> ops.add(x, 2.0).numpy()
    array([3., 4., 6.])
    """
    return Add.apply(a, b)


def subtract(a: Any, b: Any) -> Tensor:
    """Return a - b.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 4.0]))
    >>> ops.subtract(x, 2.0).numpy()
    array([-1.,  0.,  2.])
    """
    return Subtract.apply(a, b)


def multiply(a: Any, b: Any) -> Tensor:
    """Return a * b.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 4.0]))
    >>> ops.multiply(x, 2.0).numpy()
    array([2., 4., 8.])
    """
    return Multiply.apply(a, b)


def divide(a: Any, b: Any) -> Tensor:
    """Return a / b.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 4.0]))
    >>> ops.divide(x, 2.0).numpy()
    array([0.5, 1. , 2. ])
    """
    return Divide.apply(a, b)


def power(x: Tensor, exponent: float) -> Tensor:
    """Return x to a constant power, a Python or NumPy real number.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0, 3.0]))
    >>> ops.power(x, 2).numpy()
    array([1., 4., 9.])
    """
    constant = as_number(exponent)
    if constant is None:
        raise TypeError(
            f"The 'exponent' of power must be a number; got {type(exponent).__name__}. For a "
            f"variable exponent, use ops.exp(exponent * ops.log(x))."
        )
    return Power.apply(x, exponent=constant)


def negative(x: Tensor) -> Tensor:
    """Return -x.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([-1.0, 0.5, 2.0]))
    >>> ops.negative(x).numpy()
    array([ 1. , -0.5, -2. ])
    """
    return Negative.apply(x)


def absolute(x: Tensor) -> Tensor:
    """Return the magnitude ``|x|``. The gradient at 0 is 0.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([-1.0, 0.5, 2.0]))
    >>> ops.absolute(x).numpy()
    array([1. , 0.5, 2. ])
    """
    return Absolute.apply(x)


def exp(x: Tensor) -> Tensor:
    """Return e to the power of x.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([0.0, 1.0]))
    >>> ops.exp(x).numpy()
    array([1.        , 2.71828183])
    """
    return Exp.apply(x)


def log(x: Tensor) -> Tensor:
    """Return the natural logarithm of x.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([1.0, 2.0]))
    >>> ops.log(x).numpy()
    array([0.        , 0.69314718])
    """
    return Log.apply(x)


def sqrt(x: Tensor) -> Tensor:
    """Return the square root of x.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([4.0, 9.0]))
    >>> ops.sqrt(x).numpy()
    array([2., 3.])
    """
    return Sqrt.apply(x)


def tanh(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent of x.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([-1.0, 0.0, 1.0]))
    >>> ops.tanh(x).numpy()
    array([-0.76159416,  0.        ,  0.76159416])
    """
    return Tanh.apply(x)


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0). The gradient at 0 is 0.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.relu(Tensor([-1.0, 2.0])).data.tolist()
    [0.0, 2.0]
    """
    return Relu.apply(x)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """Return x limited to [low, high]. The gradient passes where low <= x <= high.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.clip(Tensor([-3.0, 0.5, 2.0]), -1, 1).data.tolist()
    [-1.0, 0.5, 1.0]
    """
    return Clip.apply(x, low=low, high=high)
