"""The setting grad_bits: its network, its runs on any device, its checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

from cupybnn import nn
from cupybnn.errors import SettingError
from cupybnn.training import TrainConfig, Trainer
from cupybnn.training.declaration import without_effect
from cupybnn.training.network import build_network

SETTINGS = {
    "dataset": "digits", "binary": True, "n_hidden": 48, "batch_size": 64, "max_steps": 12,
    "eval_every_n": 0, "device": "cpu",
}  # fmt: skip


def trained(**settings) -> dict[str, np.ndarray]:
    made = Trainer(TrainConfig(**{**SETTINGS, **settings}))
    made.run()
    return made.model.state_dict()


def test_the_network():
    config = TrainConfig(binary=True, grad_bits=2, n_hidden=8)
    model = build_network(config, 64, 10)
    plain = build_network(TrainConfig(binary=True, n_hidden=8), 64, 10)
    rounding = {name: m for name, m in model.named_modules() if isinstance(m, nn.GradientRounding)}
    assert list(rounding) == ["fc2.rounding", "fc3.rounding"]
    assert len({int(m.random_state()[0]) for m in rounding.values()}) == 2, "one seed each"
    assert {m.quantizer.bits for m in rounding.values()} == {2}
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize("bits", [1, 4])
def test_xnor_and_dense_products_train_alike_and_runs_repeat(bits):
    a, b, c = (trained(grad_bits=bits, xnor=xnor) for xnor in (True, False, True))
    for name, array in a.items():
        np.testing.assert_array_equal(b[name], array, err_msg=name)
        np.testing.assert_array_equal(c[name], array, err_msg=name)
    other = trained(grad_bits=0)
    assert (other["fc2.weight"] != a["fc2.weight"]).any()


def test_a_restored_run_equals_an_uninterrupted_one(tmp_path):
    whole = trained(grad_bits=2)
    first = Trainer(TrainConfig(**SETTINGS | {"max_steps": 5}, grad_bits=2, log_dir=str(tmp_path)))
    first.run()
    second = trained(grad_bits=2, restore=str(first.run_folder))
    for name, array in whole.items():
        np.testing.assert_array_equal(second[name], array, err_msg=name)
    assert int(whole["fc2.rounding.random_state"][1]) == 12


def test_an_attack_rounds_as_the_step_does():
    state = trained(grad_bits=2, adversarial=0.05, max_steps=3)
    assert int(state["fc2.rounding.random_state"][1]) == 3


def test_errors():
    for value in (3, -1, 16, True):
        with pytest.raises(SettingError, match="'grad_bits' must be 0, 1, 2, 4 or 8; got"):
            TrainConfig(binary=True, grad_bits=value)


def test_without_binary_layers_it_has_no_effect():
    sentences = without_effect(TrainConfig(grad_bits=4))
    assert sentences == ["--grad_bits has no effect without --binary."]
