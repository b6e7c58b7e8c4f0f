"""`EarlyStopping`: when a run ends, what it keeps, what it does to the learning rate."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from cupybnn import TrainConfig, Trainer, ops
from cupybnn.autograd import Tensor
from cupybnn.data import Dataset
from cupybnn.parallel import Alone
from cupybnn.training import Callback
from cupybnn.training.step import Objective
from cupybnn.training.stopping import EarlyStopping

RNG = np.random.default_rng(0)
X = RNG.standard_normal((50, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(int)
DATA = Dataset.from_arrays(X[:40], Y[:40], X[40:], Y[40:], classes=2)
SETTINGS = {"n_hidden": 8, "hidden_layers": 1, "reg": 0.0, "device": "cpu", "eval_every_n": 0}


class Told:
    """Stands for a trainer whose epochs have one step each and given measures."""

    def __init__(self, monitor, measures, **options):
        self.stopping = EarlyStopping(monitor, **options)
        self.ranks = Alone()
        self.epoch, self.stopped_after = 0, None
        self.optimizer = SimpleNamespace(groups=[{"lr": 1.0}])
        self.rates = []
        self.stopping.on_start(self)
        for number, measure in enumerate(measures, 1):
            self.epoch, self.accuracy = number, measure
            self.stopping.on_step(self, number - 1, SimpleNamespace(loss=np.float32(measure)))
            self.rates.append(self.optimizer.groups[0]["lr"])
            if self.stopped_after is not None:
                break

    def evaluate(self):
        return 0.0, self.accuracy

    def request_stop(self):
        self.stopped_after = self.epoch


class TestRule:
    """The rules are those of scikit-learn's multilayer perceptron."""

    @pytest.mark.parametrize(
        ("measures", "after"),
        [
            ([4, 3, 2, 1, 0.5, 0.25], None),
            ([4, 4, 4, 4, 4], 4),  # the third in a row that is no better
            ([4, 3.95, 3.92, 3.91, 3], 4),  # better by less than tol
            ([4, 5, 5, 3, 5, 5, 5], 7),  # one that is better begins anew
            ([4, 3.875, 3.75, 3.625, 3.5], None),  # by tol exactly
            ([np.nan] * 5, 4),
        ],
    )
    def test_loss(self, measures, after):
        assert Told("loss", measures, tol=0.125, patience=2).stopped_after == after

    @pytest.mark.parametrize(
        ("measures", "after"),
        [
            ([0.5, 0.75, 0.75, 0.75, 0.75], 5),
            ([0.5, 0.75, 0.875, 0.9375], None),
            ([0.5, 0.4, 0.4, 0.4], 4),
        ],
    )
    def test_accuracy(self, measures, after):
        told = Told("accuracy", measures, tol=0.0625, patience=2)
        assert told.stopped_after == after
        assert told.stopping.best == max(measures)
        assert told.stopping.triggered == (after is not None)

    def test_no_stop_with_an_infinite_tolerance(self):
        told = Told("loss", [1.0] * 50, tol=-np.inf, patience=1)
        assert told.stopped_after is None
        assert told.stopping.losses == [1.0] * 50

    def test_learning_rate_falls_before_the_run_stops(self):
        told = Told("loss", [1.0] * 50, tol=0.5, patience=1, decay=10, least_lr=0.05)
        assert told.rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])
        assert told.stopped_after == 7

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="one of loss, accuracy; got 'error'"):
            EarlyStopping("error")
        with pytest.raises(ValueError, match=r"None or greater than 1; got 0\.5"):
            EarlyStopping(decay=0.5)


class TestRun:
    @pytest.mark.parametrize(("batch", "steps"), [(40, 6), (10, 24), (16, 15), (7, 35)])
    def test_losses_are_means_over_epochs(self, batch, steps):
        class Steps(Callback):
            def __init__(self):
                self.losses = []

            def on_step(self, trainer, step, output):
                self.losses.append((float(output.loss), trainer.epoch))

        kept, stopping = Steps(), EarlyStopping(tol=-np.inf)
        config = TrainConfig(**SETTINGS, batch_size=batch, max_steps=steps)
        Trainer(config, [kept, stopping], data=DATA).run()
        ends = [-(-epoch * 40 // batch) for epoch in range(7)]
        expected = [np.mean([x for x, _ in kept.losses[a:b]]) for a, b in pairwise(ends)]
        assert stopping.losses == pytest.approx(expected, rel=1e-6)
        assert kept.losses[-1][1] == 6 == len(stopping.losses)

    def test_best_weights(self):
        stopping = EarlyStopping("accuracy", patience=3, tol=0.0, keep_best=True)
        config = TrainConfig(**SETTINGS, batch_size=10, max_steps=4000, lr=0.05)
        trainer = Trainer(config, [stopping], data=DATA)
        result = trainer.run()
        assert result.stopped
        assert len(stopping.accuracies) == len(stopping.losses) == trainer.epoch
        trainer.model.load_state_dict(stopping.best_state)
        assert trainer.evaluate()[1] == stopping.best == max(stopping.accuracies)


def test_l2_penalty_is_of_real_weights():
    config = TrainConfig(**{**SETTINGS, "hidden_layers": 2, "reg": 0.5}, binary=True, penalty="l2")
    trainer = Trainer(config, data=DATA)
    real = [trainer.model.fc1.weight, trainer.model.fcout.weight]
    objective = Objective(trainer.model, config)
    expected = 0.25 * sum((w.data.astype(np.float64) ** 2).sum() for w in real)
    assert objective.penalty().item() == pytest.approx(expected, rel=1e-6)
    assert objective.penalty_kind == "l2"
    assert objective.penalty_factor(trainer.model.fc2.weight) == 0
    assert [objective.penalty_factor(w) for w in real] == [0.5, 0.5]
    x = Tensor(np.array([3.0, -4.0]), requires_grad=True)
    loss = ops.l2(x)
    loss.backward()
    assert loss.item() == 12.5
    np.testing.assert_array_equal(x.grad, [3, -4])
