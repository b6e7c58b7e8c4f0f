"""Straight-through estimators against formulas written here with NumPy alone, in float64.

Finite differences cannot test them: a pseudo-gradient is not the derivative of the forward pass.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from arrays import host

from cupybnn import ops
from cupybnn.autograd import Tensor
from cupybnn.ops import quantizer as table

BESIDE = [np.nextafter(1, 0), np.nextafter(1, 2)]
POINTS = np.array(
    [0.0, -0.0, 1.0, -1.0, *BESIDE, *np.negative(BESIDE), 0.5, -0.25, 1e-300, -1e-300, 3, -40, 1e4]
)
GRADS = np.random.default_rng(0).uniform(-3, 3, POINTS.shape)


def reference_ste(x, g, window=1.0):
    return g if -window <= x <= window else 0.0


def reference_clipped(x, g, limit=1.0):
    return min(max(g, -limit), limit)


def reference_approx(x, g):
    return g * (2 - 2 * abs(x)) if abs(x) <= 1 else 0.0


def reference_swish(x, g, b=5.0):
    if abs(b * x) > 700:
        return 0.0  # cosh would overflow; its reciprocal is below 1e-300
    return g * b * (2 - b * x * math.tanh(b * x / 2)) / (1 + math.cosh(b * x))


def reference_ede(x, g, progress=0.0):
    t = 0.1 * 10 ** (2 * progress)
    return g * max(1 / t, 1) * t * (1 - math.tanh(t * x) ** 2)


def sharpened():
    quantizer = ops.EdeSign()
    quantizer.progress = 1.0
    return quantizer


CASES = {
    "ste_sign": ("ste_sign", reference_ste),
    "hard_tanh": ("hard_tanh", reference_ste),
    "ste_sign of window 0.5": (
        ops.SteSign(0.5),
        lambda x, g: reference_ste(x, g, window=0.5),
    ),
    "clipped_grad": ("clipped_grad", reference_clipped),
    "clipped_grad at 2": (ops.ClippedGrad(2), lambda x, g: reference_clipped(x, g, 2)),
    "identity": ("identity", lambda x, g: g),
    "approx_sign": ("approx_sign", reference_approx),
    "swish_sign": ("swish_sign", reference_swish),
    "swish_sign of beta 2": (ops.SwishSign(2), lambda x, g: reference_swish(x, g, 2)),
    "magnitude_aware_sign": ("magnitude_aware_sign", reference_ste),
    "stochastic_sign": ("stochastic_sign", reference_ste),
    "ede_sign": ("ede_sign", reference_ede),
    "ede_sign at the end": (sharpened(), lambda x, g: reference_ede(x, g, 1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_pseudo_gradient(xp, case):
    quantizer, reference = CASES[case]
    x = Tensor(xp.asarray(POINTS), requires_grad=True)
    ops.sign(x, quantizer).backward(xp.asarray(GRADS))
    expected = [reference(a, g) for a, g in zip(POINTS, GRADS, strict=True)]
    np.testing.assert_allclose(host(x.grad), expected, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("name", ops.quantizer_names())
def test_forward_is_the_sign(xp, name):
    points = np.append(POINTS, [np.nan, np.inf, -np.inf])
    y = ops.sign(Tensor(xp.asarray(points)), name, training=False)
    np.testing.assert_array_equal(host(y.data), np.where(points >= 0, 1.0, -1.0))
    assert y.two_valued


@pytest.mark.parametrize("name", ops.quantizer_names())
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_is_kept(xp, name, dtype):
    x = Tensor(xp.linspace(-2, 2, 9, dtype=dtype), requires_grad=True)
    y = ops.sign(x, name)
    assert y.dtype == dtype
    y.sum().backward()  # the engine checks the gradient's dtype


@pytest.mark.parametrize("name", ops.quantizer_names())
def test_window_is_where_the_pseudo_gradient_ends(name):
    quantizer = ops.get_quantizer(name)
    inside, outside = quantizer.pseudo_gradient(np.array([0.999, 1.001]), np.ones(2))
    if quantizer.window is None:
        assert outside != 0
    else:
        assert quantizer.window == 1
        assert inside != 0
        assert outside == 0


@pytest.mark.parametrize("name", ops.quantizer_names())
def test_docstring_says_formula_picture_and_source(name):
    text = type(ops.get_quantizer(name)).__doc__
    assert "Forward: " in text
    assert "Pseudo-gradient:" in text
    assert "::" in text
    assert "-1         0         1" in text
    source = text.partition("Notes\n    -----\n")[2]
    assert re.match(r"\s+[\w ]+( et al\.|, [\w, ]+): \w.*\b20\d\d\b", source, re.DOTALL)


@pytest.mark.parametrize("name", ops.quantizer_names())
def test_plot(name):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = ops.get_quantizer(name).plot()
    forward, pseudo = axes.get_lines()
    np.testing.assert_array_equal(np.unique(forward.get_ydata()), [-1, 1])
    x = pseudo.get_xdata()
    expected = ops.get_quantizer(name).pseudo_gradient(x, np.ones_like(x))
    np.testing.assert_array_equal(pseudo.get_ydata(), expected)
    matplotlib.pyplot.close(axes.figure)


def test_saved_array_and_gradient_are_not_written_to(xp):
    x, grad = xp.asarray(POINTS), xp.asarray(GRADS)
    for name in ops.quantizer_names():
        out = ops.get_quantizer(name).pseudo_gradient(x, grad)
        assert not xp.may_share_memory(out, grad)
    np.testing.assert_array_equal(host(x), POINTS)
    np.testing.assert_array_equal(host(grad), GRADS)


def test_sign_of_signs_is_itself():
    y = ops.sign(Tensor([0.5, -2.0], requires_grad=True))
    assert ops.sign(y) is y
    for view in (y.reshape(2, 1), y[:1], y.T):
        assert view.two_valued
    for other in (y * 2, y + y, y.relu()):
        assert not other.two_valued


def test_magnitude_aware_sign_scales_columns(xp):
    w = Tensor(xp.asarray([[0.5, -3.0], [-1.5, 1.0]]), requires_grad=True)
    y = ops.quantize(w, "magnitude_aware_sign")
    np.testing.assert_array_equal(host(y.data), [[1, -2], [-1, 2]])
    y.backward(xp.asarray([[1.0, 1.0], [10.0, 10.0]]))
    np.testing.assert_array_equal(host(w.grad), [[1, 0], [0, 20]])


class TestStochasticSign:
    def test_probability(self, xp):
        x = np.repeat([-2, -1, -0.5, 0, 0.8, 1, 2], 10_000)
        y = host(ops.sign(Tensor(xp.asarray(x)), ops.StochasticSign(seed=4)).data)
        np.testing.assert_array_equal(np.unique(y), [-1, 1])
        share = (y.reshape(7, -1) > 0).mean(1)
        np.testing.assert_array_equal(share[[0, 1, 5, 6]], [0, 0, 1, 1])
        np.testing.assert_allclose(share[2:5], [0.25, 0.5, 0.9], atol=0.025)

    def test_draws_anew_but_repeatably(self, xp):
        x = Tensor(xp.zeros(64))
        quantizer, again = (ops.StochasticSign(seed=4) for _ in range(2))
        first, second = (host(ops.sign(x, quantizer).data) for _ in range(2))
        assert (first != second).any()
        np.testing.assert_array_equal(host(ops.sign(x, again).data), first)


class TestRegistry:
    def test_own_quantizer(self, monkeypatch):
        monkeypatch.setattr(table, "_REGISTRY", dict(table._REGISTRY))

        @ops.register_quantizer("doubled")
        class Doubled(ops.Quantizer):
            def pseudo_gradient(self, x, grad):
                return 2 * grad

        assert "doubled" in ops.quantizer_names()
        x = Tensor([5.0], requires_grad=True)
        ops.sign(x, "doubled").backward(np.ones(1, "f"))
        assert x.grad == [2]
        with pytest.raises(ValueError, match="'doubled' is already registered"):
            ops.register_quantizer("doubled")(Doubled)

    def test_unknown_name_lists_the_known_ones(self):
        with pytest.raises(ValueError, match=r"approx_sign, .*ste_sign, .* got 'signum'"):
            ops.get_quantizer("signum")

    def test_instance_is_taken_as_it_is(self):
        quantizer = ops.SteSign(0.5)
        assert ops.get_quantizer(quantizer) is quantizer

    def test_window_is_checked(self):
        with pytest.raises(ValueError, match="'window' of ste_sign must be positive; got 0"):
            ops.SteSign(0)
