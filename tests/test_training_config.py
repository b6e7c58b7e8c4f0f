"""The configuration of a run: what is refused, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from cupybnn.errors import SettingError
from cupybnn.spelling import nearest
from cupybnn.training import TrainConfig
from cupybnn.training.declaration import declared


def test_defaults_are_the_original_programs():
    config = TrainConfig()
    assert (config.n_hidden, config.reg, config.lr) == (512, 1e-4, 1e-3)
    assert (config.batch_size, config.max_steps, config.eval_every_n) == (128, 1000, 100)
    assert (config.binary, config.xnor, config.batch_norm, config.debug) == (False,) * 4


class TestByBinary:
    """What `binary` decides, unless it is named."""

    @pytest.mark.parametrize(
        ("settings", "batch_norm", "reg"),
        [
            ({}, False, 1e-4),
            ({"binary": True}, True, 0.0),
            ({"binary": True, "reg": 1e-4}, True, 1e-4),
            ({"binary": True, "batch_norm": False}, False, 0.0),
            ({"batch_norm": True, "reg": 0}, True, 0.0),
            ({"binary": True, "batch_norm": None, "reg": None}, True, 0.0),
        ],
    )
    def test_values(self, settings, batch_norm, reg):
        config = TrainConfig(**settings)
        assert (config.batch_norm, config.reg) == (batch_norm, reg)
        assert isinstance(config.reg, float)
        stored = json.loads(config.to_json())
        assert (stored["batch_norm"], stored["reg"]) == (batch_norm, reg)
        assert TrainConfig.from_json(config.to_json()) == config

    def test_an_invalid_binary_is_reported_first(self):
        with pytest.raises(ValueError, match="The 'binary' must be True or False; got 'yes'"):
            TrainConfig(binary="yes")


class TestDeclarations:
    SETTINGS = declared(TrainConfig)

    def test_each_field_has_one(self):
        assert list(self.SETTINGS) == list(TrainConfig.__dataclass_fields__)
        for name, each in self.SETTINGS.items():
            assert each.help, name
            assert each.help[-1] not in ".,;", name
            assert each.may_change(TrainConfig()) in ("same", "reported", "free"), name
            default = getattr(TrainConfig(), name)
            assert each.rule.check(name, default) == default
            assert (each.by_binary is None) == (each.default == default)

    def test_needs_name_existing_settings(self):
        for name, each in self.SETTINGS.items():
            if each.needs:
                other, *values = each.needs
                for value in values:
                    self.SETTINGS[other].rule.check(other, value)
                assert other in self.SETTINGS
            assert not set(each.synonyms) & set(self.SETTINGS), name

    def test_groups_are_contiguous(self):
        headings = [each.group for each in self.SETTINGS.values()]
        assert [h for h, _ in itertools.groupby(headings)] == list(dict.fromkeys(headings))

    def test_docstring_describes_every_setting(self):
        text = inspect.getdoc(TrainConfig)
        for name, each in self.SETTINGS.items():
            assert f"\n{name} : {each.rule.kind}, default " in text
        assert "reg : float, default 0.0001, with `binary` 0.0\n    Penalty factor." in text
        assert max(map(len, text.splitlines())) <= 100

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("epochs", ["max_steps"]),
            ("hidden", ["n_hidden", "hidden_layers"]),
            ("learning_rate", ["lr"]),
            ("batchsize", ["batch_size"]),
            ("batch-norm", ["batch_norm", "sync_batch_norm"]),
            ("dropout", ["keep_prob", "input_keep_prob", "sign_keep_prob"]),
            ("resume", ["restore"]),
            ("max_step", ["max_steps"]),
            ("zzz", []),
            ("", []),
        ],
    )
    def test_nearest(self, written, meant):
        names = {name: each.synonyms for name, each in self.SETTINGS.items()}
        assert nearest(written, names) == meant


def test_numpy_scalars_are_plain_numbers():
    config = TrainConfig(
        n_hidden=np.int32(8),
        lr=np.float32(0.5),
        binary=np.True_,
        ste=np.str_("identity"),
        milestones=np.array([3, 5]),
    )
    assert TrainConfig.from_json(config.to_json()) == config
    found = (config.n_hidden, config.lr, config.binary, config.ste, *config.milestones)
    assert found == (8, 0.5, True, "identity", 3, 5)
    assert [type(value) for value in found] == [int, float, bool, str, int, int]


class TestWidths:
    """`n_hidden` as one number, as ever, or as one for each layer."""

    def test_one_number(self):
        config = TrainConfig(n_hidden=64, hidden_layers=4)
        assert config.hidden_sizes == (64, 64, 64, 64)
        stored = json.loads(config.to_json())
        assert (stored["n_hidden"], stored["hidden_layers"]) == (64, 4)

    @pytest.mark.parametrize("layers", [{}, {"hidden_layers": 2}, {"hidden_layers": 3}])
    def test_one_for_each_layer(self, layers):
        config = TrainConfig(n_hidden=[np.int64(30), 20], **layers)
        assert (config.n_hidden, config.hidden_sizes, config.hidden_layers) == ((30, 20),) * 2 + (
            2,
        )
        stored = json.loads(config.to_json())
        assert (stored["n_hidden"], stored["hidden_layers"]) == ([30, 20], 2)
        assert TrainConfig.from_json(config.to_json()) == config == TrainConfig(n_hidden=(30, 20))

    def test_a_single_layer(self):
        assert TrainConfig(n_hidden=(30,)).hidden_sizes == (30,)
        with pytest.raises(SettingError, match="'bop' needs binary weights"):
            TrainConfig(n_hidden=(30,), binary=True, optimizer="bop")

    def test_a_number_of_layers_that_does_not_agree(self):
        with pytest.raises(SettingError, match="got 5 layers and 2 widths"):
            TrainConfig(n_hidden=(30, 20), hidden_layers=5)


def test_absolute_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(log_dir="runs", data_dir=str(tmp_path / "mnist"), restore="~/run")
    found = config.with_absolute_paths()
    assert found.log_dir == str(tmp_path / "runs")
    assert found.data_dir == str(tmp_path / "mnist")
    assert found.restore == str(Path.home() / "run")
    assert (config.log_dir, TrainConfig().with_absolute_paths()) == ("runs", TrainConfig())


@pytest.mark.parametrize(
    ("name", "bad", "rule"),
    [
        ("n_hidden", 0, "a whole number, at least 1, or one for each layer; got 0"),
        ("n_hidden", 1.5, "a whole number, at least 1, or one for each layer; got 1.5"),
        ("n_hidden", True, "a whole number, at least 1, or one for each layer; got True"),
        ("n_hidden", [], r"a whole number, at least 1, or one for each layer; got \[\]"),
        ("n_hidden", (5, 0), r"a whole number, at least 1, or one for each layer; got \(5, 0\)"),
        ("n_hidden", [[5]], r"a whole number, at least 1, or one for each layer; got \[\[5\]\]"),
        ("n_hidden", "5,4", "a whole number, at least 1, or one for each layer; got '5,4'"),
        ("batch_size", -3, "a whole number, at least 1; got -3"),
        ("max_steps", -1, "a whole number, at least 0; got -1"),
        ("eval_every_n", -1, "a whole number, at least 0; got -1"),
        ("eval_every_n", "100", "a whole number, at least 0; got '100'"),
        ("seed", -1, "a whole number, at least 0; got -1"),
        ("validation", -1, "a whole number, at least 0; got -1"),
        ("reg", -1e-9, "a finite number, at least 0; got -1e-09"),
        ("reg", float("nan"), "a finite number, at least 0; got nan"),
        ("lr", 0, "a finite number, greater than 0; got 0"),
        ("lr", float("inf"), "a finite number, greater than 0; got inf"),
        ("lr", "1e-3", "a finite number, greater than 0; got '1e-3'"),
        ("keep_prob", 0, r"a finite number, in \(0, 1\]; got 0"),
        ("keep_prob", 1.01, r"a finite number, in \(0, 1\]; got 1.01"),
        ("reg", 10**400, "a finite number, at least 0; got 1000"),
        ("binary", 1, "True or False; got 1"),
        ("batch_norm", "no", "True or False; got 'no'"),
        ("loss", ["l1"], r"one of cross_entropy, squared_hinge; got \['l1'\]"),
        ("dataset", "cifar", "one of auto, mnist, fashion, digits; got 'cifar'"),
        ("dtype", "int8", "one of float32, float64, tf32, bfloat16; got 'int8'"),
        ("ste", "nothing", "one of .*hard_tanh.*; got 'nothing'"),
        ("log_dir", "", "a path or None; got ''"),
        ("log_dir", "a\0b", "a path or None; got 'a.*b'"),
        ("data_dir", 3, "a path or None; got 3"),
    ],
)
def test_bad_values(name, bad, rule):
    with pytest.raises(ValueError, match=f"The '{name}' must be {rule}"):
        TrainConfig(**{name: bad})


def test_digits_with_a_data_directory():
    with pytest.raises(
        ValueError, match=r"'data_dir' must be None with the dataset 'digits', .*got 'd'"
    ):
        TrainConfig(dataset="digits", data_dir="d")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0  # type: ignore[misc]


def test_json_round_trip():
    config = TrainConfig(lr=0.1 + 0.2, binary=True, log_dir=Path("a") / "b", seed=np.int64(3))
    assert TrainConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["log_dir"] == str(Path("a") / "b")


def test_unknown_names_and_other_json():
    with pytest.raises(ValueError, match=r"got learning_rate\. Known: .*\blr\b"):
        TrainConfig.from_mapping({"learning_rate": 1.0})
    with pytest.raises(ValueError, match=r"got epochs\. .* Nearest to epochs: max_steps\."):
        TrainConfig.from_mapping({"epochs": 3})
    with pytest.raises(ValueError, match="is not JSON"):
        TrainConfig.from_json("{")
    with pytest.raises(ValueError, match="must be a JSON object; got list"):
        TrainConfig.from_json("[]")
