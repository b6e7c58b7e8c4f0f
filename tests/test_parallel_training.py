"""Data-parallel training: one rank or many learn the same."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from ranks import together

from cupybnn import nn
from cupybnn.errors import RankError, SettingError
from cupybnn.training import Callback, TrainConfig, Trainer, restored_config
from cupybnn.training.checkpoint import load

COMMON = {
    "dataset": "digits",
    "n_hidden": 48,
    # Not a number by which sums of signs are divisible: an activation that equals its mean, where
    # rounding alone decides about its sign, is then rare, and with this seed there is none.
    "batch_size": 47,
    "seed": 1,
    "max_steps": 12,
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
}  # fmt: skip


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_step(self, trainer, step, output):
        self.losses.append(float(output.loss))


def train(ranks=None, steps=None, **settings):
    """Return the losses, the evaluations and the whole state of a run."""
    record = Losses()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # latent weights that can leave the window
        trainer = Trainer(TrainConfig(**{**COMMON, **settings}), [record], ranks=ranks)
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


@pytest.mark.parametrize("network", NETWORKS)
def test_many_ranks_learn_what_one_learns(tmp_path, network):
    settings = {**NETWORKS[network], "dtype": "float64", "sync_batch_norm": True}
    alone = train(**settings)
    for size in (2, 3, 4):
        runs = together(tmp_path, size, lambda ranks: train(ranks, **settings))
        assert not any(isinstance(run, Exception) for run in runs), runs
        same_run(alone, runs[0], 1e-9)
        for run in runs[1:]:  # the others know the same, but report nothing
            assert run[0] == []
            same_run((runs[0][0], *run[1:]), runs[0], 0)
