"""Virtual adversarial training: the divergence, the directions, and the plain step."""

from __future__ import annotations

import numpy as np
import pytest

from cupybnn import ops
from cupybnn.autograd import Tensor, gradcheck
from cupybnn.backends.devices import CPU, to_device
from cupybnn.backends.random import bell, random_words
from cupybnn.cli.main import main
from cupybnn.training import TrainConfig, Trainer

QUICK = {"dataset": "digits", "device": "cpu", "n_hidden": 24, "batch_size": 40, "reg": 0.0}
REAL = {**QUICK, "dtype": "float64", "vat": 1.0, "vat_xi": 1e-4}


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0).sum(axis=1)


class TestDivergence:
    def test_value_and_gradient(self, xp):
        random = np.random.default_rng(0)
        logits, p = random.normal(size=(5, 4)), softmax(random.normal(size=(5, 4)))
        p[2] = [0, 1, 0, 0]
        t = Tensor(xp.asarray(logits), requires_grad=True)
        loss = ops.softmax_divergence(t, xp.asarray(p))
        np.testing.assert_allclose(loss.item(), divergence(p, softmax(logits)).mean(), rtol=1e-12)
        gradcheck(lambda x: ops.softmax_divergence(x, xp.asarray(p)), t)

    def test_it_is_least_where_both_agree(self):
        logits = np.random.default_rng(1).normal(size=(3, 5))
        t = Tensor(logits, requires_grad=True)
        loss = ops.softmax_divergence(t, softmax(logits))
        loss.backward()
        assert abs(loss.item()) < 1e-14
        np.testing.assert_allclose(t.grad, 0, atol=1e-15)

    def test_excluded_classes(self):
        """A class of probability 0 may have a logit of -inf."""
        loss = ops.softmax_divergence(
            Tensor([[0.0, float("-inf")]]), np.array([[1.0, 0.0]], np.float32)
        )
        assert loss.item() == 0.0

    def test_an_example_without_a_class_has_no_gradient(self, xp):
        """Even where its softmax is NaN."""
        logits = np.array([[np.nan, 0, np.inf], [-np.inf] * 3, [0, 0, 0]], np.float32)
        p = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 1]], np.float32)
        t = Tensor(xp.asarray(logits), requires_grad=True)
        loss = ops.softmax_divergence(t, xp.asarray(p))
        loss.backward()
        np.testing.assert_allclose(loss.item(), np.log(3) / 3, rtol=1e-6)
        np.testing.assert_array_equal(to_device(t.grad, CPU)[:2], 0)

    @pytest.mark.parametrize("p", [np.ones((2, 3)), np.ones((3, 2), int), np.ones(3)])
    def test_what_does_not_fit(self, p):
        with pytest.raises(ValueError, match="probabilities of one shape"):
            ops.softmax_divergence(Tensor(np.zeros((3, 2))), p)
        with pytest.raises(ValueError, match=r"pass p\.detach\(\)"):
            ops.softmax_divergence(
                Tensor(np.zeros((1, 2))), Tensor(np.ones((1, 2)), requires_grad=True)
            )


class TestDirections:
    def test_nearly_normal_numbers(self, xp):
        words = random_words((1000, 7), 5, 3, np)
        expected = words.view(np.uint8).reshape(1000, 7, 4).sum(axis=2, dtype=np.int64) - 510
        drawn = bell((1000, 7), 5, 3, xp)
        np.testing.assert_array_equal(drawn if xp is np else drawn.get(), expected)
        assert abs(expected.mean()) < 8
        assert abs(expected.var() / 21845 - 1) < 0.05

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_lengths(self, xp, dtype):
        rows = np.array([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [-5.0, 12.0]], dtype)
        got = ops.of_length(xp.asarray(rows), 2.0)
        got = got if xp is np else got.get()
        assert got.dtype == dtype
        expected = [[1.2, 1.6], [0, 0], [2, 0], [-10 / 13, 24 / 13]]
        np.testing.assert_allclose(got, expected, rtol=1e-6)

    def test_it_is_where_the_divergence_grows_most(self):
        """For a smooth network: the first eigenvector's side, better than any random direction."""
        random = np.random.default_rng(2)
        weight = random.normal(size=(6, 4))

        def network(x):
            return ops.tanh(x) @ Tensor(weight)

        x = random.normal(size=(8, 6)) * 0.3
        p = softmax(network(Tensor(x)).data)
        start = random.normal(size=x.shape)
        move = ops.virtual_adversarial(network, x, p, start, distance=0.05, xi=1e-5)
        np.testing.assert_allclose(np.linalg.norm(move, axis=1), 0.05, rtol=1e-9)
        # One step of the power iteration: H start, with H by finite differences of the gradient.
        for row in range(8):
            hessian = np.zeros((6, 6))
            for i in range(6):
                for j in range(6):
                    value = 0.0
                    for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                        there = x[row : row + 1].copy()
                        there[0, i] += a * 1e-4
                        there[0, j] += b * 1e-4
                        there = softmax(network(Tensor(there)).data)
                        value += a * b * divergence(p[row : row + 1], there)[0]
                    hessian[i, j] = value / 4e-8
            step = hessian @ start[row]
            np.testing.assert_allclose(move[row] / 0.05, step / np.linalg.norm(step), atol=2e-3)


class TestPlainStep:
    def test_the_loss_is_that_of_two_passes(self):
        made = Trainer(TrainConfig(**REAL, batch_norm=True))
        made.make_step(0)  # away from the symmetric start
        model, step = made.model.train(), made._step
        inputs, labels = made.data.batch(made.order.indices(1))
        inputs = inputs.copy()
        before = [array.copy() for _, array in model.named_buffers()]
        logits, expected = step._virtual(inputs, 1)
        p = softmax(logits.data)
        # By hand: the gradient at a random point, by finite differences of the divergence.
        start = bell(inputs.shape, step._vat_seed, 1, np)
        there = inputs + 1e-4 * start / np.linalg.norm(start, axis=1, keepdims=True)

        def at(x):
            return divergence(p, softmax(model(Tensor(x)).data)).mean()

        pixels = [(0, 20), (3, 35), (39, 44)]
        slopes = []
        for pixel in pixels:
            up, down = there.copy(), there.copy()
            up[pixel] += 1e-4
            down[pixel] -= 1e-4
            slopes.append((at(up) - at(down)) / 2e-4)
        move = ops.virtual_adversarial(model, inputs, p, start, distance=1.0, xi=1e-4)
        gradient = Tensor(there, requires_grad=True)
        ops.softmax_divergence(model(gradient), p).backward()
        np.testing.assert_allclose([gradient.grad[x] for x in pixels], slopes, atol=2e-8)
        np.testing.assert_allclose(np.linalg.norm(move, axis=1), 1.0)
        np.testing.assert_allclose(expected.item(), at(inputs + move), rtol=1e-6)
        assert expected.item() > 2 * at(inputs + 1e4 * (there - inputs))  # than at random
        for (_, array), old in zip(model.named_buffers(), before, strict=True):
            array[...] = old
        loss = float(made.make_step(1).loss)
        plain = made.objective.loss(Tensor(logits.data), labels).item()
        np.testing.assert_allclose(loss, plain + expected.item(), rtol=1e-12)

    def test_running_statistics_are_those_of_the_first_pass(self):
        settings = {**QUICK, "binary": True, "batch_norm": True, "first": True, "last": True}
        states = []
        for vat in (0.0, 2.0):
            made = Trainer(TrainConfig(**settings, vat=vat))
            made.make_step(0)
            states.append([array for _, array in made.model.named_buffers()])
        for a, b in zip(*states, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_all_passes_drop_the_same(self):
        settings = {**QUICK, "keep_prob": 0.5, "input_keep_prob": 0.5, "batch_norm": True}
        made = Trainer(TrainConfig(**settings, vat=1.0))
        made.make_step(0)
        states = [m.random_state() for _, m in made.model.named_modules()]
        assert [int(state[1]) for state in states if state is not None] == [1] * 4
        inputs, _ = made.data.batch(made.order.indices(1))
        _, expected = made._step._virtual(inputs, 1)
        made._step._vat = {"distance": 1e-9, "xi": 1.0}
        for state in states:
            if state is not None:
                state[1] -= 1
        _, tiny = made._step._virtual(inputs, 1)
        assert abs(tiny.item()) < 1e-6 < expected.item()

    def test_xnor_and_dense_steps_are_the_same(self):
        traces = []
        for xnor in (False, True):
            settings = {**QUICK, "binary": True, "batch_norm": True, "vat": 2.0}
            made = Trainer(TrainConfig(**settings, xnor=xnor))
            traces.append([float(made.make_step(step).loss) for step in range(5)])
        assert traces[0] == traces[1]

    def test_a_restored_run_equals_an_uninterrupted_one(self, tmp_path):
        settings = {**QUICK, "binary": True, "batch_norm": True, "vat": 1.0, "mix": "some"}
        settings |= {"schedule": "constant", "eval_every_n": 5}
        whole = Trainer(TrainConfig(**settings, max_steps=12)).run()
        half = Trainer(TrainConfig(**settings, max_steps=6, log_dir=str(tmp_path))).run()
        rest = Trainer(TrainConfig(**settings, max_steps=12, restore=str(half.run_folder))).run()
        for (name, a), (_, b) in zip(
            whole.model.state_dict().items(), rest.model.state_dict().items(), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_it_makes_predictions_more_stable():
    common = {**QUICK, "batch_norm": True, "max_steps": 200, "lr": 3e-3}
    changes = []
    for vat in (0.0, 1.0):
        made = Trainer(TrainConfig(**common, vat=vat))
        made.run()
        judge = Trainer(TrainConfig(**common, vat=1.0))
        judge.make_step(0)
        judge.model.load_state_dict(made.model.state_dict())
        inputs, _ = judge.data.batch(judge.order.indices(1))
        changes.append(judge._step._virtual(inputs, 1)[1].item())
    assert changes[1] < 0.5 * changes[0]


def test_options(capsys):
    quick = ["--dataset", "digits", "--max_steps", "2", "--n_hidden", "8", "--device", "cpu"]
    assert main(["train", *quick, "--vat", "1.5", "--vat_xi", "0.5"]) == 0
    assert "virtual adversarial images (1.5)" in capsys.readouterr().out
    assert main(["train", *quick, "--vat_xi", "0.5"]) == 0
    assert "--vat_xi has no effect without --vat" in capsys.readouterr().err
    for wrong in ({"vat": -1.0}, {"vat_xi": 0.0}):
        with pytest.raises(ValueError, match="must be a finite number"):
            TrainConfig(**wrong)
