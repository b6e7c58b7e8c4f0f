"""Optimizers against their formulas in plain float64 NumPy, schedules, groups, averages."""

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


# Each step is a gradient and the options that hold for it.


def reference_sgd(w, steps):
    velocity = np.zeros_like(w)
    for grad, o in steps:
        velocity = o["momentum"] * velocity + grad
        w = w - o["lr"] * velocity
    return w


def reference_adam(w, steps):
    mean, square = np.zeros_like(w), np.zeros_like(w)
    for t, (grad, o) in enumerate(steps, 1):
        b1, b2 = o["betas"]
        w = w * (1 - o["lr"] * o.get("weight_decay", 0))
        mean = b1 * mean + (1 - b1) * grad
        square = b2 * square + (1 - b2) * grad**2
        w = w - o["lr"] * (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + o["eps"])
    return w


def reference_bop(w, steps):
    w, mean = np.where(w >= 0, 1.0, -1.0), np.zeros_like(w)
    for grad, o in steps:
        mean = (1 - o["lr"]) * mean + o["lr"] * grad
        w = np.where((np.abs(mean) > o["threshold"]) & (np.sign(mean) == w), -w, w)
    return w


#: By name the class, its reference, options, and others to change to.
KINDS = {
    "SGD": (
        optim.SGD,
        reference_sgd,
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.5},
    ),
    "plain SGD": (optim.SGD, reference_sgd, {"lr": 0.1, "momentum": 0.0}, {"momentum": 0.5}),
    "Adam": (
        optim.Adam,
        reference_adam,
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3},
        {"lr": 0.02, "betas": (0.5, 0.7), "eps": 0.1},
    ),
    "AdamW": (
        optim.AdamW,
        reference_adam,
        {"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3},
        {"lr": 0.02, "weight_decay": 0.1, "betas": (0.5, 0.7), "eps": 0.1},
    ),
    "Bop": (
        optim.Bop,
        reference_bop,
        {"lr": 0.5, "threshold": 0.2},
        {"lr": 0.2, "threshold": 0.0},
    ),
}


def factory_of(name):
    kind, _, options, _ = KINDS[name]
    return lambda parameters: kind(parameters, **options)


OPTIMIZERS = {
    name: (
        factory_of(name),
        lambda w, grads, f=reference, o=options: f(w, [(grad, o) for grad in grads]),
    )
    for name, (_, reference, options, _) in KINDS.items()
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


def test_state_that_does_not_fit_lists_all_mismatches():
    optimizer = optim.Adam([make(np, (2,)), make(np, (3,))])
    state = optimizer.state_dict()
    state["0.0.mean"] = np.zeros(5)
    del state["0.1.square"]
    state["0.9.mean"] = np.zeros(1)
    with pytest.raises(ValueError, match="does not match this Adam") as caught:
        optimizer.load_state_dict(state)
    for line in (
        "0.0.mean: must be (2,) float64, is (5,) float64",
        "missing: 0.1.square",
        "unknown: 0.9.mean",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize("factory", [optim.Adam, lambda p: optim.Combined(optim.Adam(p))])
@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("steps", np.array(2.7), "must be () int64, is () float64"),
        ("steps", np.array("3"), "must be () int64, is () <U1"),
        ("steps", np.array(-1), "must be at least 0; got -1"),
        ("steps", np.array([3]), "must be () int64, is (1,) int64"),
        ("steps", np.array(True), "must be () int64, is () bool"),
        ("steps", np.array(2**64 - 1, np.uint64), "must fit in int64; got values from 184467"),
        ("steps", np.array(math.inf), "must be () int64, is () float64"),
        ("0.0.mean", np.ones(3, complex), "must be (3,) float32, is (3,) complex128"),
        ("0.0.mean", np.array([1, 2, None]), "must be (3,) float32, is (3,) object"),
        ("0.0.mean", np.ones(3, int), "must be (3,) float32, is (3,) int64"),
        ("0.0.mean", np.ones((3, 1), "f4"), "must be (3,) float32, is (3, 1) float32"),
        ("0.0.mean", np.float32([1, math.nan, math.inf]), "must be finite; 2 of its values are"),
        ("0.0.mean", np.array([1, 1, 1e39]), "must fit in float32; 1 of its values overflow"),
        ("0.0.square", np.float32([1, -0.5, 0]), "must be at least 0; got -0.5"),
        ("0.0.square", None, "missing"),
        ("0.0.cube", np.ones(3, "f4"), "unknown"),
    ],
)
def test_absurd_state_is_refused(factory, name, value, fault):
    parameter = nn.Parameter(np.ones(3, "float32"))
    optimizer = factory([parameter])
    run(optimizer, parameter, np, [np.float32([1, 2, 3])])
    before = {k: a.tobytes() for k, a in optimizer.state_dict().items()}
    state = optimizer.state_dict()
    key = next((k for k in state if k.endswith(f"/{name}")), name)
    state[key] = value
    if value is None:
        del state[key]
    expected = f"{fault}: {key}" if fault in ("missing", "unknown") else f"{key}: {fault}"
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        optimizer.load_state_dict(state)
    assert len(str(caught.value).splitlines()) == 2
    assert {k: a.tobytes() for k, a in optimizer.state_dict().items()} == before


def test_state_on_the_device_and_of_another_precision(xp):
    parameter = nn.Parameter(xp.asarray([1.0, 2.0], "float32"))
    optimizer = optim.SGD([parameter], 0.1)
    velocity = xp.asarray([0.5, 0.25], "float64")
    optimizer.load_state_dict({"steps": np.int32(3), "0.0.velocity": velocity})
    assert optimizer.steps == 3
    assert optimizer.state_dict()["0.0.velocity"].dtype == np.float32
    np.testing.assert_array_equal(optimizer.state_dict()["0.0.velocity"], [0.5, 0.25])


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


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, (*_, later) in KINDS.items() for option in (*later, "lr_scale")],
)
def test_options_changed_between_steps_hold_from_the_next_one(xp, name, option):
    kind, reference, options, later = KINDS[name]
    parameter = make(xp)
    before, grads = host(parameter.data).copy(), gradients()
    optimizer = kind([parameter], **options)
    run(optimizer, parameter, xp, grads[:2])
    optimizer.groups[0][option] = later.get(option, 0.25)
    got = run(optimizer, parameter, xp, grads[2:])
    if option == "lr_scale":
        changed = options | {"lr": options["lr"] * 0.25}
    else:
        changed = options | {option: later[option]}
    expected = reference(before, list(zip(grads, [options] * 2 + [changed] * 2, strict=True)))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    assert (expected != reference(before, [(grad, options) for grad in grads])).any()


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
        with pytest.raises(ValueError, match=r"may have 'lr', 'lr_scale', 'mom.*; got 'rate'"):
            optim.SGD([{"params": [p], "rate": 1}], 0.1)
        with pytest.raises(ValueError, match=r"of Adam .*got 'weight_decay'\. AdamW has 'weight_d"):
            optim.Adam([{"params": [p], "weight_decay": 1}])
        with pytest.raises(ValueError, match="must appear only once"):
            optim.SGD([{"params": [p]}, {"params": [p]}], 0.1)
        with pytest.raises(ValueError, match="must appear only once"):
            optim.SGD([p, p], 0.1)
        for given in ([np.ones(2)], [{"params": [1.0]}], {"params": ["x"]}, [p, None]):
            with pytest.raises(TypeError, match=r"takes Parameters: .*; got a (nd|fl|str|None)"):
                optim.SGD(given, 0.1)
        with pytest.raises(TypeError, match=r"got a Linear\. Pass its parameters\(\)"):
            optim.SGD(nn.Linear(2, 2), 0.1)
        for given in ([{"params": [p]}, p], [{"lr": 0.1}]):
            with pytest.raises(ValueError, match=r"must all be dicts with 'params'; got"):
                optim.SGD(given, 0.1)

    @pytest.mark.parametrize(
        ("make_it", "option", "hint"),
        [
            (optim.Adam, "weight_decay", "AdamW has 'weight_decay'."),
            (optim.SGD, "weight_decay", "AdamW has 'weight_decay'."),
            (optim.Adam, "momentum", "SGD has 'momentum'."),
            (optim.SGD, "nesterov", ""),
            (optim.AdamW, "beta", "Did you mean 'betas'?"),
            (optim.Bop, "treshold", "Did you mean 'threshold'?"),
        ],
    )
    def test_unknown_options_are_refused(self, make_it, option, hint):
        p = make(np, (2,))
        with pytest.raises(TypeError) as caught:
            make_it([p], lr=0.1, **{option: 0.5})
        message = str(caught.value)
        assert message.startswith(f"{make_it.__name__} has no option {option!r}; it has ")
        assert message.endswith(hint or "'schedule'.")
        assert all(repr(name) in message for name in (*make_it.rules, "schedule"))
        optimizer = make_it([p], lr=0.1)
        with pytest.raises(ValueError, match=f"group of {make_it.__name__} .*; got '{option}'"):
            optimizer.groups[0][option] = 0.5

    @pytest.mark.parametrize(
        "change",
        [
            lambda group: group.__setitem__("lr", -1),
            lambda group: group.update(lr=0.5, betas=(2, 2)),
            lambda group: group.__ior__({"lr": 0.5, "eps": math.nan}),
            lambda group: group.setdefault("rate", 1),
        ],
    )
    def test_options_are_checked_when_changed(self, change):
        group = optim.Adam([make(np, (2,))], 0.25).groups[0]
        with pytest.raises(ValueError, match=r"'(lr|betas|eps|rate)'"):
            change(group)
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.9, 0.999), 1e-8)
        with pytest.raises(TypeError, match="cannot be removed"):
            del group["lr"]
        with pytest.raises(ValueError, match="'lr' of Adam must be a finite number >= 0"):
            optim.Adam([make(np, (2,))]).set_lr(-1)

    def test_an_attribute_is_not_taken_for_an_option(self):
        optimizer = optim.SGD([make(np, (2,))], 0.25)
        with pytest.raises(AttributeError, match=r"for group in optimizer.groups: group\['lr'\] ="):
            optimizer.lr = 0.5

    def test_options_of_a_new_kind_of_optimizer(self):
        class Signed(optim.Optimizer):
            def __init__(self, parameters, lr, power=1.0, **common):
                super().__init__(parameters, lr, power=power, **common)

            def update(self, block):
                block.weight -= block.lr * block.xp.sign(block.grad) ** block.options["power"]

        p = make(np, (2,))
        before = p.data.copy()
        run(Signed([p], 0.5, power=2), p, np, [np.array([3.0, -4.0])])
        np.testing.assert_array_equal(p.data, before - 0.5)
        with pytest.raises(TypeError, match=r"Signed has no option 'powr'.* Did you mean 'power'"):
            Signed([p], 0.5, powr=2)

    def test_nothing_to_update_is_refused(self):
        layer = nn.Linear(2, 2)
        used_up = layer.parameters()
        list(used_up)
        for nothing in ([], used_up, [{"params": []}], nn.ReLU().parameters()):
            with pytest.raises(ValueError, match=r"Adam must have parameters to update; got none"):
                optim.Adam(nothing)
        with pytest.raises(ValueError, match="WeightAverage must have parameters; got none"):
            optim.WeightAverage([])

    def test_schedule_is_checked(self):
        with pytest.raises(TypeError, match=r"'schedule' of SGD must be None or a function.*got 0"):
            optim.SGD([make(np, (2,))], 0.1, schedule=0.5)

    def test_gradient_of_another_shape(self):
        first, p = make(np, (2,)), make(np, (2, 3))
        first.grad, p.grad = np.ones(2), np.ones(6)
        before = first.data.copy()
        optimizer = optim.SGD([first, p], 0.1)
        with pytest.raises(ValueError, match=r"have its shape \(2, 3\); got \(6,\)"):
            optimizer.step()
        assert optimizer.steps == 0
        np.testing.assert_array_equal(first.data, before)

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


class TestFloat16:
    @pytest.mark.parametrize("name", KINDS)
    @pytest.mark.parametrize("size", [1e-6, 1.0, 6e4])
    def test_moments_neither_overflow_nor_vanish(self, xp, name, size):
        dtype = "float16"
        values = np.linspace(-2, 2, 12).astype(dtype)
        parameter = nn.Parameter(xp.asarray(values))
        grads = [g.astype(dtype) for g in size * np.sign(gradients((12,)))]
        factory = factory_of(name)
        optimizer = factory([parameter])
        if name == "SGD" and size > 1:
            optimizer.groups[0]["lr"] = 0.0  # so large a step is no float16 itself
        run(optimizer, parameter, xp, grads)
        assert parameter.dtype == dtype
        state = optimizer.state_dict()
        for key, array in state.items():
            assert key == "steps" or array.dtype == np.float32
            assert np.isfinite(array).all()
        if "0.0.square" in state:
            assert (state["0.0.square"] > 0).all()
        factory([parameter]).load_state_dict(state)
        assert np.isfinite(host(parameter.data).astype("f8")).all()

    @pytest.mark.parametrize("name", KINDS)
    def test_formula_within_rounding(self, xp, name):
        dtype = "float16"
        values = np.linspace(-2, 2, 12).astype(dtype)
        parameter = nn.Parameter(xp.asarray(values), limit=1.5)
        grad = gradients((12,), 1)[0].astype(dtype)
        factory, reference = OPTIMIZERS[name]
        got = run(factory([parameter]), parameter, xp, [grad]).astype("f8")
        expected = reference(values.astype("f8"), [grad.astype("f8")]).clip(-1.5, 1.5)
        eps = float(np.finfo(dtype).eps)
        np.testing.assert_allclose(got, expected, rtol=eps, atol=eps)

    def test_averages(self, xp):
        dtype = "float16"
        parameter = nn.Parameter(xp.asarray(np.full(3, 6e4), dtype))
        average = optim.WeightAverage([parameter], decay=0.9)
        average.update()
        parameter.data = -parameter.data
        average.update()  # the difference is no float16
        live = host(parameter.data).copy()
        kept = host(average.averages[0]).copy()
        assert kept.dtype == np.float32
        np.testing.assert_allclose(kept, live[0].astype("f8") * (1 - 0.9) / 1.9, rtol=1e-4)
        with average.applied():
            np.testing.assert_array_equal(host(parameter.data), kept.astype(dtype))
        np.testing.assert_array_equal(host(parameter.data), live)
        np.testing.assert_array_equal(host(average.averages[0]), kept)


class TestClipGradNorm:
    def clip(self, xp, arrays, max_norm, dtype="float32"):
        parameters = [nn.Parameter(xp.zeros(np.shape(a), dtype)) for a in arrays]
        for parameter, a in zip(parameters, arrays, strict=True):
            parameter.grad = xp.asarray(np.array(a, dtype))
        norm = optim.clip_grad_norm(iter(parameters), max_norm)
        return norm, [host(p.grad) for p in parameters]

    @pytest.mark.parametrize("max_norm", [1, np.float32(2.5), 1e3, math.inf])
    def test_formula(self, xp, max_norm):
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape) for shape in ((70_000,), (3, 4), (), (0,))]
        norm, grads = self.clip(xp, arrays, max_norm, "float64")
        expected = np.linalg.norm(np.concatenate([a.ravel() for a in arrays]))
        assert float(norm) == pytest.approx(expected, rel=1e-12)
        factor = min(1, float(max_norm) / expected)
        for got, a in zip(grads, arrays, strict=True):
            np.testing.assert_allclose(got, a * factor, rtol=1e-12)

    def test_nothing_changes_below_the_limit(self, xp):
        _, (grad,) = self.clip(xp, [[0.1, 0.3]], 1.0)
        assert grad.tobytes() == np.float32([0.1, 0.3]).tobytes()

    @pytest.mark.parametrize(
        ("dtype", "size"),
        [("float16", 6e4), ("float16", 1e-7), ("float32", 3e38), ("float32", 2e-38)],
    )
    def test_squares_neither_overflow_nor_vanish(self, xp, dtype, size):
        values = np.full(10_000, size, dtype)
        norm, (grad,) = self.clip(xp, [values], 1e-3, dtype)
        expected = 100 * float(values[0])
        assert float(norm) == pytest.approx(expected, rel=1e-12)
        factor = min(1.0, 1e-3 / expected)
        np.testing.assert_array_equal(grad, (values.astype("f8") * factor).astype(dtype))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_non_finite_gradients_are_left(self, xp, bad):
        norm, grads = self.clip(xp, [[1.0, bad], [2.0]], 0.5)
        assert not math.isfinite(float(norm))
        np.testing.assert_array_equal(np.concatenate(grads), np.float32([1, bad, 2]))

    def test_a_gradient_of_two_parameters_is_scaled_once(self, xp):
        p, q = make(xp, (2,)), make(xp, (2,))
        p.grad = q.grad = xp.asarray([3.0, 4.0])
        assert float(optim.clip_grad_norm([p, q], 1.0)) == 5.0
        np.testing.assert_allclose(host(p.grad), [0.6, 0.8])

    def test_without_gradients(self):
        assert optim.clip_grad_norm([make(np, (2,))], 1.0) == 0.0
        assert optim.clip_grad_norm([], 1.0) == 0.0

    @pytest.mark.gpu
    def test_the_norm_stays_on_the_device(self):
        import cupy

        p = make(cupy, (2,))
        p.grad = cupy.ones(2)
        norm = optim.clip_grad_norm(p, 1.0)
        assert isinstance(norm, cupy.ndarray)
        assert norm.shape == ()

    @pytest.mark.parametrize("value", [0, -1, math.nan, "1", None, True])
    def test_limit_is_checked(self, value):
        message = f"'max_norm' must be a positive number; got {value!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            optim.clip_grad_norm([], value)
        with pytest.raises(TypeError, match="takes Parameters"):
            optim.clip_grad_norm([np.ones(2)], 1.0)


class TestShown:
    def test_optimizers(self):
        p, q = make(np, (2, 3)), make(np, (1000,))
        adam = optim.Adam([p, q], 0.5, schedule=schedules.warm_up(3, schedules.cosine(10)))
        assert repr(adam) == (
            "Adam(schedule=warm_up(3, cosine(10, 0.0)), lr=0.5, betas=(0.9, 0.999), eps=1e-08, "
            "2 parameters of 1,006 elements)"
        )
        groups = [{"params": [p], "name": "small"}, {"params": [q], "lr": 2}]
        sgd = optim.SGD(groups, 0.5, lr_scale=optim.binarynet_scale)
        assert repr(sgd).splitlines() == [
            "SGD(",
            "  (0): name='small', lr=0.5, momentum=0.0, lr_scale=binarynet_scale, "
            "1 parameter of 6 elements",
            "  (1): lr=2, momentum=0.0, lr_scale=binarynet_scale, 1 parameter of 1,000 elements",
            ")",
        ]
        combined = optim.Combined(optim.Bop([p]), optim.SGD([q], 1))
        assert repr(combined).splitlines() == [
            "Combined(",
            "  (0): Bop(lr=0.0001, threshold=1e-08, 1 parameter of 6 elements)",
            "  (1): SGD(lr=1, momentum=0.0, 1 parameter of 1,000 elements)",
            ")",
        ]
        assert repr(optim.WeightAverage([p], 0.5)) == (
            "WeightAverage(decay=0.5, updates=0, 1 parameter of 6 elements)"
        )

    def test_schedules(self):
        made = schedules.constant(), schedules.step([2, 4]), schedules.exponential(5, 0.1)
        assert [repr(s) for s in made] == [
            "constant(1.0)",
            "step((2, 4), 0.1)",
            "exponential(5, 0.1)",
        ]


class TestSchedules:
    def test_values(self):
        def values(schedule, *steps):
            return [pytest.approx(schedule(s)) for s in steps]

        assert values(schedules.constant(), 0, 10**6) == [1, 1]
        assert values(schedules.step([2, 4], 0.5), 0, 1, 2, 3, 4, 9) == [1, 1, 0.5, 0.5, 0.25, 0.25]
        assert values(schedules.exponential(10, 0.01), 0, 5, 10, 20) == [1, 0.1, 0.01, 0.01]
        assert values(schedules.cosine(10), 0, 5, 10, 20) == [1, 0.5, 0, 0]
        assert values(schedules.cosine(10, 0.2), 0, 5, 10) == [1, 0.6, 0.2]
        assert 0 <= schedules.warm_up(10**400)(5) < 1e-300
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

    @pytest.mark.parametrize(
        ("name", "value", "fault"),
        [
            ("updates", np.array(1.5), "updates: must be () int64, is () float64"),
            ("updates", np.array(-1), "updates: must be at least 0; got -1"),
            ("0", np.ones(3, complex), "0: must be (3,) float64, is (3,) complex128"),
            ("0", np.ones(4), "0: must be (3,) float64, is (4,) float64"),
            ("1", np.ones(4), "unknown: 1"),
        ],
    )
    def test_absurd_state_is_refused(self, name, value, fault):
        average = optim.WeightAverage([make(np, (3,))])
        before = average.averages[0].copy()
        with pytest.raises(ValueError, match=re.escape(fault)):
            average.load_state_dict({**average.state_dict(), name: value})
        np.testing.assert_array_equal(average.averages[0], before)
        assert average.updates == 0

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
        with pytest.raises(ValueError, match="does not match this WeightAverage"):
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
        with pytest.raises(ValueError, match=r"(?s)Combined:.*unknown: 2/x.*1/0.0.square: must"):
            combined.load_state_dict(bad)
        np.testing.assert_array_equal(combined.state_dict()["0/0.0.mean"], state["0/0.0.mean"])

    def test_bad_parts(self):
        with pytest.raises(ValueError, match="at least one optimizer; got none"):
            optim.Combined()
        parameter = make(np)
        with pytest.raises(ValueError, match="must appear only once"):
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
