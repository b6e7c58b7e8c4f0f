"""The order of images: a known function, alike on both backends, and as good as a random one.

Each statistic is of fixed seeds, and compared with what random permutations would give.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from arrays import host

from cupybnn import backends
from cupybnn.backends.devices import CPU, Device
from cupybnn.backends.order import Order
from cupybnn.backends.random import random_words

KEY = 2**63 + 987_654_321
SIZES = [1, 2, 3, 5, 31, 32, 33, 1437, 60_000, 65_536, 65_537]


def fill(order: Order, steps: int, rows: int, step=0, batch=None, first=0, xp=np) -> np.ndarray:
    """Return the images of steps; by default a step is an epoch."""
    out = xp.full((steps, rows), -1, np.int32)
    backend = backends.get(CPU if xp is np else Device("cuda"))
    backend.fill_order(order, step, order.images if batch is None else batch, first, out)
    return host(out)


def by_the_definition(order: Order, position: int) -> int:
    """Compute one image with the integers of Python."""
    epoch, x = divmod(position, order.images)
    words = [int(word) for word in random_words((16,), order.seed, epoch, np)]
    if order.shuffle:
        bits = max(5, (order.images - 1).bit_length())
        sizes = bits // 2, bits - bits // 2
        while True:
            halves = list(divmod((x + words[12]) % 2**bits, 2 ** sizes[1]))
            for i in range(12):
                h = (halves[(i + 1) % 2] ^ words[i]) * 0x85EBCA6B % 2**32
                h = (h ^ h >> 15) * 0xC2B2AE35 % 2**32
                halves[i % 2] ^= h >> 32 - sizes[i % 2]
            x = halves[0] * 2 ** sizes[1] + halves[1]
            if x < order.images:
                break
    if order.ends is None:
        return x
    bits = 53 - order.images.bit_length()
    point = x + (words[13] * 2**32 + words[14] >> 64 - bits) / 2**bits
    return min(int((order.ends <= point).sum()), order.last)


def weighted(count: int, shuffle: bool, whole: bool) -> Order:
    random = np.random.default_rng(count)
    weights = random.integers(0, 4, count) if whole else random.exponential(size=count)
    ends = np.cumsum(weights * (random.random(count) < 0.7), dtype=np.float64)
    images = max(round(ends[-1]), 1)
    ends *= images / ends[-1]
    return Order(images, KEY, shuffle, ends, int(np.searchsorted(ends, ends[-1])))


def orders() -> list[Order]:
    found = [Order(n, KEY, shuffle) for n in (*SIZES, 2**31 - 1) for shuffle in (True, False)]
    return found + [weighted(n, s, w) for n in (9, 1000) for s in (True, False) for w in (1, 0)]


def test_images_are_those_of_the_definition():
    for order in orders():
        for step, batch, first, shape in ((0, 4, 0, (3, 4)), (10**7, 999, 997, (2, 5))):
            found = fill(order, *shape, step, batch, first)
            positions = [
                (step + i) * batch + (first + j) % batch
                for i in range(shape[0])
                for j in range(shape[1])
            ]
            assert found.reshape(-1).tolist() == [by_the_definition(order, p) for p in positions]


@pytest.mark.gpu
def test_the_device_computes_the_same():
    import cupy

    for order in orders():
        ends = None if order.ends is None else cupy.asarray(order.ends)
        there = Order(order.images, order.seed, order.shuffle, ends, order.last)
        for shape, where in (
            ((1024, 256), (0, 512, 256)),  # a round of the second of two ranks
            ((300, 5), (10**9, 7, 5)),  # beyond the end of a batch comes its first
            ((2, 70_000), (3, 70_000, 0)),
            ((1025, 1023), (5, 1024, 1)),  # more images than threads
            ((1, 1), (0, 1, 0)),
            ((4, 0), (0, 8, 8)),
        ):
            ours, expected = fill(there, *shape, *where, xp=cupy), fill(order, *shape, *where)
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("images", SIZES)
def test_an_epoch_is_a_permutation(images):
    epochs = 1 if images > 5000 else 40
    for epoch in fill(Order(images, KEY, True), epochs, images):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(images))


# Statistics --------------------------------------------------------------------------------------


def assert_even(counts: np.ndarray, expected: np.ndarray | float | None = None) -> None:
    """Pearson's chi-squared within five standard deviations of its mean."""
    expected = counts.mean() if expected is None else expected
    assert np.min(expected) > 4
    squares, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    assert abs(squares - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("images", "epochs"), [(2, 5000), (3, 6000), (4, 12_000), (5, 60_000)])
def test_all_permutations_are_equally_frequent(images, epochs):
    # Some 500 of each permutation of five images.
    found = fill(Order(images, KEY, True), epochs, images)
    digits = images ** np.arange(images)
    codes = {int((digits * p).sum()) for p in permutations(range(images))}
    seen, counts = np.unique(found @ digits, return_counts=True)
    assert set(seen) == codes
    assert_even(counts)


@pytest.mark.parametrize("images", [32, 60])
def test_half_of_the_permutations_are_odd(images):
    """Without the addition, all of them would be even where there are as many images as numbers."""
    found = fill(Order(images, KEY, True), 1000, images)
    odd = (np.linalg.det(np.eye(images)[found]) < 0).sum()
    assert abs(odd - 500) < 5 * np.sqrt(250)


class TestManyEpochs:
    """Of 60,000 images, the first two and a few others in 8000 epochs, and of other seeds."""

    IMAGES, EPOCHS = 60_000, 8000

    def at(self, *places: int, seed: int = KEY) -> list[np.ndarray]:
        order = Order(self.IMAGES, seed, True)
        return [fill(order, self.EPOCHS, 1, first=place)[:, 0] for place in places]

    def test_each_place_gets_every_image(self):
        for images in self.at(0, 1, 31_007, 59_999):
            assert_even(np.bincount(images // 60, minlength=1000))
            assert_even(np.bincount(images % 64, minlength=64))
            assert abs((images % 2).mean() - 0.5) < 2.5 / np.sqrt(self.EPOCHS)

    def test_places_and_epochs_are_independent(self):
        first, second, far = self.at(0, 1, 32_768)
        other = self.at(0, seed=KEY + 1)[0]
        pairs = [(first, second), (first, far), (first[:-1], first[1:]), (first, other)]
        pairs.append((first[:-1], second[1:]))
        for a, b in pairs:
            cells = a // 3000 * 20 + b // 3000
            assert_even(np.bincount(cells, minlength=400))
            assert_even(np.bincount((a - b) % self.IMAGES // 600, minlength=100))
            assert_even(np.bincount((a ^ b) & 63, minlength=64))
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


class TestWholeEpochs:
    def test_neighbours_of_an_epoch_are_unrelated(self):
        (images,) = fill(Order(60_000, KEY, True), 1, 60_000)
        for lag in (1, 2, 100, 256, 32_768):
            a, b = images[:-lag].astype(np.int64), images[lag:]
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))
            assert_even(np.bincount(a // 3000 * 20 + b // 3000, minlength=400))
            assert_even(np.bincount((a - b) % 60_000 // 300, minlength=200))

    @pytest.mark.parametrize("images", [33, 1437])
    def test_coincidences_are_of_poisson_s_distribution(self, images):
        """Images at their own place, and at their place in another epoch: one in the mean."""
        found = fill(Order(images, KEY, True), 400, images)
        own, other = (found == np.arange(images)).sum(axis=1), (found[1:] == found[:-1]).sum(axis=1)
        for counts in (own, other):
            frequencies = np.bincount(np.minimum(counts, 4), minlength=5)
            shares = np.exp(-1) / np.array([1, 1, 2, 6])
            assert_even(frequencies, len(counts) * np.append(shares, 1 - shares.sum()))
