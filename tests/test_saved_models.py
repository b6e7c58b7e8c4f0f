"""Trained models: the one a run returns, and the same one opened from its folder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cupybnn
from cupybnn import data, nn
from cupybnn.autograd import Tensor
from cupybnn.errors import CheckpointError
from cupybnn.training import Callback, DataDescription, TrainConfig, Trainer, restored_config
from cupybnn.training.checkpoint import BEST, NEWEST, Checkpoint, load, save
from cupybnn.training.network import build_network

QUICK = {"dataset": "digits", "device": "cpu", "n_hidden": 24, "max_steps": 30, "eval_every_n": 10}
NETWORKS = {
    "full precision": {},
    "binary": {"binary": True, "xnor": True},
    "without batch norm": {"binary": True, "batch_norm": False, "first": True, "last": True},
    "averaged": {"binary": True, "average": "ema", "average_decay": 0.9},
    "averaged, without batch norm": {"average": "swa", "average_from": 12},
    "no average yet": {"batch_norm": True, "average": "ema", "average_from": 1000},
    "float64": {"dtype": "float64"},
}


def accuracy(model, images, labels):
    return float((model(Tensor(images)).numpy().argmax(axis=1) == labels).mean())


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
def test_what_a_run_returns_and_what_is_opened_are_what_was_evaluated(
    tmp_path, digits, settings, monkeypatch
):
    trainer = Trainer(TrainConfig(**QUICK, **settings, log_dir=str(tmp_path)))
    result = trainer.run()
    monkeypatch.setattr("cupybnn.data.digits.load", lambda: pytest.fail("data were loaded"))
    opened = cupybnn.load_model(result.run_folder, device="cpu")
    images = opened.trained_on.scale(digits.test_images).astype(trainer.config.storage_dtype)
    np.testing.assert_array_equal(images, trainer.data.scale(digits.test_images))
    for model in (result.model, opened):
        assert not any(module.training for _, module in model.named_modules())
        assert accuracy(model, images, digits.test_labels) == result.final_accuracy
    np.testing.assert_array_equal(
        opened(Tensor(images)).numpy(), result.model(Tensor(images)).numpy()
    )


def test_training_goes_on_with_weights_that_are_not_the_averages():
    trainer = Trainer(TrainConfig(**QUICK, **NETWORKS["averaged"]))
    result = trainer.run()
    last, averaged = trainer.model.fc1.weight.numpy(), result.model.fc1.weight.numpy()
    assert (last != averaged).any()


def test_description_of_the_images(tmp_path, digits):
    result = cupybnn.train(**QUICK, log_dir=str(tmp_path), validation=142)
    described = cupybnn.load_model(result.run_folder, device="cpu").trained_on
    assert described == DataDescription.of(digits.with_validation(142))
    assert (described.name, described.features, described.classes) == ("digits", 64, 10)
    assert (described.image_shape, described.pixel_max) == ((8, 8), 16)
    assert (described.train_images, described.test_images) == (1300, 142)
    eight = digits.test_images[:3].reshape(3, 8, 8)
    np.testing.assert_array_equal(described.scale(eight), described.scale(eight.reshape(3, 64)))
    with pytest.raises(ValueError, match=r"images with 64 pixels each; got shape \(64,\)"):
        described.scale(eight[0].ravel())


class BestIsNotNewest(Callback):
    """Spoil the network after its last evaluation but one, so that this one stays the best."""

    def on_step(self, trainer, step, output):
        if step == 28:
            for parameter in trainer.model.parameters():
                parameter.write()[...] = 0


def test_newest_best_and_files(tmp_path):
    config = TrainConfig(**QUICK, lr=1e-2, log_dir=str(tmp_path))
    folder = Trainer(config, [BestIsNotNewest()]).run().run_folder
    weights = {
        name: cupybnn.load_model(run, which=which, device="cpu").fc1.weight.numpy()
        for name, run, which in (
            ("default", folder, "newest"),
            ("best", folder, "best"),
            ("newest file", folder / NEWEST, "newest"),
            ("best file", folder / BEST, "newest"),
        )
    }
    np.testing.assert_array_equal(weights["default"], weights["newest file"])
    np.testing.assert_array_equal(weights["best"], weights["best file"])
    np.testing.assert_array_equal(weights["best"], load(folder / BEST).arrays["model/fc1.weight"])
    assert (weights["best"] != weights["default"]).any()
    with pytest.raises(ValueError, match="'which' must be one of newest, best; got 'first'"):
        cupybnn.load_model(folder, which="first")
    (folder / BEST).unlink()
    with pytest.raises(CheckpointError, match=r"best\.npz, does not exist"):
        cupybnn.load_model(folder, which="best")


def test_checkpoints_of_earlier_versions(tmp_path, digits):
    """They say nothing of the images, and keep averages without batch norm's statistics."""
    for settings in (NETWORKS["binary"], NETWORKS["averaged"]):
        result = cupybnn.train(**QUICK, **settings, log_dir=str(tmp_path))
        new = load(result.run_folder)
        info = {name: value for name, value in new.info.items() if name != "data"}
        arrays = {k: v for k, v in new.arrays.items() if not k.startswith("averaged/")}
        save(tmp_path / "old.npz", Checkpoint(new.step, arrays, info))
        model = cupybnn.load_model(tmp_path / "old.npz", device="cpu")
        assert model.trained_on == DataDescription("digits", 64, 10)
        np.testing.assert_array_equal(model.fc1.weight.numpy(), arrays["model/fc1.weight"])
        again = restored_config(str(tmp_path / "old.npz"), max_steps=32)
        assert Trainer(again).run().notices == ()


def test_checkpoints_that_describe_nothing(tmp_path):
    result = cupybnn.train(**QUICK, log_dir=str(tmp_path))
    good = load(result.run_folder)
    for wrong in ("x", {}, {"name": "digits"}, {"name": "digits", "features": 64}):
        save(tmp_path / "x.npz", dataclasses.replace(good, info={**good.info, "data": wrong}))
        with pytest.raises(CheckpointError, match="does not say what its model was trained on"):
            cupybnn.load_model(tmp_path / "x.npz")
    other = {**good.info["data"], "features": 63}
    save(tmp_path / "x.npz", dataclasses.replace(good, info={**good.info, "data": other}))
    with pytest.raises(CheckpointError, match=r"x\.npz does not fit its network"):
        cupybnn.load_model(tmp_path / "x.npz")


def own_model(units=20):
    """A model that no configuration describes."""
    return nn.Sequential(
        nn.Linear(64, 30, rng=1), nn.BatchNorm(30), nn.Sign(), nn.BinaryLinear(30, units, rng=2),
        nn.BatchNorm(units), nn.ReLU(), nn.Linear(units, 10, rng=3),
    )  # fmt: skip


@pytest.mark.parametrize("average", ["none", "ema"])
def test_a_model_of_ones_own(tmp_path, digits, average):
    settings = {"max_steps": 30, "reg": 0.0, "device": "cpu", "average": average}
    config = TrainConfig(**settings, log_dir=str(tmp_path))
    result = Trainer(config, model=own_model(), data=digits).run()
    run = result.run_folder
    with pytest.raises(CheckpointError, match=r"load_model\(run, model=my_model\)"):
        cupybnn.load_model(run, device="cpu")
    model = own_model()
    assert cupybnn.load_model(run, model=model, device="cpu") is model
    images = model.trained_on.scale(digits.test_images)
    assert accuracy(model, images, digits.test_labels) == result.final_accuracy
    assert not model.training
    with pytest.raises(CheckpointError, match="does not fit the given model"):
        cupybnn.load_model(run, model=own_model(21), device="cpu")
    with pytest.raises(TypeError, match=r"The 'model' must be an nn\.Module; got type"):
        cupybnn.load_model(run, model=nn.Linear)
    longer = restored_config(str(run), max_steps=31)
    assert Trainer(longer, model=own_model(), data=digits).run().steps == 31
    with pytest.raises(CheckpointError, match="give Trainer the same one as 'model'"):
        Trainer(longer, data=digits)


def test_a_model_made_by_hand_takes_the_weights_of_a_network(tmp_path, digits):
    result = cupybnn.train(**QUICK, log_dir=str(tmp_path))
    made = build_network(result.config, 64, 10)
    opened = cupybnn.load_model(result.run_folder, model=made, device="cpu")
    images = opened.trained_on.scale(digits.test_images)
    assert accuracy(opened, images, digits.test_labels) == result.final_accuracy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cupybnn.train(**QUICK, log_dir=str(tmp_path_factory.mktemp("runs"))).run_folder


class TestOtherImages:
    def go_on(self, folder, dataset):
        config = restored_config(str(folder), max_steps=31)
        return Trainer(config, data=dataset).notices

    def test_same_images(self, folder, digits):
        assert self.go_on(folder, digits) == []

    def test_fewer_images(self, folder, digits):
        fewer = dataclasses.replace(
            digits, train_images=digits.train_images[9:], train_labels=digits.train_labels[9:]
        )
        assert self.go_on(folder, fewer) == [
            "The images differ from the checkpoint's 1,442 training and 355 test images of digits: "
            "this run has 1,433 training and 355 test images. Its results will differ from those "
            "of an uninterrupted run."
        ]

    @pytest.mark.parametrize("part", ["train_images", "train_labels", "test_images", "test_labels"])
    def test_as_many_but_one_differs(self, folder, digits, part):
        changed = getattr(digits, part).copy()
        changed.flat[7] ^= 1
        (said,) = self.go_on(folder, dataclasses.replace(digits, **{part: changed}))
        assert "this run has as many images, but different ones" in said
