"""Data sets of any arrays: what is taken and how, what is refused, and training on them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from arrays import host

from cupybnn import TrainConfig, Trainer
from cupybnn.backends.devices import CPU, resolve
from cupybnn.data import Dataset, DeviceData, digits
from cupybnn.training import train

RNG = np.random.default_rng(11)
X = RNG.standard_normal((60, 5))
Y = np.arange(60) % 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def task(examples: int, features: int = 6, classes: int = 4, seed: int = 0):
    """Points about the corners of a simplex, far from 0 and not between 0 and 1."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, examples)
    return 8 * np.eye(classes, features)[y] + rng.standard_normal((examples, features)) - 20, y


class TestFromArrays:
    @pytest.mark.parametrize(
        ("dtype", "kept"),
        [
            ("float64", "float64"),
            (">f8", "float64"),
            ("longdouble", "float64"),
            ("float32", "float32"),
            (">f4", "float32"),
            ("float16", "float32"),
            ("int64", "float32"),
            ("uint16", "float32"),
            ("bool", "float32"),
            ("uint8", "uint8"),
        ],
    )
    def test_dtypes(self, dtype, kept):
        x = RNG.integers(0, 2, (60, 5)).astype(dtype)
        data = Dataset.from_arrays(x, Y)
        assert data.train_images.dtype == kept
        np.testing.assert_array_equal(data.train_images, x.astype(kept))
        assert data.pixel_max == (255 if dtype == "uint8" else None)

    def test_shapes(self):
        x = RNG.standard_normal((60, 2, 3, 4))
        data = Dataset.from_arrays(x, Y, x[:9], Y[:9])
        np.testing.assert_array_equal(data.train_images, x.reshape(60, 24))
        assert (data.features, data.image_shape, data.classes) == (24, None, 3)
        images = Dataset.from_arrays(x[:, 0], Y)
        assert images.image_shape == (3, 4)
        assert len(images.test_labels) == 0
        assert images.with_validation(7).test_images.shape == (7, 12)

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", ">i4", "bool"])
    def test_labels(self, dtype):
        y = (np.arange(60) % 2).astype(dtype)
        data = Dataset.from_arrays(X, y)
        np.testing.assert_array_equal(data.train_labels, y)
        assert data.classes == 2

    def test_classes(self):
        assert Dataset.from_arrays(X, Y + 24).classes == 27  # letters from 1 to 26: 0 never occurs
        assert Dataset.from_arrays(X, Y, X[:3], [0, 1, 9]).classes == 10
        assert Dataset.from_arrays(X, Y, classes=300).classes == 300

    def test_lists_and_other_libraries(self):
        data = Dataset.from_arrays(X.tolist(), Y.tolist())
        np.testing.assert_array_equal(data.train_images, X)
        torch = pytest.importorskip("torch")
        data = Dataset.from_arrays(torch.tensor(X), torch.tensor(Y))
        np.testing.assert_array_equal(data.train_images, X)

    def test_either_backend(self, xp):
        data = Dataset.from_arrays(
            xp.asarray(X), xp.asarray(Y), xp.asarray(X[:4]), xp.asarray(Y[:4])
        )
        np.testing.assert_array_equal(data.train_images, X)
        assert type(data.train_images) is type(data.test_labels) is np.ndarray

    def test_floats_are_not_copied(self):
        assert np.shares_memory(Dataset.from_arrays(X, Y).train_images, X)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (([1.0, 2.0], [0, 1]), r"shape \(examples, ...\).*got \(2,\)\. .*x.reshape\(-1, 1\)"),
            ((np.zeros((0, 3)), []), r"at least one example of one feature; got \(0, 3\)"),
            ((np.zeros((4, 0)), [0] * 4), r"at least one example of one feature; got \(4, 0\)"),
            ((X, Y[:-1]), r"'train_y' .* shape \(60,\), one label for each example; got \(59,\)"),
            ((X, Y[:, None]), r"got \(60, 1\)\. .* y.ravel\(\)"),
            ((X, np.eye(3)[Y].astype(int)), r"got \(60, 3\)\. .* y.argmax\(axis=1\)"),
            ((X, np.eye(3)[Y]), r"must be integers; got float64\. .* y.argmax\(axis=1\)"),
            ((X, Y.astype(float)), r"must be integers; got float64\. .* y.astype\(int\)"),
            ((X, Y + 0.5), r"must be integers; got float64\. Number the classes: .*np.unique"),
            ((X, [f"{y}" for y in Y]), r"must be integers; got <U1\. Number the classes"),
            (
                (X, Y - 1),
                r"'train_y' .* classes from 0 to 1; got -1 for example 0\. To number them",
            ),
            ((X, Y, None, None, 2), r"classes from 0 to 1; got 2 for example 2"),
            ((X, Y * 0), r"'classes' .* must be given .*the largest label is 0"),
            ((X, Y * 10**9), r"'classes' .* must be given .*np.unique"),
            ((X, Y, X), r"must be given together; got 'test_x' without 'test_y'"),
            ((X, Y, None, Y), r"must be given together; got 'test_y' without 'test_x'"),
            ((X, Y, X[:, :4], Y), r"examples like .*, float64 of shape \(5,\); got .*\(4,\)"),
            ((X, Y, X.astype(np.uint8), Y), r"float64 of shape \(5,\); got uint8"),
            ((X, Y, X[:0], Y[:0]), r"The 'test_x' .* at least one example"),
            ((X + 1j, Y), r"'train_x' .* must be real numbers; got complex128"),
            ((X.astype(object), Y), r"must be real numbers; got object"),
            ((np.ma.masked_less(X, 0), Y), r"masked array.*x.filled"),
        ],
    )
    def test_refused(self, arguments, words):
        with pytest.raises((ValueError, TypeError), match=words):
            Dataset.from_arrays(*arguments)

    def test_sparse_matrices_are_refused(self):
        sparse = pytest.importorskip("scipy.sparse")
        with pytest.raises(
            TypeError, match=r"Make an array of the scipy.csr_matrix: x.toarray\(\)"
        ):
            Dataset.from_arrays(sparse.csr_matrix(X), Y)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("part", ["train", "test"])
    def test_values_that_are_not_finite(self, bad, part):
        x = X.copy()
        x[7, 2] = x[9, 1] = bad
        parts = (x, Y, X, Y) if part == "train" else (X, Y, x, Y)
        with pytest.raises(
            ValueError, match=rf"'{part}_images' .* got 2 value\(s\) .* first {bad}"
        ):
            Dataset.from_arrays(*parts)
        with pytest.raises(ValueError, match="as feature 2 of example 7"):
            Dataset.from_arrays(*parts)

    def test_values_too_large_for_the_network(self):
        x = X.copy()
        x[3, 4] = 1e300
        data = Dataset.from_arrays(x, Y)
        with pytest.raises(ValueError, match=r"network of float32 must be finite; .* example 3"):
            DeviceData(data, CPU)
        assert DeviceData(data, CPU, "float64").train_images[3, 4] == 1e300

    @pytest.mark.parametrize("pixel_max", [0, -1, float("nan"), float("inf")])
    def test_pixel_max(self, pixel_max):
        with pytest.raises(ValueError, match="'pixel_max' of a Dataset must be None or a positive"):
            Dataset.from_arrays(np.ones((3, 2), np.uint8), [0, 1, 1], pixel_max=pixel_max)


class TestDeviceData:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_floats_stay_as_they_are(self, xp, dtype):
        device = resolve("cpu" if xp is np else "cuda")
        data = DeviceData(Dataset.from_arrays(X, Y, X[:8], Y[:8]), device, dtype)
        assert data.pixel_scale is None
        inputs, labels = data.batch(xp.asarray([5, 0, 5]))
        assert inputs.dtype == dtype
        np.testing.assert_array_equal(host(inputs), X[[5, 0, 5]].astype(dtype))
        np.testing.assert_array_equal(host(labels), Y[[5, 0, 5]])
        batches = list(data.test_batches(3))
        assert [len(y) for _, y in batches] == [3, 3, 2]
        np.testing.assert_array_equal(
            np.concatenate([host(x) for x, _ in batches]), X[:8].astype(dtype)
        )

    def test_uint8_is_scaled(self, xp):
        device = resolve("cpu" if xp is np else "cuda")
        x = np.array([[0, 51], [255, 102]], np.uint8)
        inputs, _ = DeviceData(Dataset.from_arrays(x, [0, 1]), device).batch(xp.asarray([1, 0]))
        np.testing.assert_allclose(host(inputs), [[1, 0.4], [0, 0.2]], rtol=1e-6)


class TestTraining:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("binary", [False, True])
    def test_floats(self, device, binary):
        settings = {
            "n_hidden": 64,
            "batch_size": 64,
            "max_steps": 250,
            "reg": 0.0,
            "batch_norm": True,
        }
        config = TrainConfig(**settings, binary=binary, device=device)
        data = Dataset.from_arrays(*task(600), *task(200, seed=1))
        trainer = Trainer(config, data=data)
        assert trainer.run().final_accuracy > 0.95
        # Evaluated in batches, some of them not full, as at once.
        logits = trainer.model(trainer_input := _tensor(trainer, data.test_images))
        assert trainer_input.shape == (200, 6)
        right = host(logits.data).argmax(axis=1) == data.test_labels
        assert trainer.evaluate()[1] == right.mean()

    @pytest.mark.parametrize("device", DEVICES)
    def test_floats_equal_the_pixels_they_are_made_of(self, device):
        """The same numbers as uint8 and as floats give the same run."""
        data = digits.load()
        scale = np.float32(1 / 16)
        floats = Dataset.from_arrays(
            (data.train_images * scale).reshape(-1, 8, 8),
            data.train_labels,
            (data.test_images * scale).reshape(-1, 8, 8),
            data.test_labels,
        )
        settings = {"n_hidden": 16, "batch_size": 32, "max_steps": 12, "fused": False}
        config = TrainConfig(**settings, augment_shift=1.0, adversarial=0.01, device=device)
        results = [Trainer(config, data=d).run().final for d in (data, floats)]
        assert results[0].test_loss == results[1].test_loss
        assert results[0].train_loss == results[1].train_loss

    def test_many_classes_and_a_validation_part(self):
        x, y = task(800, features=80, classes=70)
        settings = {"n_hidden": 64, "max_steps": 100, "lr": 0.01, "reg": 0.0, "device": "cpu"}
        config = TrainConfig(**settings, validation=100)
        data = Dataset.from_arrays(x + 20, y)
        assert Trainer(config, data=data).run().final_accuracy > 0.8

    def test_restored(self, tmp_path):
        data = Dataset.from_arrays(*task(100), *task(40, seed=1), name="corners")
        settings = {"n_hidden": 8, "batch_size": 16, "device": "cpu", "dataset": "digits"}
        first = TrainConfig(**settings, max_steps=5, log_dir=str(tmp_path))
        folder = Trainer(first, data=data).run().run_folder
        longer = TrainConfig(**settings, max_steps=9)
        again = TrainConfig(**settings, max_steps=9, restore=str(folder))
        finals = [Trainer(config, data=data).run().final for config in (longer, again)]
        assert finals[0].test_loss == finals[1].test_loss

    def test_other_things_than_a_dataset(self):
        with pytest.raises(TypeError, match=r"must be a Dataset; got tuple\. .*from_arrays"):
            Trainer(TrainConfig(device="cpu"), data=(X, Y))

    def test_no_test_part(self):
        with pytest.raises(ValueError, match=r"'arrays' must have a test part .* validation=N"):
            Trainer(TrainConfig(device="cpu"), data=Dataset.from_arrays(X, Y))

    def test_training_needs_no_test_part_without_evaluations(self):
        settings = {"n_hidden": 8, "batch_size": 16, "max_steps": 5, "device": "cpu"}
        x, y = task(100)
        alone = Trainer(
            TrainConfig(**settings, eval_every_n=0), data=Dataset.from_arrays(x, y, classes=4)
        ).run()
        assert alone.history == ()
        assert np.isnan([alone.final.test_loss, alone.final_accuracy]).all()
        data = Dataset.from_arrays(x, y, *task(40, seed=1))
        tested = Trainer(TrainConfig(**settings, eval_every_n=0), data=data).run()
        assert tested.history == ()
        assert tested.final.train_loss == alone.final.train_loss
        watched = Trainer(TrainConfig(**settings, eval_every_n=1), data=data).run()
        assert tested.final.test_loss == watched.final.test_loss

    def test_weights_count_examples(self, tmp_path):
        x, y = task(40)
        weights = np.arange(40) % 4
        settings = {"n_hidden": 8, "batch_size": 16, "device": "cpu", "max_steps": 20}
        config = TrainConfig(**settings, batch_norm=True, shuffle=False)
        weighted = Dataset.from_arrays(x, y, x, y, weights=weights)
        repeated = Dataset.from_arrays(x.repeat(weights, 0), y.repeat(weights), x, y)
        finals = [Trainer(config, data=data).run().final for data in (weighted, repeated)]
        assert finals[0].train_loss == finals[1].train_loss
        assert finals[0].test_loss == finals[1].test_loss
        plain = Trainer(config, data=Dataset.from_arrays(x, y, x, y)).run().final
        assert plain.test_loss != finals[0].test_loss
        assert len(weighted.with_validation(10).train_weights) == 30

    @pytest.mark.parametrize(
        ("weights", "error", "message"),
        [
            (np.ones(59), ValueError, r"must have shape \(60,\), .* got \(59,\)"),
            ([-1.0] + [1.0] * 59, ValueError, r"at least 0; got -1.0 for example 0"),
            ([1.0, np.nan] + [1.0] * 58, ValueError, r"must be finite .*; got nan for example 1"),
            (np.zeros(60), ValueError, "must not all be zero; got 60 zeros"),
            (np.array(["a"] * 60), TypeError, "must be real numbers; got <U1"),
        ],
    )
    def test_wrong_weights(self, weights, error, message):
        with pytest.raises(error, match=message):
            Dataset.from_arrays(X, Y, weights=weights)

    def test_examples_stay_on_their_device(self, xp):
        x, y = task(100)
        device = "cpu" if xp is np else "cuda"
        there = xp.asarray(x, xp.float32)
        data = Dataset("there", there, y, there[:10], y[:10], None, None, classes=4)
        trainer = Trainer(TrainConfig(n_hidden=8, max_steps=3, device=device), data=data)
        assert trainer.data.train_images is there
        elsewhere = Dataset.from_arrays(x.astype("f4"), y, x[:10].astype("f4"), y[:10], classes=4)
        again = Trainer(TrainConfig(n_hidden=8, max_steps=3, device=device), data=elsewhere)
        assert trainer.run().final.test_loss == again.run().final.test_loss
        assert trainer.state().info["data"] == {**again.state().info["data"], "name": "there"}
        bad = there.copy()
        bad[3, 2] = np.nan
        with pytest.raises(ValueError, match="nan as feature 2 of example 3"):
            Dataset("there", bad, y, there[:10], y[:10], None, None, classes=4)

    def test_only_images_are_deformed(self):
        data = Dataset.from_arrays(X, Y, X, Y)
        with pytest.raises(ValueError, match=r"needs images, .* Leave out the shift, scale"):
            Trainer(TrainConfig(device="cpu", augment_shift=1.0, augment_scale=0.1), data=data)

    def test_inputs_of_many_features_are_evaluated_in_small_batches(self, monkeypatch):
        from cupybnn.training import evaluation

        data = Dataset.from_arrays(*task(50), *task(40, seed=1))
        trainer = Trainer(TrainConfig(n_hidden=8, device="cpu"), data=data)
        whole = trainer.evaluate()
        sizes = []
        batches = trainer.data.test_batches
        trainer.data.test_batches = lambda size, *part: sizes.append(size) or batches(size, *part)
        monkeypatch.setattr(evaluation, "_BATCH_BYTES", 6 * 4 * 7)
        assert trainer.evaluate() == pytest.approx(whole, rel=1e-5)
        assert sizes == [7]


def _tensor(trainer, x):
    from cupybnn.autograd import Tensor
    from cupybnn.backends.devices import to_device

    trainer.model.eval()
    return Tensor(to_device(x.astype(np.float32), trainer.device))


class TestDataset:
    def test_repr(self):
        assert repr(digits.load()) == (
            "Dataset('digits', train=1442, test=355, shape=(8, 8), dtype=uint8, classes=10)"
        )
        part = Dataset.from_arrays(X, Y, name="x").with_validation(20)
        text = "train=40, {}=20, shape=(5,), dtype={}, classes=3{})"
        assert repr(part) == "Dataset('x', " + text.format("validation", "float64", "")
        of_device = text.format("test", "float32", ", device='cpu'")
        assert repr(DeviceData(part, CPU)) == "DeviceData(" + of_device

    def test_comparison_copy_and_pickle(self):
        data = Dataset.from_arrays(X, Y)
        assert data == data
        assert data != Dataset.from_arrays(X, Y)
        assert len({data, data}) == 1
        for again in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
            np.testing.assert_array_equal(again.train_images, X)
            assert again.classes == 3

    def test_public_call_takes_no_dataset_by_mistake(self):
        with pytest.raises(ValueError, match="dataset"):
            train(data=Dataset.from_arrays(X, Y), device="cpu")
