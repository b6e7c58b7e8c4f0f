"""Layers whose weights stay in shared memory: how they are dealt out, and that they are exact."""

from __future__ import annotations

import numpy as np
import pytest

from cupybnn.backends.cuda import resident
from cupybnn.backends.cuda.resident import Deal, Shape, choose
from cupybnn.deploy import digits as fixed

LIMIT = 232_448  # of a Hopper GPU


def test_many_rows_meet_wide_strips_and_few_rows_many_strips():
    hidden = Shape(4096, 512)
    assert (hidden.chunks, hidden.last) == (4, 4)
    for rows, units in ((64, 128), (128, 128), (1024, 256), (65_536, 256)):
        assert choose(hidden, rows, 132, LIMIT).units == units
    assert choose(hidden, 8192, 132, LIMIT) == Deal(256, 16, 8, 12)
    first = Shape(4096, 784, 1)
    assert (first.chunks, first.last) == (7, 1)
    assert choose(first, 65_536, 132, LIMIT) == Deal(192, 22, 6, 7)
    assert choose(Shape(4096, 784, 3), 8192, 132, LIMIT).strips == 64
    assert choose(Shape(10, 512, end=True), 65_536, 132, LIMIT) == Deal(10, 1, 132, 13)
    assert choose(Shape(10, 512, end=True), 64, 132, LIMIT).strips == 10


@pytest.mark.parametrize(("units", "width"), [(132 * 256 + 1, 128), (64, 10_000)])
def test_what_does_not_fit(units, width):
    assert choose(Shape(units, width), 1000, 132, LIMIT) is None


# --- on a GPU

ROWS = (1, 15, 64, 65, 129, 500)


def deals(weights, rows):
    """Every way to deal a layer out, with one worker and with several."""
    shape = weights.shape
    tiles = -(-rows // 64)
    for units in shape.strips:
        strips, stages = -(-shape.units // units), shape.stages(units, LIMIT)
        if stages and strips <= 132:
            for workers in {1, min(tiles, 132 // strips)}:
                yield Deal(units, strips, workers, stages)


def need_hopper():
    import cupy

    if not resident.runs_on(cupy.cuda.Device().id):
        pytest.skip("needs a Hopper GPU")
    return cupy


def unpacked(cupy, words, rows, units):
    from cupybnn.backends.devices import Device
    from cupybnn.packed import PackedMatrix

    ones = cupy.zeros(rows, np.int32)
    packed = PackedMatrix._of(words, ones, (rows, units), -1, Device("cuda", words.data.device_id))
    return packed.to_numpy().unpack(np.int8) > 0


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "units"), [(4096, 512), (1030, 300), (200, 1111), (1, 1)])
def test_signs_times_signs(inputs, units):
    cupy = need_hopper()
    from cupybnn.backends.cuda.packing import words_shape
    from cupybnn.packed import pack

    rng = np.random.default_rng(inputs)
    weight = rng.integers(0, 2, (inputs, units)) * 2 - 1
    spread = 2 * int(inputs**0.5)
    threshold = rng.integers(-spread, spread + 1, units).astype(np.int32)
    threshold[:1] = np.iinfo(np.int32).max
    threshold[-1] = -inputs
    flip = rng.random(units) < 0.5
    packed = pack(cupy.asarray(weight.astype(np.int8)), axis=-2)
    layer = resident.Weights.of_signs(packed, cupy.asarray(threshold), cupy.asarray(flip), 0)
    for rows in ROWS:
        x = rng.integers(0, 2, (rows, inputs)) * 2 - 1
        expected = (x @ weight >= threshold) != flip
        signs = pack(cupy.asarray(x.astype(np.int8)))
        for deal in deals(layer, rows):
            out = cupy.zeros(words_shape(1, rows, units), np.uint32)
            ones, cleared = cupy.zeros(rows, np.int32), cupy.ones(rows, np.int32)
            counts = signs.popcounts, ones, cleared
            layer.launch(rows, signs.words, out, ones=counts, deal=deal)(0)
            np.testing.assert_array_equal(unpacked(cupy, out, rows, units), expected, str(deal))
            np.testing.assert_array_equal(ones.get(), expected.sum(1), str(deal))
            assert not cleared.any()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("inputs", "units"), [(784, 600), (16, 33), (1200, 64)])
def test_pixels_times_digits(inputs, units, count):
    cupy = need_hopper()
    from cupybnn.backends.cuda.byte_product import PixelProduct
    from cupybnn.backends.cuda.packing import words_shape

    rng = np.random.default_rng(inputs)
    most = 1 if count == 1 else fixed.MOST
    whole = rng.integers(-most, most + 1, (inputs, units))
    spread = most * 100 * inputs**0.5
    # Some are the exact sums of the first row, which reach them, and the next integers.
    row = rng.integers(0, 256, inputs)
    threshold = rng.normal(0, spread, units).astype(np.float32)
    threshold[::3] = np.nextafter((row @ whole)[::3].astype(np.float32), np.float32(np.inf))
    shift = np.zeros(units, np.int64)
    parts, least = fixed.pixel_digits(whole, shift, threshold, np.float32(1), count)
    flip = rng.random(units) < 0.5
    product = PixelProduct(parts, least, cupy.asarray(flip), 0)
    layer = resident.Weights.of_pixels(product.words, parts, product.threshold, product.flip, 0)
    for rows in ROWS:
        x = rng.integers(0, 256, (rows, inputs)).astype(np.uint8)
        x[0] = row
        x[-1] = 255
        expected = (x.astype(np.int64) @ whole >= threshold.astype(np.float64)) != flip
        there = cupy.asarray(x)
        words = resident.pixel_map(there.data.ptr, rows, inputs, inputs)
        for deal in deals(layer, rows):
            out = cupy.zeros(words_shape(1, rows, units), np.uint32)
            ones = cupy.zeros(rows, np.int32)
            counts = None, ones, None
            launch = layer.launch(rows, None, out, resident.MAP, ones=counts, deal=deal)
            launch(0, *words)
            np.testing.assert_array_equal(ones.get(), expected.sum(1), str(deal))
            np.testing.assert_array_equal(unpacked(cupy, out, rows, units), expected, str(deal))


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "units"), [(4096, 10), (300, 23), (1, 1)])
def test_signs_times_real_weights(inputs, units):
    cupy = need_hopper()
    from cupybnn.packed import pack

    rng = np.random.default_rng(inputs)
    whole = rng.integers(-fixed.MOST, fixed.MOST + 1, (inputs, units))
    whole[0] = fixed.MOST
    shift = rng.integers(-20, 20, units)
    add = rng.normal(size=units).astype(np.float32)
    steps = [("add", cupy.asarray(add)), ("relu", None)]
    layer = resident.Weights.of_end(whole, shift, steps, 0)
    for rows in ROWS:
        x = rng.integers(0, 2, (rows, inputs)) * 2 - 1
        exact = (x @ whole).astype(np.float32) * np.ldexp(1.0, -shift).astype(np.float32)
        expected = np.maximum(exact + add, np.float32(0))
        signs = pack(cupy.asarray(x.astype(np.int8)))
        for deal in deals(layer, rows):
            out = cupy.full((rows, units), np.nan, np.float32)
            counts = signs.popcounts, None, None
            launch = layer.launch(rows, signs.words, None, resident.OUT, ones=counts, deal=deal)
            launch(0, out.data.ptr)
            np.testing.assert_array_equal(out.get(), expected, str(deal))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 10), (5, 300), (3000, 10)])
def test_small_results_share_memory_and_none_is_given_twice(shape):
    cupy = pytest.importorskip("cupy")
    from cupybnn.backends.cuda.results import Results

    results = Results(shape)
    kept = [results.new(0) for _ in range(150)]
    for i, out in enumerate(kept):
        assert (out.shape, out.dtype) == (shape, np.float32)
        assert out.flags.c_contiguous
        out.fill(i)
    for i, out in enumerate(kept):
        assert (out.get() == i).all()
    memory = {out.data.mem.ptr for out in kept}
    assert len(memory) == {10: 3, 1500: 30, 30_000: 150}[int(np.prod(shape))]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        assert results.new(stream.ptr).data.mem.ptr not in memory


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["real", "binary"])
@pytest.mark.parametrize("sizes", [(784, 512, 300, 10), (50, 1030, 100, 64, 7)])
def test_networks_by_plans(sizes, first):
    cupy = need_hopper()
    from test_pixel_network import network

    from cupybnn import PackedNetwork
    from cupybnn.deploy.cuda_plan import ResidentPlan

    net = PackedNetwork.from_model(network(sizes, first, "real"), pixel_max=256)
    on_gpu = net.to("cuda")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (700, sizes[0])).astype(np.uint8)
    expected, there = net(pixels), cupy.asarray(pixels)
    for count in (65, 200, 699):
        many = [on_gpu(there[i % 2 : i % 2 + count]) for i in range(6)]  # aligned, or maybe not
        for i, got in enumerate(many):
            np.testing.assert_array_equal(got.get(), expected[i % 2 : i % 2 + count])
    assert all(
        isinstance(plan[0], ResidentPlan) for plan in on_gpu._forward.cuda._graphs._values.values()
    )
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        others = [on_gpu(there[:200]) for _ in range(4)]
    here = [on_gpu(there[:200]) for _ in range(4)]
    stream.synchronize()
    for got in [*others, *here]:
        np.testing.assert_array_equal(got.get(), expected[:200])
