"""What compiled kernels do of a training step: the same numbers as NumPy's, bit for bit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from cupybnn import Tensor, data, nn, ops, optim, settings, sign
from cupybnn.backends import numpy_backend
from cupybnn.training import TrainConfig, Trainer

SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-38, 3e38], np.float32)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def passes(request, cpu_kernels, monkeypatch):
    """The compiled passes, in one thread and in several, with a count of their uses."""
    from cupybnn.backends.cpu import passes, training

    monkeypatch.setattr(settings, "kernel_threads", lambda: request.param)
    monkeypatch.setattr(passes, "ELEMENTS_A_THREAD", 1)
    used = []
    for name in training.__all__:
        kernel = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *a, f=kernel, n=name: used.append(n) or f(*a))
    return used


def same(compute, used, expected):
    """Check that compiled kernels and NumPy compute the same bits."""
    mine = compute()
    assert set(used) == set(expected)
    with numpy_backend.force_kernel("numpy"):
        numpys = compute()
    assert len(mine) == len(numpys)
    for a, b in zip(mine, numpys, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b, equal_nan=True), np.argwhere(a != b)[:3]


def numbers(rng, shape):
    """Return random numbers, some of them special."""
    x = rng.standard_normal(shape).astype(np.float32)
    places = rng.random(shape) < 0.02
    x[places] = rng.choice(SPECIAL, int(places.sum()))
    return x


@pytest.mark.parametrize("shape", [(1, 2), (7, 3), (5, 16), (129, 33), (3, 4, 250), (1000, 130)])
def test_batch_norm(passes, shape):
    rng = np.random.default_rng(0)
    x, slope = numbers(rng, shape) / 8 + 7, numbers(rng, shape)
    x[..., 1] = 3.0  # of variance 0
    gamma, beta, mean, variance = (rng.random(shape[-1]).astype(np.float32) for _ in range(4))

    def compute():
        leaves = [Tensor(a, requires_grad=True) for a in (x, gamma, beta)]
        running = mean.copy(), variance.copy()
        y = ops.batch_norm(*leaves, *running, training=True, decay=0.87)
        y.backward(slope)
        return [y.data, *running, *(leaf.grad for leaf in leaves)]

    same(compute, passes, ["batch_norm", "batch_norm_gradient"])


@pytest.mark.parametrize("window", [1.0, 0.3, np.inf])
def test_signs_and_their_pseudo_gradient(passes, window):
    rng = np.random.default_rng(1)
    x, slope = numbers(rng, (37, 129)), numbers(rng, (37, 129))
    x[0, : SPECIAL.size] = SPECIAL

    def compute():
        leaf = Tensor(x, requires_grad=True)
        y = ops.sign(leaf, ops.SteSign(window))
        y.backward(slope)
        return y.data, leaf.grad

    same(compute, passes, ["signs", "gradient_in_window"])


class Restless(optim.Adam):
    """Changes weights after Adam has."""

    def update(self, block):
        super().update(block)
        block.weight += 1


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW, Restless])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_adam(passes, kind, limit):
    rng = np.random.default_rng(2)
    first, slopes = rng.standard_normal((61, 50)).astype(np.float32), numbers(rng, (5, 61, 50))

    def compute():
        weight = nn.Parameter(first.copy())
        weight.limit = limit
        optimizer = kind([weight], lr=0.1, betas=(0.8, 0.99), eps=1e-3)
        for slope in slopes:
            weight.grad = slope
            with np.errstate(all="ignore"):
                optimizer.step()
        return weight.data, *optimizer.state_dict().values()

    same(compute, passes, [] if kind is Restless else ["adam"])


def test_other_arrays_are_left_to_numpy(passes):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 30))

    def compute(x):
        leaves = [Tensor(a.astype(x.dtype), requires_grad=True) for a in (x, x[0], x[1])]
        y = ops.sign(ops.batch_norm(*leaves, np.zeros(30), np.ones(30), training=True))
        y.sum().backward()
        return leaves[0].grad

    for other in (x, x.astype(np.float16)):
        assert np.isfinite(compute(other)).all()
    wide = np.asfortranarray(x.astype(np.float32))
    assert np.array_equal(sign(wide), np.where(wide >= 0, 1, -1))
    one = np.ones(1, np.float32)  # NumPy adds up a single column in pairs
    ops.batch_norm(Tensor(x[:, :1].astype("f4")), *map(Tensor, (one, one)), one, one, training=True)
    assert not passes


def test_a_training_run_leaves_the_same_network(passes):
    digits = data.load("digits")

    def compute():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = TrainConfig(
                n_hidden=70, batch_size=50, binary=True, xnor=True, batch_norm=True, device="cpu",
                max_steps=4,
            )  # fmt: skip
            trainer = Trainer(config, data=digits)
        losses = [trainer.make_step(step).loss for step in range(4)]
        return *losses, *(p.data for p in trainer.model.parameters())

    same(
        compute,
        passes,
        ["signs", "gradient_in_window", "batch_norm", "batch_norm_gradient", "adam"],
    )
