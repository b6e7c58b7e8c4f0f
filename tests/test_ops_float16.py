"""float16: sums and counts beyond what it holds, forward and backward, against wider types."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import host

from cupybnn import ops
from cupybnn.autograd import Tensor

MANY = 70_000  # more than the greatest float16, 65,504


def in_float16(xp, values):
    return Tensor(xp.asarray(np.asarray(values, "float16")), requires_grad=True)


def assert_close(got, expected, units=1):
    """Compare a float16 array with float64 numbers, to `units` in the last place."""
    assert np.asarray(got).dtype == np.float16
    with np.errstate(over="ignore"):
        rounded = np.asarray(expected, "float16").astype("float64")
    np.testing.assert_allclose(
        np.asarray(got, "float64"), rounded, rtol=units * 2.0**-10, atol=units * 2.0**-24
    )


@pytest.mark.parametrize("shape", [(MANY,), (MANY, 2)])
class TestOfManyElements:
    @pytest.fixture
    def x(self, xp, shape):
        return in_float16(xp, np.random.default_rng(0).uniform(-1, 1, shape) + 0.25)

    def test_sum_and_mean(self, xp, x, shape):
        values = host(x.data).astype("float64")
        for axis in (0, None):
            assert_close(host(x.sum(axis).data), values.sum(axis))
            assert_close(host(x.mean(axis).data), values.mean(axis))
        y = x.mean(0)
        y.backward(xp.full(y.shape, 1000, "float16"))
        assert_close(host(x.grad), np.full(shape, 1000 / MANY))

    def test_gradient_of_an_operand_that_was_broadcast(self, xp, x, shape):
        scale = in_float16(xp, np.ones(shape[1:]))
        y = x * scale
        y.backward(xp.full(shape, 0.5, "float16"))
        assert_close(host(scale.grad), 0.5 * host(x.data).astype("float64").sum(0))

    def test_extreme_that_many_share(self, xp, shape):
        x = in_float16(xp, np.ones(shape))
        y = x.max(0)
        y.backward(xp.full(y.shape, 1000, "float16"))
        assert_close(host(x.grad), np.full(shape, 1000 / MANY))

    def test_element_taken_many_times(self, xp, shape):
        x = in_float16(xp, np.ones((3, *shape[1:])))
        y = x[np.zeros(5000, int)]
        y.backward(xp.ones(y.shape, "float16"))
        expected = np.zeros(x.shape)
        expected[0] = 5000
        assert_close(host(x.grad), expected)

    def test_penalties(self, x, shape):
        values = host(x.data).astype("float64")
        assert_close(host(ops.l1(x).data), abs(values).sum())
        near = Tensor(x.data / abs(x.data) * 0.75, requires_grad=True)  # not beyond 65,504
        assert_close(host(ops.bipolar_penalty(near).data), near.size * 0.4375)


class TestLosses:
    @pytest.mark.parametrize("n", [3, MANY])
    @pytest.mark.parametrize("loss", [ops.softmax_cross_entropy, ops.squared_hinge])
    def test_of_class_numbers(self, xp, loss, n):
        rng = np.random.default_rng(1)
        values = rng.uniform(-4, 4, (n, 3)).astype("float16")
        labels = xp.asarray(rng.integers(0, 3, n))
        x, wide = in_float16(xp, values), Tensor(xp.asarray(values, "float64"), requires_grad=True)
        got, expected = loss(x, labels), loss(wide, labels)
        got.backward(xp.asarray(2048, "float16"))
        expected.backward(xp.asarray(2048, "float64"))
        assert_close(host(got.data), host(expected.data))
        assert_close(host(x.grad), host(wide.grad), units=2)

    def test_differences_beyond_float16(self, xp):
        x = in_float16(xp, [[6e4, -6e4]])
        loss = ops.softmax_cross_entropy(x, xp.asarray([0]))
        loss.backward()
        assert loss.item() == 0
        assert host(x.grad).tolist() == [[0, 0]]
        assert ops.squared_hinge(in_float16(xp, [[6e4, -6e4]]), xp.asarray([0])).item() == 0

    def test_mse(self, xp):
        a = in_float16(xp, np.full(MANY, 0.5))
        loss = ops.mse(a, xp.zeros(MANY, "float16"))
        loss.backward(xp.asarray(1000, "float16"))
        assert loss.item() == 0.25
        assert_close(host(a.grad), np.full(MANY, 1000 / MANY))
        # The mean fits, though not each square does.
        b = in_float16(xp, [300, *[0] * 9])
        assert_close(host(ops.mse(b, xp.zeros(10, "float16")).data), 9000)

    @pytest.mark.parametrize("op", [ops.softmax, ops.log_softmax])
    def test_softmax_of_many_classes(self, xp, op):
        values = np.random.default_rng(2).uniform(-1, 1, (2, MANY)).astype("float16")
        x, wide = in_float16(xp, values), Tensor(xp.asarray(values, "float64"), requires_grad=True)
        gradient = np.random.default_rng(3).uniform(0, 1, values.shape).astype("float16")
        op(x).backward(xp.asarray(gradient))
        op(wide).backward(xp.asarray(gradient, "float64"))
        assert_close(host(op(x).data), host(op(wide).data))
        # The terms of the gradient may cancel.
        np.testing.assert_allclose(host(x.grad), host(wide.grad), rtol=1e-3, atol=1e-4)


class TestBatchNorm:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("of_statistics", ["float16", "float32"])
    def test_of_a_large_batch(self, xp, training, of_statistics):
        rng = np.random.default_rng(4)
        values = (rng.standard_normal((MANY, 2)) * [1, 40] + [3, 200]).astype("float16")
        gradient = (rng.uniform(0, 1, values.shape)).astype("float16")
        results = []
        for dtype, others in (("float16", of_statistics), ("float32", "float32")):
            x = Tensor(xp.asarray(values, dtype), requires_grad=True)
            gamma = Tensor(xp.asarray([1.5, 0.5], others), requires_grad=True)
            beta = Tensor(xp.asarray([0.0, 1.0], others), requires_grad=True)
            mean = xp.asarray([2.5, 150], others)
            variance = xp.asarray([1.25, 1000], others)
            y = ops.batch_norm(x, gamma, beta, mean, variance, training=training)
            assert y.dtype == dtype
            y.backward(xp.asarray(gradient, dtype))
            for tensor, expected in ((gamma, others), (beta, others), (x, dtype)):
                assert tensor.grad.dtype == expected
            arrays = (y.data, x.grad, gamma.grad, beta.grad, mean, variance)
            results.append([host(array).astype("float64") for array in arrays])
        for got, expected in zip(*results, strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)

    def test_of_numbers_whose_squares_overflow(self, xp):
        values = np.array([[1000.0], [-1000.0], [3000.0], [-3000.0]], "float16")
        x = in_float16(xp, values)
        one, zero = Tensor(xp.ones(1, "float16")), Tensor(xp.zeros(1, "float16"))
        statistics = xp.zeros(1, "float32"), xp.ones(1, "float32")
        y = ops.batch_norm(x, one, zero, *statistics, training=True)
        assert_close(host(y.data), values / np.sqrt(5e6))
        assert float(statistics[1][0]) == pytest.approx(0.9 + 5e5)


def test_scale_of_a_quantizer(xp):
    x = in_float16(xp, np.full((MANY, 2), 0.75))
    assert host(ops.quantize(x, "magnitude_aware_sign").data)[0].tolist() == [0.75, 0.75]


def test_products_add_up_in_float32(xp):
    a, b = in_float16(xp, np.full((2, 5000), 0.25)), in_float16(xp, np.ones((5000, 3)))
    y = a @ b
    y.backward(xp.ones(y.shape, "float16"))
    assert host(y.data).tolist() == [[1250] * 3] * 2
    assert host(a.grad)[0, 0] == 3
    many = in_float16(xp, np.ones((5000, 1)))
    (many @ in_float16(xp, np.ones((1, 1)))).backward(xp.ones((5000, 1), "float16"))
    one = in_float16(xp, np.ones((1, 1)))
    (many.detach() @ one).backward(xp.ones((5000, 1), "float16"))
    assert host(one.grad).tolist() == [[5000]]
