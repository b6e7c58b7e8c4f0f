"""Learning what trained networks predict, and from images mixed in pairs."""

from __future__ import annotations

import os

import numpy as np
import pytest

from cupybnn import ops
from cupybnn.autograd import Tensor, no_grad
from cupybnn.cli.main import main
from cupybnn.data import Augmentation, Dataset, Mixing, load
from cupybnn.deploy import PackedNetwork
from cupybnn.errors import CheckpointError, SettingError
from cupybnn.training import TrainConfig, Trainer, checkpoint, images, restored_config
from cupybnn.training.saved import load_model

QUICK = {"dataset": "digits", "device": "cpu", "n_hidden": 24, "batch_size": 40, "reg": 0.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """A full-precision run folder, and the packed network of a binary run."""
    folder = tmp_path_factory.mktemp("teachers")
    common = {**QUICK, "batch_norm": True, "max_steps": 60, "lr": 3e-3, "log_dir": str(folder)}
    made = [Trainer(TrainConfig(**common, binary=binary)).run() for binary in (False, True)]
    PackedNetwork.from_run(made[1].run_folder, device="cpu").save(folder / "packed.npz")
    return [str(made[0].run_folder), str(made[1].run_folder), str(folder / "packed.npz")]


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def predictions(run: str, inputs: np.ndarray, temperature: float) -> np.ndarray:
    with no_grad():
        return softmax(load_model(run, device="cpu")(Tensor(inputs)).data / temperature)


class TestTeachers:
    def test_targets_are_the_mean_of_the_predictions(self, runs):
        made = Trainer(TrainConfig(**QUICK, teacher=(runs[0], runs[2]), teacher_temperature=2.0))
        inputs, _ = made.data.batch(made.order.indices(0))
        expected = sum(predictions(run, inputs, 2.0) for run in runs[:2]) / 2
        got = made.teachers.targets(inputs)
        assert got.dtype == inputs.dtype
        np.testing.assert_allclose(got, expected, atol=1e-6)
        expected = ops.softmax_cross_entropy(Tensor(made.model(Tensor(inputs)).data), got).item()
        np.testing.assert_allclose(float(made.make_step(0).loss), expected, rtol=1e-6)

    def test_a_run_and_its_packed_network_teach_the_same(self, runs):
        losses = [
            float(Trainer(TrainConfig(**QUICK, teacher=run)).make_step(0).loss) for run in runs[1:]
        ]
        assert losses[0] == losses[1]

    def test_they_see_the_images_that_are_learned(self, runs):
        """Deformed and mixed; an attack, and dropout of pixels, come later."""
        settings = {**QUICK, "augment_shift": 1.0, "mix": "uniform", "adversarial": 0.05}
        made = Trainer(TrainConfig(**settings, teacher=runs[0], input_keep_prob=0.8))
        seen = []
        targets = made.teachers.targets
        made.teachers.targets = lambda x: seen.append(x.copy()) or targets(x)
        made.make_step(0)
        inputs, _ = made.data.batch(made.order.indices(0))
        seed = images.augmentation_seed(made.config)
        inputs = Augmentation(shift=1.0)(inputs, (8, 8), seed, 0)
        shares = Mixing("uniform").shares(40, images.stream_seed(made.config, images.MIXING), 0, np)
        np.testing.assert_array_equal(seen[0], Mixing.mix(inputs, shares))

    def test_a_student_follows_its_teacher(self, runs):
        """Also where the teacher is wrong."""
        settings = {**QUICK, "batch_norm": True, "max_steps": 300, "lr": 1e-2}
        student = Trainer(TrainConfig(**settings, teacher=runs[0])).run().model
        data = load("digits")
        inputs = data.train_images.astype(np.float32) / np.float32(data.pixel_max)
        taught = predictions(runs[0], inputs, 1.0).argmax(axis=1)
        wrong = taught != data.train_labels
        with no_grad():
            learned = student(Tensor(inputs)).data.argmax(axis=1)
        assert wrong.sum() > 10
        assert (learned == taught)[wrong].mean() > 0.6

    def test_a_restored_run_equals_an_uninterrupted_one(self, runs, tmp_path, monkeypatch):
        settings = {**QUICK, "mix": "uniform", "vat": 1.0, "eval_every_n": 3}
        settings |= {"teacher_temperature": 1.5}
        monkeypatch.chdir(tmp_path)
        whole = Trainer(TrainConfig(**settings, teacher=runs[0], max_steps=8)).run()
        relative = os.path.relpath(runs[0], tmp_path)
        half = Trainer(
            TrainConfig(**settings, teacher=relative, max_steps=4, log_dir=str(tmp_path))
        ).run()
        monkeypatch.chdir("/")  # the checkpoint's path is absolute
        config = restored_config(str(half.run_folder), max_steps=8, log_dir=None)
        assert config.teacher == (runs[0],)
        rest = Trainer(config).run()
        for (name, a), (_, b) in zip(
            whole.model.state_dict().items(), rest.model.state_dict().items(), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=name)

    def test_another_teacher_is_reported(self, runs, tmp_path):
        half = Trainer(
            TrainConfig(**QUICK, teacher=runs[0], max_steps=2, log_dir=str(tmp_path))
        ).run()
        config = restored_config(str(half.run_folder), max_steps=4, teacher=(runs[2],))
        assert any("teacher is" in sentence for sentence in Trainer(config).notices)
        stored = checkpoint.load_run(str(half.run_folder))
        assert stored.info["config"]["teacher"] == [runs[0]]

    def test_what_cannot_teach(self, runs, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            Trainer(TrainConfig(**QUICK, teacher=str(tmp_path / "none")))
        random = np.random.default_rng(0)
        x, y = random.normal(size=(80, 8)), random.integers(0, 3, 80)
        data = Dataset.from_arrays(x, y, x, y)
        with pytest.raises(SettingError, match="classes of the data, 8 and 3 for arrays"):
            Trainer(TrainConfig(**{**QUICK, "teacher": runs[0]}), data=data)
        for wrong in (5, ("",), (None,)):
            with pytest.raises(ValueError, match="'teacher' must be a path or several"):
                TrainConfig(teacher=wrong)


class TestMixing:
    def test_uniform_and_some(self, xp):
        uniform = Mixing("uniform").shares(4000, 3, 5, xp)
        some = Mixing("some").shares(4000, 3, 5, xp)
        uniform, some = (x if xp is np else x.get() for x in (uniform, some))
        assert uniform.shape == (4000, 1)
        assert abs(uniform.mean() - 0.25) < 0.01
        assert 0 <= uniform.min() < 0.01
        assert 0.49 < uniform.max() < 0.5
        mixed = some != 0
        assert abs(mixed.mean() - 0.5) < 0.03
        np.testing.assert_array_equal(some[mixed], uniform[mixed])

    def test_each_with_the_next(self):
        x = np.array([[0.0, 4.0], [8.0, 0.0], [4.0, 4.0]])
        got = Mixing.mix(x, np.array([[0.25], [0.0], [0.5]], np.float32))
        np.testing.assert_array_equal(got, [[2.0, 3.0], [8.0, 0.0], [2.0, 4.0]])

    def test_labels_are_mixed_by_the_same_shares(self):
        made = Trainer(TrainConfig(**QUICK, mix="uniform"))
        inputs, labels = made.data.batch(made.order.indices(1))
        of_step = images.TrainingImages(made.data, made.order, made.config)
        mixed, same, targets = of_step(1)
        np.testing.assert_array_equal(same, labels)
        shares = Mixing("uniform").shares(40, images.stream_seed(made.config, images.MIXING), 1, np)
        one_hot = np.eye(10)[labels]
        expected = (1 - shares) * one_hot + shares * np.roll(one_hot, -1, axis=0)
        np.testing.assert_allclose(targets, expected, rtol=1e-6)
        np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(
            mixed, (1 - shares) * inputs + shares * np.roll(inputs, -1, axis=0), atol=1e-6
        )
        assert not Mixing()


def test_options(capsys, runs):
    quick = ["--dataset", "digits", "--max_steps", "2", "--n_hidden", "8", "--device", "cpu"]
    teachers = f"{runs[0]},{runs[2]}"
    options = ["--teacher", teachers, "--teacher_temperature", "2", "--mix", "some"]
    assert main(["train", *quick, *options]) == 0
    out = capsys.readouterr().out
    assert "images mixed in pairs" in out
    assert f"Learning from {runs[0]}, {runs[2]}" in out
    assert main(["train", *quick, "--teacher_temperature", "2"]) == 0
    assert "--teacher_temperature has no effect without --teacher" in capsys.readouterr().err
    assert main(["train", *quick, "--teacher", "/nowhere/at/all"]) != 0
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_norm": True},
        {"binary": True, "xnor": True, "batch_norm": True, "first": True, "last": True, "vat": 1.0},
        {"batch_norm": True, "input_keep_prob": 0.8, "mix": "uniform", "adversarial": 0.05},
    ],
    ids=["full precision", "virtual", "mixed, dropped, attacked"],
)
@pytest.mark.parametrize("graph", [False, True])
def test_the_fused_step_learns_the_same(runs, settings, graph):
    settings = {**QUICK, "device": "cuda", **settings, "teacher": (runs[0], runs[2])}
    settings |= {"teacher_temperature": 1.5}
    plain = Trainer(TrainConfig(**settings, fused=False))
    fused = Trainer(TrainConfig(**settings, graph=graph))
    for step in range(4):
        expected, got = plain.make_step(step), fused.make_step(step)
        np.testing.assert_allclose(
            float(got.loss), float(expected.loss), rtol=1e-5 if step == 0 else 0.1
        )
    assert not fused.notices
    assert (fused._step._graph is not None) == graph
