"""xnor_gemm equals the integer product of the signs, whatever comes in."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gemm_cases import (
    BFLOAT16,
    KS,
    LENGTHS,
    array,
    assert_product,
    check_random_cases,
    host,
    reference,
)

import cupybnn
from cupybnn import pack, xnor_gemm

pytestmark = pytest.mark.cpu_kernels


@pytest.mark.parametrize("seed", range(25))
def test_equals_int64_product_on_random_cases(xp, seed):
    """25 seeds of 20 cases."""
    check_random_cases(xp, seed)


@pytest.mark.parametrize("k", [*KS, 70_000])
def test_every_awkward_k(xp, k):
    rng = np.random.default_rng(k)
    for m, n in ((1, 1), (1, 129), (65, 1), (3, 17), (66, 130)):
        a, b = array(rng, xp, (m, k)), array(rng, xp, (k, n))
        expected = reference(host(a), host(b))
        assert_product(xnor_gemm(a, b), expected, (m, k, n))
        assert_product(xnor_gemm(pack(a), pack(b, axis=-2)), expected, ("packed", m, k, n))


@pytest.mark.parametrize("m", LENGTHS)
def test_every_awkward_m_and_n(xp, m):
    rng = np.random.default_rng(m)
    for n in LENGTHS:
        k = int(rng.choice((33, 200, 257)))
        a, b = array(rng, xp, (m, k)), array(rng, xp, (k, n), layout="F" if n % 2 else "C")
        expected = reference(host(a), host(b))
        assert_product(xnor_gemm(a, b), expected, (m, k, n))
        assert_product(xnor_gemm(pack(a), pack(b, axis=-2)), expected, ("packed", m, k, n))


@pytest.mark.parametrize("shape", [(300, 1025, 513), (1030, 300, 2050), (513, 4097, 300)])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_large_products(xp, shape, layout):
    """Large enough for the paths that small matrices never reach, with uneven edges."""
    m, k, n = shape
    rng = np.random.default_rng(m)
    a, b = array(rng, xp, (m, k), layout=layout), array(rng, xp, (k, n), layout=layout)
    expected = reference(host(a), host(b))
    assert_product(xnor_gemm(a, b), expected, shape)
    assert_product(xnor_gemm(pack(a), pack(b, axis=-2)), expected, ("packed", shape))
    assert_product(xnor_gemm(a.T[:k, :m].T, pack(b, axis=-2)), expected, ("mixed", shape))


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [
        ((4, 5), (5, 6)),
        ((5,), (5, 6)),
        ((4, 5), (5,)),
        ((5,), (5,)),
        ((2, 4, 5), (5, 6)),
        ((4, 5), (2, 5, 6)),
        ((5,), (2, 5, 6)),
        ((2, 4, 5), (5,)),
        ((2, 1, 4, 5), (3, 5, 6)),
        ((4, 0), (0, 6)),
        ((0, 5), (5, 6)),
        ((4, 5), (5, 0)),
        ((0, 4, 5), (5, 6)),
        ((0,), (0,)),
        ((0,), (0, 3)),
    ],
)
def test_shapes_are_those_of_matmul(xp, shape_a, shape_b):
    rng = np.random.default_rng(0)
    a, b = array(rng, xp, shape_a), array(rng, xp, shape_b)
    expected = xp.matmul(xp.ones(shape_a, xp.float32), xp.ones(shape_b, xp.float32))
    result = xnor_gemm(a, b)
    assert result.shape == expected.shape
    assert type(result) is type(expected)
    assert result.dtype == np.float32
    assert_product(result, reference(host(a), host(b)), (shape_a, shape_b))


def test_batch_of_many_small_matrices(xp):
    rng = np.random.default_rng(0)
    a, b = array(rng, xp, (3000, 6, 70)), array(rng, xp, (3000, 70, 7))
    assert_product(xnor_gemm(a, b), reference(host(a), host(b)), "batch")
    assert_product(xnor_gemm(pack(a), pack(b, -2)), reference(host(a), host(b)), "packed")


def test_batch_of_large_matrices_broadcast(xp):
    rng = np.random.default_rng(0)
    a, b = array(rng, xp, (2, 1, 130, 300)), array(rng, xp, (3, 300, 140))
    assert_product(xnor_gemm(a, b), reference(host(a), host(b)), "batch")
    scale = xp.asarray(rng.random((3, 1, 140)), xp.float32)
    bias = xp.asarray(rng.random(140), xp.float32)
    expected = reference(host(a), host(b)).astype(np.float32) * host(scale) + host(bias)
    assert_product(xnor_gemm(a, b, scale=scale, bias=bias), expected, "scaled")


def test_one_matrix_times_a_batch_is_one_tall_product(xp):
    rng = np.random.default_rng(0)
    a, b = array(rng, xp, (5, 60, 400)), array(rng, xp, (400, 90))
    assert_product(xnor_gemm(a, b), reference(host(a), host(b)), "folded")
    assert_product(xnor_gemm(pack(a), b), reference(host(a), host(b)), "folded, packed")


def test_sums_at_their_extremes(xp):
    """All signs alike: each sum is K or -K, beside sums of the opposite sign."""
    for k in (257, 2047, 2048, 2049, 4096):
        a = np.ones((70, k), np.float32)
        a[1::2] = -1
        for pattern in (1, 2, 3):
            b = np.ones((k, 130), np.float32)
            b[:, ::pattern] = -1
            expected = reference(a, b)
            for layout in (np.ascontiguousarray, np.asfortranarray):
                result = xnor_gemm(xp.asarray(layout(a)), xp.asarray(layout(b)))
                assert_product(result, expected, (k, pattern))
                result = xnor_gemm(xp.asarray(b.T.copy()), xp.asarray(a.T.copy()))
                assert_product(result, expected.T, (k, pattern, "transposed"))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("f4", "f4", "f4"),
        ("f2", "f2", "f4"),
        ("f2", "f8", "f8"),
        ("f4", "f8", "f8"),
        ("f4", "i8", "f4"),
        ("?", "f8", "f8"),
        ("i1", "i1", "i4"),
        ("i8", "i8", "i4"),
        ("?", "i2", "i4"),
        ("?", "?", "i4"),
    ],
)
def test_default_dtype(xp, a, b, expected):
    a, b = xp.ones((2, 3), a), xp.ones((3, 2), b)
    assert xnor_gemm(a, b).dtype == np.dtype(expected)
    assert xnor_gemm(a[0], b).dtype == np.dtype(expected)
    assert xnor_gemm(pack(a), pack(b, -2)).dtype == np.int32


def test_packed_counts_as_an_integer(xp):
    a = pack(xp.ones((2, 3)))
    for dtype, expected in (("f2", "f4"), ("f4", "f4"), ("f8", "f8"), ("i8", "i4"), ("?", "i4")):
        assert xnor_gemm(a, xp.ones((3, 2), dtype)).dtype == np.dtype(expected)
        assert xnor_gemm(xp.ones((2, 3), dtype), a.T).dtype == np.dtype(expected)


@pytest.mark.skipif(not BFLOAT16, reason="needs ml_dtypes")
def test_bfloat16_counts_as_float32(xp):
    (bfloat16,) = BFLOAT16
    a = array(np.random.default_rng(0), xp, (4, 300), bfloat16)
    for b in (a.T, xp.ones((300, 2), xp.float16), xp.ones((300, 2), xp.int8)):
        assert xnor_gemm(a, b).dtype == np.float32
    assert xnor_gemm(a, xp.ones((300, 2))).dtype == np.float64
    assert xnor_gemm(a, a.T, dtype=bfloat16).dtype == bfloat16


def test_longdouble_stays_longdouble():
    a = np.ones((2, 3), np.longdouble)
    assert xnor_gemm(a, a.T.astype(np.float32)).dtype == np.longdouble


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "f2", "f4", "f8"])
def test_dtype_and_out(xp, dtype):
    rng = np.random.default_rng(0)
    for m, k, n in ((5, 127, 9), (130, 100, 140), (140, 127, 300)):
        a, b = array(rng, xp, (m, k)), array(rng, xp, (k, n))
        expected = reference(host(a), host(b))
        result = xnor_gemm(a, b, dtype=dtype)
        assert result.dtype == np.dtype(dtype)
        assert_product(result, expected, dtype)
        for order in "CF":
            out = xp.full((m, n), 99, dtype, order=order)
            assert xnor_gemm(a, b, out=out) is out
            assert_product(out, expected, (dtype, order))
        frame = xp.full((2 * m, 3 * n), 99, dtype)
        assert_product(xnor_gemm(a, b, out=frame[::2, ::3], dtype=dtype), expected, "strided")
        frame[::2, ::3] = 99
        assert (host(frame) == 99).all(), "wrote beside out"


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2", ">i4", ">i2", "g"])
def test_operands_and_results_of_other_byte_orders_and_lengths(dtype):
    rng = np.random.default_rng(0)
    for m, k, n in ((3, 70, 5), (130, 300, 140), (140, 2100, 30), (1, 1500, 2000)):
        a, b = (array(rng, np, shape, dtype) for shape in ((m, k), (k, n)))
        expected = reference(a, b)
        rounded = expected.astype(dtype)
        assert_product(xnor_gemm(a, b), expected, dtype)
        result = xnor_gemm(pack(a), pack(b, -2), dtype=dtype)
        assert result.dtype == np.dtype(dtype)
        assert_product(result, rounded, dtype)
        for order in "CF":
            out = np.full((m, n), 7, dtype, order=order)
            xnor_gemm(a, b, out=out)
            assert_product(out, rounded, (dtype, order))


@pytest.mark.parametrize("name", ["f2", *(d.name for d in BFLOAT16)])
def test_half_results_round_to_nearest_even(xp, name):
    dtype = np.dtype(name) if name == "f2" else BFLOAT16[0]
    exact_to = 2048 if name == "f2" else 256
    k = 2 * exact_to + 5
    # Row m has k - m negative elements: the products are all integers from -k to k in steps of 2.
    a = np.where(np.arange(k) < np.arange(0, k + 1, 7)[:, None], 1, -1).astype(np.int8)
    b = np.ones((k, 1), np.int8)
    exact = reference(a, b)
    assert np.abs(exact).max() > exact_to
    result = xnor_gemm(xp.asarray(a), xp.asarray(b), dtype=dtype)
    assert result.dtype == dtype
    np.testing.assert_array_equal(
        host(result).astype(np.float32), exact.astype(np.float32).astype(dtype).astype(np.float32)
    )


def test_float16_becomes_infinite_beyond_its_range(xp):
    a = xp.ones((1, 70_000), xp.int8)
    assert float(xnor_gemm(a, a.T, dtype="f2")[0, 0]) == np.inf
    assert float(xnor_gemm(a, -a.T, dtype="f2")[0, 0]) == -np.inf


def test_out_may_overlap_an_operand(xp):
    rng = np.random.default_rng(0)
    for n in (16, 200):
        x = array(rng, xp, (n, n))
        y = array(rng, xp, (n, n))
        expected = reference(host(x), host(y))
        assert xnor_gemm(x, y, out=x) is x
        assert_product(x, expected, "out is a")
        z = array(rng, xp, (n, n))
        expected = reference(host(y), host(z.T))
        xnor_gemm(y, z.T, out=z)
        assert_product(z, expected, "out is b, transposed")
        both = array(rng, xp, (n, n + 3))
        expected = reference(host(both[:, :n]), host(y))
        xnor_gemm(both[:, :n], y, out=both[:, 3:])
        assert_product(both[:, 3:], expected, "shifted")


def test_out_of_vectors(xp):
    a = array(np.random.default_rng(0), xp, (5,))
    b = array(np.random.default_rng(1), xp, (5, 6))
    out = xp.empty((), xp.float32)
    assert xnor_gemm(a, a, out=out) is out
    assert float(out) == reference(host(a), host(a))
    for x, y, n in ((a, b, 6), (b.T, a, 6)):
        out = xp.full((n, 2), 99, xp.float64)
        xnor_gemm(x, y, out=out[:, 1])
        assert_product(out[:, 1], reference(host(x), host(y)), "vector")
        assert (host(out[:, 0]) == 99).all()


def test_operands_are_left_alone(xp):
    rng = np.random.default_rng(0)
    for dtype in ("f4", "?", "i1"):
        a, b = array(rng, xp, (300, 300), dtype), array(rng, xp, (300, 300), dtype)
        before = host(a).copy(), host(b).copy()
        xnor_gemm(a, b)
        xnor_gemm(a[:5, :5], b[:5, :5])
        np.testing.assert_array_equal(host(a), before[0])
        np.testing.assert_array_equal(host(b), before[1])


def test_array_likes():
    assert xnor_gemm([[1, -1]], [[2], [3]]).tolist() == [[0]]
    assert xnor_gemm([[True, False]], [[True], [False]]).tolist() == [[2]]
    assert xnor_gemm((1.0, -1.0), (1.0, -1.0)) == 2.0

    class Sub(np.ndarray):
        pass

    a = np.ones((2, 2), np.float32).view(Sub)
    assert type(xnor_gemm(a, a)) is np.ndarray


@pytest.mark.parametrize("name", ["f4", "f8", "f2", "g", ">f4", *(d.name for d in BFLOAT16)])
def test_not_a_number_raises_no_floating_point_error(name):
    """Nor does it warn from a thread of the pool, which does not know of the caller's errstate."""
    dtype = BFLOAT16[0] if name == "bfloat16" else np.dtype(name)
    a = np.full((600, 600), np.nan).astype(dtype)
    if name in ("f4", "f8"):  # signalling: even to compare it is an invalid operation
        infinity, bits = (0x7F800001, "u4") if name == "f4" else (0x7FF0000000000001, "u8")
        a = np.full((600, 600), infinity, bits).view(dtype)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (xnor_gemm(a, a) == 600).all()
        assert (xnor_gemm(a[:4, :4], a[:4, :4]) == 4).all()
        assert (xnor_gemm(a[:1], a) == 600).all()
        assert (cupybnn.sign(a).astype("f4") == -1).all()
        assert not pack(a).popcounts.any()


def test_factors_beyond_a_dtype_raise_no_floating_point_error():
    a = np.ones((600, 600), np.float32)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (xnor_gemm(a, a, scale=1e300) == np.inf).all()
        assert (xnor_gemm(a, a, scale=1e-300, dtype="f8") == 0).all()
        assert (xnor_gemm(a, a, scale=(1e30, 1e30), bias=-1) == np.inf).all()
        assert np.isnan(xnor_gemm(a, a, scale=np.inf, bias=-np.inf)).all()
        assert (xnor_gemm(a, a, scale=1e-9, dtype="f2") == np.float16(6e-7)).all()
        nothing = np.zeros(2)
        threshold, flip = cupybnn.fold_batch_norm([1e300, 0], nothing, [1, 1e-45], nothing, 0.0)
        assert (threshold.dtype, flip.dtype) == (np.int32, bool)
