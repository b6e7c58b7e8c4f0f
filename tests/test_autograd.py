"""The engine: graphs, accumulation, errors, memory."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from arrays import host, leaf

from cupybnn import ops, xnor_gemm
from cupybnn.autograd import (
    Function,
    GraphError,
    NonFiniteError,
    Tensor,
    debug,
    gradcheck,
    is_grad_enabled,
    no_grad,
)


class TestTensor:
    def test_dtype_of_python_numbers_is_float32(self):
        assert Tensor([1.0, 2.0]).dtype == np.float32
        assert Tensor(1.5).dtype == np.float32
        assert Tensor(np.array([1.0])).dtype == np.float64
        assert Tensor([1, 2]).dtype == np.int64

    def test_number_operands_do_not_widen(self, xp):
        x = leaf(xp, dtype="float32")
        for y in (x * 2.0, 2 - x, x / 3, 1.5 + x, x**2, x * np.float64(2), np.float64(2) * x):
            assert y.dtype == np.float32

    def test_array_on_either_side(self, xp):
        x = leaf(xp)
        array = xp.arange(3.0)
        for y in (array * x, x * array):
            assert isinstance(y, Tensor)
            np.testing.assert_array_equal(host(y.data), host(array * x.data))

    def test_constructor_copies(self, xp):
        array = xp.ones(3)
        x = Tensor(array, requires_grad=True)
        y = (x * x).sum()
        array[...] = 7
        y.backward()
        np.testing.assert_array_equal(host(x.grad), [2, 2, 2])

    @pytest.mark.parametrize("data", [["a"], [1j], [None], np.array([object()])])
    def test_only_real_numbers(self, data):
        with pytest.raises(TypeError, match="must be real numbers"):
            Tensor(data)

    def test_no_masked_arrays(self):
        with pytest.raises(TypeError, match="must not be a masked array"):
            Tensor(np.ma.array([1.0, 2.0], mask=[True, False]))

    def test_integers_have_no_gradient(self):
        with pytest.raises(TypeError, match="floating dtype; got int64"):
            Tensor([1, 2], requires_grad=True)

    def test_repr(self):
        text = repr(Tensor([1.0, -1.0], requires_grad=True, name="w"))
        assert text == "Tensor([ 1. -1.], requires_grad=True, name='w')"
        assert "made by multiply" in repr(Tensor([1.0], requires_grad=True) * 2)

    def test_item_and_float(self, xp):
        assert Tensor(xp.asarray([2.5])).item() == 2.5
        assert float(Tensor(xp.asarray(2.5))) == 2.5
        with pytest.raises(ValueError, match=r"one element; this one is \(2,\)"):
            Tensor([1.0, 2.0]).item()

    def test_bool_needs_one_element(self, xp):
        assert Tensor(xp.asarray(2.5))
        assert Tensor(xp.asarray([[True]]))
        assert not Tensor(xp.asarray([0.0]))
        for shape in ((2,), (0,), (1, 0)):
            with pytest.raises(
                ValueError, match=r"truth value of a tensor of shape \(.*\) is ambiguous"
            ):
                bool(Tensor(xp.zeros(shape)))

    def test_tensors_are_hashed_by_identity(self, xp):
        x = Tensor(xp.ones(3))
        same = x.detach()
        assert hash(x) != hash(same)
        assert len({x, same}) == 2
        names = {x: "x", same: "same", 1: "one"}
        assert (names[x], names[same], names[1]) == ("x", "same", "one")
        assert x in names
        assert Tensor(xp.ones(3)) not in names

    def test_numpy_reads_it_as_data(self):
        x = leaf(np, (2, 3), dtype="float32")
        array = np.asarray(x)
        assert array.dtype == np.float32
        assert np.shares_memory(array, x.data)
        assert np.asarray(x, np.float64).dtype == np.float64
        assert not np.shares_memory(np.array(x), x.data)
        np.testing.assert_array_equal(np.stack([x, x]), np.stack([x.data, x.data]))
        np.testing.assert_allclose(x, x.data)
        with pytest.raises(ValueError, match="copy"):
            np.asarray(x, np.float64, copy=False)
        assert np.asarray(Tensor([1, 2])).dtype == np.int64

    def test_edit_of_what_numpy_read_is_noticed(self):
        x = leaf(np)
        array = np.asarray(x)
        y = (x * x).sum()
        array[0] = 5
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    def test_arithmetic_with_arrays_on_the_left_is_the_tensors(self, xp):
        x = leaf(xp, (2, 3))
        ones = xp.ones((2, 3))
        for y in (ones + x, ones - x, ones * x, ones / x, ones @ x.T, np.float64(2) * x):
            assert isinstance(y, Tensor)
            assert y.requires_grad
        with pytest.raises(TypeError):
            np.add(host(ones), x)

    @pytest.mark.gpu
    def test_numpy_does_not_read_it_from_a_gpu(self):
        import cupy

        with pytest.raises(TypeError, match=r"on cuda:0.*\.numpy\(\)"):
            np.asarray(Tensor(cupy.ones(3)))

    def test_product_of_signs_refuses_a_tensor_that_requires_gradients(self):
        with pytest.raises(TypeError, match=r"got a cupybnn\.Tensor with requires_grad=True"):
            xnor_gemm(leaf(np, (2, 2)), np.ones((2, 2)))
        got = xnor_gemm(leaf(np, (2, 2)).detach(), np.ones((2, 2)))
        assert type(got) is np.ndarray

    def test_detach_shares_memory_and_leaves_the_graph(self, xp):
        x = leaf(xp)
        y = x.detach()
        assert not y.requires_grad
        y.data[0] = 9
        assert float(x.data[0]) == 9

    def test_assignment_of_elements(self, xp):
        x = Tensor(xp.zeros(3))
        x[1] = Tensor(xp.asarray(4.0))
        np.testing.assert_array_equal(host(x.data), [0, 4, 0])
        with pytest.raises(GraphError, match="computed tensor cannot be assigned"):
            (leaf(xp) * 2)[0] = 1

    def test_operand_of_wrong_type(self):
        with pytest.raises(
            TypeError, match="operands of add must be tensors, arrays or numbers; got list"
        ):
            ops.add(Tensor([1.0]), [1.0])

    @pytest.mark.gpu
    def test_devices_are_not_mixed(self):
        import cupy

        with pytest.raises(TypeError, match="add must be on one device; got cpu and cuda:0"):
            Tensor([1.0]) + Tensor(cupy.ones(1))

    @pytest.mark.gpu
    def test_gradient_travels_between_devices(self):
        x = Tensor([1.0, 2.0], requires_grad=True)
        (x.to("cuda") * 3).sum().to("cpu").backward()
        np.testing.assert_array_equal(x.grad, [3, 3])


class TestBackward:
    def test_sums_over_all_paths(self, xp):
        x = leaf(xp)
        y = x * x
        (y + y * x + x).sum().backward()
        value = host(x.data)
        np.testing.assert_allclose(host(x.grad), 2 * value + 3 * value**2 + 1)

    def test_many_contributions_to_one_node(self, xp):
        x = leaf(xp)
        y = x * 1
        (y + y + y + y + y).sum().backward()
        np.testing.assert_array_equal(host(x.grad), [5, 5, 5])

    def test_many_contributions_to_a_scalar(self, xp):
        x = Tensor(xp.asarray(3.0), requires_grad=True)
        y = x * 1
        (y * y + y + y).backward()
        assert float(x.grad) == 8
        assert isinstance(x.grad, xp.ndarray)

    def test_accumulates_until_zero_grad(self, xp):
        x = leaf(xp)
        for _ in range(2):
            (x * 3).sum().backward()
        np.testing.assert_array_equal(host(x.grad), [6, 6, 6])
        x.zero_grad()
        assert x.grad is None

    def test_gradients_of_leaves_share_no_memory(self, xp):
        a, b = leaf(xp), leaf(xp, seed=1)
        gradient = xp.ones(3)
        (a + b).backward(gradient)
        for array in (b.grad, gradient):
            assert not xp.may_share_memory(a.grad, array)
        a.grad += 1
        np.testing.assert_array_equal(host(b.grad), [1, 1, 1])

    def test_leaf_itself(self, xp):
        x = leaf(xp)
        x.backward(xp.full(3, 2.0))
        np.testing.assert_array_equal(host(x.grad), [2, 2, 2])

    def test_gradient_argument(self, xp):
        x = leaf(xp)
        (x * 2).backward(Tensor(xp.asarray([1.0, 2.0, 3.0])))
        np.testing.assert_array_equal(host(x.grad), [2, 4, 6])

    def test_retain_grad(self, xp):
        x = leaf(xp)
        y = (x * 2).retain_grad()
        (y * y).sum().backward()
        np.testing.assert_allclose(host(y.grad), 2 * host(y.data))

    def test_deep_graph(self):
        x = Tensor(np.ones(1), requires_grad=True)
        y = x
        for _ in range(20_000):
            y = y + 1
        y.backward()
        assert x.grad == [1]

    def test_deep_graph_is_forgotten_without_recursion(self):
        y = Tensor(np.ones(1), requires_grad=True)
        for _ in range(100_000):
            y = y + 1
        del y

    def test_no_grad(self, xp):
        x = leaf(xp)
        with no_grad():
            assert not is_grad_enabled()
            assert not (x * 2).requires_grad
        assert is_grad_enabled()

        @no_grad()
        def double(t):
            return t * 2

        assert not double(x).requires_grad
        assert (x * 2).requires_grad

    def test_no_grad_ends_with_an_exception(self):
        with pytest.raises(KeyError), no_grad():
            raise KeyError
        assert is_grad_enabled()

    def test_saved_arrays_are_freed_by_backward_and_by_forgetting(self):
        for use in (lambda t: t.sum().backward(), lambda t: None):
            x = leaf(np, (5,))
            y = x.exp()
            inner = weakref.ref(y._node)
            use(y)
            del y
            gc.disable()  # without the garbage collector: there are no reference cycles
            try:
                assert inner() is None
            finally:
                gc.enable()
            assert x._storage.saves == 0


def returning(gradients):
    """Return a function of two operands, their sum, whose backward pass is `gradients`."""

    class Given(Function):
        @staticmethod
        def forward(ctx, a, b):
            return a + b

        @staticmethod
        def backward(ctx, grad):
            return gradients(ctx.xp, grad)

    return Given


kept_by_backward = []


def one_array_for_both(xp, grad):
    array = grad * 2
    return array, array


def views_of_one_array(xp, grad):
    array = xp.stack([grad, grad])
    return array[0], array[0]


def array_and_a_view_of_it(xp, grad):
    array = grad * 2
    return array, array[...]


def incoming_gradient(xp, grad):
    return grad, grad


def arrays_that_it_keeps(xp, grad):
    kept_by_backward[:] = grad * 2, grad * 2
    return kept_by_backward[0], kept_by_backward[1][...]


def base_of_a_kept_view(xp, grad):
    a, b = grad * 2, grad * 2
    kept_by_backward[:] = a[1:], b[1:]
    return a, b


class TestGradientsThatABackwardShares:
    """Adding to one leaf's gradient changes no other array, whatever a backward returned."""

    @pytest.mark.parametrize(
        "gradients",
        [
            one_array_for_both,
            views_of_one_array,
            array_and_a_view_of_it,
            incoming_gradient,
            arrays_that_it_keeps,
            base_of_a_kept_view,
        ],
    )
    def test_each_leaf_has_its_own(self, xp, gradients):
        a, b = leaf(xp), leaf(xp, seed=1)
        first = xp.full(3, 0.5)
        returning(gradients).apply(a, b).backward(first)
        expected = host(b.grad).copy()
        kept = [host(array).copy() for array in kept_by_backward]
        (a * 7).sum().backward()
        a.grad += 30
        np.testing.assert_array_equal(host(b.grad), expected)
        np.testing.assert_array_equal(host(a.grad), expected + 37)
        np.testing.assert_array_equal(host(first), [0.5, 0.5, 0.5])
        for array, before in zip(kept_by_backward, kept, strict=True):
            np.testing.assert_array_equal(host(array), before)
        kept_by_backward.clear()

    @pytest.mark.parametrize("gradients", [one_array_for_both, array_and_a_view_of_it])
    @pytest.mark.parametrize("leaf_first", [True, False])
    @pytest.mark.parametrize("swapped", [True, False])
    def test_a_leaf_and_a_computed_tensor(self, xp, gradients, leaf_first, swapped):
        # Between the function's backward and that of `b * 1`, the leaf's gradient grows.
        a, b = leaf(xp), leaf(xp, seed=1)
        computed = a * 28 + b * 1 if swapped else b * 1 + a * 28
        operands = (a, computed) if leaf_first else (computed, a)
        returning(gradients).apply(*operands).sum().backward()
        np.testing.assert_array_equal(host(a.grad), [58, 58, 58])
        np.testing.assert_array_equal(host(b.grad), [2, 2, 2])

    def test_a_new_array_is_not_copied(self, xp):
        addresses = []

        def new_arrays(xp, grad):
            arrays = grad * 2, grad * 3
            addresses[:] = [address(array) for array in arrays]
            return arrays

        def address(array):
            return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr

        a, b = leaf(xp), leaf(xp, seed=1)
        returning(new_arrays).apply(a, b).sum().backward()
        assert [address(a.grad), address(b.grad)] == addresses


class TestRefusals:
    def test_nothing_requires_a_gradient(self):
        with pytest.raises(GraphError, match="needs a tensor that depends on one with requires"):
            Tensor([1.0]).backward()

    def test_several_elements_without_gradient(self, xp):
        with pytest.raises(GraphError, match=r"one element; this one has shape \(3,\)"):
            (leaf(xp) * 2).backward()

    def test_gradient_of_wrong_shape_dtype_or_kind(self, xp):
        y = leaf(xp) * 2
        with pytest.raises(ValueError, match=r"shape \(3,\) and dtype float64; got \(2,\)"):
            y.backward(xp.ones(2))
        with pytest.raises(ValueError, match=r"got .* float32"):
            y.backward(xp.ones(3, "float32"))
        with pytest.raises(TypeError, match="array like the tensor's; got list"):
            y.backward([1, 1, 1])

    def test_second_backward(self, xp):
        x = leaf(xp)
        y = (x * x).sum()
        y.backward()
        before = host(x.grad).copy()
        with pytest.raises(GraphError, match=r"freed at sum .* by an earlier backward"):
            y.backward()
        np.testing.assert_array_equal(host(x.grad), before)

    def test_second_backward_with_retained_graph(self, xp):
        x = leaf(xp)
        y = (x * x).sum()
        y.backward(retain_graph=True)
        y.backward()
        np.testing.assert_allclose(host(x.grad), 4 * host(x.data))

    def test_shared_part_freed_by_another_loss(self, xp):
        x = leaf(xp)
        hidden = x * x
        first, second = hidden.sum(), (hidden * 2).sum()
        first.backward()
        before = host(x.grad).copy()
        with pytest.raises(GraphError, match="freed at multiply"):
            second.backward()
        np.testing.assert_array_equal(host(x.grad), before)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda x, grad: grad[:1], r"operand 0 a gradient of shape \(3,\) .* shape \(1,\)"),
            (lambda x, grad: grad.astype("float32"), "dtype float64; .* dtype float32"),
            (lambda x, grad: None, "it returned None"),
            (lambda x, grad: (grad, grad), r"must return 1 gradient\(s\).* it returned 2"),
        ],
    )
    def test_wrong_gradient_names_the_operation(self, xp, wrong, message):
        class BadlyDerived(Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save(x)
                return x * 1

            @staticmethod
            def backward(ctx, grad):
                return wrong(ctx.saved[0], grad)

        with pytest.raises(GraphError, match=f"backward of badly_derived.*{message}"):
            BadlyDerived.apply(leaf(xp)).sum().backward()

    def test_shapes_that_do_not_fit_are_named(self, xp):
        a, b = leaf(xp, (2, 3)), leaf(xp, (4,))
        for op, name in ((ops.add, "add"), (ops.matmul, "matmul"), (ops.divide, "divide")):
            with pytest.raises(ValueError, match=rf"{name} of \(2, 3\) float64, \(4,\) float64"):
                op(a, b)
        with pytest.raises(IndexError, match=r"index of \(2, 3\) float64"):
            a[5]
        with pytest.raises(ValueError, match=r"reshape of \(2, 3\)"):
            a.reshape(4, 2)


class TestGradcheck:
    def test_accepts_a_correct_backward(self, xp):
        assert gradcheck(lambda a, b: (a * b).exp(), leaf(xp), leaf(xp, seed=1))

    def test_fails_a_backward_wrong_by_a_factor_of_two(self, xp):
        class Square(Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save(x)
                return x * x

            @staticmethod
            def backward(ctx, grad):
                (x,) = ctx.saved
                return grad * x  # should be 2 x

        with pytest.raises(AssertionError, match=r"input 0 is wrong in 3 of 3 .* first at \(0,\)"):
            gradcheck(Square.apply, leaf(xp))

    def test_fails_one_wrong_element_of_the_second_input(self, xp):
        class Product(Function):
            @staticmethod
            def forward(ctx, a, b):
                ctx.save(a, b)
                return a * b

            @staticmethod
            def backward(ctx, grad):
                a, b = ctx.saved
                grad_b = grad * a
                grad_b[2] += 1e-3
                return grad * b, grad_b

        with pytest.raises(AssertionError, match=r"input 1 is wrong in 1 of 3 .* first at \(2,\)"):
            gradcheck(Product.apply, leaf(xp), leaf(xp, seed=1))

    def test_gradient_of_an_unused_input_is_zero(self, xp):
        assert gradcheck(lambda a, b: a * 2, leaf(xp), leaf(xp, seed=1))
        # A zero that is wrong is found.
        with pytest.raises(AssertionError, match=r"input 1 is wrong .* backward gives 0,"):
            gradcheck(lambda a, b: a * b.detach(), leaf(xp), leaf(xp, seed=1))

    def test_needs_float64_leaves(self):
        with pytest.raises(TypeError, match="float64 leaf; got float32"):
            gradcheck(lambda x: x * x, Tensor([1.0], requires_grad=True))
        with pytest.raises(TypeError, match="requires_grad=False"):
            gradcheck(lambda x: x * x, Tensor(np.ones(2)))
        with pytest.raises(TypeError, match=r"inputs one by one; got list as input 0"):
            gradcheck(lambda x: x * x, [leaf(np)])

    def test_leaves_the_input_as_it_was(self):
        x = leaf(np)
        before = x.data.copy()
        gradcheck(lambda t: t * t, x)
        np.testing.assert_array_equal(x.data, before)


class TestCheckFinite:
    def test_forward_value(self, xp):
        x = Tensor(xp.asarray([1.0, -1.0, 0.0]))
        with (
            np.errstate(all="ignore"),
            pytest.raises(NonFiniteError) as caught,
            debug.check_finite(),
        ):
            x.log()
        error = caught.value
        assert (error.op, error.phase, error.shape, error.bad) == ("log", "forward value", (3,), 2)
        assert error.place == ""

    def test_gradient(self, xp):
        x = Tensor(xp.asarray([0.0, 4.0]), requires_grad=True, name="x")
        with np.errstate(all="ignore"), debug.check_finite():
            y = x.sqrt().sum()
            with pytest.raises(NonFiniteError, match=r"1 value.*gradient of x of sqrt") as caught:
                y.backward()
        assert caught.value.phase == "gradient of x"

    def test_off_again_afterwards(self, xp):
        with pytest.raises(KeyError), debug.check_finite():
            raise KeyError
        with np.errstate(all="ignore"):
            assert not np.isfinite(Tensor(xp.asarray(-1.0)).log().item())
