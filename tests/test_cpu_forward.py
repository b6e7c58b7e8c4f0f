"""Pixels through a packed network by the compiled kernels of the CPU, whose sums are exact."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from test_packed_network import hidden, settle
from test_pixel_network import exact_real, network

from cupybnn import PackedNetwork, nn, settings
from cupybnn.deploy import digits
from cupybnn.deploy.cpu_forward import CpuForward
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PackedLayer

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(settings, "cpu_kernels", lambda: True)
    monkeypatch.setattr("cupybnn.deploy.forward._LEAST_WEIGHTS", 0)


def pixels(rows: int, inputs: int) -> np.ndarray:
    x = np.random.default_rng(rows).integers(0, 256, (rows, inputs)).astype(np.uint8)
    x[-1] = 255
    return x


@pytest.mark.slow  # the first one compiles the kernels
@pytest.mark.parametrize("first", ["real", "binary"])
@pytest.mark.parametrize(
    "sizes", [(784, 130, 70, 10), (50, 33, 7), (16, 64, 100, 65, 3), (1, 1, 1)]
)
def test_logits_are_exact(sizes, first, monkeypatch):
    last = "binary" if sizes[0] == 16 else "real"
    net = PackedNetwork.from_model(network(sizes, first, last), pixel_max=256)
    x = pixels(70, sizes[0])
    monkeypatch.setattr(settings, "cpu_kernels", lambda: False)
    expected = net(x)
    monkeypatch.setattr(settings, "cpu_kernels", lambda: True)
    for rows in (1, 3, 4, 5, 33, 70):
        np.testing.assert_array_equal(net(x[:rows]), expected[:rows])
    assert isinstance(net._forward.cpu, CpuForward)
    np.testing.assert_array_equal(net(x[::2]), expected[::2])  # rows apart
    np.testing.assert_array_equal(net(np.asfortranarray(x)), expected)
    np.testing.assert_array_equal(net(x[7]), expected[7])
    assert net(x[:0]).shape == (0, sizes[-1])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(net))(x), expected)


@pytest.mark.parametrize(("inputs", "units"), [(784, 70), (3, 5), (2000, 3)])
def test_sums_near_a_threshold(inputs, units):
    """Thresholds are sums of an image, and float32 next to them: the low parts must decide."""
    rng = np.random.default_rng(inputs)
    weight = rng.normal(size=(inputs, units)).astype(np.float32)
    x = pixels(40, inputs)
    whole, shift = digits.fixed_point(weight)
    sums = x.astype(np.int64) @ whole
    threshold = np.ldexp(sums[np.arange(units) % 40, np.arange(units)], -shift).astype(np.float32)
    threshold[1::3] = np.nextafter(threshold[1::3], np.float32(np.inf))
    threshold[2::3] = np.nextafter(threshold[2::3], np.float32(-np.inf))
    threshold[-3:] = np.inf, -np.inf, np.nan
    flip = rng.random(units) < 0.5
    layers = [
        PackedLayer("first", "real", weight, (), threshold, flip),
        PackedLayer("last", "real", np.eye(units, dtype=np.float32)),
    ]
    forward = CpuForward(layers, InputSpec(inputs, None, 1.0))
    exact = np.ldexp(sums.astype(np.float64), -shift)
    with np.errstate(invalid="ignore"):
        expected = np.where((exact >= threshold) != flip, 1, -1)
    np.testing.assert_array_equal(forward(x), expected)
    for rows in range(1, 5):
        np.testing.assert_array_equal(forward(x[:rows]), expected[:rows])


def test_steps_follow():
    chain = [exact_real(30, 40, 1), nn.BatchNorm(40), nn.Sign(), *hidden(40, 20, 1)]
    end = [nn.BinaryLinear(20, 6, rng=2), nn.Scale(0.5), nn.BatchNorm(6), nn.ReLU()]
    net = PackedNetwork.from_model(settle(nn.Sequential(*chain, *end)), pixel_max=256)
    x = pixels(9, 30)
    scaled = np.multiply(x, np.float32(1 / 256), dtype=np.float32)
    np.testing.assert_array_equal(net(x), net(scaled))


@pytest.mark.parametrize(
    ("what", "why"),
    [("not finite", "not finite"), ("numbers", "for pixels"), ("real between", "between"),
     ("no logits", "for logits"), ("too wide", "32 bits")],
)  # fmt: skip
def test_other_networks_go_another_way(what, why):
    weight = np.full((4, 3), np.nan if what == "not finite" else 1, np.float32)
    if what == "too wide":
        weight = np.full((1 << 19, 1), 0.7, np.float32)
    units = weight.shape[1]
    first = PackedLayer(
        "first", "real", weight, (), np.zeros(units, np.float32), np.zeros(units, bool)
    )
    last = PackedLayer("last", "real", np.ones((units, 2), np.float32))
    layers = [first, last]
    if what == "real between":
        between = np.ones((units, units), np.float32)
        layers.insert(1, PackedLayer("between", "real", between, (), first.threshold, first.flip))
    if what == "no logits":
        layers = [first]
    spec = InputSpec(len(weight), None, None if what == "numbers" else 1.0)
    with pytest.raises(ValueError, match=why):
        CpuForward(layers, spec)
    if what in ("not finite", "real between"):
        net = PackedNetwork(layers, spec)
        with np.errstate(invalid="ignore"):
            assert net(np.ones((2, 4), np.uint8)).shape == (2, 2)
        assert net._forward.cpu is False


def test_a_small_network_does_not_import_them(monkeypatch):
    monkeypatch.undo()
    net = PackedNetwork.from_model(network((30, 20, 3), "real", "real"), pixel_max=256)
    net(pixels(5, 30))
    assert net._forward.cpu is None
