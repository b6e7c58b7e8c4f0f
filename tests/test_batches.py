"""Batches: the images of each step, weighted or not."""

from __future__ import annotations

import numpy as np
import pytest

from cupybnn.backends.devices import CPU, Device
from cupybnn.data import BatchOrder, DeviceData, digits
from cupybnn.data.batches import epoch_length


class TestBatches:
    def test_every_epoch_draws_every_image_once(self):
        order = BatchOrder(images=10, batch_size=4, seed=0, device=CPU)
        stream = np.concatenate([order.indices(step) for step in range(5)])
        assert sorted(stream[:10]) == list(range(10)) == sorted(stream[10:])
        assert not np.array_equal(stream[:10], stream[10:])

    def test_batch_larger_than_the_data(self):
        order = BatchOrder(images=3, batch_size=8, seed=0, device=CPU)
        counts = np.bincount(np.concatenate([order.indices(s) for s in range(3)]))
        np.testing.assert_array_equal(counts, [8, 8, 8])

    def test_a_step_depends_on_nothing_before_it(self):
        walked = BatchOrder(100, 32, 5, CPU)
        sequence = [walked.indices(step) for step in range(12)]
        for step in (11, 3, 7):
            np.testing.assert_array_equal(BatchOrder(100, 32, 5, CPU).indices(step), sequence[step])
        assert not np.array_equal(BatchOrder(100, 32, 6, CPU).indices(0), sequence[0])

    def test_a_part_of_a_batch_is_that_of_the_whole_one(self):
        whole = BatchOrder(100, 32, 5, CPU)
        for first, count in ((0, 11), (11, 11), (22, 11), (5, 0)):  # the third one wraps around
            part = BatchOrder(100, 32, 5, CPU)
            for step in (*range(6), 40, 41, 3):
                expected = whole.indices(step)[(first + np.arange(count)) % 32]
                np.testing.assert_array_equal(part.indices(step, first, count), expected)

    @pytest.mark.gpu
    @pytest.mark.parametrize("weights", [None, np.arange(100) % 7 / 3], ids=["even", "weighted"])
    @pytest.mark.parametrize("shuffle", [True, False])
    def test_a_gpu_has_the_same_batches(self, weights, shuffle):
        import cupy

        arguments = (100, 32, 5), (weights, shuffle)
        there, here = (
            BatchOrder(*arguments[0], device, *arguments[1]) for device in (Device("cuda"), CPU)
        )
        for step in (*range(9), 10**6, 4):
            found = there.indices(step)
            assert isinstance(found, cupy.ndarray)
            np.testing.assert_array_equal(found.get(), here.indices(step))
            part = there.indices(step, 11, 30).get()  # beyond the end of the batch comes its first
            np.testing.assert_array_equal(part, here.indices(step)[(11 + np.arange(30)) % 32])
        np.testing.assert_array_equal(there.permutation(3).get(), here.permutation(3))

    def test_a_large_seed_is_a_seed_of_its_own(self):
        orders = [BatchOrder(100, 32, seed, CPU).indices(0).tolist() for seed in (1, 2**32, 2**70)]
        assert orders[0] != orders[1] != orders[2] != orders[0]

    def test_more_images_than_int32_can_number_are_refused(self):
        with pytest.raises(ValueError, match=r"at most 2,147,483,647; got 2,147,483,648\. Train"):
            BatchOrder(2**31, 32, 0, CPU)
        assert BatchOrder(2**31 - 1, 32, 0, CPU).indices(2**40).max() > 2**20

    def test_without_shuffling_every_epoch_has_the_given_order(self):
        order = BatchOrder(5, 4, 0, CPU, shuffle=False)
        stream = np.concatenate([order.indices(step) for step in range(5)])
        np.testing.assert_array_equal(stream, [*range(5)] * 4)

    def test_a_whole_weight_is_that_many_occurrences(self):
        weights = np.array([3.0, 0, 1, 2, 0])
        order = BatchOrder(5, 4, 0, CPU, weights)
        assert order.images == 6
        for epoch in range(20):
            counts = np.bincount(order.permutation(epoch), minlength=5)
            np.testing.assert_array_equal(counts, weights)

    def test_weights_of_one_are_no_weights(self):
        weighted = BatchOrder(50, 8, 3, CPU, np.ones(50))
        for step in range(20):
            np.testing.assert_array_equal(
                weighted.indices(step), BatchOrder(50, 8, 3, CPU).indices(step)
            )

    @pytest.mark.parametrize("shuffle", [True, False])
    def test_occurrences_follow_fractional_weights(self, shuffle):
        weights = np.random.default_rng(0).exponential(size=40) * (np.arange(40) % 3 > 0)
        order = BatchOrder(40, 8, 0, CPU, weights, shuffle)
        expected = weights * order.images / weights.sum()
        counts = np.array([np.bincount(order.permutation(e), minlength=40) for e in range(2000)])
        assert (counts.sum(axis=1) == order.images).all()
        assert (np.floor(expected) <= counts).all()
        assert (counts <= np.ceil(expected)).all()
        np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.05)

    @pytest.mark.parametrize(
        ("weights", "length"),
        [([1, 2, 3], 6), ([0.1, 0.1, 0], 2), ([1e6, 1e6], 32), ([1.3, 1.3], 3), ([5, 0, 0], 5)],
    )
    def test_length_of_a_weighted_epoch(self, weights, length):
        assert epoch_length(np.array(weights, float)) == length

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_inputs_are_pixels_from_0_to_1(self, dtype):
        data = digits.load()
        device_data = DeviceData(data, CPU, dtype)
        inputs, labels = device_data.batch(np.array([5, 0, 5]))
        assert inputs.dtype == dtype
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(inputs, data.train_images[[5, 0, 5]] / 16)
        np.testing.assert_array_equal(labels, data.train_labels[[5, 0, 5]])
        batches = list(device_data.test_batches(100))
        assert [len(x) for x, _ in batches] == [100, 100, 100, 55]
        np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), data.test_labels)
