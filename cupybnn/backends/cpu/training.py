"""Kernels for what a training step does besides products: one pass instead of NumPy's many.

Each makes the same float32 operations in the same order as the NumPy code it stands in for, so that
all results are the same, bit for bit: sums over a batch add row after row, and nothing is
contracted or reordered. Arguments are addresses of contiguous float32 arrays, and numbers.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from cupybnn.backends.cpu.cache import cached
from cupybnn.backends.cpu.memory import floats
from cupybnn.backends.cpu.parts import first_part, inline, next_part

__all__ = ["adam", "batch_norm", "batch_norm_gradient", "gradient_in_window", "signs"]

ONE, ZERO = np.float32(1), np.float32(0)


@cached("decay", "rate_1", "rate_2", "eps", "factor", "limit")
def adam(
    counter, parts, step, size, weight, grad, mean, square, decay, rate_1,
    rate_2, eps, factor, limit,
):  # fmt: skip
    """Update a weight as `optim.Adam` does, and clip it to [-limit, limit].

    Parameters
    ----------
    counter, parts, step, size
        See `cupybnn.backends.cpu.threads`: a part is `step` of `size` elements.
    decay 32
        Factor of the weight before the update.
    rate_1, rate_2 32
        1 minus the decays of the two means.
    eps, factor 32
        ``weight -= mean / (sqrt(square) + eps) * factor``.
    """
    part = first_part(counter)
    while part < parts:
        at, n = 4 * step * part, min(step, size - step * part)
        w, g = carray(floats(weight + at), n), carray(floats(grad + at), n)
        m, s = carray(floats(mean + at), n), carray(floats(square + at), n)
        for i in range(n):
            x = g[i]
            first = m[i] + (x - m[i]) * rate_1
            second = s[i] + (x * x - s[i]) * rate_2
            m[i] = first
            s[i] = second
            y = w[i] * decay - first / (np.sqrt(second) + eps) * factor
            y = -limit if y < -limit else y  # NaN stays
            w[i] = limit if y > limit else y
        part = next_part(counter, part)


@cached()
def signs(counter, parts, step, size, x, out):
    """Write +1 where x >= 0 and -1 elsewhere."""
    part = first_part(counter)
    while part < parts:
        at, n = 4 * step * part, min(step, size - step * part)
        source, target = carray(floats(x + at), n), carray(floats(out + at), n)
        for i in range(n):
            target[i] = ONE if source[i] >= ZERO else -ONE
        part = next_part(counter, part)


@cached("window")
def gradient_in_window(counter, parts, step, size, x, grad, window, out):
    """Write ``grad * (abs(x) <= window)``: a product, so that NaN and infinities stay NaN."""
    part = first_part(counter)
    while part < parts:
        at, n = 4 * step * part, min(step, size - step * part)
        source, slope = carray(floats(x + at), n), carray(floats(grad + at), n)
        target = carray(floats(out + at), n)
        for i in range(n):
            target[i] = slope[i] * (ONE if abs(source[i]) <= window else ZERO)
        part = next_part(counter, part)


@cached("number", "keep", "new", "eps")
def batch_norm(
    counter, parts, step, rows, features, x, gamma, beta, means, variances, normal, out, inverse,
    work, number, keep, new, eps,
):  # fmt: skip
    """Normalize features by their batch, and update the running statistics.

    Parameters
    ----------
    counter, parts, step
        A part is `step` of the features.
    x, normal, out : address of shape (rows, features)
    gamma, beta, means, variances, inverse : address of shape (features,)
    work : address of shape (2, features)
    number 32
        Rows.
    keep, new 32
        ``running = running * keep + new * current``.
    """
    part = first_part(counter)
    while part < parts:
        first = step * part
        n = min(step, features - first)
        _batch_norm(
            rows, n, 4 * features, x + 4 * first, gamma + 4 * first, beta + 4 * first,
            means + 4 * first, variances + 4 * first, normal + 4 * first, out + 4 * first,
            inverse + 4 * first, work + 8 * first, number, keep, new, eps,
        )  # fmt: skip
        part = next_part(counter, part)


@inline
def _batch_norm(
    rows, n, stride, x, gamma, beta, means, variances, normal, out, inverse, work, number, keep,
    new, eps,
):  # fmt: skip
    mean, total = carray(floats(work), n), carray(floats(work + 4 * n), n)
    g, b = carray(floats(gamma), n), carray(floats(beta), n)
    running, running_square = carray(floats(means), n), carray(floats(variances), n)
    inverses = carray(floats(inverse), n)
    total[:] = ZERO
    for row in range(rows):
        values = carray(floats(x + row * stride), n)
        for j in range(n):
            total[j] += values[j]
    for j in range(n):
        mean[j] = total[j] / number
    total[:] = ZERO
    for row in range(rows):
        values = carray(floats(x + row * stride), n)
        for j in range(n):
            difference = values[j] - mean[j]
            total[j] += difference * difference
    for j in range(n):
        variance = total[j] / number
        running[j] = running[j] * keep + new * mean[j]
        running_square[j] = running_square[j] * keep + new * variance
        inverses[j] = ONE / np.sqrt(variance + eps)
    for row in range(rows):
        values = carray(floats(x + row * stride), n)
        here, result = (
            carray(floats(normal + row * stride), n),
            carray(floats(out + row * stride), n),
        )
        # Two loops: LLVM does not check more than a few arrays for overlaps.
        for j in range(n):
            here[j] = (values[j] - mean[j]) * inverses[j]
        for j in range(n):
            result[j] = here[j] * g[j] + b[j]


@cached("number")
def batch_norm_gradient(
    counter, parts, step, rows, features, grad, normal, gamma, inverse, grad_x, grad_gamma,
    grad_beta, work, number,
):  # fmt: skip
    """Write the gradients of x, gamma and beta of `batch_norm`; arguments likewise."""
    part = first_part(counter)
    while part < parts:
        first = step * part
        n = min(step, features - first)
        _batch_norm_gradient(
            rows, n, 4 * features, grad + 4 * first, normal + 4 * first, gamma + 4 * first,
            inverse + 4 * first, grad_x + 4 * first, grad_gamma + 4 * first,
            grad_beta + 4 * first, work + 8 * first, number,
        )  # fmt: skip
        part = next_part(counter, part)


@inline
def _batch_norm_gradient(
    rows, n, stride, grad, normal, gamma, inverse, grad_x, grad_gamma, grad_beta, work, number
):
    for_gamma, for_beta = carray(floats(grad_gamma), n), carray(floats(grad_beta), n)
    slope, offset = carray(floats(work), n), carray(floats(work + 4 * n), n)
    g, inverses = carray(floats(gamma), n), carray(floats(inverse), n)
    for_gamma[:] = ZERO
    for_beta[:] = ZERO
    for row in range(rows):
        above = carray(floats(grad + row * stride), n)
        values = carray(floats(normal + row * stride), n)
        for j in range(n):
            for_gamma[j] += above[j] * values[j]
            for_beta[j] += above[j]
    for j in range(n):
        slope[j] = for_gamma[j] / -number
        offset[j] = for_beta[j] / number
    for row in range(rows):
        above = carray(floats(grad + row * stride), n)
        values = carray(floats(normal + row * stride), n)
        result = carray(floats(grad_x + row * stride), n)
        for j in range(n):
            value = values[j] * slope[j] - offset[j] + above[j]
            result[j] = value * (g[j] * inverses[j])
