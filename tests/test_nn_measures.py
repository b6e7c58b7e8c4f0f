"""Measures of the signs in training."""

from __future__ import annotations

import numpy as np
import pytest

from cupybnn import nn
from cupybnn.autograd import Tensor
from cupybnn.training.measures import (
    EntropyRecord,
    FlipCounter,
    FlipRecord,
    outside_window,
    sign_entropy,
)


def layer_of(xp, values):
    layer = nn.BinaryLinear(2, 2, rng=0).to("cpu" if xp is np else "cuda")
    layer.weight.data = xp.asarray(values, "float32")
    return layer


def test_flips(xp):
    net = nn.Sequential(nn.Linear(2, 2, rng=0), hidden=layer_of(xp, [[1, 1], [1, 1]]))
    counter = FlipCounter(net)
    found = []
    for values in ([[1, 1], [1, 1]], [[-1, 0.5], [1, -0.0]], [[-1, -1], [1, 1]], [[1, 1], [1, 1]]):
        net.hidden.weight.data = xp.asarray(values, "float32")
        found.append(counter.update())
    assert [f["hidden.weight"] for f in found] == [(0, 0), (0.25, 0.25), (0.25, 0.5), (0.5, 0)]
    assert set(found[0]) == {"hidden.weight"}


def test_outside_window(xp):
    layer = layer_of(xp, [[1, -1], [np.nextafter(np.float32(1), 2), -3]])
    assert outside_window(layer) == {"weight": 0.5}
    assert outside_window(nn.BinaryLinear(2, 2, ste="identity")) == {"weight": 0}


def test_sign_entropy(xp):
    x = xp.asarray([[1.0, 1, -1], [-2, 0, -1], [3, 1, -1], [-1, 5, 1]])
    quarter = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert sign_entropy(x) == pytest.approx((1 + 0 + quarter) / 3)
    assert sign_entropy(Tensor(x)) == sign_entropy(x)
    with pytest.raises(ValueError, match=r"not be empty; got \(0, 3\)"):
        sign_entropy(x[:0])


def test_record_of_a_run():
    from cupybnn.training import TrainConfig, Trainer

    record = FlipRecord()
    config = TrainConfig(dataset="digits", device="cpu", binary=True, n_hidden=16, max_steps=5)
    Trainer(config, callbacks=[record]).run()
    assert len(record.steps) == 5
    assert set(record.flips) == set(record.outside) == {"fc2.weight", "fc3.weight"}
    flips = record.flips["fc2.weight"]
    assert len(flips) == 5
    assert any(f.since_last > 0 for f in flips)
    assert flips[0].since_last == flips[0].since_start


@pytest.mark.parametrize("last", [False, True])
def test_entropy_of_a_run(last):
    from cupybnn.training import TrainConfig, Trainer

    record = EntropyRecord()
    config = TrainConfig(
        dataset="digits",
        device="cpu",
        binary=True,
        last=last,
        n_hidden=16,
        max_steps=25,
        eval_every_n=10,
    )
    trainer = Trainer(config, callbacks=[record])
    trainer.run()
    assert record.steps == [0, 10, 20, 24]
    assert set(record.entropy) == {"fc1", "fc2"} | ({"fc3"} if last else set())
    images = trainer.data.scale(trainer.data.test_images[:256])
    trainer.model.eval()
    stages = dict(nn.stages(trainer.model, Tensor(images)))
    for name, entropy in record.entropy.items():
        assert len(entropy) == 4
        assert entropy[-1] == sign_entropy(stages[f"{name}/activation"])


def test_entropy_of_a_network_without_signs_is_empty():
    from cupybnn.training import TrainConfig, Trainer

    record = EntropyRecord()
    config = TrainConfig(dataset="digits", device="cpu", n_hidden=16, max_steps=1)
    Trainer(config, callbacks=[record]).run()
    assert (record.steps, record.entropy) == ([0], {})
