"""Scales, bias, thresholds: the numbers that the epilogue writes, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from gemm_cases import BFLOAT16, array, assert_product, host, reference

from cupybnn import fold_batch_norm, ops, pack, xnor_gemm, xnor_gemm_packed
from cupybnn.autograd import Tensor, no_grad

pytestmark = pytest.mark.cpu_kernels

SHAPES = [(3, 70, 5), (130, 257, 140), (70, 4097, 300), (300, 100, 70), (1, 3000, 1030)]


def operands(rng, xp, m, k, n):
    a, b = array(rng, xp, (m, k)), array(rng, xp, (k, n))
    return a, b, reference(host(a), host(b))


def scaled(acc, row, column, bias, work):
    """The formula of the documentation, each step rounded to `work`."""
    value = acc.astype(work)
    for factor in (row, column):
        if factor is not None:
            value = (value * factor.astype(work)).astype(work)
    return value if bias is None else (value + bias.astype(work)).astype(work)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", *(d.name for d in BFLOAT16)])
def test_scale_and_bias(xp, shape, dtype):
    dtype = BFLOAT16[0] if dtype == "bfloat16" else np.dtype(dtype)
    work = np.float64 if dtype == np.float64 else np.float32
    rng = np.random.default_rng(0)
    a, b, acc = operands(rng, xp, *shape)
    m, _, n = shape
    row, column, bias = (rng.standard_normal(s).astype(np.float32) for s in ((m, 1), (n,), (1, n)))
    given = [xp.asarray(x) for x in (row, column, bias)]
    for scale, used in (
        (given[1], (None, column)),
        (given[0], (row, None)),
        ((given[0], given[1]), (row, column)),
        ((given[0][:, 0], None), (row, None)),
        (None, (None, None)),
    ):
        for bias_given, bias_used in ((given[2], bias), (None, None)):
            expected = scaled(acc, *used, bias_used, work).astype(dtype)
            for x, y in ((a, b), (pack(a), pack(b, axis=-2))):
                result = xnor_gemm(x, y, scale=scale, bias=bias_given, dtype=dtype)
                assert result.dtype == dtype
                np.testing.assert_array_equal(
                    host(result).astype(np.float64), expected.astype(np.float64)
                )


def test_scale_of_a_batch(xp):
    rng = np.random.default_rng(0)
    for m, k, n in ((4, 50, 5), (130, 300, 100)):
        a, b = array(rng, xp, (3, 2, m, k)), array(rng, xp, (2, k, n))
        acc = reference(host(a), host(b))
        row, column, bias = (
            rng.standard_normal(s).astype(np.float32) for s in ((2, m, 1), (3, 1, 1, n), (n,))
        )
        result = xnor_gemm(a, b, scale=(xp.asarray(row), xp.asarray(column)), bias=xp.asarray(bias))
        assert_product(result, scaled(acc, row, column, bias, np.float32), (m, k, n))


def test_scalars_lists_and_other_dtypes_of_scale(xp):
    a, b, acc = operands(np.random.default_rng(0), xp, 3, 40, 5)
    assert_product(xnor_gemm(a, b, scale=0.5), acc * 0.5, "number")
    assert_product(xnor_gemm(a, b, scale=0.5, bias=[1, 2, 3, 4, 5]), acc / 2 + np.arange(1, 6), "")
    assert_product(xnor_gemm(a, b, scale=xp.arange(5)), acc * np.arange(5), "int")
    assert_product(xnor_gemm(a, b, scale=(2, 0.25)), acc * 0.5, "pair of numbers")
    half = xp.ones(5, xp.float16)
    assert_product(xnor_gemm(pack(a), b, bias=half), acc + 1.0, "half")


def test_scaled_integers_are_float32_by_default(xp):
    a, b, acc = operands(np.random.default_rng(0), xp, 3, 40, 5)
    result = xnor_gemm(pack(a), pack(b, -2), scale=2)
    assert result.dtype == np.float32
    assert_product(result, acc * 2, "packed")
    assert xnor_gemm(a.astype("f8"), b, bias=1).dtype == np.float64


def test_scale_into_out(xp):
    a, b, acc = operands(np.random.default_rng(0), xp, 140, 300, 130)
    for order in "CF":
        out = xp.full((140, 130), 99, np.float32, order=order)
        assert xnor_gemm(a, b, scale=0.5, out=out) is out
        assert_product(out, acc * 0.5, order)


def test_scale_of_vectors(xp):
    a, b, acc = operands(np.random.default_rng(0), xp, 3, 40, 5)
    scale = xp.asarray([1, 2, 4, 8, 16], np.float32)
    assert_product(xnor_gemm(a[0], b, scale=scale), acc[0] * host(scale), "a is a vector")
    assert_product(
        xnor_gemm(a, b[:, 0], scale=scale[:3, None]), acc[:, 0] * host(scale)[:3], "b is a vector"
    )
    assert float(xnor_gemm(a[0], b[:, 0], scale=3)) == acc[0, 0] * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_result(xp, shape):
    rng = np.random.default_rng(1)
    a, b, acc = operands(rng, xp, *shape)
    n = shape[2]
    threshold = rng.integers(-20, 20, n).astype(np.int32)
    flip = rng.integers(0, 2, n).astype(bool)
    for t, f in ((None, None), (threshold, None), (None, flip), (threshold, flip)):
        expected = (acc >= (0 if t is None else t)) ^ (False if f is None else f)
        for x, y in ((a, b), (pack(a), pack(b, axis=-2))):
            result = xnor_gemm_packed(
                x,
                y,
                threshold=None if t is None else xp.asarray(t),
                flip=None if f is None else xp.asarray(f),
            )
            assert (result.shape, result.axis) == (acc.shape, -1)
            np.testing.assert_array_equal(host(result.unpack(bool)), expected)
            np.testing.assert_array_equal(host(result.popcounts), expected.sum(axis=-1))


def test_packed_result_is_the_next_left_operand(xp):
    rng = np.random.default_rng(2)
    a, b, acc = operands(rng, xp, 65, 200, 130)
    c = array(rng, xp, (130, 33))
    expected = reference(acc, host(c))
    assert_product(xnor_gemm(xnor_gemm_packed(a, b), c), expected, "two layers")
    assert_product(xnor_gemm(xnor_gemm_packed(a, b), pack(c, -2)), expected, "two layers, packed")


def test_packed_result_of_vectors_and_batches(xp):
    rng = np.random.default_rng(3)
    a, b = array(rng, xp, (2, 4, 70)), array(rng, xp, (70, 66))
    acc = reference(host(a), host(b))
    np.testing.assert_array_equal(host(xnor_gemm_packed(a, b).unpack(bool)), acc >= 0)
    vector = xnor_gemm_packed(a[1, 2], b)
    assert (vector.shape, vector.axis) == ((66,), -1)
    np.testing.assert_array_equal(host(vector.unpack(bool)), acc[1, 2] >= 0)
    assert xnor_gemm(vector, vector) == 66


def test_threshold_of_one_number_and_beyond_int32(xp):
    a, b, acc = operands(np.random.default_rng(4), xp, 5, 60, 9)
    np.testing.assert_array_equal(
        host(xnor_gemm_packed(a, b, threshold=4, flip=True).unpack(bool)), acc < 4
    )
    far = xp.asarray([2**40, -(2**40)] * 4 + [2**31])
    expected = np.broadcast_to([False, True] * 4 + [False], acc.shape)
    np.testing.assert_array_equal(
        host(xnor_gemm_packed(a, b, threshold=far).unpack(bool)), expected
    )
    for number in (10**30, -(10**30)):  # no integer type of NumPy holds it
        got = host(xnor_gemm_packed(a, b, threshold=number).unpack(bool))
        assert (got == (number < 0)).all()
    unsigned = xp.full(9, 2**32 - 1, np.uint32)
    assert not host(xnor_gemm_packed(a, b, threshold=unsigned).unpack(bool)).any()


def test_empty_packed_results(xp):
    for shape_a, shape_b in (((0, 5), (5, 3)), ((2, 5), (5, 0)), ((2, 0), (0, 3))):
        result = xnor_gemm_packed(xp.ones(shape_a), xp.ones(shape_b))
        assert result.shape == (shape_a[0], shape_b[1])
        assert (host(result.unpack()) == 1).all()  # a sum of nothing is 0, whose sign is +1


def batch_norm_sign(s, mean, var, gamma, beta, eps):
    """The formula, step by step in float32."""
    f = np.float32
    with np.errstate(all="ignore"):
        scale = f(gamma) * (f(1) / np.sqrt(f(var) + f(eps)))
        return s.astype(f) * scale + (f(beta) - f(mean) * scale) >= 0


def test_folding_is_what_batch_norm_does_outside_of_training():
    rng = np.random.default_rng(11)
    n, k = 300, 400
    mean, var = rng.integers(-k, k, n).astype("f4"), rng.integers(0, 50, n).astype("f4")
    gamma, beta = rng.standard_normal(n).astype("f4"), (rng.integers(-2, 3, n) / 2).astype("f4")
    threshold, flip = fold_batch_norm(mean, var, gamma, beta, 1e-4)
    s = np.arange(-k, k + 1, dtype="f4")[:, None]
    x = Tensor(np.broadcast_to(s, (len(s), n)))
    with no_grad():
        y = ops.batch_norm(x, Tensor(gamma), Tensor(beta), mean, var, training=False, eps=1e-4)
    np.testing.assert_array_equal((s >= threshold) != flip, y.numpy() >= 0)


@pytest.mark.parametrize("seed", range(8))
def test_fold_batch_norm_is_exact_for_every_integer(xp, seed):
    rng = np.random.default_rng(seed)
    n, k = 200, 1500
    spread = 10.0 ** rng.integers(-6, 4)
    mean = (rng.standard_normal(n) * spread * 10).astype(np.float32)
    mean[:40] = np.round(mean[:40])  # sums that meet the mean exactly
    var = (rng.random(n) * spread).astype(np.float32)
    gamma = rng.standard_normal(n).astype(np.float32)
    gamma[::9] = 0
    beta = np.where(rng.random(n) < 0.3, 0, rng.standard_normal(n)).astype(np.float32)
    eps = (1e-4, 1e-5, 0.0)[seed % 3]
    var[::7] = 0
    threshold, flip = fold_batch_norm(*(xp.asarray(x) for x in (mean, var, gamma, beta)), eps)
    assert isinstance(threshold, xp.ndarray)
    assert (threshold.dtype, flip.dtype) == (np.int32, np.bool_)
    s = np.arange(-k, k + 1)[:, None]
    folded = (s >= host(threshold)) != host(flip)
    np.testing.assert_array_equal(folded, batch_norm_sign(s, mean, var, gamma, beta, eps))


def test_fold_batch_norm_by_hand():
    def fold(mean, gamma, beta):
        t, f = fold_batch_norm([mean], [1.0], [gamma], [beta], 0.0)
        return int(t[0]), bool(f[0])

    assert fold(3.0, 1.0, 0.0) == (3, False)  # s >= 3
    assert fold(3.5, 2.0, 0.0) == (4, False)
    assert fold(3.0, -1.0, 0.0) == (4, True)  # s <= 3: not s >= 4
    assert fold(3.0, -1.0, 1.0) == (5, True)  # s <= 4
    least = np.iinfo(np.int32).min
    assert fold(3.0, 0.0, 1.0) == (least, False)  # always +1
    assert fold(3.0, 0.0, -1.0) == (least, True)  # always -1
    assert fold(0.0, 1.0, 1e9) == (least, False)  # so far off that no product gets there
    assert fold(3.0, np.nan, 0.0) == (least, True)


def test_fold_batch_norm_and_product(xp):
    rng = np.random.default_rng(5)
    a, b, acc = operands(rng, xp, 90, 300, 70)
    parameters = [rng.standard_normal(70).astype(np.float32) for _ in range(4)]
    parameters[1] = np.abs(parameters[1]) * 100
    threshold, flip = fold_batch_norm(*(xp.asarray(x) for x in parameters), 1e-4)
    result = xnor_gemm_packed(a, b, threshold=threshold, flip=flip)
    expected = batch_norm_sign(acc, *parameters, 1e-4)
    np.testing.assert_array_equal(host(result.unpack(bool)), expected)


def test_fold_batch_norm_errors():
    x = np.ones(3)
    with pytest.raises(ValueError, match=r"vectors of one length; got shapes \(3,\), \(2,\)"):
        fold_batch_norm(x, np.ones(2), x, x)
    with pytest.raises(ValueError, match="vectors of one length"):
        fold_batch_norm(*[np.ones((3, 1))] * 4)


def overlapping_factors(frame, out, m, n):
    """Row scale, column scale and bias that lie in `out` or, in part, before it in `frame`."""
    return {
        "row scale": (out[..., :, -1:], None),
        "column scale": (None, out[..., -1, :]),
        "both": (out[..., :, :1], out[..., :1, :]),
        "bias": out[..., m // 2, :],
        "bias, in part": frame.reshape(-1)[n // 2 : n // 2 + n],
        "bias, reversed": out[..., 0, ::-1],
        "bias of each matrix": out[..., 1:2, :],
    }


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 20, 5), (2200, 200, 130), (2, 5000, 1100)])
def test_factors_may_lie_in_out(xp, batch, m, k, n):
    """Later panels, tiles and matrices of a batch must not read what earlier ones wrote."""
    rng = np.random.default_rng(0)
    a, b = array(rng, xp, (*batch, m, k)), array(rng, xp, (k, n))
    for name in overlapping_factors(xp.zeros(n), xp.zeros((m, n)), m, n):
        frame = xp.asarray(rng.standard_normal(n + m * n * (3 if batch else 1)), xp.float32)
        out = frame[n:].reshape(*batch, m, n)
        given = overlapping_factors(frame, out, m, n)[name]
        if batch and name == "column scale":
            given = (None, given[1][0])
        if batch and name in ("bias", "bias, reversed"):
            given = given[1]
        argument = "bias" if "bias" in name else "scale"
        apart = [None if x is None else x.copy() for x in given] if argument == "scale" else None
        expected = xnor_gemm(a, b, **{argument: tuple(apart) if apart else given.copy()})
        assert xnor_gemm(a, b, out=out, **{argument: given}) is out
        assert_product(out, host(expected), (name, batch, m))


def test_factors_are_copied_only_where_they_overlap(monkeypatch):
    """The bias goes to the backend as it came in, but for the one that lies in `out`."""
    given = []
    monkeypatch.setattr(
        "cupybnn.backends.numpy_backend.gemm", lambda a, b, out, epilogue: given.append(epilogue)
    )
    a, bias, frame = np.ones((3, 3)), np.ones(3, np.float32), np.ones((6, 3), np.float32)
    xnor_gemm(a, a, bias=bias, out=frame[:3])
    xnor_gemm(a, a, bias=frame[3], out=frame[:3])
    xnor_gemm(a, a, bias=frame[2], out=frame[:3])
    shares = [np.shares_memory(e.bias, x) for e, x in zip(given, (bias, frame, frame), strict=True)]
    assert shares == [True, True, False]
