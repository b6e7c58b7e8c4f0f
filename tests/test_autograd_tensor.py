"""Tensors as Python and NumPy use them: as numbers, as sequences, in files."""

from __future__ import annotations

import copy
import gc
import math
import operator
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
from arrays import host, leaf

import cupybnn
from cupybnn import nn, ops
from cupybnn.autograd import GraphError, Tensor, gradcheck

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def test_is_public():
    assert cupybnn.Tensor is Tensor


class TestAsASequence:
    def test_iterates_over_rows(self, xp):
        x = leaf(xp, (3, 2))
        rows = list(x)
        assert [row.shape for row in rows] == [(2,)] * 3
        sum(row * (i + 1) for i, row in enumerate(x)).sum().backward()
        np.testing.assert_array_equal(host(x.grad), [[1, 1], [2, 2], [3, 3]])
        assert list(Tensor(xp.ones((0, 2)))) == []
        first, *rest = Tensor(xp.asarray([1, 2, 3]))
        assert (int(first), [int(t) for t in rest]) == (1, [2, 3])
        assert [int(t) for t in reversed(Tensor(xp.arange(3)))] == [2, 1, 0]

    @pytest.mark.parametrize("use", [iter, list, sum, tuple, lambda t: [*t], lambda t: max(*t)])
    def test_a_scalar_is_not_a_sequence(self, xp, use):
        with pytest.raises(TypeError, match=r"shape \(\) cannot be iterated over"):
            use(Tensor(xp.asarray(3.0)))

    def test_one_number_has_no_length(self, xp):
        with pytest.raises(TypeError, match=r"shape \(\) has no length"):
            len(Tensor(xp.asarray(3.0)))
        assert len(Tensor(xp.ones((4, 2)))) == 4
        assert len(Tensor(xp.ones((0, 2)))) == 0

    def test_in_compares_values(self, xp):
        x = Tensor(xp.asarray([[1.0, 2.0], [3.0, xp.nan]]))
        assert 1.0 in x
        assert np.int64(3) in x
        assert 4 not in x
        assert float("nan") not in x
        assert Tensor(xp.asarray(2.0)) in x
        assert xp.asarray([1.0, 7.0]) in x  # as in NumPy: any element that is equal
        assert 1.0 not in Tensor(xp.ones((0,)))
        assert 3.0 in Tensor(xp.asarray(3.0))
        with pytest.raises(TypeError, match="must be tensors, arrays or numbers; got str"):
            assert "1" in x


class TestComparisons:
    OPERATORS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)

    @pytest.mark.parametrize("compare", OPERATORS)
    def test_element_by_element_on_either_side(self, xp, compare):
        a = np.array([[1.0, 2.0, np.nan], [3.0, -0.0, np.inf]])
        b = np.array([1.0, 3.0, np.nan])
        x, y = Tensor(xp.asarray(a), requires_grad=True), Tensor(xp.asarray(b))
        for got, expected in [
            (compare(x, y), compare(a, b)),
            (compare(x, xp.asarray(b)), compare(a, b)),
            (compare(xp.asarray(b), x), compare(b, a)),
            (compare(x, 2), compare(a, 2)),
            (compare(2.0, x), compare(2.0, a)),
            (compare(np.float32(2), x), compare(np.float32(2), a)),
        ]:
            assert isinstance(got, xp.ndarray)
            assert got.dtype == bool
            np.testing.assert_array_equal(host(got), expected)

    def test_of_one_number_is_usable_as_a_truth(self, xp):
        loss = Tensor(xp.asarray(0.25, "float32"), requires_grad=True)
        assert loss < 0.3
        assert not loss > 1
        assert loss == 0.25
        assert max(loss, Tensor(xp.asarray(0.5))).item() == 0.5

    def test_comparison_with_other_types(self):
        x = Tensor([1.0, 2.0])
        for other in (None, "a", object(), {}):
            assert (x == other) is False
            assert (x != other) is True
        for compare in self.OPERATORS:
            with pytest.raises(TypeError, match="must be tensors, arrays or numbers; got list"):
                compare(x, [1.0, 2.0])
        with pytest.raises(TypeError, match=r"operands of less must be .* got NoneType"):
            x < None  # noqa: B015

    def test_shapes_must_fit(self, xp):
        with pytest.raises(ValueError, match=r"equal of \(3,\) float64, \(2,\) float64"):
            Tensor(xp.ones(3)) == Tensor(xp.ones(2))  # noqa: B015


class TestAsANumber:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "bool"])
    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_conversions(self, xp, shape, dtype):
        x = Tensor(xp.ones(shape, dtype))
        assert (int(x), float(x), bool(x), x.item()) == (1, 1.0, True, 1)
        assert type(int(x)) is int
        assert type(float(x)) is float

    def test_formats(self, xp):
        loss = Tensor(xp.asarray(0.123456, "float32"), requires_grad=True)
        assert f"{loss:.3f}" == "0.123"
        assert f"{loss * 1:8.2e}" == "1.23e-01"
        assert f"{Tensor(xp.asarray([7])):03d}" == "007"
        assert f"{Tensor(xp.ones(2))}" == repr(Tensor(xp.ones(2)))
        with pytest.raises(TypeError, match=r"'\.3f' needs a tensor of one element; .* \(2,\)"):
            f"{Tensor(xp.ones(2)):.3f}"

    def test_rounds(self, xp):
        x = Tensor(xp.asarray(2.71828))
        assert round(x) == 3
        assert type(round(x)) is int
        assert round(x, 2) == 2.72
        assert (math.floor(x), math.ceil(x), math.trunc(float(x))) == (2, 3, 2)

    def test_integers_are_indices(self, xp):
        assert "abc"[Tensor(xp.asarray(1))] == "b"
        assert list(range(Tensor(xp.asarray(3)))) == [0, 1, 2]
        for wrong in (xp.asarray(1.0), xp.asarray([1]), xp.asarray(True)):
            with pytest.raises(TypeError, match="Only an integer tensor of shape"):
                operator.index(Tensor(wrong))

    def test_several_elements_are_not_a_number(self, xp):
        for convert in (int, float, round, lambda t: t.item()):
            with pytest.raises(ValueError, match=r"one element; this one is \(2,\)"):
                convert(Tensor(xp.ones(2)))


class TestWhatBecomesATensor:
    @pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2", ">i4", "<f4", "<i8"])
    def test_byte_order(self, dtype):
        values = np.array([[1.5, -2.0], [0.0, 3.0]]).astype(dtype)
        x = Tensor(values)
        assert x.dtype == np.dtype(dtype).newbyteorder("=")
        assert x.dtype.isnative
        np.testing.assert_array_equal(x.data, values)
        np.testing.assert_array_equal((x * values).data, values * values)

    def test_gradients_of_big_endian_data(self):
        values = np.array([1.5, -2.0], ">f8")
        x = Tensor(values, requires_grad=True)
        assert gradcheck(lambda t: (t * t * values).exp(), x)
        x.zero_grad()
        (x * 2).backward(np.array([1, 3], ">f8"))
        np.testing.assert_array_equal(x.grad, [2, 6])
        x.data = np.array([4, 5], ">f4")
        assert x.dtype == np.float32

    def test_longdouble(self):
        precise = np.longdouble(1) + np.finfo(np.longdouble).eps
        x = Tensor(np.array([precise, -2]), requires_grad=True)
        assert x.dtype == np.longdouble
        assert x.data[0] == precise
        y = (x * x).sum()
        held = x.data
        y.backward(retain_graph=True)
        assert x.grad[0] == 2 * precise
        assert ops.sign(x).data.tolist() == [1, -1]
        assert type(x[1].item()) is float
        for op in (ops.softmax, ops.mean, ops.max, ops.sigmoid, lambda t: t**2, lambda t: t @ t):
            assert op(x).dtype == np.longdouble
            op(x).sum().backward()
        held[0] = -held[0]
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    def test_edits_of_longdouble_are_noticed_bit_by_bit(self):
        x = Tensor(np.array([0.0, np.nan], np.longdouble), requires_grad=True)
        y = (x * x).sum()
        held = x.data
        y.backward(retain_graph=True)
        held[0] = -0.0
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    @pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
    def test_narrow_types_of_jax_become_float32(self, name):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        dtype = np.dtype(getattr(ml_dtypes, name))
        values = np.array([1.0, -1.5, 0.25]).astype(dtype)
        x = Tensor(values, requires_grad=True)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x.data, values.astype(np.float32))
        y = x * values + dtype.type(0.5)
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y.data, [1.5, 2.75, 0.5625])
        x.data = values
        assert x.dtype == np.float32

    @pytest.mark.parametrize(
        "data", [np.zeros(2, "f4,i4"), np.zeros(2, "V4"), np.zeros(2, "M8[s]"), np.array(["a"])]
    )
    def test_other_types_do_not(self, data):
        with pytest.raises(TypeError, match=r"must be real numbers; got numpy\.ndarray with dtype"):
            Tensor(data)

    @pytest.mark.parametrize(
        "number",
        [
            *(2, 2.0, True, Fraction(3, 2), np.int8(2), np.uint64(2), np.bool_(True)),
            *(np.float16(1.5), np.float32(1.5), np.float64(1.5), np.longdouble(1.5)),
        ],
    )
    def test_numbers_take_the_tensors_dtype(self, xp, number):
        x = Tensor(xp.asarray([1.0, 2.0, 3.0], "float32"), requires_grad=True)
        value = float(number)
        for got, expected in [
            (x * number, host(x.data) * value),
            (number - x, value - host(x.data)),
            (x**number, host(x.data) ** value),
        ]:
            assert got.dtype == np.float32
            np.testing.assert_allclose(host(got.data), expected, rtol=1e-6)

    @pytest.mark.parametrize("exponent", [[2], "2", None, 2j, np.complex64(2), Tensor(2.0)])
    def test_exponents_are_numbers(self, exponent):
        with pytest.raises(TypeError, match="'exponent' of power must be a number; got"):
            Tensor([1.0]) ** exponent


class TestAxes:
    @pytest.mark.parametrize("number", [int, np.int64, np.int8, np.uint8])
    @pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
    def test_may_be_numpys_integers(self, xp, name, number):
        x = leaf(xp, (2, 3, 4))
        reduce = getattr(np, name)
        for axis in (number(1), (number(0), number(2)), [number(0)]):
            plain = axis if isinstance(axis, number) else tuple(axis)
            y = getattr(x, name)(axis)
            np.testing.assert_allclose(host(y.data), reduce(host(x.data), axis=plain))
            assert gradcheck(lambda t, axis=axis: getattr(t, name)(axis), x)

    def test_of_the_other_operations(self, xp):
        x = leaf(xp, (2, 3))
        one = np.int64(1)
        assert x.transpose(one, np.int64(0)).shape == (3, 2)
        assert x.transpose((1, 0)).shape == x.transpose([1, 0]).shape == (3, 2)
        assert x[0].transpose(0).shape == (3,)
        assert x.reshape([one * 3, -1]).shape == (3, 2)
        assert x.softmax(one).shape == (2, 3)
        assert ops.concatenate([x, x], one).shape == (2, 6)
        assert x.argmax(one).shape == (2,)
        assert x[one, Tensor(xp.asarray(0))].shape == ()

    @pytest.mark.parametrize("axis", [1.0, "0", (0, 1.0), Tensor(1.0)])
    def test_are_integers(self, axis):
        for name in ("sum", "mean", "max", "min"):
            with pytest.raises(TypeError, match=f"'axis' of {name} must be an integer"):
                getattr(leaf(np, (2, 3)), name)(axis)


def test_assignment_by_a_tensor_as_index(xp):
    x = Tensor(xp.zeros(4))
    x[Tensor(xp.asarray([0, 2]))] = 1.0
    x[x > 0] += 1
    np.testing.assert_array_equal(host(x.data), [2, 0, 2, 0])


def copies(tensor):
    """Return `tensor` as every protocol of pickle, and deepcopy, give it back."""
    for protocol in PROTOCOLS:
        yield pickle.loads(pickle.dumps(tensor, protocol))
    yield copy.deepcopy(tensor)


class TestPickle:
    def test_keeps_what_there_is(self, xp):
        x = Tensor(xp.asarray([[1.0, -1.0]], "float32"), requires_grad=True, name="w")
        x.two_valued = True
        held = x.data
        x.grad = xp.asarray([[2.0, 3.0]], "float32")
        for other in copies(x):
            assert type(other) is Tensor
            assert (other.name, other.requires_grad, other.two_valued) == ("w", True, True)
            assert other.dtype == np.float32
            for a, b in ((other.data, x.data), (other.grad, x.grad)):
                np.testing.assert_array_equal(host(a), host(b))
                assert not xp.may_share_memory(a, b)
            (other * other).sum().backward()
            other.data[0, 0] = 5
            assert not other.two_valued
        assert host(held).tolist() == [[1, -1]]
        assert x.two_valued

    def test_a_model_whose_data_was_read(self, xp):
        model = nn.Sequential(nn.Linear(3, 4, rng=0), nn.BatchNorm(4), nn.Linear(4, 2, rng=1))
        if xp is not np:
            model.to("cuda")
        held = [parameter.data for _, parameter in model.named_parameters()]
        x = Tensor(xp.ones((2, 3), "float32"))
        expected = host(model.eval()(x).data)
        for other in copies(model):
            np.testing.assert_array_equal(host(other(x).data), expected)
            for (_, a), (_, b) in zip(
                model.named_parameters(), other.named_parameters(), strict=True
            ):
                assert type(a) is type(b) is nn.Parameter
                assert (a.bits, a.limit) == (b.bits, b.limit)
                b.write()[...] = 0
        np.testing.assert_array_equal(host(model(x).data), expected)
        assert held

    def test_shared_tensors_and_memory_stay_shared(self, xp):
        x = leaf(xp)
        a, same, alias, view = copy.deepcopy([x, x, x.detach(), x.detach()[1:]])
        assert a is same
        y = (a * a).sum()
        view[0] = 7  # a view is a copy of its own
        assert host(a.data).tolist() == host(x.data).tolist()
        alias[0] = 5
        assert float(a.data[0]) == 5
        with pytest.raises(GraphError, match="edited in place"):
            y.backward()

    def test_read_only_buffers_are_not_kept(self):
        buffers = []
        x = leaf(np, (50,))
        text = pickle.dumps(x, 5, buffer_callback=buffers.append)
        other = pickle.loads(text, buffers=[bytes(buffer) for buffer in buffers])
        other.write()[...] = 1
        assert (other.data == 1).all()

    def test_computed_tensors_are_refused(self, xp):
        y = leaf(xp) * 2
        for refused in (
            lambda: copy.deepcopy(y),
            *[lambda p=p: pickle.dumps({"y": y}, p) for p in PROTOCOLS],
        ):
            with pytest.raises(GraphError, match=r"made by multiply\) cannot be .*t\.detach\(\)"):
                refused()
        with pytest.raises(GraphError, match="graph at multiply"):
            copy.deepcopy(y._node)
        detached = copy.deepcopy(y.detach())
        np.testing.assert_array_equal(host(detached.data), host(y.data))
        y.sum().backward()

    @pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
    def test_an_unfinished_node_is_forgotten_quietly(self):
        from cupybnn.autograd import Context

        node = Context.__new__(Context)
        del node
        gc.collect()

    def test_shallow_copy_is_on_the_same_memory(self, xp):
        x = leaf(xp)
        (x * 1).sum().backward()
        y = copy.copy(x)
        assert y is not x
        y.grad += 1
        assert host(x.grad).tolist() == [1, 1, 1]
        loss = (x * x).sum()
        copy.copy(loss).backward(retain_graph=True)
        y[0] = 9
        assert float(x.data[0]) == 9
        with pytest.raises(GraphError, match="edited in place"):
            loss.backward()

    def test_subclasses_keep_their_own(self):
        class Named(Tensor):
            __slots__ = ("unit",)

        class Open(Named):
            pass

        globals()["Open"] = Open
        Open.__qualname__ = "Open"
        x = Open([1.0])
        x.unit, x.note = "m", ["free"]
        for other in (*copies(x), copy.copy(x)):
            assert type(other) is Open
            assert (other.unit, other.note) == ("m", ["free"])


class TestSilence:
    """Arithmetic on tensors follows IEEE 754 whatever NumPy's error state and filters are."""

    @pytest.fixture(autouse=True)
    def strict(self):
        with np.errstate(all="raise"), warnings.catch_warnings():
            warnings.simplefilter("error")
            yield

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_extreme_numbers(self, xp, dtype):
        limits = np.finfo(dtype)
        values = [limits.max, -limits.max, limits.tiny, limits.smallest_subnormal, 0.0, -1.0, 700.0]
        x = Tensor(xp.asarray(np.array([values, values[::-1]], dtype)), requires_grad=True)
        labels = xp.asarray([0, 1])
        for op in (
            lambda t: t * t,
            lambda t: t / t,
            lambda t: 1 / t,
            lambda t: t - 3 * t,
            lambda t: t**3,
            lambda t: t**-0.5,
            *(getattr(ops, name) for name in ("exp", "log", "sqrt", "tanh", "relu", "absolute")),
            *(getattr(ops, name) for name in ("softmax", "log_softmax", "sigmoid", "l1")),
            *(getattr(ops, name) for name in ("sum", "mean", "max", "min", "bipolar_penalty")),
            *(
                lambda t, name=name: ops.sign(t, name)
                for name in ops.quantizer_names()
                if name != "magnitude_aware_sign"
            ),
            lambda t: ops.quantize(t.reshape(14, 1), "magnitude_aware_sign"),
            lambda t: t @ t.T,
            lambda t: ops.maximum(t, t.T.reshape(2, 7)),
            lambda t: ops.softmax_cross_entropy(t, labels),
            lambda t: ops.squared_hinge(t, labels),
            lambda t: ops.mse(t, t * 3),
            lambda t: t.astype("float16") if dtype != "float16" else t.astype("float32"),
            lambda t: t[[0, 0, 1]],
        ):
            y = op(x)
            y.backward(xp.full(y.shape, np.finfo(y.dtype).max, y.dtype))
        assert x.astype("int32").dtype == np.int32

    def test_batch_norm(self, xp):
        for values in ([[1e-30, 1e30], [0, -1e30]], [[3e38, 0], [-3e38, 0]]):
            x = Tensor(xp.asarray(values, "float32"), requires_grad=True)
            scale, shift = Tensor(xp.ones(2, "float32"), requires_grad=True), xp.zeros(2, "float32")
            statistics = [xp.zeros(2, "float32"), xp.ones(2, "float32")]
            for training in (True, False):
                y = ops.batch_norm(x, scale, Tensor(shift), *statistics, training=training)
                (y * y).sum().backward()

    def test_empty_arrays(self, xp):
        empty = Tensor(xp.ones((0, 3), "float32"), requires_grad=True)
        mean = empty.mean()
        mean.backward()
        assert math.isnan(mean.item())
        assert host(empty.mean(0).data).shape == (3,)
        assert empty.mean(1).dtype == np.float32

    def test_making_tensors(self):
        assert Tensor([1e-45, 1e-300]).data[1] == 0
        x = leaf(np)
        gradcheck(lambda t: t * 1e-200 * 1e-110, x)  # subnormal numbers
