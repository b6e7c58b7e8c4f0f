"""Recipes: each that comes with the package makes a configuration, and options override it."""

from __future__ import annotations

import pytest

from cupybnn.cli import train as command
from cupybnn.cli.main import main
from cupybnn.training import TrainConfig, Trainer, recipes, train


@pytest.mark.parametrize("name", recipes.names())
def test_each_is_a_configuration(name):
    recipe = recipes.load(name)
    config = TrainConfig.from_mapping(recipe.settings, source=f"recipe {name}")
    assert recipe.name == name
    assert 10 < len(recipe.summary) <= 100
    assert "\n" not in recipe.summary
    assert config.validation == 0  # a recipe ends on the test set
    assert config.log_dir is None
    assert config.restore is None


def test_original_is_the_defaults():
    assert TrainConfig.from_mapping(recipes.load("original").settings) == TrainConfig()


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
    assert [line.split()[0] for line in lines] == recipes.names()
    assert {"original", "digits"} <= set(recipes.names())


def test_own_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('summary = "mine"\n[settings]\nn_hidden = 17\n')
    assert recipes.load(str(path)).settings == {"n_hidden": 17}
    assert command._config({"recipe": str(path)}).n_hidden == 17


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_hidden = ", "is not TOML"),
        ("n_hidden = 5", r"must hold a 'summary' and a table \[settings\].*got n_hidden"),
        ("", "got nothing"),
        ("[settings]\nlearning = 1", r"got learning\. Known:"),
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
        assert "must be one of digits, original" in capsys.readouterr().err


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

    def test_falling_schedule_and_other_max_steps_is_said(self, tmp_path):
        settings = {**QUICK, "schedule": "cosine"}
        first = train(**settings, log_dir=str(tmp_path))
        longer = {**settings, "max_steps": 40, "restore": str(first.run_folder)}
        assert "max_steps is 40 instead of 30" in train(**longer).notices[0]

    def test_exponential_needs_an_end_above_zero(self):
        with pytest.raises(ValueError, match="'final_lr' must be greater than 0"):
            TrainConfig(schedule="exponential")
