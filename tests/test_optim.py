"""Optimisers against their formulas in plain float64 NumPy, schedules, groups, averages."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from arrays import host

from cupybnn import nn, optim
from cupybnn.autograd import GraphError
from cupybnn.optim import schedules

# Longer than a block of the host's updates, and no multiple of it.
SHAPE = (7, 10_001)


def make(xp, shape=SHAPE, seed=0, **options):
    rng = np.random.default_rng(seed)
    return nn.Parameter(xp.asarray(rng.standard_normal(shape)), **options)


def gradients(shape=SHAPE, steps=4):
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape) for _ in range(steps)]


def run(optimizer, parameter, xp, grads):
    for grad in grads:
        parameter.grad = xp.asarray(grad)
        optimizer.step()
    return host(parameter.data)


def reference_sgd(w, grads, lr=0.1, momentum=0.9):
    velocity = np.zeros_like(w)
    for grad in grads:
        velocity = momentum * velocity + grad
        w = w - lr * velocity
    return w


def reference_adam(w, grads, lr=0.01, b1=0.8, b2=0.95, eps=1e-3, decay=0.0):
    mean, square = np.zeros_like(w), np.zeros_like(w)
    for t, grad in enumerate(grads, 1):
        w = w * (1 - lr * decay)
        mean = b1 * mean + (1 - b1) * grad
        square = b2 * square + (1 - b2) * grad**2
        w = w - lr * (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + eps)
    return w


def reference_bop(w, grads, lr=0.5, threshold=0.2):
    w, mean = np.where(w >= 0, 1.0, -1.0), np.zeros_like(w)
    for grad in grads:
        mean = (1 - lr) * mean + lr * grad
        w = np.where((np.abs(mean) > threshold) & (np.sign(mean) == w), -w, w)
    return w


OPTIMIZERS = {
    "SGD": (lambda p: optim.SGD(p, 0.1, momentum=0.9), reference_sgd),
    "plain SGD": (
        lambda p: optim.SGD(p, 0.1),
        lambda w, g: reference_sgd(w, g, momentum=0.0),
    ),
    "Adam": (lambda p: optim.Adam(p, 0.01, betas=(0.8, 0.95), eps=1e-3), reference_adam),
    "AdamW": (
        lambda p: optim.AdamW(p, 0.01, 0.3, betas=(0.8, 0.95), eps=1e-3),
        lambda w, g: reference_adam(w, g, decay=0.3),
    ),
    "Bop": (lambda p: optim.Bop(p, 0.5, threshold=0.2), reference_bop),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [SHAPE, (), (0,), (3,)])
def test_formula(xp, name, shape):
    factory, reference = OPTIMIZERS[name]
    parameter = make(xp, shape)
    before, grads = host(parameter.data).copy(), gradients(shape)
    got = run(factory([parameter]), parameter, xp, grads)
    np.testing.assert_allclose(got, reference(before, grads), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_stays_and_gradients_are_not_changed(xp, name):
    parameter = nn.Parameter(xp.asarray(np.ones(SHAPE), "float32"))
    grad = xp.asarray(gradients(steps=1)[0], "float32")
    before = host(grad).copy()
    optimizer = OPTIMIZERS[name][0]([parameter])
    run(optimizer, parameter, xp, [grad])
    assert parameter.dtype == np.float32
    assert all(a.dtype == np.float32 for k, a in optimizer.state_dict().items() if k != "steps")
    np.testing.assert_array_equal(host(grad), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_threads_change_nothing(monkeypatch, name):
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        parameter = make(np, (300, 500))
        grads = gradients((300, 500), 2)
        results.append(run(OPTIMIZERS[name][0]([parameter]), parameter, np, grads).tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trip_continues_exactly(xp, name):
    factory, _ = OPTIMIZERS[name]
    parameter, grads = make(xp), gradients()
    expected = run(factory([parameter]), parameter, xp, grads)
    again = make(xp)
    first = factory([again])
    run(first, again, xp, grads[:2])
    second = factory([again])
    second.load_state_dict(first.state_dict())
    assert second.steps == 2
    np.testing.assert_array_equal(run(second, again, xp, grads[2:]), expected)


def test_state_that_does_not_fit_lists_all_misfits():
    optimizer = optim.Adam([make(np, (2,)), make(np, (3,))])
    state = optimizer.state_dict()
    state["0.0.mean"] = np.zeros(5)
    del state["0.1.square"]
    state["0.9.mean"] = np.zeros(1)
    with pytest.raises(ValueError, match="does not fit this Adam") as caught:
        optimizer.load_state_dict(state)
    for line in (
        "0.0.mean: must be of shape (2,), is (5,)",
        "missing: 0.1.square",
        "unknown: 0.9.mean",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("state", "got"),
    [
        (None, "be a mapping of names to arrays; got NoneType"),
        ({"steps": None}, "hold NumPy or CuPy arrays; got NoneType for 'steps'"),
    ],
)
@pytest.mark.parametrize(
    "make_it", [optim.SGD, optim.WeightAverage, lambda p, lr: optim.Combined(optim.SGD(p, lr))]
)
def test_load_of_what_is_no_state(make_it, state, got):
    optimizer = make_it([make(np, (2,))], 0.1)
    what = rf"'state' of {type(optimizer).__name__}\.load_state_dict must {got}"
    with pytest.raises(TypeError, match=what):
        optimizer.load_state_dict(state)


def test_fortran_ordered_weights_and_gradients(xp):
    values = np.asfortranarray(np.random.default_rng(0).standard_normal((4, 3)))
    parameter = nn.Parameter(xp.asarray(values, order="F"))
    grad = np.asfortranarray(np.random.default_rng(1).standard_normal((4, 3)))
    got = run(optim.SGD([parameter], 0.5), parameter, xp, [xp.asarray(grad, order="F")])
    np.testing.assert_allclose(got, values - 0.5 * grad, rtol=1e-14)


def test_without_gradient_nothing_happens(xp):
    parameter = make(xp)
    before = host(parameter.data).copy()
    optim.SGD([parameter], 1.0).step()
    np.testing.assert_array_equal(host(parameter.data), before)


def test_zero_grad():
    parameter = make(np, (2,))
    parameter.grad = np.ones(2)
    optim.SGD([parameter], 1.0).zero_grad()
    assert parameter.grad is None


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_latent_weights_are_clipped_after_the_update(xp, name):
    free, clipped = make(xp), make(xp, limit=0.75)
    grads = [10 * g for g in gradients(steps=1)]
    expected = run(OPTIMIZERS[name][0]([free]), free, xp, grads)
    got = run(OPTIMIZERS[name][0]([clipped]), clipped, xp, grads)
    np.testing.assert_array_equal(got, expected.clip(-0.75, 0.75))
    assert np.abs(expected).max() > 0.75


def test_update_between_forward_and_backward_is_noticed(xp):
    parameter = make(xp)
    loss = (parameter * parameter).sum()
    parameter.grad = xp.ones(SHAPE)
    optim.SGD([parameter], 0.1).step()
    with pytest.raises(GraphError, match="edited in place"):
        loss.backward()


class TestGroups:
    def test_options_of_groups(self):
        slow, fast = make(np, (2,)), make(np, (2,))
        before = slow.data.copy(), fast.data.copy()
        optimizer = optim.SGD([{"params": [slow], "lr": 0.1}, {"params": [fast]}], lr=1.0)
        for parameter in (slow, fast):
            parameter.grad = np.ones(2)
        optimizer.step()
        np.testing.assert_allclose(slow.data, before[0] - 0.1)
        np.testing.assert_allclose(fast.data, before[1] - 1.0)
        optimizer.set_lr(2.0)
        assert [group["lr"] for group in optimizer.groups] == [2.0, 2.0]

    def test_by_predicate(self):
        net = nn.Sequential(
            nn.Linear(4, 3, rng=0), nn.BatchNorm(3), nn.Sign(), nn.BinaryLinear(3, 2, rng=0)
        )
        groups = optim.parameter_groups(
            net,
            (optim.is_binary, {"name": "binary"}),
            (lambda name, p: name.startswith("0."), {"lr": 0.5}),
            (lambda name, p: False, {"lr": 7}),
        )
        assert [g["params"] for g in groups] == [
            [net[3].weight],
            [net[0].weight],
            [net[1].gamma, net[1].beta],
        ]
        optimizer = optim.Adam(groups, lr=1e-3)
        assert [g["lr"] for g in optimizer.groups] == [1e-3, 0.5, 1e-3]

    def test_binarynet_scale(self):
        layer = nn.BinaryLinear(10, 5, bias=True, rng=0)
        before = layer.weight.data.copy()
        layer.weight.grad = np.full((10, 5), 1e-3, "float32")
        layer.bias.grad = np.full(5, 1e-3, "float32")
        optim.SGD(layer.parameters(), 1.0, lr_scale=optim.binarynet_scale).step()
        np.testing.assert_allclose(before - layer.weight.data, 1e-3 * math.sqrt(10), rtol=1e-4)
        np.testing.assert_allclose(layer.bias.data, -1e-3, rtol=1e-6)

    def test_mistakes(self):
        p = make(np, (2,))
        with pytest.raises(ValueError, match=r"may have .*lr, lr_scale, momentum.* got .*'rate'"):
            optim.SGD([{"params": [p], "rate": 1}], 0.1)
        with pytest.raises(ValueError, match="must not be in two groups"):
            optim.SGD([{"params": [p]}, {"params": [p]}], 0.1)
        with pytest.raises(TypeError, match="takes Parameters"):
            optim.SGD([np.ones(2)], 0.1)

    @pytest.mark.parametrize("value", [-1, math.nan, math.inf, "a", None, [1.0], True])
    @pytest.mark.parametrize(
        ("make_it", "option", "rule"),
        [
            (optim.SGD, "lr", "a finite number >= 0"),
            (optim.SGD, "lr_scale", "a finite number >= 0 or a function of a parameter"),
            (optim.SGD, "momentum", "a number in [0, 1)"),
            (optim.Adam, "lr", "a finite number >= 0"),
            (optim.Adam, "betas", "two numbers in [0, 1)"),
            (optim.Adam, "eps", "a finite number >= 0"),
            (optim.AdamW, "betas", "two numbers in [0, 1)"),
            (optim.AdamW, "weight_decay", "a finite number >= 0"),
            (optim.Bop, "lr", "a number in [0, 1]"),
            (optim.Bop, "threshold", "a finite number >= 0"),
        ],
    )
    def test_options_are_checked(self, make_it, option, rule, value):
        p = make(np, (2,))
        before = p.data.copy()
        expected = re.escape(f"The {option!r} of {make_it.__name__} must be {rule}; got {value!r}.")
        with pytest.raises(ValueError, match=expected):
            make_it([p], **{"lr": 0.1, option: value})
        with pytest.raises(ValueError, match=expected):
            make_it([{"params": [p], option: value}], lr=0.1)
        np.testing.assert_array_equal(p.data, before)

    @pytest.mark.parametrize(
        ("make_it", "options"),
        [
            (optim.SGD, {"lr": 0.1, "momentum": 1}),
            (optim.SGD, {"lr": 0.1, "momentum": 2}),
            (optim.Adam, {"betas": (0.9, 1.0)}),
            (optim.Adam, {"betas": (0.9,)}),
            (optim.Bop, {"lr": 1.5}),
        ],
    )
    def test_options_beyond_their_range(self, make_it, options):
        with pytest.raises(ValueError, match=f"The '{list(options)[-1]}' of {make_it.__name__}"):
            make_it([make(np, (2,))], **options)

    @pytest.mark.parametrize("number", [0, 0.5, np.float32(0.5), np.array(0.5)])
    def test_options_may_be_numbers_of_any_kind(self, number):
        optim.SGD([make(np, (2,))], number, momentum=number, lr_scale=number)
        optim.AdamW([make(np, (2,))], number, number, betas=[number, number], eps=number)
        optim.Bop([make(np, (2,))], number, threshold=number)


class TestSchedules:
    def test_values(self):
        def values(schedule, *steps):
            return [pytest.approx(schedule(s)) for s in steps]

        assert values(schedules.constant(), 0, 10**6) == [1, 1]
        assert values(schedules.step([2, 4], 0.5), 0, 1, 2, 3, 4, 9) == [1, 1, 0.5, 0.5, 0.25, 0.25]
        assert values(schedules.exponential(10, 0.01), 0, 5, 10, 20) == [1, 0.1, 0.01, 0.01]
        assert values(schedules.cosine(10), 0, 5, 10, 20) == [1, 0.5, 0, 0]
        assert values(schedules.cosine(10, 0.2), 0, 5, 10) == [1, 0.6, 0.2]
        warm = schedules.warm_up(3, schedules.cosine(10))
        assert values(warm, 0, 1, 2, 3, 8, 13) == [0.25, 0.5, 0.75, 1, 0.5, 0]

    def test_optimizer_follows_it(self):
        p = make(np, (1,))
        optimizer = optim.SGD([p], 1.0, schedule=schedules.step([1]))
        values = [p.item()]
        for _ in range(3):
            p.grad = np.ones(1)
            optimizer.step()
            values.append(p.item())
        np.testing.assert_allclose(np.diff(values), [-1, -0.1, -0.1])

    @pytest.mark.parametrize("make_schedule", [schedules.cosine, schedules.exponential])
    def test_steps_are_checked(self, make_schedule):
        with pytest.raises(ValueError, match=r"needs steps >= 1.* got 0"):
            make_schedule(0, 0.5)


class TestWeightAverage:
    @pytest.mark.parametrize("decay", [None, 0.8])
    def test_formula(self, xp, decay):
        p = make(xp, (3,))
        average = optim.WeightAverage([p], decay)
        rng = np.random.default_rng(3)
        history = []
        for _ in range(4):
            p.data = xp.asarray(rng.standard_normal(3))
            history.append(host(p.data).copy())
            average.update()
            # Each update before counts 0.8 times as much as the next; the first is not favoured.
            shares = None if decay is None else decay ** np.arange(len(history))[::-1]
            expected = np.average(history, axis=0, weights=shares)
            np.testing.assert_allclose(host(average.averages[0]), expected, rtol=1e-12)

    def test_applied_for_a_while(self, xp):
        p = make(xp, (3,))
        average = optim.WeightAverage([p])
        average.update()
        first = host(p.data).copy()
        p.data += 1

        def fail_within():
            with average.applied():
                np.testing.assert_array_equal(host(p.data), first)
                raise KeyError

        with pytest.raises(KeyError):
            fail_within()
        np.testing.assert_array_equal(host(p.data), first + 1)
        np.testing.assert_array_equal(host(average.averages[0]), first)

    def test_applied_within_itself(self, xp):
        p = make(xp, (3,))
        average = optim.WeightAverage([p], 0.5)
        average.update()
        first = host(p.data).copy()
        p.data += 1
        with average.applied():
            with average.applied():
                np.testing.assert_array_equal(host(p.data), first)
            np.testing.assert_array_equal(host(p.data), first)
            assert average.is_applied
        assert not average.is_applied
        np.testing.assert_array_equal(host(p.data), first + 1)
        np.testing.assert_array_equal(host(average.averages[0]), first)

    @pytest.mark.parametrize("decay", [None, 0.5])
    def test_used_while_applied(self, xp, decay):
        """The average is the same, and the weights come back, whatever is done within."""
        plain, p = make(xp, (3,)), make(xp, (3,))
        expected, average = (optim.WeightAverage([q], decay) for q in (plain, p))
        for a, q in ((expected, plain), (average, p)):
            a.update()
            q.data += 1
        expected.update()
        with average.applied():
            average.update()
            p.data *= 7  # lost at the end
            inside = average.state_dict()
        np.testing.assert_array_equal(host(p.data), host(plain.data))
        for name, array in expected.state_dict().items():
            np.testing.assert_array_equal(inside[name], array)
            np.testing.assert_array_equal(average.state_dict()[name], array)

    def test_suspended(self, xp):
        p = make(xp, (3,))
        average = optim.WeightAverage([p])
        average.update()
        first = host(p.data).copy()
        p.data += 1

        def look():
            with average.suspended():
                np.testing.assert_array_equal(host(p.data), first + 1)
                raise KeyError

        with average.applied():
            with pytest.raises(KeyError):
                look()
            np.testing.assert_array_equal(host(p.data), first)
        np.testing.assert_array_equal(host(p.data), first + 1)

    def test_absurd_number_of_updates_is_refused(self):
        average = optim.WeightAverage([make(np, (3,))])
        for wrong in (2.5, -1, float("nan")):
            with pytest.raises(ValueError, match=r"The 'updates' .* whole number, at least 0"):
                average.load_state_dict({**average.state_dict(), "updates": np.array(wrong)})

    def test_state(self):
        p = make(np, (3,))
        average, again = (optim.WeightAverage([p], 0.9) for _ in range(2))
        average.update()
        p.data += 1
        average.update()
        again.load_state_dict(average.state_dict())
        p.data += 1
        for a in (average, again):
            a.update()
        np.testing.assert_array_equal(again.averages[0], average.averages[0])
        with pytest.raises(ValueError, match="does not fit this WeightAverage"):
            again.load_state_dict({"updates": np.array(1)})

    def test_decay_is_checked(self):
        with pytest.raises(ValueError, match=r"'decay' must be None or in \[0, 1\); got 1"):
            optim.WeightAverage([], 1)


class TestCombined:
    def parts(self, xp):
        binary, real = make(xp, seed=1), make(xp, seed=2)
        optimizers = optim.Bop([binary], lr=0.5, threshold=0.2), optim.Adam([real], lr=0.01)
        return (binary, real), optimizers

    def test_each_does_what_it_does_alone(self, xp):
        alone, optimizers = self.parts(xp)
        for parameter, optimizer in zip(alone, optimizers, strict=True):
            run(optimizer, parameter, xp, gradients())
        together, parts = self.parts(xp)
        combined = optim.Combined(*parts)
        for grad in gradients():
            for parameter in together:
                parameter.grad = xp.asarray(grad.astype(parameter.dtype))
            combined.step()
        combined.zero_grad()
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(host(a.data), host(b.data))
            assert b.grad is None
        assert combined.steps == parts[0].steps == len(gradients())

    def test_groups_are_those_of_the_parts(self):
        _, parts = self.parts(np)
        combined = optim.Combined(*parts)
        combined.groups[1]["lr"] = 7.0
        assert [group["lr"] for group in parts[1].groups] == [7.0]
        combined.set_lr(0.5)
        assert [part.groups[0]["lr"] for part in parts] == [0.5, 0.5]

    def test_state(self, xp):
        parameters, parts = self.parts(xp)
        combined = optim.Combined(*parts)
        for parameter in parameters:
            parameter.grad = xp.ones_like(parameter.data)
        combined.step()
        state = combined.state_dict()
        assert set(state) == {
            "steps",
            "0/steps",
            "0/0.0.mean",
            "1/steps",
            "1/0.0.mean",
            "1/0.0.square",
        }
        other = optim.Combined(*self.parts(xp)[1])
        other.load_state_dict(state)
        assert other.steps == other.optimizers[1].steps == 1
        for name, array in other.state_dict().items():
            np.testing.assert_array_equal(array, state[name])

    def test_state_that_does_not_fit_changes_nothing(self):
        combined = optim.Combined(*self.parts(np)[1])
        state = combined.state_dict()
        bad = {**state, "0/0.0.mean": state["0/0.0.mean"] + 1, "2/x": np.zeros(1)}
        bad["1/0.0.square"] = np.zeros((1, 1))
        with pytest.raises(ValueError, match=r"(?s)Combined:.*unknown: 2/x.*1/ 0.0.square: must"):
            combined.load_state_dict(bad)
        np.testing.assert_array_equal(combined.state_dict()["0/0.0.mean"], state["0/0.0.mean"])

    def test_bad_parts(self):
        with pytest.raises(ValueError, match="at least one optimiser; got none"):
            optim.Combined()
        parameter = make(np)
        with pytest.raises(ValueError, match="two groups"):
            optim.Combined(optim.SGD([parameter], lr=0.1), optim.Adam([parameter]))


def test_bop_trains_without_latent_weights():
    """A binary layer learns a known matrix of signs, and its weights stay +1 and -1."""
    from cupybnn import ops
    from cupybnn.autograd import Tensor

    rng = np.random.default_rng(0)
    target = np.where(rng.standard_normal((15, 8)) >= 0, 1, -1)
    layer = nn.BinaryLinear(15, 8, rng=1)
    optimizer = optim.Bop(layer.parameters(), lr=0.01, threshold=1e-3)
    for _ in range(300):
        x = np.where(rng.standard_normal((64, 15)) >= 0, 1, -1).astype("float32")
        error = layer(ops.sign(Tensor(x))) - (x @ target).astype("float32")
        optimizer.zero_grad()
        (error * error).mean().backward()
        optimizer.step()
        assert set(np.unique(layer.weight.data)) == {-1, 1}
    np.testing.assert_array_equal(layer.weight.data, target)
