"""Choosing, joining, comparing, and other dtypes; softmax and the sigmoid."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import host, leaf

from cupybnn import ops
from cupybnn.autograd import Tensor, gradcheck

SHAPES = [((3, 4), (3, 4)), ((3, 4), (4,)), ((1, 4), (3, 1)), ((), (2, 3)), ((0, 3), (3,))]


@pytest.mark.parametrize("shapes", SHAPES)
class TestOfTwo:
    def test_maximum_and_minimum(self, xp, shapes):
        a, b = (leaf(xp, shape, seed) for seed, shape in enumerate(shapes))
        for op, reference in ((ops.maximum, np.maximum), (ops.minimum, np.minimum)):
            np.testing.assert_array_equal(
                host(op(a, b).data), reference(host(a.data), host(b.data))
            )
            assert gradcheck(op, a, b)
            assert gradcheck(lambda x, op=op: op(0.1, x), b)
            assert gradcheck(lambda x, op=op: op(x, 0.1), a)

    def test_where(self, xp, shapes):
        a, b = (leaf(xp, shape, seed) for seed, shape in enumerate(shapes))
        condition = np.random.default_rng(5).random(np.broadcast_shapes(*shapes)) > 0.5
        for chosen in (xp.asarray(condition), Tensor(xp.asarray(condition))):
            y = ops.where(chosen, a, b)
            np.testing.assert_array_equal(
                host(y.data), np.where(condition, host(a.data), host(b.data))
            )
            assert gradcheck(lambda x, y, chosen=chosen: ops.where(chosen, x, y), a, b)
        assert gradcheck(lambda x: ops.where(xp.asarray(condition), x, 2.0), a)
        assert gradcheck(lambda x: ops.where(x > 0, x, x * 0.1), a)

    def test_condition_is_broadcast_too(self, xp, shapes):
        a, b = (leaf(xp, shape, seed) for seed, shape in enumerate(shapes))
        assert gradcheck(lambda x, y: ops.where(xp.asarray([[[True]], [[False]]]), x, y), a, b)


class TestTies:
    def test_equal_elements_share_the_gradient(self, xp):
        for op in (ops.maximum, ops.minimum):
            a = Tensor(xp.asarray([1.0, 2.0, 0.0]), requires_grad=True)
            b = Tensor(xp.asarray([1.0, 3.0, -0.0]), requires_grad=True)
            op(a, b).sum().backward()
            np.testing.assert_array_equal(host(a.grad) + host(b.grad), [1, 1, 1])
            np.testing.assert_array_equal(host(a.grad)[[0, 2]], [0.5, 0.5])
            x = Tensor(xp.asarray([1.0]), requires_grad=True)
            op(x, x).sum().backward()
            np.testing.assert_array_equal(host(x.grad), [1])

    def test_nan_is_kept_and_gets_no_gradient(self, xp):
        a = Tensor(xp.asarray([xp.nan, 1.0]), requires_grad=True)
        b = Tensor(xp.asarray([1.0, xp.nan]), requires_grad=True)
        y = ops.maximum(a, b)
        assert np.isnan(host(y.data)).all()
        y.sum().backward()
        np.testing.assert_array_equal(host(a.grad), [0, 0])

    def test_what_was_not_chosen_stays_out_of_the_gradient(self, xp):
        x = Tensor(xp.asarray([0.0, 4.0]), requires_grad=True)
        ops.where(x > 0, x.sqrt(), 0.0).backward(xp.asarray([np.inf, 1.0]))
        np.testing.assert_array_equal(host(x.grad)[1], 0.25)
        y = Tensor(xp.asarray([1.0, 4.0]), requires_grad=True)
        ops.where(xp.asarray([False, True]), y, 0.0).backward(xp.asarray([np.nan, 1.0]))
        np.testing.assert_array_equal(host(y.grad), [0, 1])


class TestWhere:
    def test_of_numbers_alone(self, xp):
        y = ops.where(xp.asarray([True, False]), 1.0, 0.0)
        assert y.dtype == np.float32
        np.testing.assert_array_equal(host(y.data), [1, 0])

    def test_condition_is_of_bool(self, xp):
        with pytest.raises(TypeError, match="'condition' of where must be bool; got dtype"):
            ops.where(xp.asarray([1.0, 0.0]), 1.0, 2.0)

    def test_condition_edited_afterwards(self, xp):
        x = leaf(xp)
        condition = xp.asarray([True, False, True])
        y = ops.where(condition, x, 0.0).sum()
        condition[...] = False
        y.backward()
        np.testing.assert_array_equal(host(x.grad), [1, 0, 1])

    def test_keeps_the_dtype(self, xp):
        x = leaf(xp, dtype="float32")
        for y in (ops.where(x > 0, x, 2.0), ops.maximum(x, 1), ops.minimum(0.5, x)):
            assert y.dtype == np.float32
            y.sum().backward()


class TestSoftmax:
    @pytest.mark.parametrize("axis", [-1, 0, 1])
    def test_against_numpy_and_differences(self, xp, axis):
        x = leaf(xp, (2, 3, 4))
        exps = np.exp(host(x.data))
        expected = exps / exps.sum(axis, keepdims=True)
        np.testing.assert_allclose(host(ops.softmax(x, axis).data), expected, rtol=1e-13)
        np.testing.assert_allclose(host(x.log_softmax(axis).data), np.log(expected), rtol=1e-12)
        assert gradcheck(lambda t: ops.softmax(t, axis), x)
        assert gradcheck(lambda t: ops.log_softmax(t, axis), x)

    def test_of_large_and_infinite_numbers(self, xp):
        x = Tensor(xp.asarray([[1e4, 0.0, -np.inf], [-1e4, -1e4, -np.inf]]), requires_grad=True)
        np.testing.assert_array_equal(host(x.softmax().data), [[1, 0, 0], [0.5, 0.5, 0]])
        logs = x.log_softmax()
        np.testing.assert_allclose(
            host(logs.data), [[0, -1e4, -np.inf], [-np.log(2), -np.log(2), -np.inf]]
        )
        ops.where(xp.isfinite(logs.data), logs, 0.0).sum().backward()
        np.testing.assert_allclose(host(x.grad), [[-1, 1, 0], [0, 0, 0]], atol=1e-12)

    def test_agree_with_cross_entropy(self, xp):
        x = leaf(xp, (5, 3))
        labels = xp.asarray([0, 2, 1, 1, 2])
        picked = -(x.log_softmax()[xp.arange(5), labels]).mean()
        assert picked.item() == pytest.approx(ops.softmax_cross_entropy(x, labels).item())


class TestSigmoid:
    def test_against_numpy_and_differences(self, xp):
        x = leaf(xp, (3, 4))
        expected = 1 / (1 + np.exp(-host(x.data)))
        np.testing.assert_allclose(host(x.sigmoid().data), expected, rtol=1e-14)
        assert gradcheck(ops.sigmoid, x)

    def test_of_large_numbers(self, xp):
        x = Tensor(xp.asarray([-1000.0, -700.0, 700.0, 1000.0, xp.nan]), requires_grad=True)
        y = x.sigmoid()
        np.testing.assert_allclose(host(y.data), [0, np.exp(-700.0), 1, 1, np.nan])
        y.backward(xp.ones(5))
        np.testing.assert_allclose(
            host(x.grad), [0, np.exp(-700.0), np.exp(-700.0), 0, np.nan], rtol=1e-12
        )


class TestJoining:
    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_concatenate(self, xp, axis):
        x, y = leaf(xp, (3, 3)), leaf(xp, (3, 3), seed=1)
        parts = (x[:2], y) if axis == 0 else (x[:, :1], y)
        np.testing.assert_array_equal(
            host(ops.concatenate(parts, axis).data),
            np.concatenate([host(part.data) for part in parts], axis),
        )
        assert gradcheck(
            lambda a, b: ops.concatenate([a[:2] if axis == 0 else a[:, :2], b, a], axis), x, y
        )

    @pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
    def test_stack(self, xp, axis):
        x, y = leaf(xp, (2, 3)), leaf(xp, (2, 3), seed=1)
        np.testing.assert_array_equal(
            host(ops.stack([x, y, x], axis).data),
            np.stack([host(t.data) for t in (x, y, x)], axis),
        )
        assert gradcheck(lambda a, b: ops.stack([a, b, a], axis), x, y)

    @pytest.mark.parametrize("join", [ops.concatenate, ops.stack])
    def test_leaves_do_not_share_a_gradient(self, xp, join):
        x, y = leaf(xp), leaf(xp, seed=1)
        joined = join([x, y])
        gradient = xp.ones(joined.shape)
        joined.backward(gradient)
        x.grad += 5
        np.testing.assert_array_equal(host(y.grad), [1, 1, 1])
        assert float(gradient.sum()) == 6

    def test_arrays_mixed_dtypes_and_iterators(self, xp):
        x = leaf(xp, dtype="float32")
        y = ops.concatenate(t for t in (xp.zeros(2), x))
        assert y.dtype == np.float64
        y.sum().backward()
        assert x.grad.dtype == np.float32
        assert ops.stack(Tensor(xp.ones((3, 2)))).shape == (3, 2)

    def test_signs_stay_signs(self, xp):
        x = leaf(xp)
        signs = ops.sign(x)
        assert ops.concatenate([signs, signs]).two_valued
        assert ops.stack([signs, signs], 1).two_valued
        assert not ops.concatenate([signs, x]).two_valued

    @pytest.mark.parametrize("join", [ops.concatenate, ops.stack])
    def test_refusals(self, xp, join):
        name = join.__name__
        for wrong in ([], [1.0, 2.0]):
            with pytest.raises(ValueError, match=f"'tensors' of {name} must be one or more"):
                join(wrong)
        with pytest.raises(ValueError, match=rf"^{name} of \(2,\) float64, \(2, 2\) float64"):
            join([Tensor(xp.ones(2)), Tensor(xp.ones((2, 2)))])
        with pytest.raises(TypeError, match="got list"):
            join([[1.0]])


class TestAstype:
    @pytest.mark.parametrize("dtype", ["float16", "float32", np.float64, ">f4"])
    def test_floating(self, xp, dtype):
        x = leaf(xp, dtype="float64")
        y = x.astype(dtype)
        target = np.dtype(dtype).newbyteorder("=")
        assert y.dtype == target
        np.testing.assert_array_equal(host(y.data), host(x.data).astype(target))
        (y * 2).sum().backward()
        assert x.grad.dtype == np.float64
        np.testing.assert_array_equal(host(x.grad), [2, 2, 2])

    def test_derivative(self, xp):
        assert gradcheck(lambda t: (t.astype("float32") * 0 + 1).astype("float64") * t, leaf(xp))

    @pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
    def test_integers_and_bool_leave_the_graph(self, xp, dtype):
        y = leaf(xp).astype(dtype)
        assert y.dtype == dtype
        assert not y.requires_grad

    def test_same_dtype_is_the_tensor_itself(self, xp):
        x = leaf(xp)
        assert x.astype(float) is x

    def test_signs_stay_signs(self, xp):
        signs = ops.sign(leaf(xp))
        for dtype, stay in (("float32", True), ("int8", True), ("bool", False), ("uint8", False)):
            assert signs.astype(dtype).two_valued is stay

    @pytest.mark.parametrize("dtype", ["complex64", "U3", object, "M8[s]"])
    def test_other_dtypes(self, dtype):
        with pytest.raises(TypeError, match="'dtype' of astype must be a real dtype"):
            Tensor([1.0]).astype(dtype)


class TestPlaces:
    @pytest.mark.parametrize("axis", [None, 0, -1])
    def test_against_numpy(self, xp, axis):
        x = leaf(xp, (3, 4))
        for name in ("argmax", "argmin"):
            got = getattr(ops, name)(x, axis)
            assert isinstance(got, xp.ndarray)
            np.testing.assert_array_equal(host(got), getattr(np, name)(host(x.data), axis))
            np.testing.assert_array_equal(host(getattr(x, name)(axis)), host(got))

    def test_accuracy(self, xp):
        logits = Tensor(xp.asarray([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]]), requires_grad=True)
        labels = Tensor(xp.asarray([1, 0, 0]))
        assert float((logits.argmax(1) == labels).mean()) == pytest.approx(2 / 3)

    def test_of_nothing_is_named(self, xp):
        with pytest.raises(ValueError, match=r"argmax of \(0, 3\) float64"):
            Tensor(xp.ones((0, 3))).argmax(0)


class TestMse:
    def test_against_numpy_and_differences(self, xp):
        a, b = leaf(xp, (3, 2)), leaf(xp, (3, 2), seed=1)
        expected = ((host(a.data) - host(b.data)) ** 2).mean()
        assert ops.mse(a, b).item() == pytest.approx(expected, rel=1e-14)
        assert gradcheck(ops.mse, a, b)
        assert gradcheck(lambda x: ops.mse(x, host(b.data) if xp is np else b.data), a)

    def test_dtype_is_that_of_the_outputs(self, xp):
        a = leaf(xp, dtype="float32")
        for targets in (xp.zeros(3), xp.zeros(3, "int64"), xp.zeros(3, "float16")):
            loss = ops.mse(a, targets)
            loss.backward()
            assert loss.dtype == a.grad.dtype == np.float32

    def test_refusals(self, xp):
        a = leaf(xp, (3, 1))
        for wrong, shape in ((xp.zeros(3), r"\(3,\)"), (0.0, "a number"), (xp.zeros((1, 1)), "")):
            with pytest.raises(ValueError, match=rf"mse needs .* got \(3, 1\) and {shape}"):
                ops.mse(a, wrong)
        with pytest.raises(ValueError, match="at least one element"):
            ops.mse(a[:0], a[:0])
        with pytest.raises(TypeError, match="'outputs' of mse must be floating"):
            ops.mse(Tensor(xp.asarray([1])), xp.asarray([1]))
