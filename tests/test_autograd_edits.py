"""Arrays edited in place: those saved for a backward pass, and those known to be signs."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import host, leaf

from cupybnn import ops
from cupybnn.autograd import (
    Function,
    GraphError,
    Tensor,
)


def assign_element(x):
    x.data[0] = 5


def assign_element_of_view(x):
    x.data[1:][...] = 5


def augmented(x):
    x.data += 1


def augmented_by_name(x):
    array = x.data
    array *= 2


def tensor_assignment(x):
    x[0] = 5


def writer(x):
    x.write()[...] = 5


def through_detach(x):
    x.detach().data[0] = 5


def through_a_view(x):
    x.reshape(3, 1).data[0] = 5


EDITS = [
    assign_element,
    assign_element_of_view,
    augmented,
    augmented_by_name,
    tensor_assignment,
    writer,
    through_detach,
    through_a_view,
]


class TestEditsInPlace:
    @pytest.mark.parametrize("edit", EDITS)
    def test_edit_of_a_saved_leaf(self, xp, edit):
        x = leaf(xp)
        y = (x * x).sum()
        edit(x)
        with pytest.raises(GraphError, match=r"multiply .* edited in place"):
            y.backward()
        assert x.grad is None

    @pytest.mark.parametrize("edit", EDITS)
    def test_edit_before_the_forward_pass(self, xp, edit):
        x = leaf(xp)
        edit(x)
        (x * x).sum().backward()
        np.testing.assert_allclose(host(x.grad), 2 * host(x.data))

    @pytest.mark.parametrize("take", [lambda x: x.data, lambda x: x.data[1:], lambda x: x.numpy()])
    def test_edit_by_an_array_taken_earlier(self, take):
        x = leaf(np)
        array = take(x)
        y = (x * x).sum()
        array[...] = 5
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    @pytest.mark.gpu
    def test_edit_by_a_cupy_array_taken_earlier(self):
        import cupy

        x = leaf(cupy)
        array = x.data[1:]
        y = (x * x).sum()
        array[...] = 5
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    def test_edit_of_a_saved_result(self, xp):
        x = leaf(xp)
        y = x.exp()
        z = y.sum()
        y.data[0] = 0
        with pytest.raises(GraphError, match=r"exp .* edited in place"):
            z.backward()

    def test_edit_of_a_view_of_a_saved_array(self, xp):
        x = leaf(xp, (2, 3))
        y = (x.T * x.T).sum()
        x.data[0, 0] = 5
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    def test_edit_of_a_result_that_is_its_operand(self, xp):
        class Same(Function):
            @staticmethod
            def forward(ctx, x):
                return x

            @staticmethod
            def backward(ctx, grad):
                return grad

        x = leaf(xp)
        y = (x * x).sum()
        Same.apply(x).data[0] = 5
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    def test_edit_of_a_strided_view(self, xp):
        x = leaf(xp, (4, 6))
        view = x[::-1, ::2]
        y = (x * x).sum()
        view.data[0, 0] = 5
        assert float(x.data[3, 0]) == 5
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    def test_edit_of_nan_and_of_the_sign_of_zero(self, xp):
        x = Tensor(xp.asarray([xp.nan, 0.0]), requires_grad=True)
        y = (x * x).sum()
        assert x.data is not None
        y.backward(retain_graph=True)  # NaN equals itself here
        x.data[1:] = xp.asarray([-0.0])  # CuPy fills an array with a zero of either sign by +0.0
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    def test_reading_is_not_an_edit(self, xp):
        x = leaf(xp)
        held = x.data
        y = (x * x).sum()
        assert float(held.sum()) == pytest.approx(float(x.data.sum()))
        y.backward()
        np.testing.assert_allclose(host(x.grad), 2 * host(held))

    def test_assignment_of_another_array_leaves_the_saved_one(self, xp):
        x = leaf(xp)
        before = host(x.data).copy()
        y = (x * x).sum()
        x.data = xp.zeros(3)
        y.backward()
        np.testing.assert_allclose(host(x.grad), 2 * before)
        np.testing.assert_array_equal(host(x.data), [0, 0, 0])

    def test_what_was_not_saved_may_be_edited(self, xp):
        x = leaf(xp)
        y = (x + x).sum()
        x.data[...] = 0
        y.backward()
        np.testing.assert_array_equal(host(x.grad), [2, 2, 2])

    def test_each_graph_is_judged_by_itself(self, xp):
        x = leaf(xp)
        held = x.data
        first = (x * x).sum()
        held[0] = 5
        second = (x * x).sum()
        second.backward()
        np.testing.assert_allclose(host(x.grad), 2 * host(held))
        with pytest.raises(GraphError, match="edited in place"):
            first.backward()

    def test_no_copy_is_made_unless_an_array_is_on_loan(self):
        x = leaf(np)
        assert x.data is not None  # handed out and forgotten at once
        y = (x * x).sum()
        assert x._storage._copy is None
        held = x.data
        assert x._storage._copy is not None
        del held
        y.backward()
        assert x._storage._copy is None

    def test_data_is_not_a_copy(self, xp):
        x = leaf(xp)
        x.data[1] = 42
        assert float(x.data[1]) == 42
        assert xp.may_share_memory(x.data, x.data)
        assert x.data.dtype == x.dtype

    @pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (4, 5)])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "bool"])
    def test_loans_of_every_shape_and_dtype(self, xp, shape, dtype):
        x = Tensor(xp.ones(shape, dtype))
        assert x.data.shape == shape
        assert x.data.dtype == dtype
        assert (host(x.data) == 1).all()


class TestIndexEditedAfterwards:
    @pytest.mark.parametrize(
        ("make_key", "value"),
        [
            (lambda xp: xp.asarray([0, 1]), 4),
            (lambda xp: xp.asarray([True, True, False, False, False]), True),
            (lambda xp: (slice(None), xp.asarray([0, 1])), 2),
            (lambda xp: Tensor(xp.asarray([0, 1])), 4),
            (lambda xp: np.array([0, 1]), 4),
        ],
    )
    def test_gradient_is_that_of_the_forward_pass(self, xp, make_key, value):
        x, same = leaf(xp, (5, 3)), leaf(xp, (5, 3))
        same[make_key(xp)].sum().backward()
        key = make_key(xp)
        y = x[key].sum()
        array = key[1] if isinstance(key, tuple) else key
        array[...] = value
        y.backward()
        np.testing.assert_array_equal(host(x.grad), host(same.grad))

    def test_of_a_list(self):
        x = leaf(np, (5,))
        key = [0, 1]
        y = x[key].sum()
        key[:] = [4, 4]
        y.backward()
        np.testing.assert_array_equal(x.grad, [1, 1, 0, 0, 0])


def signs(xp):
    return ops.sign(Tensor(xp.asarray([[0.5, -2.0, 0.0], [-1.0, 3.0, -0.5]])))


class TestTwoValued:
    """What is known of a tensor's values ends with the contents that it was known of."""

    @pytest.mark.parametrize(
        "edit",
        [
            lambda s: s.data.__setitem__((0, 0), 0.25),
            lambda s: s.data[1:].fill(0.25),
            lambda s: s.__setitem__((0, 0), 0.25),
            lambda s: s.write().fill(0.25),
            lambda s: setattr(s, "data", s.data * 0.25),
            augmented,
        ],
    )
    @pytest.mark.parametrize(
        "alias",
        [
            lambda s: s,
            lambda s: s.detach(),
            lambda s: s.T.detach(),
            lambda s: s.reshape(3, 2).detach(),
            lambda s: s[:, ::-1].detach(),
        ],
    )
    def test_ends_with_an_edit(self, xp, alias, edit):
        s = signs(xp)
        other = alias(s)
        assert s.two_valued
        assert other.two_valued
        edit(other)
        assert not other.two_valued
        if xp.may_share_memory(s._data, other._data):
            assert not s.two_valued
            assert not s.T.two_valued
        with pytest.raises(ValueError, match=r"'a' of binary_matmul must be known to hold only"):
            ops.binary_matmul(other, other.T)

    def test_ends_with_an_edit_of_the_base_of_a_view(self, xp):
        s = signs(xp)
        views = s.T, s.reshape(-1), s[:1], s.detach()
        taken = s[[0]]  # a copy
        s.data[0, 0] = 0.25
        assert not any(view.two_valued for view in views)
        assert taken.two_valued

    def test_ends_with_an_edit_by_an_array_taken_earlier(self, xp):
        s = signs(xp)
        held = s.data[0]
        assert s.two_valued
        held[0] = 0.25
        assert not s.two_valued
        held[0] = 1  # nobody looked at it again: it stays unknown
        assert not s.two_valued

    def test_ends_with_an_edit_by_an_array_taken_before_it_began(self, xp):
        x = Tensor(xp.ones(3))
        held = x.data
        x.two_valued = True
        held[0] = 0.25
        assert not x.two_valued

    def test_may_start_again(self, xp):
        s = signs(xp)
        s.data[0, 0] = 0.25
        again = ops.sign(s)
        assert again is not s
        assert again.two_valued
        np.testing.assert_array_equal(host(again.data), [[1, -1, 1], [-1, 1, -1]])

    def test_reading_is_not_an_edit(self, xp):
        s = signs(xp)
        held = s.data
        assert float(held.sum()) == 0
        assert s.two_valued
        assert s.T.two_valued

    def test_another_part_of_the_memory_may_hold_other_values(self, xp):
        x = Tensor(xp.asarray([1.0, 0.25]))
        part = x[:1]
        part.two_valued = True
        assert part.two_valued
        assert not x.two_valued

    def test_moving_keeps_it_and_the_memory(self, xp):
        s = signs(xp)
        other = s.detach()
        other.move(s.device)  # where it is already
        assert other.two_valued
        other[0, 0] = 0.25
        assert not s.two_valued

    def test_a_step_of_training_copies_nothing_for_it(self):
        x = leaf(np, (2, 3))
        s = ops.sign(x)
        ops.binary_matmul(s, ops.sign(leaf(np, (3, 2), seed=1))).sum().backward()
        assert s.two_valued
        assert s._storage._copy is None
