"""Data-parallel training: one rank or many learn the same."""

from __future__ import annotations

import itertools
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks import together

from cupybnn import nn
from cupybnn.cli import train as command
from cupybnn.data import Dataset
from cupybnn.data import load as load_data
from cupybnn.deploy import PackedNetwork
from cupybnn.errors import CheckpointError, RankError, SettingError
from cupybnn.parallel import Alone
from cupybnn.training import Callback, TrainConfig, Trainer, restored_config
from cupybnn.training.checkpoint import load
from cupybnn.training.step import PlainStep
from cupybnn.training.stopping import EarlyStopping
from cupybnn.training.teachers import Teachers

COMMON = {
    "dataset": "digits",
    "n_hidden": 48,
    # Not a number by which sums of signs are divisible: an activation that equals its mean, where
    # rounding alone decides about its sign, is then rare, and with this seed there is none.
    "batch_size": 47,
    "seed": 6,
    "max_steps": 7,
    "eval_every_n": 5,
    "device": "cpu",
    "debug": True,  # compares the checksums of the weights after every step
}
NETWORKS = {
    "fp": {"keep_prob": 0.8},
    "binary": {"binary": True, "reg": 1e-4, "keep_prob": 0.9, "sign_keep_prob": 0.9},
    "no-norm": {"binary": True, "batch_norm": False, "penalty": "bipolar", "reg": 1e-4},
    "clipped": {
        "binary": True, "ste": "clipped_grad", "batch_norm": False, "first": True, "last": True,
    },
    "all-binary": {"binary": True, "first": True, "last": True},
    "stochastic": {"binary": True, "ste": "stochastic_sign", "average": "ema"},
    "magnitude": {"binary": True, "ste": "magnitude_aware_sign", "optimizer": "sgd"},
    "bop": {"binary": True, "optimizer": "bop", "average": "swa", "average_from": 3},
    "binarynet": {
        "binary": True, "lr_scale": "binarynet", "loss": "squared_hinge", "optimizer": "adamw",
        "weight_decay": 0.01, "adversarial": 0.02, "augment_shift": 1, "augment_elastic": 0.5,
    },
    # Dropout by halves, because activations times two are whole numbers, whose sums are exact.
    "virtual": {"binary": True, "vat": 0.5, "keep_prob": 0.5, "augment_shift": 1},
    "l2": {"binary": True, "penalty": "l2", "reg": 1e-3, "shuffle": False},
    "rounded": {"binary": True, "grad_bits": 2, "adversarial": 0.02},
    "mixed": {"binary": True, "mix": "some", "augment_shift": 1, "augment_elastic": 0.5},
}  # fmt: skip


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_step(self, trainer, step, output):
        self.losses.append(float(output.loss))


def train(ranks=None, data=None, **settings):
    """Return the losses, the evaluations and the whole state of a run."""
    record = Losses()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # latent weights that can leave the window
        trainer = Trainer(TrainConfig(**{**COMMON, **settings}), [record], data=data, ranks=ranks)
    result = trainer.run()
    state = trainer.state()
    return record.losses, result, state


def same_run(one, other, tolerance):
    """Whether two runs have the same trace and end with the same weights."""
    np.testing.assert_allclose(one[0], other[0], rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(one[1].history, other[1].history, strict=True):
        for field in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert getattr(mine, field) == pytest.approx(getattr(theirs, field), abs=tolerance)
    assert one[2].arrays.keys() == other[2].arrays.keys()
    for name, array in one[2].arrays.items():
        assert array.shape == other[2].arrays[name].shape, name
        np.testing.assert_allclose(
            array, other[2].arrays[name], rtol=tolerance, atol=tolerance, err_msg=name
        )


def run_together(folder, size, **settings):
    """Return what `train` returns on each of `size` ranks."""
    runs = together(folder, size, lambda ranks: train(ranks, **settings))
    assert not any(isinstance(run, Exception) for run in runs), runs
    return runs


SIZES = [("binary", 2), ("binary", 3), ("binary", 4)]
SIZES += [(name, 2 + i % 2) for i, name in enumerate(NETWORKS) if name != "binary"]


@pytest.mark.parametrize(("network", "size"), SIZES)
def test_many_ranks_learn_what_one_learns(tmp_path, network, size):
    settings = {**NETWORKS[network], "dtype": "float64", "sync_batch_norm": True}
    alone = train(**settings)
    runs = run_together(tmp_path, size, **settings)
    same_run(alone, runs[0], 1e-9)
    for run in runs[1:]:  # the others know the same, but report nothing
        assert run[0] == []
        same_run((runs[0][0], *run[1:]), runs[0], 0)


def test_many_ranks_learn_from_teachers_what_one_learns(tmp_path):
    teacher = str(tmp_path / "teacher.npz")
    model = train(binary=True, max_steps=20)[1].model
    PackedNetwork.from_model(model).save(teacher)
    settings = {"binary": True, "teacher": (teacher,), "dtype": "float64", "sync_batch_norm": True}
    alone, runs = train(**settings), run_together(tmp_path, 3, **settings)
    np.testing.assert_allclose(alone[0], runs[0][0], rtol=1e-6)  # a teacher predicts in float32
    assert alone[0][0] != pytest.approx(train(**{**settings, "teacher": ()})[0][0], rel=1e-3)


def test_many_ranks_learn_from_weighted_images_what_one_learns(tmp_path):
    digits = load_data("digits")
    weights = np.random.default_rng(0).uniform(0, 3, len(digits.train_labels))
    data = replace(digits, train_weights=weights)
    settings = {"binary": True, "dtype": "float64", "sync_batch_norm": True}
    alone = train(**settings, data=data)
    runs = together(tmp_path, 3, lambda ranks: train(ranks, **settings, data=data))
    same_run(alone, runs[0], 1e-9)
    assert alone[0][0] != pytest.approx(train(**settings)[0][0], rel=1e-3)


@pytest.mark.parametrize("size", [4])
def test_float32_differs_by_rounding_alone(tmp_path, size):
    settings = {"binary": True, "sync_batch_norm": True, "max_steps": 6}
    alone, runs = train(**settings), run_together(tmp_path, size, **settings)
    np.testing.assert_allclose(alone[0], runs[0][0], rtol=2e-6)
    for name, array in alone[2].arrays.items():
        if name.startswith("model/") and "weight" in name:
            np.testing.assert_allclose(array, runs[0][2].arrays[name], atol=2e-4, err_msg=name)


def test_a_run_of_some_ranks_can_be_repeated_bit_for_bit(tmp_path):
    settings = {"binary": True, "keep_prob": 0.9}
    one, other = (run_together(tmp_path, 3, **settings)[0] for _ in range(2))
    assert one[0] == other[0]
    for name, array in one[2].arrays.items():
        assert array.tobytes() == other[2].arrays[name].tobytes(), name


def test_statistics_are_the_mean_of_those_of_the_parts(tmp_path):
    settings = {"binary": True, "max_steps": 1, "eval_every_n": 5}
    runs = run_together(tmp_path, 3, **settings)
    trainer = Trainer(TrainConfig(**{**COMMON, **settings}))
    inputs, _ = trainer.data.batch(trainer.order.indices(0))
    products = inputs @ trainer.model.fc1.weight.data
    bounds = [r * 47 // 3 for r in range(4)]
    parts = [products[a:b] for a, b in itertools.pairwise(bounds)]
    for statistic, initial, of in (("mean", 0, np.mean), ("variance", 1, np.var)):
        expected = 0.9 * initial + 0.1 * sum(len(p) / 47 * of(p, axis=0) for p in parts)
        for run in runs:
            array = run[2].arrays[f"model/bn1.{statistic}"]
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


def test_a_rank_keeps_its_share_of_latent_weights_alone(tmp_path):
    sizes = []

    class Look(Callback):
        def on_step(self, trainer, step, output):
            (slots,) = ([s.size for s in trainer.optimizer._slots[p]] for p in [weight(trainer)])
            sizes.append((weight(trainer).share.weight.size, slots))
            assert set(np.unique(weight(trainer).data)) == {-1.0, 1.0}
            assert output.logits.shape == (11, 10)  # 47 images among four ranks

        def on_evaluate(self, trainer, evaluation):
            assert weight(trainer).share is None
            assert len(np.unique(weight(trainer).data)) > 1000  # latent weights

    def weight(trainer):
        return trainer.model.fc2.weight

    def run(ranks):
        config = TrainConfig(**{**COMMON, "binary": True, "n_hidden": 128, "max_steps": 4})
        return Trainer(config, [Look()], ranks=ranks).run()

    runs = together(tmp_path, 4, run)
    assert not any(isinstance(r, Exception) for r in runs), runs
    assert sizes == [(128 * 128 // 4, [128 * 128 // 4] * 2)] * 4


def test_a_checkpoint_continues_on_any_number_of_ranks(tmp_path):
    settings = {"binary": True, "sync_batch_norm": True, "dtype": "float64", "eval_every_n": 3}
    whole = train(**settings)
    folder = str(tmp_path / "log")
    run_together(tmp_path, 3, **settings, log_dir=folder, max_steps=5)
    (newest,) = (tmp_path / "log").rglob("newest.npz")
    stored = load(newest)
    assert stored.step == 5
    for size in (1, 2, 4):
        config = restored_config(str(newest), max_steps=COMMON["max_steps"], log_dir=None)

        def go_on(ranks, config=config):
            trainer = Trainer(config, ranks=ranks)
            trainer.run()
            return trainer.state()

        states = together(tmp_path, size, go_on) if size > 1 else [go_on(None)]
        for name, array in whole[2].arrays.items():
            np.testing.assert_allclose(
                states[0].arrays[name], array, rtol=1e-9, atol=1e-9, err_msg=name
            )


def test_a_model_of_ones_own_begins_with_the_weights_of_rank_0(tmp_path):
    def run(ranks):
        model = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm(32), nn.Dropout(0.9), nn.Sign(), nn.BinaryLinear(32, 10)
        )  # no seeds: different on every rank
        config = TrainConfig(**{**COMMON, "n_hidden": 512, "reg": 0.0})
        trainer = Trainer(config, model=model, ranks=ranks)
        trainer.run()
        return trainer.state()

    states = together(tmp_path, 3, run)
    assert not any(isinstance(s, Exception) for s in states), states
    for name, array in states[0].arrays.items():
        for other in states[1:]:
            assert array.tobytes() == other.arrays[name].tobytes(), name


def test_more_ranks_than_images_of_a_batch(tmp_path):
    errors = together(tmp_path, 3, lambda ranks: train(ranks, batch_size=2))
    for rank, error in enumerate(errors):
        assert isinstance(error, SettingError)
        assert "got 2 images for 3 ranks" in str(error)
        assert error.report == (rank == 0)


def refused(folder, function):
    """Return the sentence with which `function` ends on each of two ranks; one alone prints it."""
    errors = together(folder, 2, function)
    assert [type(error) for error in errors] == [SettingError] * 2, errors
    assert [error.report for error in errors] == [True, False]
    return str(errors[0])


def test_a_teacher_that_is_missing_is_reported_once(tmp_path):
    missing = str(tmp_path / "missing.npz")
    first, second = together(tmp_path, 2, lambda ranks: train(ranks, teacher=(missing,)))
    assert isinstance(first, CheckpointError)
    assert isinstance(second, RankError)
    assert not second.report


STUDENT = """
[settings]
dataset = "digits"
binary = true
batch_norm = true
reg = 0.0
max_steps = 9
n_hidden = 16
[teachers]
recipe = "{}"
count = 2
"""
TEACHER = """
[settings]
n_hidden = 24
batch_norm = true
max_steps = 20
reg = 0.0
"""


class TestTeachers:
    """A recipe that trains its teachers first."""

    def run(self, folder, monkeypatch, size, begins=lambda trainer: None):
        """Train; return all results with their ranks, and what the teachers' files held."""
        (folder / "wise.toml").write_text(TEACHER)
        recipe = folder / "student.toml"
        recipe.write_text(STUDENT.format((folder / "wise.toml").as_posix()))
        options = {"log_dir": str(folder / f"log-{size}"), "sync_batch_norm": True}
        options |= {"device": "cpu", "recipe": str(recipe), "seed": 3}
        config = command._config(options)
        results, files, opens, runs = [], [], Teachers.open, Trainer.run

        def open_them(config, dataset, device):
            files.append([Path(path).read_bytes() for path in config.teacher])
            return opens(config, dataset, device)

        def run(trainer):
            results.append((trainer.ranks.rank, runs(trainer)))
            return results[-1][1]

        def go(ranks):
            signals = SimpleNamespace(training_begins=begins)
            command._train_with(ranks, config, options, signals)

        with monkeypatch.context() as patches:
            patches.setattr(Teachers, "open", staticmethod(open_them))
            patches.setattr(Trainer, "run", run)
            errors = together(folder, size, go) if size > 1 else [go(Alone())]
        assert errors == [None] * size
        return results, [held for held in files if held]

    def test_they_end_equal_on_all_ranks(self, tmp_path, monkeypatch, capsys):
        results, files = self.run(tmp_path, monkeypatch, 3)
        assert len(files) == 3
        assert files[0] == files[1] == files[2]
        assert len(files[0]) == 2
        assert files[0][0] != files[0][1]
        assert [p.name for p in sorted((tmp_path / "log-3/teachers").iterdir())] == [
            "wise-6.npz", "wise-7.npz",
        ]  # fmt: skip
        out = capsys.readouterr().out
        assert re.findall(r"^Teacher \d of 2", out, re.MULTILINE) == [
            "Teacher 1 of 2", "Teacher 2 of 2",
        ]  # fmt: skip
        alone, _ = self.run(tmp_path, monkeypatch, 1)
        assert [result.steps for _, result in alone] == [20, 20, 9]
        for rank, result in results:
            (like,) = [
                r for _, r in alone if r.config.seed == result.config.seed
                and bool(r.config.teacher) == bool(result.config.teacher)
            ]  # fmt: skip
            assert result.final.test_loss == pytest.approx(like.final.test_loss, rel=1e-3)
            assert rank in (0, 1, 2)

    def test_a_stop_while_one_is_trained_ends_all_ranks(self, tmp_path, monkeypatch, capsys):
        def begins(trainer):
            if trainer.ranks.rank == 0:
                trainer.request_stop()

        results, files = self.run(tmp_path, monkeypatch, 2, begins)
        assert [(result.stopped, result.steps) for _, result in results] == [(True, 1)] * 2
        assert not files
        assert capsys.readouterr().out == "Stopped while training a teacher\n"

    def test_others_are_refused(self, tmp_path):
        """The same names, but different networks."""

        def run(ranks):
            path = tmp_path / str(ranks.rank) / "teacher.npz"
            path.parent.mkdir()
            PackedNetwork.from_model(train(seed=ranks.rank, max_steps=2)[1].model).save(path)
            train(ranks, teacher=(str(path),))

        sentence = refused(tmp_path, run)
        assert re.search(r"same options, data and checkpoint; got teachers: rank 0 \[", sentence)


@pytest.mark.parametrize(
    ("what", "stops"),
    [
        ({"tol": np.inf, "patience": 1}, True),
        ({"monitor": "accuracy", "tol": np.inf, "patience": 1, "keep_best": True}, True),
        ({"tol": np.inf, "patience": 1, "decay": 2.0}, False),
    ],
)
def test_early_stopping_is_the_same_on_all_ranks(tmp_path, what, stops):
    settings = {**COMMON, "binary": True, "batch_size": 600, "dtype": "float64"}
    config = TrainConfig(**{**settings, "sync_batch_norm": True, "max_steps": 14})

    def run(ranks):
        stopping = EarlyStopping(**what)
        trainer = Trainer(config, [stopping], ranks=ranks)
        return trainer.run(), stopping, trainer.optimizer.groups[0]["lr"]

    alone, *runs = run(None), *together(tmp_path, 2, run)
    result, stopping, lr = alone
    assert result.stopped == stops
    assert lr < 1e-3 or stops
    for other, found, other_lr in runs:
        assert other.steps in (result.steps, result.steps + 1)  # a vote is counted a step later
        assert other_lr == lr
        np.testing.assert_allclose(found.losses[: len(stopping.losses)], stopping.losses, rtol=1e-9)
        assert found.accuracies[: len(stopping.accuracies)] == stopping.accuracies
        assert (found.best_state is None) == (stopping.best_state is None)


def test_what_needs_all_ranks_is_refused_in_on_step(tmp_path):
    class Evaluate(Callback):
        def on_step(self, trainer, step, output):
            trainer.evaluate()

    def run(ranks):
        Trainer(TrainConfig(**COMMON), [Evaluate()], ranks=ranks).run()

    first, second = together(tmp_path, 2, run)
    assert isinstance(first, SettingError)
    assert "must be called on all ranks after a step" in str(first)
    assert "on_every_rank = True" in str(first)
    assert isinstance(second, RankError)  # with the same reason, which rank 0 prints


def test_callbacks_may_evaluate_where_weights_are_whole(tmp_path):
    class Evaluate(Callback):
        def __init__(self, everywhere):
            self.on_every_rank, self.found = everywhere, []

        def on_evaluate(self, trainer, evaluation):
            self.found.append((trainer.evaluate(), evaluation.test_accuracy, trainer.state().step))

        def on_step(self, trainer, step, output):
            if self.on_every_rank and step == 2:
                self.found.append((trainer.evaluate()[1], trainer.state().step))

    def run(ranks):
        callbacks = [Evaluate(False), Evaluate(True)]
        Trainer(TrainConfig(**{**COMMON, "binary": True}), callbacks, ranks=ranks).run()
        return [callback.found for callback in callbacks]

    (alone, every), (nothing, other) = together(tmp_path, 2, run)
    assert not nothing
    assert len(alone) == 2
    for (_, accuracy), reported, _ in alone:
        assert accuracy == reported
    assert every == other
    assert len(every) == 3


def test_more_ranks_than_test_images(tmp_path):
    x = np.random.default_rng(0).integers(0, 17, (60, 8, 8)).astype(np.uint8)
    data = Dataset.from_arrays(x, np.arange(60) % 10, test_x=x[:2], test_y=[3, 4], pixel_max=16)
    config = TrainConfig(**{**COMMON, "sync_batch_norm": True, "dtype": "float64", "max_steps": 2})
    alone = Trainer(config, data=data).run()
    for result in together(tmp_path, 3, lambda r: Trainer(config, data=data, ranks=r).run()):
        assert result.final.test_loss == pytest.approx(alone.final.test_loss, abs=1e-9)
        assert result.final_accuracy == alone.final_accuracy


@pytest.mark.parametrize(
    ("settings", "names"),
    [({"lr": 0.5}, "lr: rank 0 0.001, rank 1 0.5"), ({"validation": 9}, "validation: rank 0 0")],
)
def test_other_options_are_refused_in_one_sentence(tmp_path, settings, names):
    errors = together(tmp_path, 3, lambda r: train(r, **(settings if r.rank == 1 else {})))
    assert [type(error) for error in errors] == [SettingError] * 3
    assert all(names in str(error) and "same options" in str(error) for error in errors)


def test_another_version_is_refused_in_one_sentence(tmp_path):
    def run(ranks):
        ranks.agree("run the same version of cupybnn", {"code": "a" if ranks.rank < 2 else "b"})

    errors = together(tmp_path, 3, run)
    expected = "All ranks must run the same version of cupybnn; got code: rank 0 'a', rank 2 'b'."
    assert [str(error) for error in errors] == [expected] * 3


@pytest.mark.parametrize("name", ["fc2.weight", "bn1.gamma"])
def test_debug_finds_the_rank_whose_weights_differ(tmp_path, name):
    class Edit(Callback):
        def on_step(self, trainer, step, output):
            if step == 3:
                parameter = dict(trainer.model.named_parameters())[name]
                parameter.write().reshape(-1)[7] *= -1

    def run(ranks):
        config = TrainConfig(**{**COMMON, "binary": True})
        trainer = Trainer(config, ranks=ranks)
        if ranks.rank == 2:
            trainer.callbacks.append(Edit())
        trainer.run()

    # A sign that one rank alone has wrong is sent again in the next step, so it cannot last.
    errors = together(tmp_path, 3, run)
    if name == "fc2.weight":
        assert errors == [None] * 3
    else:
        for error in errors:
            assert isinstance(error, RankError)
            assert f"the {name} differs between rank 0 and rank 2" in str(error)


def test_a_rank_that_fails_ends_the_others_with_its_reason(tmp_path):
    class Full(Callback):
        def on_evaluate(self, trainer, evaluation):
            raise OSError("No space left on device")

    def run(ranks):
        Trainer(TrainConfig(**COMMON), [Full()], ranks=ranks).run()

    first, *others = together(tmp_path, 3, run)
    assert isinstance(first, OSError)
    for error in others:
        assert isinstance(error, RankError)
        assert "Rank 0 " in str(error)
        assert "ended with an error: No space left on device" in str(error)


def test_the_first_step_may_take_long(monkeypatch, tmp_path):
    """It compiles kernels, which another rank may find in a cache."""
    busy, call = [], PlainStep.__call__

    def step(self, step):
        busy.append((step, self._team.ranks._meeting.busy))
        return call(self, step)

    monkeypatch.setattr(PlainStep, "__call__", step)
    run_together(tmp_path, 2, max_steps=3)
    assert sorted(busy) == [(step, step == 0) for step in (0, 0, 1, 1, 2, 2)]


def test_one_rank_that_is_asked_to_stop_stops_all_at_the_same_step(tmp_path):
    class Stop(Callback):
        def on_step(self, trainer, step, output):
            if step == 4:
                trainer.request_stop()

    def run(ranks):
        trainer = Trainer(TrainConfig(**COMMON), ranks=ranks)
        if ranks.rank == 1:
            trainer.callbacks.append(Stop())
        return trainer.run()

    results = together(tmp_path, 3, run)
    assert [(result.stopped, result.steps) for result in results] == [(True, 6)] * 3
