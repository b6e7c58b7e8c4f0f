"""Augmentation: the sampling against SciPy's, each deformation by what it does, repeatability."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import host
from hypothesis import given, settings
from hypothesis import strategies as st

from cupybnn.data.augmentation import Augmentation, sample

SHAPE = (28, 20)
CENTRE = np.array([13.5, 9.5])
AMOUNTS = {
    "shift": 2.0,
    "rotation": 12.0,
    "scale": 0.15,
    "shear": 0.15,
    "elastic": 1.0,
    "flip": True,
}


def coordinates(xp, batch=2000, shape=SHAPE, seed=5, number=3, **amounts):
    both = Augmentation(**amounts).coordinates(batch, shape, seed, number, xp)
    return np.stack([host(c) for c in both], axis=-1)


def linear_maps(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and image of the center for each image, from three pixels; rows before columns."""
    down, right = points[:, 1, 0] - points[:, 0, 0], points[:, 0, 1] - points[:, 0, 0]
    matrix = np.stack([down, right], axis=-1).astype(np.float64)
    return matrix, points.mean(axis=(1, 2), dtype=np.float64) - CENTRE


class TestSample:
    @settings(max_examples=40, deadline=None)
    @given(
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
        st.sampled_from([np.float32, np.float64]),
        st.integers(0, 2**32 - 1),
    )
    def test_against_scipy(self, shape, dtype, seed):
        from scipy.ndimage import map_coordinates

        random = np.random.default_rng(seed)
        images = random.random(shape).astype(dtype)
        positions = random.uniform(-3, 12, (2, shape[0], 5, 7))
        positions[:, :, :2] = np.round(positions[:, :, :2])  # middles of pixels, and the border
        got = sample(images, *positions)
        assert got.dtype == dtype
        for image, result, rows, columns in zip(images, got, *positions, strict=True):
            expected = map_coordinates(
                image.astype(np.float64), [rows, columns], order=1, mode="grid-constant"
            )
            np.testing.assert_allclose(
                result, expected, atol=1e-6 if dtype == np.float32 else 1e-12
            )

    def test_whole_positions_are_exact(self, xp):
        images = xp.asarray(np.random.default_rng(0).random((3, 5, 6), np.float32))
        rows, columns = (xp.asarray(c) for c in np.mgrid[0:5, 0:6].astype(np.float32))
        rows, columns = (xp.broadcast_to(c, images.shape) for c in (rows, columns))
        np.testing.assert_array_equal(host(sample(images, rows, columns)), host(images))
        moved = host(sample(images, rows - 2, columns + 1))
        np.testing.assert_array_equal(moved[:, 2:, :-1], host(images)[:, :-2, 1:])
        assert not moved[:, :2].any()
        assert not moved[:, :, -1].any()

    def test_far_outside_is_zero(self, xp):
        images = xp.ones((1, 4, 4), np.float32)
        far = xp.asarray(np.array([[-1e9, 1e9, -1.0, 4.0, 3.0]], np.float32))
        np.testing.assert_array_equal(host(sample(images, far, far)), [[0, 0, 0, 0, 1]])


class TestDeformations:
    def test_shift(self, xp):
        matrix, moved = linear_maps(coordinates(xp, shift=2.0))
        np.testing.assert_allclose(matrix, np.broadcast_to(np.eye(2), matrix.shape), atol=1e-5)
        assert (abs(moved) <= 2.0001).all()
        assert (abs(moved).max(axis=0) > 1.98).all()
        assert abs(np.corrcoef(moved.T)[0, 1]) < 0.1

    def test_rotation(self, xp):
        matrix, moved = linear_maps(coordinates(xp, rotation=12.0))
        np.testing.assert_allclose(moved, 0, atol=1e-5)
        np.testing.assert_allclose(
            matrix @ matrix.transpose(0, 2, 1), [np.eye(2)] * 2000, atol=1e-5
        )
        angles = np.degrees(np.arctan2(matrix[:, 0, 1], matrix[:, 0, 0]))
        assert -12.001 < angles.min() < -11.9
        assert 11.9 < angles.max() < 12.001

    def test_scale(self, xp):
        matrix, moved = linear_maps(coordinates(xp, scale=0.2))
        np.testing.assert_allclose(moved, 0, atol=1e-5)
        np.testing.assert_allclose(matrix[:, [0, 1], [1, 0]], 0, atol=1e-6)
        factors = 1 / matrix[:, [0, 1], [0, 1]]
        assert (factors.min(axis=0) > 0.7999).all()
        assert (factors.min(axis=0) < 0.81).all()
        assert (factors.max(axis=0) < 1.2001).all()
        assert (factors.max(axis=0) > 1.19).all()

    def test_shear(self, xp):
        matrix, moved = linear_maps(coordinates(xp, shear=0.3))
        np.testing.assert_allclose(moved, 0, atol=1e-5)
        np.testing.assert_allclose(matrix[:, [0, 1, 0], [0, 1, 1]], [[1, 1, 0]] * 2000, atol=1e-6)
        share = matrix[:, 1, 0]
        assert -0.3001 < share.min() < -0.29
        assert 0.29 < share.max() < 0.3001

    def test_elastic(self, xp):
        field = coordinates(xp, elastic=1.5) - np.moveaxis(np.mgrid[0:28, 0:20], 0, -1)
        np.testing.assert_allclose(field.std(axis=0), 1.5, rtol=0.1)  # at each pixel
        np.testing.assert_allclose(field.mean(axis=0), 0, atol=0.2)

        # Smooth: neighbors move alike, far ones on their own.
        def alike(rows: int) -> float:
            return float((field[:, rows:] * field[:, : 28 - rows]).mean() / 1.5**2)

        assert alike(1) > 0.95
        assert 0.6 < alike(4) < 0.9
        assert abs(alike(16)) < 0.05

    def test_flip(self, xp):
        images = np.random.default_rng(0).random((2000, 560), np.float32)
        got = host(Augmentation(flip=True)(xp.asarray(images), SHAPE, 5, 3)).reshape(-1, *SHAPE)
        images = images.reshape(got.shape)
        same = (got == images).all(axis=(1, 2))
        assert 0.45 < same.mean() < 0.55
        np.testing.assert_array_equal(got[~same], images[~same][:, :, ::-1])

    def test_all_together_and_each_image_its_own(self, xp):
        images = np.zeros((50, 28, 20), np.float32)
        images[:, 8:20, 6:14] = 1
        images = xp.asarray(images.reshape(50, -1))
        got = host(Augmentation(**AMOUNTS)(images, SHAPE, 1, 2))
        assert got.shape == images.shape
        assert got.dtype == np.float32
        assert got.min() >= 0
        assert got.max() <= 1
        assert len(np.unique(got, axis=0)) == 50
        # A shape in the middle stays in the middle, and about as large.
        mass = got.sum(axis=1)
        assert mass.min() > 0.4 * 96
        assert mass.max() < 1.7 * 96
        rows = (got.reshape(50, 28, 20).sum(axis=2) @ np.arange(28)) / mass
        assert abs(rows - 13.5).max() < 5

    def test_a_deformation_does_not_change_the_others(self):
        alone, _ = linear_maps(coordinates(np, batch=20, rotation=10.0))
        with_shift, _ = linear_maps(coordinates(np, batch=20, rotation=10.0, shift=3.0))
        np.testing.assert_allclose(alone, with_shift, atol=1e-5)


class TestRepeatable:
    def test_seed_and_number_decide(self):
        augmentation = Augmentation(**AMOUNTS)
        images = np.random.default_rng(0).random((4, 64), np.float32)
        first = augmentation(images, (8, 8), 1, 7)
        np.testing.assert_array_equal(first, augmentation(images, (8, 8), 1, 7))
        assert (first != augmentation(images, (8, 8), 1, 8)).any()
        assert (first != augmentation(images, (8, 8), 2, 7)).any()

    @pytest.mark.gpu
    def test_the_same_on_both_backends(self):
        import cupy

        augmentation = Augmentation(**AMOUNTS)
        images = np.random.default_rng(0).random((16, 560), np.float32)
        got = augmentation(cupy.asarray(images), SHAPE, 1, 7)
        np.testing.assert_allclose(got.get(), augmentation(images, SHAPE, 1, 7), atol=1e-4)

    def test_positions_that_are_no_numbers_are_outside(self, xp):
        nowhere = xp.asarray([[np.nan, np.inf, -np.inf, 1e30, 1]], np.float32)
        images = xp.ones((1, 3, 3), np.float32)
        got = sample(images, nowhere, xp.ones_like(nowhere))
        np.testing.assert_array_equal(host(got), [[0, 0, 0, 0, 1]])

    def test_off(self):
        images = np.random.default_rng(0).random((4, 64), np.float32)
        assert not Augmentation()
        assert Augmentation()(images, (8, 8), 0, 0) is images
        assert Augmentation(shift=1.0)(images[:0], (8, 8), 0, 0).shape == (0, 64)

    def test_float64(self):
        images = np.random.default_rng(0).random((4, 64))
        assert Augmentation(**AMOUNTS)(images, (8, 8), 0, 0).dtype == np.float64


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"shift": -1.0}, "The 'shift' of an Augmentation must be finite and at least 0; got -1.0"),
        ({"elastic": float("nan")}, "The 'elastic' .* got nan"),
        ({"rotation": float("inf")}, "The 'rotation' .* got inf"),
        ({"scale": 1.0}, r"The 'scale' of an Augmentation must be in \[0, 1\); got 1.0"),
    ],
)
def test_bad_amounts(amounts, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**amounts)
