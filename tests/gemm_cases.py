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


LENGTHS = (0, 1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)
KS = (0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4097)
BATCHES = (((), ()), ((), ()), ((2,), (2,)), ((3,), ()), ((), (2,)), ((2, 1), (3,)), ((0,), (1,)))


def random_case(rng: np.random.Generator, xp: Any) -> list[Any]:
    """Two operands that fit, each of any dtype and strides."""
    m, n = rng.choice(LENGTHS[:12], 2)
    k = rng.choice(KS[:-4])
    batch_a, batch_b = BATCHES[rng.integers(len(BATCHES))]
    shape_a, shape_b = (*batch_a, m, k), (*batch_b, k, n)
    kind = rng.integers(8)
    if kind in (0, 2):
        shape_a = (k,)
    if kind in (1, 2):
        shape_b = (k,)
    dtypes = DTYPES + (HOST_DTYPES if xp is np else [])
    return [
        array(
            rng, xp, tuple(map(int, shape)), dtypes[rng.integers(len(dtypes))], rng.choice(LAYOUTS)
        )
        for shape in (shape_a, shape_b)
    ]


def check_random_cases(xp: Any, seed: int, count: int = 20) -> None:
    """Compare products of random operands, as arrays and with either or both packed."""
    from cupybnn import pack, xnor_gemm

    rng = np.random.default_rng(seed)
    for i in range(count):
        a, b = random_case(rng, xp)
        case = f"seed {seed}, case {i}: {a.dtype} {a.shape} {a.strides} @ {b.dtype} {b.shape}"
        expected = reference(host(a), host(b))
        assert_product(xnor_gemm(a, b), expected, case)
        packed_b = pack(b, axis=-2 if b.ndim > 1 else -1)
        assert_product(xnor_gemm(pack(a), packed_b), expected, f"packed, {case}")
        mixed = (pack(a), b) if i % 2 else (a, packed_b)
        assert_product(xnor_gemm(*mixed), expected, f"one packed, {case}")
