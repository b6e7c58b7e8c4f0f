"""What data-parallel training is made of, in one process."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cupybnn import nn, ops
from cupybnn.autograd import Tensor
from cupybnn.backends.random import from_row, random_words, uniform
from cupybnn.data import Augmentation
from cupybnn.parallel import Alone
from cupybnn.training.team import Team


@pytest.mark.parametrize("shape", [(12, 5), (12,), (12, 3, 2)])
@pytest.mark.parametrize("draw", [random_words, uniform])
def test_rows_are_drawn_by_their_place(xp, shape, draw):
    whole = draw(shape, 7, 3, xp)
    for start, stop in ((0, 3), (3, 4), (4, 9), (9, 9), (9, 12)):
        with from_row(start):
            part = draw((stop - start, *shape[1:]), 7, 3, xp)
        assert part.dtype == whole.dtype
        assert (part == whole[start:stop]).all()
    assert (draw(shape, 7, 3, xp) == whole).all()  # the context has ended


def test_images_are_deformed_by_their_place(xp):
    images = xp.asarray(np.random.default_rng(0).random((7, 64), np.float32))
    deform = Augmentation(shift=1, rotation=10, scale=0.1, shear=0.1, elastic=1)
    whole = deform(images, (8, 8), 5, 2)
    with from_row(3):
        assert (deform(images[3:], (8, 8), 5, 2) == whole[3:]).all()


def test_layers_draw_for_images_by_their_place_and_for_weights_not_at_all():
    def layers():
        return nn.Sequential(
            nn.Dropout(0.5, rng=0),
            nn.Sign(ops.StochasticSign(seed=1)),
            nn.SignDropout(0.5, rng=1),
            nn.BinaryLinear(6, 4, rng=2, ste=ops.StochasticSign(seed=2)),
        )

    x = np.random.default_rng(3).normal(size=(9, 6))
    whole = layers()(Tensor(x)).data
    with from_row(4):
        part = layers()(Tensor(x[4:])).data
    assert (part == whole[4:]).all()


def test_a_leaf_is_complete_when_its_last_use_is_done():
    a, b = (Tensor([2.0, 3.0], requires_grad=True, name=n) for n in "ab")
    seen = []

    def completed(leaf):
        seen.append((leaf.name, leaf.grad.tolist()))

    hidden = ops.relu(a * b)
    ((hidden * b).sum() + ops.l1(a)).backward(completed=completed)
    # d/da = b * b + 1, d/db = 2 a b; each is reported once, with its final value.
    assert sorted(seen) == [("a", [5.0, 10.0]), ("b", [8.0, 18.0])]


class Vote(np.ndarray):
    """A vote on a device that has computed what the test says."""

    def get(self, stream):
        assert stream.waits_for <= device.done, "the device has not come so far"
        return np.array(self)


class device:
    """What the host has launched, and what has ended: numbers of steps."""

    kind, launched, done = "cuda", 0, 0

    class Stream:
        def __init__(self, **options) -> None:
            self.waits_for = 0

        def record(self) -> int:
            return device.launched

        def wait_event(self, step: int) -> None:
            self.waits_for = device.done = max(device.done, step)  # the host will wait

    xp = SimpleNamespace(
        cuda=SimpleNamespace(Stream=Stream, get_current_stream=lambda: device.Stream())
    )


@pytest.mark.parametrize("asked", range(1, 10))
def test_all_ranks_stop_after_the_same_step(monkeypatch, asked):
    """Votes are read some steps later; the host is never far ahead of the device."""
    monkeypatch.setattr(device, "launched", 0)
    monkeypatch.setattr(device, "done", 0)
    team = object.__new__(Team)
    team._device, team.ranks, team.stop = device, Alone(), False
    team._counted, team._earlier, team._side = 0, None, None
    votes = np.zeros(1, np.float32).view(Vote)  # written again by every step
    for step in range(1, 30):
        if team.stop:
            break
        device.launched = step
        votes[0] = 2.0 * (step >= asked)
        team.count(votes)
        assert device.launched - device.done < 8
    # In steps 8, 12, 16, ... the host reads the votes of four steps before.
    assert step - 1 == max(8, 4 + -(-asked // 4) * 4)
