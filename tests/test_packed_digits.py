"""Real weights as digits and bit planes: the arithmetic on the host, against Python's integers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from cupybnn.deploy.digits import (
    CONSTANTS,
    MOST,
    PLANES,
    fixed_point,
    pixel_digits,
    sign_planes,
)


def weights(seed: int, inputs: int = 37, units: int = 9) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(inputs, units)) * 10.0 ** rng.integers(-6, 6, units)
    w[:, 0], w[:, 1] = 0, 1
    w[:, 2] = np.where(rng.random(inputs) < 0.5, -1, 1)
    return w.astype(np.float32)


def test_whole_weights_are_the_weights_but_for_their_last_bits():
    w = weights(0)
    whole, shift = fixed_point(w)
    back = np.ldexp(whole.astype(np.float64), -shift)
    assert np.abs(whole).max() <= MOST
    assert (np.abs(back - w) <= 2.0**-23 * np.abs(w).max(0)).all()
    np.testing.assert_array_equal(back[:, :3], w[:, :3])
    for greatest in (MOST, MOST + 1, 2**23 - 1, 2**22):
        whole, shift = fixed_point(np.array([[greatest], [2]], np.float32))
        assert abs(int(whole[0, 0])) <= MOST
        assert np.ldexp(float(whole[1, 0]), -int(shift[0])) == 2


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("factor", [np.float32(1 / 255), np.float32(1 / 16)])
def test_digits_and_thresholds_decide_as_exact_sums_do(digits, factor):
    rng = np.random.default_rng(digits)
    w = weights(1) if digits == 3 else np.where(weights(1) >= 0, 1, -1).astype(np.float32)
    inputs, units = w.shape
    if digits == 3:
        whole, shift = fixed_point(w)
    else:
        whole, shift = w.astype(np.int64), np.zeros(units, np.int64)
    pixels = rng.integers(0, 256, (200, inputs))
    sums = pixels @ whole
    # Thresholds at a sum that comes, just beside it, and beyond all.
    scaled = [Fraction(int(sums[i, i])) * Fraction(float(factor)) / Fraction(2) ** int(shift[i])
              for i in range(units)]  # fmt: skip
    threshold = np.array([float(s) for s in scaled], np.float32)
    threshold[3], threshold[4] = np.inf, -np.inf
    threshold[5] = np.nextafter(threshold[5], np.float32(np.inf))
    threshold[6] = np.nan
    parts, least = pixel_digits(whole, shift, threshold, factor, digits)
    assert parts.shape == (digits, units, inputs + 2)
    line = np.concatenate([pixels, np.tile(CONSTANTS, (200, 1))], axis=1)
    total = np.zeros((200, units), np.int64)
    for i, digit in enumerate(parts):
        total = (total >> 8 if i else total) + line @ digit.T.astype(np.int64)
        assert np.abs(total).max() < 2**30
    assert np.abs(total - least).max() < 2**31
    for row in range(200):
        for unit in range(units):
            exact = Fraction(int(sums[row, unit])) * Fraction(float(factor))
            exact /= Fraction(2) ** int(shift[unit])
            t = float(threshold[unit])
            above = t == -np.inf or (np.isfinite(t) and exact >= Fraction(t))
            assert (total[row, unit] >= least[unit]) == above


def test_planes_add_up_to_the_weights():
    whole, _ = fixed_point(weights(2))
    signs = np.where(sign_planes(whole), 1, -1).astype(np.int64)
    units = whole.shape[1]
    assert signs.shape == (len(whole), PLANES * units + 1)
    a = np.where(np.random.default_rng(0).random((50, len(whole))) < 0.5, 1, -1)
    products = a @ signs
    each = products[:, :-1].reshape(50, units, PLANES) @ (1 << np.arange(PLANES))
    np.testing.assert_array_equal((each - products[:, -1:]) // 2, a @ whole)


# --- on a GPU

SHAPES = [(1, 1, 1), (3, 5, 31), (65, 126, 33), (64, 127, 100), (130, 784, 512), (200, 785, 1025),
          (1000, 300, 4096), (16, 1000, 1024), (33000, 784, 130)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_by_digits_are_exact(shape, digits):
    import cupy

    from cupybnn import pack
    from cupybnn.backends.cuda.byte_product import PixelProduct, runs_on
    from cupybnn.backends.cuda.compiler import architecture

    if not runs_on(architecture(0)):
        pytest.skip("the product of bytes needs a Hopper GPU")
    rows, inputs, units = shape
    rng = np.random.default_rng(rows)
    if digits == 3:
        whole, shift = fixed_point(rng.normal(size=(inputs, units)).astype(np.float32))
    else:
        whole, shift = rng.integers(0, 2, (inputs, units)) * 2 - 1, np.zeros(units, np.int64)
    pixels = rng.integers(0, 256, (rows, inputs)).astype(np.uint8)
    pixels[rows // 2] = 255
    sums = (pixels.astype(np.float64) @ whole).astype(np.int64)  # below 2**53
    threshold = np.ldexp(sums[rows // 3].astype(np.float64), -shift).astype(np.float32)
    threshold += rng.normal(size=units).astype(np.float32) * (np.arange(units) % 3)
    threshold[::7], threshold[1::9] = np.inf, -np.inf
    flip = rng.random(units) < 0.5
    parts, least = pixel_digits(whole, shift, threshold, np.float32(1), digits)
    product = PixelProduct(parts, least, cupy.asarray(flip), 0)
    lines = product.lines_like(rows)
    lines[...] = 0xFFFFFFFF
    x = cupy.asarray(pixels)
    for there in (x, cupy.concatenate([x[:1], x])[1:]):  # aligned, and maybe not
        cleared = cupy.full(7, 5, np.int32)
        product.arrangement(lines, rows, cleared)(there, cupy.cuda.get_current_stream().ptr)
        assert not cleared.any()
        words, ones = product(lines, rows)
        # As numbers, which float64 holds exactly: threshold * 2**shift.
        above = sums >= np.ldexp(threshold.astype(np.float64), shift)
        expected = pack(cupy.asarray(above != flip))
        np.testing.assert_array_equal(ones.get(), expected.popcounts.get())
        np.testing.assert_array_equal(words.get(), expected.words.get())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 33, 3), (130, 512, 10), (1000, 4096, 10),
                                   (70, 1025, 64), (2, 32767, 2)])  # fmt: skip
def test_signs_by_planes_are_exact_but_for_one_rounding(shape):
    import cupy

    from cupybnn import pack
    from cupybnn.deploy.cuda_products import plane_product
    from cupybnn.deploy.layers import PackedLayer

    rows, inputs, units = shape
    rng = np.random.default_rng(rows)
    weight = rng.normal(size=(inputs, units)).astype(np.float32)
    product = plane_product(PackedLayer("last", "real", cupy.asarray(weight)))
    whole, shift = fixed_point(weight)
    signs = np.where(rng.random((rows, inputs)) < 0.5, -1, 1)
    got = product(pack(cupy.asarray(signs.astype(np.int8))))
    expected = np.ldexp((signs @ whole).astype(np.float32), -shift)
    np.testing.assert_array_equal(got.get(), expected)
    np.testing.assert_allclose(got.get(), signs @ weight.astype(np.float64), 1e-6, 1e-4)


@pytest.mark.parametrize(("layer", "reason"), [
    (np.full((3, 65), 1, np.float32), "many units"), (np.full((2, 3), np.inf, np.float32), "inf"),
    (np.full((2, 3), 1e-41, np.float32), "steps that float32 lacks"),
    (np.ones((1 << 15, 1), np.float32), "more signs than an int16 counts"),
])  # fmt: skip
def test_other_layers_have_no_planes(layer, reason):
    pytest.importorskip("cupy")
    from cupybnn.deploy.cuda_products import plane_product
    from cupybnn.deploy.layers import PackedLayer

    assert plane_product(PackedLayer("last", "real", layer)) is None, reason
