"""Matrices in awkward shapes, dtypes and strides, and the product that cupybnn must equal."""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import ml_dtypes

    BFLOAT16 = [np.dtype(ml_dtypes.bfloat16)]
except ModuleNotFoundError:
    BFLOAT16 = []

DTYPES = [
    *(np.dtype(c) for c in ("f4", "f4", "f2", "f8", "i1", "i2", "i4", "i8", "?")),
    *BFLOAT16,
]
HOST_DTYPES = [np.dtype(np.longdouble), np.dtype(">f4"), np.dtype(">i2")]

LAYOUTS = ("C", "F", "transposed", "negative", "upside down", "strided", "repeated", "offset")


def host(x: Any) -> np.ndarray:
    """Copy of an array in the host's memory."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def signs(x: np.ndarray) -> np.ndarray:
    """+1 where x >= 0 and -1 elsewhere, int64."""
    if x.dtype.kind == "b":
        return np.where(x, 1, -1)
    if x.dtype.name == "bfloat16":
        x = x.astype(np.float32)
    return np.where(x >= 0, 1, -1)


def reference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer product of the signs: int64, by float64 where int64 would take long.

    Sums of fewer than 2**53 terms of +1 and -1 are exact in float64.
    """
    a, b = signs(a), signs(b)
    if a.size * (b.shape[-1] if b.ndim > 1 else 1) > 1 << 22:
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)
    return np.matmul(a, b)


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Random numbers around 0, with both zeros and all that is not a number."""
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind == "i":
        info = np.iinfo(dtype)
        x = rng.integers(-2, 3, shape).astype(dtype)
        return np.where(rng.random(shape) < 0.02, info.min, x).astype(dtype)
    x = rng.standard_normal(shape).astype(np.float32)
    odd = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-45], np.float32)
    x = np.where(rng.random(shape) < 0.1, rng.choice(odd, shape), x)
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def array(
    rng: np.random.Generator,
    xp: Any,
    shape: tuple[int, ...],
    dtype: Any = np.float32,
    layout: str = "C",
) -> Any:
    """Random array of `xp` with the strides that `layout` names."""
    x = values(rng, shape, np.dtype(dtype))
    if layout == "C":
        return xp.asarray(x)
    if layout == "F":
        return xp.asfortranarray(xp.asarray(x))
    if layout == "transposed" and x.ndim > 1:
        return xp.asarray(np.ascontiguousarray(x.swapaxes(-1, -2))).swapaxes(-1, -2)
    if layout == "upside down" and x.ndim > 1:
        return xp.asarray(np.ascontiguousarray(x[..., ::-1, :]))[..., ::-1, :]
    if layout == "repeated":  # stride 0 along the first axis
        return xp.broadcast_to(xp.asarray(x[:1]), shape)
    if layout == "offset":
        wide = xp.asarray(np.concatenate([x[..., :0], x, x], axis=-1))
        return wide[..., shape[-1] :]
    if layout == "strided":
        return xp.asarray(np.repeat(x, 3, axis=-1))[..., ::3]
    return xp.asarray(np.ascontiguousarray(x[..., ::-1]))[..., ::-1]


def assert_product(result: Any, expected: np.ndarray, case: object) -> None:
    """Compare element by element; name the case and the first element that differs."""
    result = host(result)
    assert result.shape == expected.shape, f"{case}: shape {result.shape}, not {expected.shape}"
    got = result.astype(np.float64) if result.dtype.kind == "V" else result
    wrong = np.argwhere(got != expected)
    if len(wrong):
        at = tuple(wrong[0])
        raise AssertionError(
            f"{case}: {len(wrong)} of {expected.size} elements differ, first at {at}: "
            f"{got[at]} instead of {expected[at]}"
        )
