"""The configuration of a run: what is refused, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cupybnn.training import TrainConfig


def test_defaults_are_the_original_programs():
    config = TrainConfig()
    assert (config.n_hidden, config.reg, config.lr) == (512, 1e-4, 1e-3)
    assert (config.batch_size, config.max_steps, config.eval_every_n) == (128, 1000, 100)
    assert (config.binary, config.xnor, config.batch_norm, config.debug) == (False,) * 4


@pytest.mark.parametrize(
    ("name", "bad", "rule"),
    [
        ("n_hidden", 0, "a whole number, at least 1; got 0"),
        ("n_hidden", 1.5, "a whole number, at least 1; got 1.5"),
        ("n_hidden", True, "a whole number, at least 1; got True"),
        ("batch_size", -3, "a whole number, at least 1; got -3"),
        ("max_steps", -1, "a whole number, at least 0; got -1"),
        ("eval_every_n", 0, "a whole number, at least 1; got 0"),
        ("eval_every_n", "100", "a whole number, at least 1; got '100'"),
        ("seed", -1, "a whole number, at least 0; got -1"),
        ("validation", -1, "a whole number, at least 0; got -1"),
        ("reg", -1e-9, "a finite number, at least 0; got -1e-09"),
        ("reg", float("nan"), "a finite number, at least 0; got nan"),
        ("lr", 0, "a finite number, greater than 0; got 0"),
        ("lr", float("inf"), "a finite number, greater than 0; got inf"),
        ("lr", "1e-3", "a finite number, greater than 0; got '1e-3'"),
        ("keep_prob", 0, r"a finite number, in \(0, 1\]; got 0"),
        ("keep_prob", 1.01, r"a finite number, in \(0, 1\]; got 1.01"),
        ("binary", 1, "True or False; got 1"),
        ("dataset", "cifar", "one of auto, mnist, digits; got 'cifar'"),
        ("dtype", "int8", "one of float32, float64, tf32, bfloat16; got 'int8'"),
        ("ste", "nothing", "one of .*hard_tanh.*; got 'nothing'"),
        ("log_dir", "", "a path or None; got ''"),
        ("data_dir", 3, "a path or None; got 3"),
    ],
)
def test_bad_values(name, bad, rule):
    with pytest.raises(ValueError, match=f"The '{name}' must be {rule}"):
        TrainConfig(**{name: bad})


def test_digits_with_a_data_directory():
    with pytest.raises(ValueError, match="reads no data directory; got the data directory 'd'"):
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
    with pytest.raises(ValueError, match="is not JSON"):
        TrainConfig.from_json("{")
    with pytest.raises(ValueError, match="must be a JSON object; got list"):
        TrainConfig.from_json("[]")
