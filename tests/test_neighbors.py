"""Images moved among their nearest neighbors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from cupybnn.backends.devices import CPU
from cupybnn.backends.random import bell, from_row
from cupybnn.data import Dataset, DeviceData, NeighborNoise, load, nearest_neighbors
from cupybnn.data import neighbors as module
from cupybnn.errors import CheckpointError, SettingError
from cupybnn.training import Callback, TrainConfig, Trainer, restored_config


def pixels(examples, features, most=255):
    return np.random.default_rng(0).integers(0, most + 1, (examples, features), np.uint8)


class TestNearest:
    @pytest.mark.parametrize("kind", ["pixels", "many pixels", "float32", "float64"])
    def test_as_scikit_learn_finds_them(self, kind, monkeypatch):
        monkeypatch.setitem(module._DISTANCES, "numpy", 1000)  # a few rows at a time
        x = pixels(150, 5000 if kind == "many pixels" else 61)
        if kind.startswith("float"):
            x = np.random.default_rng(0).normal(size=(150, 40)).astype(kind)
        found = nearest_neighbors(x, 7)
        peer = NearestNeighbors(n_neighbors=7, algorithm="brute").fit(x.astype(np.float64))
        np.testing.assert_array_equal(found, peer.kneighbors(return_distance=False))
        assert found.dtype == np.int32

    def test_of_equal_distances_the_first(self):
        """Exactly: in float32, 255 * 255 * 784 and one more are the same number."""
        x = pixels(90, 784, most=1) * np.uint8(255)
        x[40], x[41], x[50] = x[3], x[3], x[3]
        x[50, :2] = x[3, :2] ^ 1  # at a distance of 1 or 254, and so on
        distances = ((x[:, None].astype(np.int64) - x[None].astype(np.int64)) ** 2).sum(axis=2)
        np.fill_diagonal(distances, distances.max() + 1)
        expected = np.argsort(distances, axis=1, kind="stable")[:, :9]
        np.testing.assert_array_equal(nearest_neighbors(x, 9), expected)

    @pytest.mark.parametrize("count", [0, 5, -1])
    def test_how_many_there_can_be(self, count):
        with pytest.raises(ValueError, match=rf"'count' of neighbors must .* 5; got {count}"):
            nearest_neighbors(pixels(5, 3), count)
        assert nearest_neighbors(pixels(5, 3), 4).shape == (5, 4)

    @pytest.mark.parametrize("features", [1024, 1025])
    @pytest.mark.parametrize("near", [0, 250])
    def test_pixels_at_the_limit_of_exact_products(self, features, near):
        """Numbers are greatest for images that are nearly black or white."""
        x = np.uint8(near) + pixels(60, features, most=2)
        wide = x.astype(np.int64)
        distances = ((wide[:, None] - wide[None]) ** 2).sum(axis=2)
        np.fill_diagonal(distances, distances.max() + 1)
        expected = np.argsort(distances, axis=1, kind="stable")[:, :20]
        np.testing.assert_array_equal(nearest_neighbors(x, 20), expected)

    def test_features_far_from_zero(self):
        x = np.random.default_rng(0).normal(size=(80, 10))
        np.testing.assert_array_equal(nearest_neighbors(x + 1e8, 5), nearest_neighbors(x, 5))

    def test_among_some(self):
        x = pixels(70, 30)
        among = np.array([0, 3, 4, 8, 20, 21, 69])
        found = nearest_neighbors(x, 3, among)
        peer = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(x[among].astype(float))
        others = np.setdiff1d(np.arange(70), among)
        expected = among[peer.kneighbors(x[others].astype(float), return_distance=False)]
        np.testing.assert_array_equal(found[others], expected)
        np.testing.assert_array_equal(found[among], among[peer.kneighbors(return_distance=False)])
        with pytest.raises(ValueError, match="examples, 7; got 7"):
            nearest_neighbors(x, 7, among)

    @pytest.mark.gpu
    @pytest.mark.parametrize("features", [784, 5000])
    def test_a_gpu_finds_the_same(self, features, monkeypatch):
        import cupy

        monkeypatch.setitem(module._DISTANCES, "cupy", 10_000)
        x = pixels(700, features, most=3) * np.uint8(85)  # of few distances, so that many are equal
        found = nearest_neighbors(cupy.asarray(x), 12)
        np.testing.assert_array_equal(found.get(), nearest_neighbors(x, 12))


class TestNoise:
    def test_pixels_by_the_definition(self):
        x, indices = pixels(40, 30), np.array([3, 0, 39, 3])
        table, noise = nearest_neighbors(x, 5), NeighborNoise(0.6)
        found = noise(x, table, indices, seed=7, number=2)
        e = bell((4, 5), 7, 2, np) * 0.6 / np.sqrt(21845)
        differences = x[table[indices]].astype(float) - x[indices][:, None]
        wanted = x[indices] + (e[:, :, None] * differences).sum(axis=1)
        assert found.dtype == np.uint8
        assert (abs(wanted.clip(0, 255) - found) <= 0.51).all()
        assert (found != x[indices]).any(axis=1).all()
        assert (found[0] != found[3]).any()  # other multiples for the same image
        assert (noise(x, table, indices, seed=7, number=3) != found).any()
        assert noise(x, table, indices, seed=7, number=2, brightest=100).max() <= 100

    def test_floats_by_the_definition(self):
        x = np.random.default_rng(1).normal(size=(40, 6))
        table, indices = nearest_neighbors(x, 3), np.arange(40)
        e = bell((40, 3), 1, 0, np) / np.sqrt(21845) * 0.3
        wanted = x + (e[:, :, None] * (x[table] - x[:, None])).sum(axis=1)
        found = NeighborNoise(0.3)(x, table, indices, seed=1, number=0)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
        found = NeighborNoise(0.3)(x.astype(np.float32), table, indices, seed=1, number=0)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

    def test_amounts_beyond_all_pixels(self):
        """Whatever differs is moved to one end of the range."""
        x, indices = pixels(40, 30), np.arange(40)
        table = nearest_neighbors(x, 5)
        found = [
            NeighborNoise(amount)(x, table, indices, seed=7, number=2)
            for amount in (1e6, 1e12, 1e300)
        ]
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_array_equal(found[0], found[2])
        assert np.isin(found[0], [0, 255]).mean() > 0.98

    @pytest.mark.parametrize("amount", [-1.0, np.nan, np.inf])
    def test_an_amount_that_is_none(self, amount):
        with pytest.raises(ValueError, match="'amount' of a NeighborNoise must be finite"):
            NeighborNoise(amount)

    def test_integers_that_are_no_pixels(self):
        x = pixels(9, 4).astype(np.int64)
        with pytest.raises(TypeError, match=r"uint8, float32 or float64; got int64\. Convert"):
            NeighborNoise(0.1)(x, np.zeros((9, 1), np.int32), np.arange(9), seed=0, number=0)

    def test_its_distribution(self):
        """Around each example, with the covariance of the differences, as often in any order."""
        x = np.array([[100, 100], [140, 100], [100, 120]], np.uint8)
        found = NeighborNoise(0.5)(
            x, nearest_neighbors(x, 2), np.zeros(20_000, int), seed=3, number=0
        )
        assert found.mean(axis=0) == pytest.approx([100, 100], abs=0.5)
        np.testing.assert_allclose(np.cov(found.T.astype(float)), [[400, 0], [0, 100]], atol=12)

    def test_permuted_pixels_give_permuted_results(self):
        x, order = pixels(50, 20), np.random.default_rng(2).permutation(20)
        moved = [
            NeighborNoise(0.4)(
                images, nearest_neighbors(images, 6), np.arange(50), seed=5, number=1
            )
            for images in (x, x[:, order])
        ]
        np.testing.assert_array_equal(moved[0][:, order], moved[1])

    def test_a_part_of_a_batch_is_that_of_the_whole_one(self):
        x = pixels(50, 20)
        table, indices = nearest_neighbors(x, 3), np.arange(20)
        whole = NeighborNoise(0.4)(x, table, indices, seed=5, number=1)
        with from_row(7):
            part = NeighborNoise(0.4)(x, table, indices[7:13], seed=5, number=1)
        np.testing.assert_array_equal(part, whole[7:13])

    @pytest.mark.gpu
    def test_a_gpu_moves_pixels_alike(self):
        import cupy

        x = pixels(300, 784)
        table, indices = nearest_neighbors(x, 9), np.arange(299, -1, -1)
        arrays = [cupy.asarray(array) for array in (x, table, indices)]
        found = NeighborNoise(0.7)(*arrays, seed=3, number=4)
        expected = NeighborNoise(0.7)(x, table, indices, seed=3, number=4)
        np.testing.assert_array_equal(found.get(), expected)

    @pytest.mark.gpu
    @pytest.mark.parametrize(("features", "count"), [(784, 8), (61, 1), (64, 21)])
    def test_the_kernel_moves_pixels_alike(self, features, count):
        import cupy

        from cupybnn.backends.cuda.fused import Launcher
        from cupybnn.backends.cuda.fused_neighbors import MoveAmongNeighbors

        x, labels = pixels(90, features), np.arange(90) % 7
        order = np.random.default_rng(3).integers(0, 90, (4, 50)).astype(np.int32)
        noise, seed, step = NeighborNoise(0.9), 2**63 + 11, 6
        out, found = cupy.zeros((50, features), np.uint8), cupy.zeros(50, np.int64)
        table = nearest_neighbors(x, count)
        MoveAmongNeighbors(
            images=cupy.asarray(x), all_labels=cupy.asarray(labels), order=cupy.asarray(order),
            table=cupy.asarray(table), step=cupy.asarray([step]), out=out, labels=found, seed=seed,
            factor=noise.factor, digits=noise.DIGITS, brightest=200, first=30, whole=60,
        ).launch(Launcher(0, np.dtype(np.float32)))  # fmt: skip
        rows = order[step % 4]
        with from_row(30):
            first = noise(x, table, rows[:30], seed=seed, number=step, brightest=200)
        rest = noise(x, table, rows[30:], seed=seed, number=step, brightest=200)
        np.testing.assert_array_equal(out.get(), np.concatenate([first, rest]))
        np.testing.assert_array_equal(found.get(), labels[rows])


class TestTraining:
    RUN: ClassVar = {
        "dataset": "digits",
        "binary": True,
        "n_hidden": 32,
        "batch_size": 50,
        "max_steps": 30,
    }

    def test_what_is_learned(self):
        trainer = Trainer(TrainConfig(**self.RUN, neighbor_noise=0.5, neighbors=4))
        trainer.make_step(0)
        inputs, labels, targets = trainer._step._images(0)
        plain, expected = trainer.data.batch(trainer.order.indices(0))
        np.testing.assert_array_equal(labels, expected)
        assert targets is labels
        assert (inputs != plain).any(axis=1).mean() > 0.9
        assert inputs.min() >= 0
        assert inputs.max() <= 1
        np.testing.assert_array_equal(inputs * 16, np.rint(inputs * 16))  # whole pixels
        assert trainer.data.nearest_neighbors(4) is trainer.data.nearest_neighbors(4)
        assert Trainer(TrainConfig(**self.RUN)).run().final.train_loss != pytest.approx(
            Trainer(TrainConfig(**self.RUN, neighbor_noise=0.5)).run().final.train_loss
        )

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_float_features(self, dtype):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
        data = Dataset.from_arrays(x, y, x, y)
        settings = {k: v for k, v in self.RUN.items() if k != "dataset"} | {"dtype": dtype}
        trainer = Trainer(TrainConfig(**settings, neighbor_noise=0.2), data=data)
        trainer.make_step(0)
        inputs, _, _ = trainer._step._images(0)
        plain, _ = trainer.data.batch(trainer.order.indices(0))
        assert inputs.dtype == dtype
        assert (inputs != plain).all()
        assert abs(inputs - plain).mean() < 0.6

    def test_examples_of_weight_0_are_no_neighbors(self):
        x = pixels(60, 5)
        weights = np.where(np.arange(60) < 40, 1.5, 0)
        data = Dataset.from_arrays(x, np.arange(60) % 3, weights=weights)
        table = DeviceData(data, CPU).nearest_neighbors(7)
        assert table.max() < 40
        np.testing.assert_array_equal(table[:40], nearest_neighbors(x[:40], 7))
        config = TrainConfig(neighbor_noise=0.1, neighbors=40, eval_every_n=0)
        with pytest.raises(SettingError, match="images of positive weight, 40; got 40"):
            Trainer(config, data=data)

    @pytest.mark.parametrize(("pixel_max", "brightest"), [(100, 250), (255, 255), (400, 255)])
    def test_the_brightest_pixel(self, pixel_max, brightest):
        """Pixels may exceed what is called full brightness; then they are not cut off."""
        x = pixels(30, 5, most=250)
        x[0, 0] = 250
        data = Dataset.from_arrays(x, np.arange(30) % 3, pixel_max=pixel_max)
        assert DeviceData(data, CPU).brightest == brightest

    def test_a_restored_run_equals_an_uninterrupted_one(self, tmp_path):
        settings = {**self.RUN, "mix": "some", "neighbor_noise": 0.5, "average": "swa"}
        whole = Trainer(TrainConfig(**settings)).run()
        half = TrainConfig(**{**settings, "max_steps": 17}, log_dir=str(tmp_path))
        folder = str(Trainer(half).run().run_folder)
        rest = Trainer(restored_config(folder, max_steps=30, log_dir=None)).run()
        for (name, a), (_, b) in zip(
            whole.model.state_dict().items(), rest.model.state_dict().items(), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=name)
        with pytest.raises(CheckpointError, match="neighbors: checkpoint 8, this run 3"):
            Trainer(restored_config(folder, max_steps=30, neighbors=3))

    def test_too_many_for_shared_memory(self, monkeypatch):
        """Then training runs operation by operation."""
        from cupybnn.backends.cuda import compiler
        from cupybnn.training import setup

        monkeypatch.setattr(compiler, "architecture", lambda index: 90)
        monkeypatch.setattr(compiler, "shared_memory_limit", lambda index: 9000)
        too_many = "shared memory does not hold that many neighbors"
        for count, reason in ((997, None), (998, too_many)):
            made = Trainer(TrainConfig(**self.RUN, neighbor_noise=0.1, neighbors=count))
            data = SimpleNamespace(
                device=SimpleNamespace(kind="cuda", index=0), pixel_scale=1.0, image_shape=(8, 8)
            )
            found = setup._unfused_reason(made.model, made.optimizer, data, made.config, None)
            assert found == reason

    def test_more_neighbors_than_there_are_images(self):
        data = load("digits")
        few = Dataset.from_arrays(
            data.train_images[:8], data.train_labels[:8], data.test_images, data.test_labels
        )
        config = TrainConfig(neighbor_noise=0.1, eval_every_n=0)
        with pytest.raises(SettingError, match=r"'neighbors' must .* images, 8; got 8"):
            Trainer(config, data=few)

    @pytest.mark.parametrize("settings", [{"neighbors": 0}, {"neighbor_noise": -1.0}])
    def test_settings(self, settings):
        with pytest.raises(SettingError, match="neighbor"):
            TrainConfig(**settings)

    def test_a_sentence_if_it_takes_long(self, monkeypatch):
        monkeypatch.setattr("cupybnn.training.setup._SECONDS", 0)
        said = []

        class Listen(Callback):
            def on_notice(self, trainer, sentence):
                said.append(sentence)

        config = TrainConfig(**{**self.RUN, "max_steps": 1}, neighbor_noise=0.1)
        assert Trainer(config, [Listen()]).run().notices == ()
        assert "the 8 nearest neighbors of 1,442 images, which may take a minute or more" in said[0]
