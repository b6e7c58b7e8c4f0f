"""Training against images that were moved to where the loss is higher."""

from __future__ import annotations

import numpy as np
import pytest

from cupybnn.cli.main import main
from cupybnn.training import TrainConfig, Trainer

QUICK = {
    "dataset": "digits",
    "device": "cpu",
    "n_hidden": 32,
    "batch_size": 40,
    "reg": 0.0,
    "dtype": "float64",
    "adversarial": 0.05,
}
NETWORKS = {
    "full precision": {},
    "batch norm": {"batch_norm": True},
    "dropout": {"batch_norm": True, "keep_prob": 0.7, "input_keep_prob": 0.8},
}


class Attacked:
    """A trainer, the first batch, and what its step makes of it."""

    def __init__(self, **settings) -> None:
        self.trainer = made = Trainer(TrainConfig(**{**QUICK, **settings}))
        self.model = made.model.train()
        made.make_step(0)  # away from the symmetric start
        self.inputs, self.labels = made.data.batch(made.order.indices(1))
        self.states = [m.random_state() for _, m in self.model.named_modules()]
        self.states = [state for state in self.states if state is not None]
        self.moved = made._step._attacked(self.inputs, self.labels)

    def loss(self, inputs: np.ndarray) -> float:
        """The loss of a batch, with the draws that come next."""
        before = [state.copy() for state in self.states]
        from cupybnn.autograd import Tensor, no_grad

        with no_grad():
            loss = self.trainer.objective.loss(self.model(Tensor(inputs)), self.labels)
        for state, old in zip(self.states, before, strict=True):
            state[...] = old
        return float(loss.data)


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
def test_each_pixel_moves_to_where_the_loss_is_higher(settings):
    attacked = Attacked(**settings)
    random = np.random.default_rng(0)
    checked = 0
    for _ in range(60):
        at = random.integers(40), random.integers(64)
        up, down = attacked.inputs.copy(), attacked.inputs.copy()
        up[at] += 1e-6
        down[at] -= 1e-6
        slope = (attacked.loss(up) - attacked.loss(down)) / 2e-6
        if abs(slope) < 1e-7:  # nothing, up to rounding
            continue
        checked += 1
        change = attacked.moved[at] - attacked.inputs[at]
        np.testing.assert_allclose(change, 0.05 * np.sign(slope), rtol=1e-12)
    assert checked > 20
    assert attacked.loss(attacked.moved) > attacked.loss(attacked.inputs)


@pytest.mark.parametrize("settings", [{}, {"first": True, "last": True, "xnor": True}])
def test_binary_networks_are_attacked_by_their_pseudo_gradient(settings):
    attacked = Attacked(binary=True, batch_norm=True, **settings)
    change = attacked.moved - attacked.inputs
    assert set(np.round(np.unique(change), 12)) <= {-0.05, 0.0, 0.05}
    assert (change != 0).mean() > 0.5
    assert attacked.loss(attacked.moved) > attacked.loss(attacked.inputs)


def test_attack_and_step_use_the_same_dropout():
    attacked = Attacked(keep_prob=0.5, input_keep_prob=0.5, batch_norm=True)
    assert [int(state[1]) for state in attacked.states] == [1] * 4  # one step, one draw each
    dropped = attacked.moved == attacked.inputs
    again = attacked.trainer._step._attacked(attacked.inputs, attacked.labels)
    assert 0.4 < dropped.mean() < 0.6  # a pixel that is dropped has no gradient
    np.testing.assert_array_equal(again == attacked.inputs, dropped)


def test_inputs_without_gradient_do_not_move():
    """With squared hinge, an image far enough on the right side has no gradient."""
    attacked = Attacked(loss="squared_hinge")
    attacked.model.fcout.weight.write()[...] *= 0
    moved = attacked.trainer._step._attacked(attacked.inputs, attacked.labels)
    np.testing.assert_array_equal(moved, attacked.inputs)


def test_xnor_and_dense_steps_are_the_same():
    traces = []
    for xnor in (False, True):
        settings = {**QUICK, "binary": True, "batch_norm": True, "dtype": "float32"}
        made = Trainer(TrainConfig(**settings, xnor=xnor))
        traces.append([float(made.make_step(step).loss) for step in range(5)])
    assert traces[0] == traces[1]


def test_adversarial_training_improves_robustness():
    common = {**QUICK, "batch_norm": True, "max_steps": 300, "dtype": "float32", "lr": 3e-3}
    losses = []
    for amount in (0.0, 0.1):
        made = Trainer(TrainConfig(**{**common, "adversarial": amount}))
        made.run()
        attack = Trainer(TrainConfig(**{**common, "adversarial": 0.1}))
        attack.make_step(0)
        attack.model.load_state_dict(made.model.state_dict())
        losses.append(float(attack.make_step(1).loss))
    assert losses[1] < 0.9 * losses[0]


def test_option(capsys):
    quick = ["--dataset", "digits", "--max_steps", "2", "--n_hidden", "8", "--device", "cpu"]
    assert main(["train", *quick, "--adversarial", "0.05"]) == 0
    assert "adversarial images (0.05)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'adversarial' must be a finite number, at least 0"):
        TrainConfig(adversarial=-0.1)
