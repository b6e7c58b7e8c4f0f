"""Smooth operations against float64 finite differences, and against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import host

from cupybnn import ops
from cupybnn.autograd import Tensor, gradcheck

RNG = np.random.default_rng(0)


def tensor(xp, *shape, low=-2.0, high=2.0, seed=0, dtype="float64"):
    values = np.random.default_rng(seed).uniform(low, high, shape).astype(dtype)
    return Tensor(xp.asarray(values), requires_grad=True)


UNARY = {
    "absolute": (abs, np.abs, -2),
    "clip": (lambda x: x.clip(-0.7, 0.9), lambda x: np.clip(x, -0.7, 0.9), -2),
    "cube": (lambda x: x**3, lambda x: x**3, -2),
    "exp": (lambda x: x.exp(), np.exp, -2),
    "index_arrays": (lambda x: x[[0, 2, 0], 1], lambda x: x[[0, 2, 0], 1], -2),
    "index_ellipsis": (lambda x: x[..., None, 0], lambda x: x[..., None, 0], -2),
    "index_integer": (lambda x: x[-1], lambda x: x[-1], -2),
    "index_mask": (
        lambda x: x[np.array([True, False, True])],
        lambda x: x[np.array([True, False, True])],
        -2,
    ),
    "index_slice": (lambda x: x[::-2, 1:3], lambda x: x[::-2, 1:3], -2),
    "log": (lambda x: x.log(), np.log, 0.1),
    "max": (lambda x: x.max(), np.max, -2),
    "max_axis": (lambda x: x.max(1), lambda x: x.max(1), -2),
    "mean": (lambda x: x.mean(), np.mean, -2),
    "mean_axis": (lambda x: x.mean(-1), lambda x: x.mean(-1), -2),
    "min_keepdims": (lambda x: x.min(0, keepdims=True), lambda x: x.min(0, keepdims=True), -2),
    "negative": (lambda x: -x, np.negative, -2),
    "power_zero": (lambda x: x**0, lambda x: x**0, -2),
    "reciprocal": (lambda x: 1 / x, lambda x: 1 / x, 0.1),
    "relu": (lambda x: x.relu(), lambda x: np.maximum(x, 0), -2),
    "reshape": (lambda x: x.reshape(4, -1), lambda x: x.reshape(4, -1), -2),
    "reshape_tuple": (lambda x: x.reshape((2, 6)), lambda x: x.reshape(2, 6), -2),
    "root": (lambda x: x**0.5, np.sqrt, 0.1),
    "sqrt": (lambda x: x.sqrt(), np.sqrt, 0.1),
    "subtract_from": (lambda x: 3 - x, lambda x: 3 - x, -2),
    "sum": (lambda x: x.sum(), np.sum, -2),
    "sum_axes": (lambda x: x.sum((0, 1)), lambda x: x.sum((0, 1)), -2),
    "sum_axis": (lambda x: x.sum(-2), lambda x: x.sum(-2), -2),
    "sum_keepdims": (lambda x: x.sum(1, keepdims=True), lambda x: x.sum(1, keepdims=True), -2),
    "tanh": (lambda x: x.tanh(), np.tanh, -2),
    "transpose": (lambda x: x.T, np.transpose, -2),
    "transpose_axes": (lambda x: x.transpose(-1, 0), lambda x: x.transpose(-1, 0), -2),
    "l1": (ops.l1, lambda x: np.abs(x).sum(), -2),
    "l2": (ops.l2, lambda x: (x**2).sum() / 2, -2),
    "bipolar_penalty": (ops.bipolar_penalty, lambda x: (1 - x**2).sum(), -2),
}


@pytest.mark.parametrize("name", UNARY)
def test_of_one_operand(xp, name):
    op, reference, low = UNARY[name]
    x = tensor(xp, 3, 4, low=low)
    np.testing.assert_allclose(host(op(x).data), reference(host(x.data)), rtol=1e-14)
    assert gradcheck(op, x)


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_keeps_the_dtype(xp, name, dtype):
    op, _, low = UNARY[name]
    x = tensor(xp, 3, 4, low=low, dtype=dtype)
    y = op(x)
    assert y.dtype == dtype
    y.backward(xp.ones(y.shape, dtype))  # the engine checks the gradient's dtype


BINARY = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
}
BROADCASTS = [((3, 4), (3, 4)), ((3, 4), (4,)), ((1, 4), (3, 1)), ((), (2, 3)), ((2, 1, 3), (4, 1))]


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shapes", BROADCASTS)
def test_of_two_operands(xp, name, shapes):
    op = BINARY[name]
    a, b = (tensor(xp, *s, low=0.5, seed=i) for i, s in enumerate(shapes))
    np.testing.assert_allclose(host(op(a, b).data), op(host(a.data), host(b.data)), rtol=1e-14)
    assert gradcheck(op, a, b)
    assert gradcheck(lambda x, y: op(y, x), a, b)


@pytest.mark.parametrize("name", BINARY)
def test_of_the_same_operand_twice(xp, name):
    assert gradcheck(lambda x: BINARY[name](x, x), tensor(xp, 3, low=0.5))


def test_mixed_dtypes_give_each_operand_its_own(xp):
    a, b = tensor(xp, 3, dtype="float32"), tensor(xp, 2, 3)
    (a * b).sum().backward()
    assert a.grad.dtype == np.float32
    assert b.grad.dtype == np.float64
    np.testing.assert_allclose(host(a.grad), host(b.data).sum(0), rtol=1e-6)


MATMULS = [
    ((3, 4), (4, 2)),
    ((4,), (4, 2)),
    ((3, 4), (4,)),
    ((4,), (4,)),
    ((5, 3, 4), (4, 2)),
    ((5, 3, 4), (5, 4, 2)),
    ((5, 1, 3, 4), (2, 4, 2)),
    ((5, 3, 4), (4,)),
    ((4,), (5, 4, 2)),
    ((1, 4), (4, 1)),
    ((3, 0), (0, 2)),
    ((0, 4), (4, 2)),
]


@pytest.mark.parametrize("shapes", MATMULS)
def test_matmul(xp, shapes):
    a, b = (tensor(xp, *s, seed=i) for i, s in enumerate(shapes))
    np.testing.assert_allclose(host((a @ b).data), host(a.data) @ host(b.data), rtol=1e-13)
    assert gradcheck(ops.matmul, a, b)


@pytest.mark.parametrize("shapes", MATMULS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_binary_matmul_is_the_product_of_signs_either_way(xp, shapes, dtype):
    gradients = []
    for xnor in (True, False):
        leaves = [tensor(xp, *s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
        signs = [ops.sign(x, "identity") for x in leaves]
        y = ops.binary_matmul(*signs, xnor=xnor)
        a, b = (np.where(host(x.data) >= 0, 1, -1) for x in leaves)
        assert y.dtype == dtype
        np.testing.assert_array_equal(host(y.data), a @ b)
        y.backward(xp.asarray(np.random.default_rng(5).standard_normal(y.shape), dtype))
        gradients.append([host(x.grad) for x in leaves])
    for by_xnor, dense in zip(*gradients, strict=True):
        np.testing.assert_array_equal(by_xnor, dense)


def test_binary_matmul_has_the_gradient_of_the_dense_product(xp):
    signs = [np.sign(RNG.standard_normal(s)) for s in ((3, 5), (5, 2))]
    a, b = (Tensor(xp.asarray(s), requires_grad=True) for s in signs)
    c, d = (Tensor(xp.asarray(s), requires_grad=True) for s in signs)
    ops.binary_matmul(ops.sign(a, "identity"), ops.sign(b, "identity")).sum().backward()
    (c @ d).sum().backward()
    np.testing.assert_array_equal(host(a.grad), host(c.grad))
    np.testing.assert_array_equal(host(b.grad), host(d.grad))


def test_arrays_are_constants(xp):
    x, w = xp.asarray([[0.5, -2.0]]), tensor(xp, 2, 3)
    product = ops.binary_matmul(ops.sign(x), ops.sign(w, "identity"))
    product.sum().backward()
    np.testing.assert_array_equal(host(w.grad), [[1] * 3, [-1] * 3])


def test_binary_matmul_insists_on_signs(xp):
    a, b = tensor(xp, 2, 3), tensor(xp, 3, 2)
    with pytest.raises(ValueError, match=r"'b' of binary_matmul .* shape \(3, 2\)"):
        ops.binary_matmul(ops.sign(a), b)
    signs = ops.sign(b)
    signs.data[0, 0] = 3
    signs.data *= 1
    with pytest.raises(ValueError, match="'b' of binary_matmul"):
        ops.binary_matmul(ops.sign(a), signs)


def norm_reference(x, gamma, beta, eps):
    rows = x.reshape(-1, x.shape[-1])
    return (x - rows.mean(0)) / np.sqrt(rows.var(0) + eps) * gamma + beta


def test_extremes_of_nothing_are_named(xp):
    for name in ("max", "min"):
        with pytest.raises(ValueError, match=rf"^{name} of \(0, 3\) float64: "):
            getattr(Tensor(xp.ones((0, 3))), name)(0)
        y = getattr(Tensor(xp.ones(3), requires_grad=True), name)()
        assert f"made by {name}" in repr(y)


class TestBatchNorm:
    def operands(self, xp, shape=(6, 3), dtype="float64"):
        x = tensor(xp, *shape, dtype=dtype)
        gamma, beta = (tensor(xp, shape[-1], seed=s, dtype=dtype) for s in (1, 2))
        return x, gamma, beta, xp.zeros(shape[-1], dtype), xp.ones(shape[-1], dtype)

    @pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4), (1, 2)])
    def test_training(self, xp, shape):
        x, gamma, beta, mean, variance = self.operands(xp, shape)
        y = ops.batch_norm(x, gamma, beta, mean, variance, training=True, decay=0.75, eps=1e-3)
        rows = host(x.data).reshape(-1, shape[-1])
        expected = norm_reference(host(x.data), host(gamma.data), host(beta.data), 1e-3)
        np.testing.assert_allclose(host(y.data), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(host(mean), 0.25 * rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(host(variance), 0.75 + 0.25 * rows.var(0), rtol=1e-12)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4)])
    def test_gradient(self, xp, training, shape):
        x, gamma, beta, mean, variance = self.operands(xp, shape)
        mean += 0.3
        variance *= 1.7

        def op(x, gamma, beta):
            return ops.batch_norm(
                x, gamma, beta, mean.copy(), variance.copy(), training=training, eps=1e-3
            )

        assert gradcheck(op, x, gamma, beta)
        assert gradcheck(op, x.detach(), gamma, beta)

    def test_evaluation_uses_the_averages(self, xp):
        x, gamma, beta, mean, variance = self.operands(xp)
        y = ops.batch_norm(x, gamma, beta, mean + 1, variance * 4, training=False, eps=0.0)
        expected = (host(x.data) - 1) / 2 * host(gamma.data) + host(beta.data)
        np.testing.assert_allclose(host(y.data), expected, rtol=1e-12)

    def test_float32_stays(self, xp):
        x, *rest = self.operands(xp, dtype="float32")
        y = ops.batch_norm(x, *rest, training=True)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == rest[2].dtype == np.float32

    def test_shapes_are_checked(self, xp):
        x, gamma, beta, mean, variance = self.operands(xp)
        with pytest.raises(ValueError, match=r"got x \(6, 3\), gamma \(1,\)"):
            ops.batch_norm(x, gamma[:1], beta, mean, variance, training=True)
        with pytest.raises(ValueError, match=r"empty batch; got x \(0, 3\)"):
            ops.batch_norm(x[:0], gamma, beta, mean, variance, training=True)


class TestDropout:
    def test_is_a_scaled_mask(self, xp):
        x = Tensor(xp.ones((100, 100), "float32"), requires_grad=True)
        y = ops.dropout(x, 0.8, seed=3, counter=0)
        values = host(y.data)
        np.testing.assert_array_equal(np.unique(values), np.float32([0, 1.25]))
        assert (values > 0).mean() == pytest.approx(0.8, abs=0.02)  # 5 standard errors
        y.sum().backward()
        np.testing.assert_array_equal(host(x.grad), values)

    def test_depends_on_seed_and_counter_alone(self, xp):
        x = Tensor(xp.ones(64, "float32"))
        drawn = {
            key: host(ops.dropout(x, 0.5, seed=key[0], counter=key[1]).data).tobytes()
            for key in [(0, 0), (0, 1), (1, 0)]
        }
        assert len(set(drawn.values())) == 3
        assert host(ops.dropout(x, 0.5, seed=0, counter=1).data).tobytes() == drawn[0, 1]

    def test_sign_dropout_stays_two_valued(self, xp):
        x = Tensor(xp.asarray(RNG.standard_normal((100, 100)), "float32"), requires_grad=True)
        s = ops.sign(x, "identity")
        y = ops.sign_dropout(s, 0.8, seed=3, counter=0)
        assert y.two_valued
        kept = host(y.data) == host(s.data)
        np.testing.assert_array_equal(np.unique(host(y.data)), [-1, 1])
        assert kept.mean() == pytest.approx(0.9, abs=0.015)
        y.sum().backward()
        np.testing.assert_array_equal(np.unique(host(x.grad)), [0, 1])
        assert host(x.grad).mean() == pytest.approx(0.8, abs=0.02)
        assert kept[host(x.grad) == 1].all()

    def test_arguments_are_checked(self):
        x = Tensor([1.0])
        for keep_prob in (0, 1.1, float("nan")):
            with pytest.raises(ValueError, match=r"'keep_prob' of dropout must be in \(0, 1\]"):
                ops.dropout(x, keep_prob, seed=0, counter=0)
        with pytest.raises(ValueError, match="'x' of sign_dropout must be known to hold only"):
            ops.sign_dropout(x, 0.5, seed=0, counter=0)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


class TestLosses:
    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_cross_entropy_of_class_numbers(self, xp, smoothing):
        logits = tensor(xp, 5, 3)
        labels = np.array([0, 2, 1, 1, 2])
        loss = ops.softmax_cross_entropy(logits, xp.asarray(labels), smoothing)
        logs = log_softmax(host(logits.data))
        one_hot = np.eye(3)[labels] * (1 - smoothing) + smoothing / 3
        assert loss.shape == ()
        assert loss.item() == pytest.approx(-(one_hot * logs).sum(1).mean(), rel=1e-12)
        assert gradcheck(
            lambda x: ops.softmax_cross_entropy(x, xp.asarray(labels), smoothing), logits
        )

    def test_cross_entropy_of_probabilities(self, xp):
        logits = tensor(xp, 4, 3)
        soft = RNG.dirichlet([1, 1, 1], 4)
        loss = ops.softmax_cross_entropy(logits, xp.asarray(soft))
        assert loss.item() == pytest.approx(-(soft * log_softmax(host(logits.data))).sum(1).mean())
        assert gradcheck(lambda x: ops.softmax_cross_entropy(x, xp.asarray(soft)), logits)

    def test_cross_entropy_of_large_logits(self, xp):
        logits = Tensor(xp.asarray([[1e4, 0.0], [0.0, 1e4]], "float32"), requires_grad=True)
        loss = ops.softmax_cross_entropy(logits, xp.asarray([0, 0]))
        loss.backward()
        assert loss.item() == 5e3
        np.testing.assert_allclose(host(logits.grad), [[0, 0], [-0.5, 0.5]], atol=1e-30)

    def test_squared_hinge(self, xp):
        outputs = tensor(xp, 5, 3)
        labels = np.array([0, 2, 1, 1, 2])
        loss = ops.squared_hinge(outputs, xp.asarray(labels))
        targets = 2 * np.eye(3)[labels] - 1
        expected = (np.maximum(0, 1 - targets * host(outputs.data)) ** 2).mean()
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert gradcheck(lambda x: ops.squared_hinge(x, xp.asarray(labels)), outputs)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("infinite", [np.inf, -np.inf])
    def test_squared_hinge_of_infinite_outputs(self, xp, infinite, dtype):
        """A target of 0 has no share in an output; others take its limit."""
        outputs = Tensor(xp.asarray([[infinite, 1.0, 0.5]], dtype), requires_grad=True)
        loss = ops.squared_hinge(outputs, xp.asarray([[0.5, 1.0, 0.0]], dtype))
        loss.backward()
        assert loss.item() == pytest.approx((1 + 0 + 1.5**2) / 3, rel=1e-3)
        np.testing.assert_allclose(host(outputs.grad), [[0, 0, 1]], rtol=1e-3)
        sign = np.sign(infinite)
        for probability, expected in ((0.75, sign), (0.25, -sign), (1.0, sign), (0.0, -sign)):
            outputs.zero_grad()
            loss = ops.squared_hinge(outputs, xp.asarray([[probability, 1.0, 1.0]], dtype))
            loss.backward()
            # On the side of its target an output costs nothing.
            assert loss.item() == (pytest.approx(0.25 / 3, rel=1e-3) if expected > 0 else np.inf)
            assert host(outputs.grad)[0, 0] == (0 if expected > 0 else infinite)
        outputs = Tensor(xp.asarray([[np.nan, 1.0]], dtype))
        assert np.isnan(ops.squared_hinge(outputs, xp.asarray([[0.5, 1.0]], dtype)).item())

    @pytest.mark.parametrize("loss", [ops.softmax_cross_entropy, ops.squared_hinge])
    def test_labels_are_checked(self, loss):
        logits = tensor(np, 4, 3)
        for labels in (np.zeros(3, int), np.zeros(4), np.zeros((4, 3), int), np.zeros((4, 2))):
            with pytest.raises(ValueError, match=r"needs (logits|outputs) of shape \(n, classes\)"):
                loss(logits, labels)
        for wrong in (-1, 3):
            with pytest.raises(ValueError, match=f"numbers from 0 to 2; got {wrong}"):
                loss(logits, np.array([0, 1, wrong, 2]))
        with pytest.raises(ValueError, match="empty batch"):
            loss(logits[:0], np.zeros(0, int))
        with pytest.raises(ValueError, match="no gradient for its labels"):
            loss(logits, tensor(np, 4, 3))

    def test_smoothing_is_checked(self):
        with pytest.raises(ValueError, match=r"'smoothing' .* \[0, 1\); got 1"):
            ops.softmax_cross_entropy(tensor(np, 1, 2), np.array([0]), 1)


@pytest.mark.parametrize("loss", [ops.softmax_cross_entropy, ops.squared_hinge])
def test_losses_keep_float32(xp, loss):
    logits = tensor(xp, 4, 3, dtype="float32")
    value = loss(logits, xp.asarray([0, 1, 2, 0]))
    value.backward()
    assert value.dtype == logits.grad.dtype == np.float32


def test_l1_and_absolute_have_no_gradient_at_zero(xp):
    for op in (ops.l1, lambda x: abs(x).sum()):
        x = Tensor(xp.asarray([-2.0, -0.0, 0.0, 3.0]), requires_grad=True)
        op(x).backward()
        np.testing.assert_array_equal(host(x.grad), [-1, 0, 0, 1])


class TestCrossEntropyOfWhatIsImprobable:
    """Logits of -inf and far apart, and labels that do not sum to 1."""

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_unlabelled_class_of_minus_infinity(self, xp, dtype):
        logits = Tensor(xp.asarray([[1.0, -np.inf, 0.0]], dtype), requires_grad=True)
        for labels in (np.array([0]), np.array([[1.0, 0.0, 0.0]])):
            logits.zero_grad()
            loss = ops.softmax_cross_entropy(logits, xp.asarray(labels))
            loss.backward()
            share = 1 / (1 + np.exp(-1))
            assert loss.item() == pytest.approx(-np.log(share), rel=1e-3)
            np.testing.assert_allclose(host(logits.grad), [[share - 1, 0, 1 - share]], rtol=1e-3)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_labelled_class_of_minus_infinity(self, xp, smoothing):
        logits = Tensor(xp.asarray([[0.0, -np.inf]]), requires_grad=True)
        loss = ops.softmax_cross_entropy(logits, xp.asarray([int(not smoothing)]), smoothing)
        loss.backward()
        assert loss.item() == np.inf
        assert np.isfinite(host(logits.grad)).all()

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_differences_that_overflow(self, xp, dtype):
        most = np.finfo(dtype).max
        logits = Tensor(xp.asarray([[most, -most], [-most, most]], dtype), requires_grad=True)
        loss = ops.softmax_cross_entropy(logits, xp.asarray([0, 1]))
        loss.backward()
        assert loss.item() == 0
        np.testing.assert_array_equal(host(logits.grad), [[0, 0], [0, 0]])
        assert ops.softmax_cross_entropy(logits, xp.asarray([0, 0])).item() == np.inf

    def test_what_has_no_loss_is_nan(self, xp):
        for row in ([np.nan, 0.0], [0.0, np.nan], [-np.inf, -np.inf], [np.inf, 0.0]):
            loss = ops.softmax_cross_entropy(Tensor(xp.asarray([row])), xp.asarray([0]))
            assert np.isnan(loss.item())

    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_labels_that_do_not_sum_to_one(self, xp, smoothing):
        logits = tensor(xp, 4, 3)
        labels = xp.asarray([[0.5, 0, 0], [0, 0, 0], [2, 1, 0.5], [0.2, 0.3, 0.5]])
        loss = ops.softmax_cross_entropy(logits, labels, smoothing)
        targets = host(labels) * (1 - smoothing) + smoothing / 3
        expected = -(targets * log_softmax(host(logits.data))).sum(1).mean()
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert gradcheck(lambda x: ops.softmax_cross_entropy(x, labels, smoothing), logits)
        if not smoothing:
            np.testing.assert_array_equal(host(logits.grad)[1], [0, 0, 0])

    @pytest.mark.parametrize("row", [[np.inf, 0.0], [-np.inf, -np.inf], [np.nan, 1.0]])
    def test_an_example_of_weight_0_has_no_gradient(self, xp, row):
        logits = Tensor(xp.asarray([row, [1.0, 2.0]]), requires_grad=True)
        with np.errstate(invalid="ignore"):
            loss = ops.softmax_cross_entropy(logits, xp.asarray([[0.0, 0.0], [1.0, 0.0]]))
        loss.backward()
        assert loss.item() == pytest.approx(np.log(1 + np.e) / 2)
        slope = np.e / (1 + np.e) / 2
        np.testing.assert_allclose(host(logits.grad), [[0, 0], [-slope, slope]], rtol=1e-12)

    @pytest.mark.gpu
    def test_label_out_of_range_has_no_weight(self):
        import cupy

        logits = tensor(cupy, 2, 3)
        loss = ops.softmax_cross_entropy(logits, cupy.asarray([0, 7]))
        loss.backward()
        np.testing.assert_array_equal(host(logits.grad)[1], [0, 0, 0])
