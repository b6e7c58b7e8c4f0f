"""The fused step of several ranks, whose kernels are computed by NumPy; without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from kernels_by_numpy import Emulator
from ranks import together
from test_parallel_training import run_together, same_run, train

from cupybnn.training.fast import FusedStep

NETWORKS = {
    "xnor": {"binary": True, "xnor": True},
    "penalty, dropout": {
        "binary": True,
        "xnor": True,
        "keep_prob": 0.5,
        "reg": 1e-4,
        "input_keep_prob": 0.8,
    },
    "sign": {"binary": True, "optimizer": "adamw", "weight_decay": 0.01},
    "all binary": {
        "binary": True,
        "xnor": True,
        "first": True,
        "last": True,
        "loss": "squared_hinge",
        "lr_scale": "binarynet",
    },
    "clipped": {
        "binary": True,
        "xnor": True,
        "last": True,
        "ste": "clipped_grad",
        "batch_norm": False,
        "penalty": "bipolar",
        "reg": 1e-4,
    },
    "fp": {"keep_prob": 0.8, "batch_norm": True},
    "attacked": {
        "binary": True,
        "xnor": True,
        "adversarial": 0.02,
        "augment_shift": 1.0,
        "augment_rotation": 10.0,
    },
    "virtual": {"binary": True, "xnor": True, "vat": 0.5, "input_keep_prob": 0.8},
}
COMMON = {"debug": False, "graph": False}


@pytest.mark.parametrize("name", NETWORKS)
def test_one_rank(name, monkeypatch):
    settings = {**NETWORKS[name], **COMMON}
    emulator = Emulator(monkeypatch)
    plain = train(**settings, fused=False)
    fused = train(**settings)
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-4)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_ranks(name, size, sync, monkeypatch, tmp_path):
    settings = {**NETWORKS[name], **COMMON, "sync_batch_norm": sync}
    if sync and settings.get("batch_norm") is False:
        return
    emulator = Emulator(monkeypatch)
    plain = run_together(tmp_path, size, **settings, fused=False)[0]
    emulator.launches.clear()
    fused = run_together(tmp_path, size, **settings)[0]
    assert emulator.launches
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-4)
    if sync:
        np.testing.assert_allclose(fused[0], train(**settings)[0], rtol=1e-4)
