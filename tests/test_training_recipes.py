"""Recipes: each that comes with the package makes a configuration, and options override it."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from conftest import ROOT

from cupybnn.cli import train as command
from cupybnn.cli.main import main
from cupybnn.data import Augmentation
from cupybnn.training import TrainConfig, recipes, train


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

    def test_published_figure_is_that_of_the_recipe_s_teachers(self, capsys, tmp_path):
        (tmp_path / "wise.toml").write_text('[settings]\ndataset = "digits"\nmax_steps = 2\n')
        path = tmp_path / "taught.toml"
        path.write_text(
            'accuracy = "0.5"\nmeasured = "one run"\n[settings]\ndataset = "digits"\n'
            "max_steps = 2\nn_hidden = 8\n[teachers]\n"
            f"recipe = {json.dumps((tmp_path / 'wise.toml').as_posix())}\ncount = 1\n"
        )
        run = ["train", "--recipe", str(path), "--device", "cpu"]
        assert main(run) == 0
        assert self.last(capsys).endswith(" s of them for teachers; published: 0.5 (one run)")
        assert main([*run, "--teacher", ""]) == 0
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
