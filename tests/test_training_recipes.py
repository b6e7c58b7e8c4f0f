"""Recipes: each that comes with the package makes a configuration, and options override it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from conftest import ROOT

from cupybnn import nn
from cupybnn.autograd import Tensor
from cupybnn.cli import train as command
from cupybnn.cli.main import main
from cupybnn.data import Augmentation
from cupybnn.errors import CheckpointError
from cupybnn.training import Callback, TrainConfig, Trainer, recipes, train


@pytest.mark.parametrize("name", recipes.names())
def test_each_is_a_configuration(name):
    recipe = recipes.load(name)
    config = TrainConfig.from_mapping(recipe.settings, source=f"recipe {name}")
    assert recipe.name == name
    assert 10 < len(recipe.summary) <= 100
    assert "\n" not in recipe.summary
    assert {"binary", "batch_norm", "reg"} <= set(recipe.settings)  # else a default decides
    assert config.validation == 0  # a recipe ends on the test set
    assert config.log_dir is None
    assert config.restore is None


def test_original_is_the_defaults():
    assert TrainConfig.from_mapping(recipes.load("original").settings) == TrainConfig()


AUGMENT = tuple(f"augment_{field.name}" for field in fields(Augmentation))


def test_recipes_match_their_names():
    configs = {n: TrainConfig.from_mapping(recipes.load(n).settings) for n in recipes.names()}
    for name in ("binarynet", "augmented", "tiny"):
        config = configs[name]
        assert config.binary
        assert config.first
        assert config.last
        assert config.dataset == "mnist"
        assert any(getattr(config, a) for a in AUGMENT) == (name != "binarynet")
    assert configs["tiny"].n_hidden <= 256
    network = ("n_hidden", "hidden_layers", "batch_norm", "ste")
    for setting in network:
        assert getattr(configs["binarynet"], setting) == getattr(configs["augmented"], setting)


@pytest.mark.parametrize("name", recipes.names())
def test_each_learns_when_made_small(name):
    small = {"dataset": "digits", "device": "cpu", "n_hidden": 64, "batch_size": 64}
    small |= {"max_steps": 200, "eval_every_n": 1000}
    # As much deformation as this is too much for 8x8 pixels.
    deformed = {name: getattr(TrainConfig(), name) for name in AUGMENT}
    settings = recipes.load(name).settings
    if "vat" in settings:
        small["vat"] = settings["vat"] / 4  # likewise
    if "latent_lr" in settings:  # for many more steps
        small["latent_lr"] = 0.1
    result = train(TrainConfig.from_mapping({**settings, **small, **deformed}))
    assert result.history[0].test_accuracy < 0.5
    assert result.final_accuracy > 0.65  # strong dropout is slow at first


def test_deformed_are_images_in_training_alone():
    plain = Trainer(TrainConfig(**QUICK))
    deforming = Trainer(TrainConfig(**QUICK, augment_shift=2.0))
    assert plain.evaluate() == deforming.evaluate()
    first, second = plain.make_step(0), deforming.make_step(0)
    assert (first.labels == second.labels).all()
    assert (first.logits != second.logits).any()
    again = Trainer(TrainConfig(**QUICK, augment_shift=2.0)).make_step(0)
    assert (again.logits == second.logits).all()


def test_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf[settings]\nn_hidden = 77\n")
    assert recipes.load(str(path)).settings == {"n_hidden": 77}


def test_options_override_a_recipe():
    recipe = recipes.load("digits").settings
    config = command._config({"recipe": "digits", "n_hidden": 33, "binary": False})
    expected = {**recipe, "n_hidden": 33, "binary": False}
    assert config == TrainConfig.from_mapping(expected)
    assert recipe["binary"] is True


def test_switches_can_be_turned_off(capsys):
    quick = ["--max_steps", "2", "--n_hidden", "8", "--device", "cpu"]
    assert main(["train", "--recipe", "digits", "--no_binary", *quick]) == 0
    assert "full precision" in capsys.readouterr().out
    assert main(["train", "--recipe", "digits", "--no-batch-norm", *quick]) == 0
    assert "batch norm" not in capsys.readouterr().out


def test_list(capsys):
    assert main(["train", "--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begun = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert begun == recipes.names()
    assert {"original", "digits"} <= set(recipes.names())
    assert max(map(len, lines)) <= 100
    assert (
        "  test accuracy 0.9859 ± 0.0056 (five seeds; NumPy on one core, 11 to 14 s a run)" in lines
    )
    at = lines.index("  trains 2 teachers first, by the recipe teacher")
    assert lines[at - 2].startswith("binarynet: ")


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def named_records(name: str) -> set[str]:
    """Return the names of the records that a recipe's file names."""
    text = (Path(recipes.__file__).parent / f"{name}.toml").read_text(encoding="utf-8")
    return {Path(each).name for each in re.findall(r"[\w/.-]+\.json", text)}


def test_published_figures_are_those_of_the_records():
    """A record has as many seeds as the recipe says, unless that names another record."""
    compared = set()
    for path in (ROOT / "bench/results/recipes").glob("*.json"):
        for name, found in json.loads(path.read_text(encoding="utf-8"))["recipes"].items():
            if (named := named_records(name)) and path.name not in named:
                continue
            recipe, runs = recipes.load(name), found["runs"]
            assert found["settings"] == recipe.settings, name
            figures = [(recipe, [run["accuracy"] for run in runs])]
            if recipe.teachers is not None:
                teacher = recipes.load(recipe.teachers.recipe)
                assert found["teachers"]["settings"] == teacher.settings
                figures.append((teacher, [a for run in runs for a in run["teachers"]]))
            for each, accuracies in figures:
                seeds = f"{NUMBERS[len(accuracies)]} seeds;"
                assert each.measured.startswith(seeds), f"{path.name} has {seeds} of {each.name}"
                mean, *deviation = each.accuracy.split(" ± ")
                assert mean == f"{np.mean(accuracies):.4f}", each.name
                if len(accuracies) > 2:
                    assert deviation == [f"{np.std(accuracies, ddof=1):.4f}"], each.name
                compared.add(each.name)
    assert compared == set(recipes.names())


class TestEnd:
    QUICK: ClassVar = ["--max_steps", "3", "--n_hidden", "8", "--device", "cpu"]

    def last(self, capsys) -> str:
        return capsys.readouterr().out.splitlines()[-1]

    def test_of_a_recipe_that_is_changed(self, capsys):
        assert main(["train", "--recipe", "digits", *self.QUICK]) == 0
        line = self.last(capsys)
        assert re.fullmatch(r"Recipe digits: test accuracy \d\.\d{4} after \d+\.\d s", line)
        assert main(["train", "--recipe", "digits", *self.QUICK, "--validation", "300"]) == 0
        assert self.last(capsys).startswith("Recipe digits: validation accuracy ")

    def test_published_figure_beside_it(self, capsys, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_text(
            'accuracy = "0.5"\nmeasured = "one run"\n[settings]\ndataset = "digits"\n'
            "max_steps = 2\nn_hidden = 8\n"
        )
        free = ["--seed", "3", "--device", "cpu", "--eval_every_n", "1"]
        assert main(["train", "--recipe", str(path), *free]) == 0
        assert self.last(capsys).endswith(" s; published: 0.5 (one run)")
        assert main(["train", "--recipe", str(path), *free, "--lr", "0.1"]) == 0
        assert "published" not in self.last(capsys)

    def test_none_without_a_recipe(self, capsys):
        assert main(["train", "--dataset", "digits", *self.QUICK]) == 0
        assert self.last(capsys).startswith("Med ex/s")


def test_own_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('summary = "mine"\n[settings]\nn_hidden = 17\n')
    assert recipes.load(str(path)).settings == {"n_hidden": 17}
    assert command._config({"recipe": str(path)}).n_hidden == 17
    path.write_text("[settings]\nn_hidden = [17, 16]\n")
    assert command._config({"recipe": str(path)}).hidden_sizes == (17, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_hidden = ", "is not TOML"),
        ("n_hidden = 5", r"must contain its settings below a line \[settings\].*got n_hidden"),
        ("", "got nothing"),
        ("accuracy = 0.98\n[settings]", r"The 'accuracy' of the recipe .* must be text; got 0\.98"),
        ("[settings]\nlearning = 1", r"recipe .*bad\.toml must name .*; got learning\. Known:"),
        ("[settings]\nlr = -1.0", "The 'lr' must be"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        command._config({"recipe": str(path)})


def test_unknown_name(capsys):
    for name in ("nothing", "../config", "", str("x" * 300)):
        assert main(["train", "--recipe", name]) == 2
        assert (
            f"must be one of {', '.join(recipes.names())}, or a .toml file"
            in capsys.readouterr().err
        )


def test_no_such_file(tmp_path, capsys):
    path = str(tmp_path / "mine.toml")
    assert main(["train", "--recipe", path]) == 2
    assert f"or a .toml file; there is no file {path!r}." in capsys.readouterr().err


QUICK = {
    "dataset": "digits",
    "device": "cpu",
    "n_hidden": 24,
    "max_steps": 30,
    "eval_every_n": 10,
}


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            {"optimizer": "sgd", "lr": 0.1, "momentum": 0.5},
            {"optimizer": "adamw", "weight_decay": 0.1},
            {"schedule": "cosine", "warm_up": 5, "final_lr": 0.1},
            {"schedule": "exponential", "final_lr": 0.01},
            {"loss": "squared_hinge", "binary": True, "penalty": "bipolar", "reg": 1e-6},
            {"label_smoothing": 0.1, "input_keep_prob": 0.8},
            {"hidden_layers": 1},
            {"schedule": "step", "milestones": [10, 20], "milestone_factor": 0.2, "warm_up": 3},
            {"average": "ema", "average_decay": 0.9, "batch_norm": True, "binary": True},
            {"average": "swa", "average_from": 12, "augment_shift": 1.0},
            {"optimizer": "bop", "binary": True, "batch_norm": True, "bop_rate": 0.05},
            {"binary": True, "first": True, "last": True, "batch_norm": True, "latent_lr": 3.0},
            {"binary": True, "batch_norm": True, "sign_keep_prob": 0.8},
            {"binary": True, "batch_norm": True, "ste": "ede_sign"},
            {
                "augment_shift": 0.5,
                "augment_rotation": 10,
                "augment_scale": 0.1,
                "augment_shear": 0.1,
                "augment_elastic": 0.3,
            },
            {"hidden_layers": 5, "binary": True, "batch_norm": True, "lr_scale": "binarynet"},
        ],
        ids=lambda s: "-".join(map(str, s.values())),
    )
    def test_each_changes_the_run_and_restores_exactly(self, tmp_path, settings):
        settings = {**QUICK, **settings}
        plain = train(**QUICK)
        whole = Trainer(TrainConfig(**settings))
        result = whole.run()
        assert result.final.train_loss != plain.final.train_loss
        assert result.final.train_loss < 10

        config = TrainConfig(**settings, log_dir=str(tmp_path))
        half = Trainer(config)
        step = half.make_step

        def step_and_stop(number):
            if number == 16:
                half.request_stop()
            return step(number)

        half.make_step = step_and_stop
        folder = half.run().run_folder
        again = Trainer(TrainConfig(**settings, restore=str(folder)))
        again.run()
        for name, array in whole.state().arrays.items():
            assert (array == again.state().arrays[name]).all()

    def test_schedule_and_scale_reach_the_optimizer(self):
        config = TrainConfig(
            **QUICK, binary=True, schedule="cosine", warm_up=4, lr_scale="binarynet"
        )
        optimizer = Trainer(config).optimizer
        factors = [optimizer.schedule(step) for step in (0, 3, 4, 17, 30)]
        assert factors == pytest.approx([0.2, 0.8, 1, 0.5, 0])
        (group,) = optimizer.groups
        scales = sorted({group["lr_scale"](p) for p in group["params"]})
        assert scales == pytest.approx([1, (48 / 1.5) ** 0.5])

    def test_milestones_count_from_the_first_step(self):
        config = TrainConfig(
            **QUICK, schedule="step", milestones=(10, 20), milestone_factor=0.5, warm_up=4
        )
        schedule = Trainer(config).optimizer.schedule
        assert [schedule(step) for step in (4, 9, 10, 19, 20)] == [1, 1, 0.5, 0.5, 0.25]

    def test_latent_weights_have_a_factor_of_their_own(self):
        settings = {**QUICK, "binary": True, "latent_lr": 0.1}
        for scale, hidden in (("none", 0.1), ("binarynet", 0.1 * (48 / 1.5) ** 0.5)):
            trainer = Trainer(TrainConfig(**settings, lr_scale=scale))
            (group,) = trainer.optimizer.groups
            assert group["lr_scale"](trainer.model.fc2.weight) == pytest.approx(hidden)
            assert group["lr_scale"](trainer.model.fc1.weight) == 1

    def test_bop_flips_binary_weights_and_leaves_the_rest_to_adam(self):
        settings = {**QUICK, "binary": True, "optimizer": "bop", "bop_rate": 0.05}
        trainer = Trainer(TrainConfig(**settings, reg=1e-3))
        binary, real = trainer.model.fc2.weight, trainer.model.fc1.weight
        before, before_real = binary.numpy().copy(), real.numpy().copy()
        assert set(np.unique(before)) == {-1.0, 1.0}
        # The penalty is of the two real layers alone: the magnitudes of signs say nothing.
        magnitudes = sum(
            abs(m.weight.numpy()).sum() for m in (trainer.model.fc1, trainer.model.fcout)
        )
        assert trainer.objective.penalty().item() == pytest.approx(1e-3 * magnitudes, rel=1e-5)
        trainer.run()
        assert set(np.unique(binary.numpy())) == {-1.0, 1.0}
        assert 0 < (binary.numpy() != before).mean() < 0.9
        assert (real.numpy() != before_real).mean() > 0.9

    def test_bop_learns(self):
        settings = {**QUICK, "binary": True, "batch_norm": True, "reg": 0.0, "max_steps": 200}
        settings |= {"n_hidden": 64, "lr": 3e-3}
        still = train(**settings, optimizer="bop", bop_threshold=1e9)  # no weight ever flips
        result = train(**settings, optimizer="bop", bop_rate=1e-2, bop_threshold=1e-6)
        assert result.final.train_loss < still.final.train_loss
        assert result.final_accuracy > 0.8

    def test_sharpening_pseudo_gradient_gets_the_progress(self):
        trainer = Trainer(TrainConfig(**QUICK, binary=True, ste="ede_sign"))
        heard = []
        step = trainer.make_step

        def listen(number):
            output = step(number)
            heard.append(trainer.model.sign1.quantizer.progress)
            return output

        trainer.make_step = listen
        trainer.run()
        assert heard == [number / 30 for number in range(30)]
        assert trainer.model.fc2.quantizer.progress == heard[-1]

    def test_another_end_of_a_sharpening_pseudo_gradient_is_reported(self, tmp_path):
        settings = {**QUICK, "binary": True, "ste": "ede_sign"}
        first = train(**settings, log_dir=str(tmp_path))
        longer = {**settings, "max_steps": 40, "restore": str(first.run_folder)}
        assert "max_steps is 40 instead of 30" in train(**longer).notices[0]

    def test_sign_dropout_keeps_activations_two_valued(self):
        config = TrainConfig(
            **QUICK, binary=True, batch_norm=False, last=True, xnor=True, sign_keep_prob=0.5
        )
        model = Trainer(config).model
        x = Tensor(np.random.default_rng(0).random((50, 64), np.float32))
        kept = {}
        for training in (True, False):
            model.train(training)
            kept[training] = {n: t for n, t in nn.stages(model, x) if n.endswith("/activation")}
            assert len(kept[training]) == 3
            for activation in kept[training].values():
                assert activation.two_valued
                assert set(np.unique(activation.numpy())) == {-1.0, 1.0}
        changed = kept[True]["fc1/activation"].numpy() != kept[False]["fc1/activation"].numpy()
        assert 0.2 < changed.mean() < 0.3  # half of the coins show what was there

    def test_changed_max_steps_of_a_schedule_is_reported(self, tmp_path):
        settings = {**QUICK, "schedule": "cosine"}
        first = train(**settings, log_dir=str(tmp_path))
        longer = {**settings, "max_steps": 40, "restore": str(first.run_folder)}
        assert "max_steps is 40 instead of 30" in train(**longer).notices[0]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"schedule": "step"}, "The 'milestones', .* must be given for the schedule 'step'"),
            (
                {"schedule": "step", "milestones": [5, 5]},
                "must be increasing whole numbers.*got .5, 5",
            ),
            ({"milestones": "12"}, "must be increasing whole numbers, at least 1; got '12'"),
            ({"milestones": [0]}, "must be increasing whole numbers, at least 1; got .0"),
            ({"optimizer": "bop"}, "'bop' needs binary weights to flip; .*binary=False"),
            (
                {"optimizer": "bop", "binary": True, "hidden_layers": 1},
                "binary=True, hidden_layers=1",
            ),
            ({"average": "mean"}, "The 'average' must be one of none, ema, swa; got 'mean'"),
            ({"average_decay": 1.0}, r"'average_decay' must be a finite number, in \[0, 1\)"),
            ({"sign_keep_prob": 0}, r"'sign_keep_prob' must be a finite number, in \(0, 1\]"),
            ({"augment_shift": -1}, "'augment_shift' must be a finite number, at least 0; got -1"),
            ({"augment_scale": 1.0}, r"'augment_scale' must be a finite number, in \[0, 1\)"),
        ],
    )
    def test_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**settings)

    def test_settings_in_the_output(self, capsys):
        quick = ["train", "--dataset", "digits", "--device", "cpu", "--max_steps", "1"]
        assert main([*quick, "--binary", "--sign_keep_prob", "0.9", "--average", "ema"]) == 0
        out = capsys.readouterr().out
        assert "sign dropout (keep 0.9)\n" in out
        assert "averaged weights (exponential, decay 0.999), from step 0 on\n" in out
        assert main([*quick, "--sign_keep_prob", "0.9"]) == 0
        captured = capsys.readouterr()
        assert "--sign_keep_prob has no effect without --binary." in captured.err
        assert "sign dropout" not in captured.out

    def test_milestones_on_the_command_line(self, capsys):
        quick = ["train", "--dataset", "digits", "--device", "cpu", "--max_steps", "1"]
        assert main([*quick, "--schedule", "step", "--milestones", "5,9"]) == 0
        with pytest.raises(SystemExit):
            main([*quick, "--milestones", "5,x"])
        assert "must be comma-separated whole numbers; got '5,x'" in capsys.readouterr().err
        config = TrainConfig(schedule="step", milestones=[5, 9])
        assert TrainConfig.from_json(config.to_json()) == config

    def test_exponential_needs_an_end_above_zero(self):
        with pytest.raises(ValueError, match="'final_lr' must be greater than 0"):
            TrainConfig(schedule="exponential")


class TestAverage:
    SETTINGS: ClassVar = {**QUICK, "binary": True, "batch_norm": True}

    @pytest.mark.parametrize("images", [{}, {"augment_shift": 2.0, "mix": "uniform"}])
    def test_what_is_evaluated(self, images):
        settings = {**self.SETTINGS, **images}
        trainer = Trainer(TrainConfig(**settings, average="swa", average_from=20))
        seen = []
        step = trainer.make_step

        def keep(number):
            output = step(number)
            seen.append(trainer.model.state_dict())
            return output

        trainer.make_step = keep
        result = trainer.run()
        model, last = trainer.model, seen[-1]
        for name, array in model.state_dict().items():  # outside, all is as training left it
            np.testing.assert_array_equal(array, last[name], err_msg=name)
        with trainer.averaged():
            inside = model.state_dict()
        for name, _ in model.named_parameters():
            mean = np.mean([state[name] for state in seen[20:]], axis=0)
            np.testing.assert_allclose(inside[name], mean, rtol=1e-4, atol=1e-6, err_msg=name)
        # Batch norm's statistics are those of the averaged weights on images as in training.
        alone = Trainer(TrainConfig(**settings))
        alone.make_step(0)
        steps = range(-(-1000 // alone.config.batch_size))
        indices = np.concatenate([alone.order.indices(step) for step in steps])
        inputs, labels = alone._step._images(indices, 0)
        inputs, _ = alone._step._mixed(inputs, labels, 0)
        alone.model.load_state_dict(inside)
        nn.refresh_statistics(alone.model, [Tensor(inputs)])
        for name, array in alone.model.named_buffers():
            np.testing.assert_allclose(inside[name], array, rtol=1e-5, err_msg=name)
        assert alone.evaluate() == pytest.approx(
            (result.final.test_loss, result.final.test_accuracy), rel=1e-5
        )

    def test_nothing_to_average_yet(self):
        plain = train(**self.SETTINGS)
        late = train(**self.SETTINGS, average="ema", average_from=1000)
        assert late.final.test_loss == plain.final.test_loss

    def test_training_goes_on_with_its_own_weights(self):
        plain = Trainer(TrainConfig(**self.SETTINGS))
        averaged = Trainer(TrainConfig(**self.SETTINGS, average="ema", average_decay=0.5))
        results = plain.run(), averaged.run()
        assert results[0].final.train_loss == results[1].final.train_loss
        assert results[0].final.test_loss != results[1].final.test_loss
        for name, array in plain.state().arrays.items():
            np.testing.assert_array_equal(averaged.state().arrays[name], array, err_msg=name)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("average", ["ema", "swa"])
    def test_methods_called_within(self, average, device):
        settings = {**self.SETTINGS, "average": average, "average_decay": 0.9, "device": device}
        trainer = Trainer(TrainConfig(**settings))
        trainer.run()
        outside, figures = trainer.state().arrays, trainer.evaluate()
        with trainer.averaged():
            inside = trainer.model.state_dict()
            with trainer.averaged():
                assert trainer.evaluate() == figures
            within = trainer.state().arrays
            with pytest.raises(RuntimeError, match=r"must be outside of Trainer.averaged\(\)"):
                trainer.make_step(trainer.step)
            for name, array in trainer.model.state_dict().items():
                np.testing.assert_array_equal(array, inside[name], err_msg=name)
        assert any((inside[name] != outside[f"model/{name}"]).any() for name in inside)
        after = trainer.state().arrays
        for name, array in outside.items():
            np.testing.assert_array_equal(within[name], array, err_msg=name)
            np.testing.assert_array_equal(after[name], array, err_msg=name)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_an_error_within_restores_the_weights(self, device, monkeypatch):
        trainer = Trainer(TrainConfig(**{**self.SETTINGS, "average": "ema", "device": device}))
        trainer.run()
        before = trainer.state().arrays

        def fail_within():
            with trainer.averaged():
                for parameter in trainer.model.parameters():
                    parameter.data *= 3
                raise KeyError

        def fail(*args):
            for parameter in trainer.model.parameters():
                parameter.data *= 3
            raise KeyError

        with pytest.raises(KeyError):
            fail_within()
        with monkeypatch.context() as patched:
            patched.setattr(nn, "refresh_statistics", fail)
            with pytest.raises(KeyError):
                trainer.evaluate()
        for name, array in trainer.state().arrays.items():
            np.testing.assert_array_equal(array, before[name], err_msg=name)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_callback_that_uses_the_average_changes_nothing(self, device):
        class Looks(Callback):
            def on_step(self, trainer, step, output):
                if step % 7 == 0:
                    with trainer.averaged():
                        trainer.evaluate()
                        trainer.state()

        settings = {**self.SETTINGS, "average": "ema", "device": device}
        plain = Trainer(TrainConfig(**settings))
        looking = Trainer(TrainConfig(**settings), [Looks()])
        for trainer in (plain, looking):
            trainer.run()
        expected = plain.state().arrays
        for name, array in looking.state().arrays.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)

    def test_other_average_is_not_restored(self, tmp_path):
        settings = {**self.SETTINGS, "average": "ema"}
        first = train(**settings, log_dir=str(tmp_path))
        with pytest.raises(CheckpointError, match="average: checkpoint 'ema', this run 'swa'"):
            train(**{**settings, "average": "swa", "restore": str(first.run_folder)})


def bench_script():
    spec = importlib.util.spec_from_file_location("bench_recipes", ROOT / "bench/recipes.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_comparison_with_the_recipe_that_is_replaced(tmp_path):
    """Welch's test, against scipy's."""
    from scipy import stats

    script = bench_script()
    new, old = [0.9911, 0.9915, 0.9908], [0.9886, 0.9880, 0.9893, 0.9884, 0.9887]
    runs = [{"accuracy": a} for a in new]
    path = tmp_path / "old.json"
    path.write_text(
        json.dumps({"recipes": {"binarynet": {"runs": [{"accuracy": a} for a in old]}}})
    )
    expected = stats.ttest_ind(new, old, equal_var=False).pvalue
    assert script.p_value(new, old) == pytest.approx(expected, rel=1e-6)
    sentence = script.comparison("binarynet", runs, json.loads(path.read_text()))
    assert "0.9911 instead of 0.9886 (+0.0025)" in sentence
    assert f"p = {expected:.2g}" in sentence
    assert script.comparison("tiny", runs, json.loads(path.read_text())) == (
        "`tiny`: the earlier record does not have it"
    )
    assert script.p_value([0.5], old) != script.p_value([0.5], old)  # one run has no deviation
    assert script.p_value([0.5, 0.5], [0.5, 0.5]) == 1
    assert script.p_value([0.5, 0.5], [0.6, 0.6]) == 0


TAUGHT = """
summary = "a network taught by two others"
[settings]
dataset = "digits"
device = "cpu"
binary = true
max_steps = 30
n_hidden = 16
[teachers]
recipe = "TEACHER"
count = 2
"""
TEACHER = """
summary = "a teacher"
[settings]
n_hidden = 24
batch_norm = true
max_steps = 40
reg = 0.0
"""


class TestTeachers:
    @pytest.fixture
    def recipe(self, tmp_path):
        (tmp_path / "wise.toml").write_text(TEACHER)
        path = tmp_path / "student.toml"
        path.write_text(TAUGHT.replace("TEACHER", (tmp_path / "wise.toml").as_posix()))
        return str(path)

    def test_they_are_trained_first(self, recipe, capsys, tmp_path):
        logs = str(tmp_path / "logs")
        options = ["--recipe", recipe, "--seed", "3", "--validation", "200"]
        assert main(["train", *options, "--log_dir", logs]) == 0
        out, err = capsys.readouterr()
        assert f"Training teacher 2 of 2: recipe {tmp_path / 'wise.toml'}, 40 steps\n" in err
        assert re.search(r"^Recipe student: validation .* s of them for teachers$", out, re.M)
        for number, seed in ((1, 6), (2, 7)):
            line = re.search(
                rf"Teacher {number} of 2: .*, seed {seed}, (.*) accuracy (\S+), \d+\.\d s\n", out
            )
            assert line is not None
            assert line[1] == "validation"
            settings = {"n_hidden": 24, "batch_norm": True, "max_steps": 40, "reg": 0.0}
            settings |= {"dataset": "digits", "device": "cpu", "seed": seed, "validation": 200}
            assert float(line[2]) == round(train(**settings).final_accuracy, 4)
        files = sorted((tmp_path / "logs/teachers").iterdir())
        assert [path.name for path in files] == ["wise-6.npz", "wise-7.npz"]
        assert f"Learning from {files[0]}, {files[1]}" in out
        final = re.findall(r"^Final validation accuracy (\S+)", out, re.MULTILINE)
        assert len(final) == 1
        settings = {**recipes.load(recipe).settings, "seed": 3, "validation": 200}
        student = train(**settings, teacher=tuple(map(str, files)))
        assert float(final[0]) == round(student.final_accuracy, 4)
        # A restored run has the same teachers, and trains none.
        (run,) = {path.parent for path in (tmp_path / "logs").rglob("best.npz")}
        assert main(["train", "--restore", str(run), "--max_steps", "32"]) == 0
        assert "Teacher 1 of 2" not in capsys.readouterr().out

    def test_their_progress_on_a_terminal(self, recipe, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert main(["train", "--recipe", recipe, "--max_steps", "1"]) == 0
        err = capsys.readouterr().err
        assert re.search(r"teacher 2 of 2: +0%.*0/40 ", err)
        assert "1/1" in err  # of the network itself

    def test_others_can_be_named(self, recipe, capsys, tmp_path):
        assert main(["train", "--recipe", recipe, "--teacher", "", "--max_steps", "1"]) == 0
        out = capsys.readouterr().out
        assert "Teacher" not in out
        assert "Learning from" not in out

    def test_their_files_are_temporary_without_a_log_directory(self, recipe, capsys):
        assert main(["train", "--recipe", recipe, "--max_steps", "1"]) == 0
        first = re.search(r"Learning from (.*), ", capsys.readouterr().out)[1]
        assert not os.path.exists(os.path.dirname(first))

    @pytest.mark.parametrize(
        ("table", "words"),
        [
            ('recipe = "teacher"', "must have a 'recipe', the name of one, and a 'count'"),
            ('recipe = "teacher"\ncount = true', "a whole number"),
            ('recipe = "teacher"\ncount = 0', "at least one"),
            ('recipe = "binarynet"\ncount = 1', "without teachers of its own"),
            ('recipe = "nobody"\ncount = 1', "must be one of"),
        ],
    )
    def test_a_wrong_table(self, tmp_path, table, words):
        path = tmp_path / "wrong.toml"
        path.write_text(f"[settings]\n[teachers]\n{table}\n")
        with pytest.raises(ValueError, match=words):
            recipes.load(str(path))


def test_row_of_a_recipe():
    script = bench_script()
    accuracies, seconds = (0.9859, 0.9831, 0.9746, 0.9803, 0.9775), (9.4, 9.0, 11.6, 10.0, 10.0)
    runs = [
        {"accuracy": accuracy, "seconds": time, "device": "cpu"}
        for accuracy, time in zip(accuracies, seconds, strict=True)
    ]
    # The sample standard deviation: 0.0040 would be that of these five as all there are.
    expected = "| `digits` | 0.9803 ± 0.0045 | 9 to 12 s a seed on cpu |"
    assert script.row("digits", runs) == expected
    assert "0.9859 ± nan" in script.row("digits", runs[:1])
    shared = [{**run, "at_a_time": 2} for run in runs]
    assert script.row("digits", shared).endswith("s a seed on cpu, 2 at a time |")


def test_what_the_output_of_a_run_says():
    text = """\
Teacher 1 of 2: recipe teacher, seed 0, test accuracy 0.9929, 3.1 s
Teacher 2 of 2: recipe teacher, seed 1, test accuracy 0.9927
Data: mnist, 60,000 training and 10,000 test images; device: cuda:0
step 0, loss = 4.0903, test accuracy 0.6555 (64.8 ex/s)
Final test accuracy 0.9919
Avg ex/s = 191700.7
Med ex/s = 494101.7
"""
    assert bench_script().outcome(text) == {
        "accuracy": 0.9919,
        "teachers": [0.9929, 0.9927],
        "examples_per_second": 494101.7,
        "device": "cuda:0",
    }
    assert bench_script().outcome(text.partition("Final")[0]) is None


def record_of(name: str, *seeds: int, settings: object = None, cpu: str = "a CPU") -> dict:
    runs = [{"seed": seed, "accuracy": seed / 10} for seed in seeds]
    found = {"settings": settings, "runs": runs}
    return {"machine": {"cpu": cpu, "devices": []}, "date": cpu, "recipes": {name: found}}


def test_runs_are_added_to_a_record():
    script = bench_script()
    earlier = record_of("tiny", 0, 1, 2)
    earlier["recipes"]["digits"] = {"settings": 1, "runs": []}
    both = script.add(record_of("tiny", 4, 1), earlier)
    assert [run["seed"] for run in both["recipes"]["tiny"]["runs"]] == [0, 1, 2, 4]
    assert both["recipes"]["digits"] == earlier["recipes"]["digits"]
    other = script.add(record_of("tiny", 4, settings={"lr": 1}), earlier)
    assert [run["seed"] for run in other["recipes"]["tiny"]["runs"]] == [4]
    assert script.described("binarynet")["teachers"]["settings"]["vat"] == 2.0


def test_a_record_of_another_machine_is_not_added_to(tmp_path):
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(record_of("tiny", 0, cpu="an abacus")))
    with pytest.raises(SystemExit, match=r"needs the machine of the record: .* is of an abacus"):
        bench_script().main(["digits", "--json", str(path), "--add"])


def test_bench_script_makes_a_row_and_a_record(tmp_path):
    path = tmp_path / "recipes.json"
    command = [sys.executable, str(ROOT / "bench/recipes.py"), "digits", "--seeds", "2"]
    command += ["--at_a_time", "2", "--first", "4", "--json", str(path), "--add"]
    command += ["--", "--max_steps", "3", "--n_hidden", "8", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    number = r"\d\.\d{4}"
    assert re.fullmatch(
        rf"\| `digits` \| {number} ± {number} \| \d+ to \d+ s a seed on cpu, 2 at a time \|\n",
        done.stdout,
    )
    record = json.loads(path.read_text(encoding="utf-8"))
    runs = record["recipes"]["digits"]["runs"]
    assert [run["seed"] for run in runs] == [4, 5]
    settings = {**recipes.load("digits").settings, "max_steps": 3, "n_hidden": 8, "device": "cpu"}
    assert runs[1]["accuracy"] == round(train(**settings, seed=5).final_accuracy, 4)
    assert record["machine"]["cpu"]
    assert record["options"][:2] == ["--max_steps", "3"]
