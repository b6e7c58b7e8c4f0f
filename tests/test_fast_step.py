"""The fused step computes what the plain step does; on a GPU."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from fast_networks import NETWORKS, arrays, dataset, run, trainer

from cupybnn.backends.cuda.fused_walk import Sums
from cupybnn.training import TrainConfig, Trainer
from cupybnn.training.step import PlainStep

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
class TestAgainstThePlainStep:
    def pair(self, **settings) -> tuple[Trainer, Trainer]:
        return trainer(**settings, fused=False), trainer(**settings, graph=False)

    def test_gradients_loss_and_statistics(self, settings):
        plain, fused = self.pair(**settings)
        expected, got = plain.make_step(0), fused.make_step(0)
        assert isinstance(plain._step, PlainStep)
        assert not isinstance(fused._step, PlainStep)
        np.testing.assert_array_equal(got.labels.get(), expected.labels.get())
        np.testing.assert_allclose(got.logits.get(), expected.logits.get(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(float(got.loss), float(expected.loss), rtol=1e-5)
        for (name, p), q in zip(
            plain.model.named_parameters(), fused.model.parameters(), strict=True
        ):
            scale = float(abs(p.grad).max())
            if name.endswith("beta"):  # where batch norm follows, these are sums that cancel
                scale = max(scale, float(abs(plain.model.fcout.weight.grad).max()))
            np.testing.assert_allclose(
                q.grad.get(), p.grad.get(), rtol=0, atol=2e-5 * scale, err_msg=name
            )
        for (name, a), (_, b) in zip(
            plain.model.named_buffers(), fused.model.named_buffers(), strict=True
        ):
            np.testing.assert_allclose(b.get(), a.get(), rtol=1e-5, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize(
        "update",
        [
            {"reg": 1e-3},
            {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warm_up": 3},
            {"reg": 1e-3, "penalty": "bipolar", "lr_scale": "binarynet"},
        ],
        ids=["adam, l1", "adamw, schedule", "bipolar, scaled"],
    )
    def test_the_update(self, settings, update):
        plain, fused = self.pair(**{**settings, **update})
        expected, got = plain.make_step(0), fused.make_step(0)
        np.testing.assert_allclose(float(got.loss), float(expected.loss), rtol=1e-5)
        for (name, p), q in zip(
            plain.model.named_parameters(), fused.model.parameters(), strict=True
        ):
            # Adam's first step has the size of the learning rate, whatever the gradient's: only its
            # sign counts, and where that is lost in rounding weights differ.
            change = abs(p.data - q.data).get()
            assert (change > 0.02 * plain.config.lr).mean() < 0.02 or name.endswith("beta"), name
        assert fused.optimizer.steps == 1

    def test_the_trace(self, settings):
        plain, fused = self.pair(**settings)
        expected = [float(plain.make_step(s).loss) for s in range(8)]
        got = [float(fused.make_step(s).loss) for s in range(8)]
        np.testing.assert_allclose(got, expected, rtol=0.15)

    def test_the_graph_changes_nothing(self, settings):
        settings = {**settings, "max_steps": 60, "reg": 1e-4}
        with_graph, a = run(**settings)
        without, b = run(**settings, graph=False)
        assert with_graph._step._graph is not None, with_graph.notices
        assert without._step._graph is None
        assert a == b
        state = arrays(without)
        for name, array in arrays(with_graph).items():
            np.testing.assert_array_equal(array, state[name], err_msg=name)

    def test_the_same_run_twice(self, settings):
        settings = {**settings, "max_steps": 30}
        _, a = run(**settings)
        _, b = run(**settings)
        assert a == b

    @pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
    def test_rounded_products_train_as_well(self, settings, dtype):
        _, exact = run(**settings, max_steps=40)
        _, rounded = run(**settings, max_steps=40, dtype=dtype)
        assert np.isfinite(rounded).all()
        # What is left of the loss; of next to nothing, a fifth says nothing.
        left = 0.01 * exact[0]
        np.testing.assert_allclose(np.mean(rounded[20:]), np.mean(exact[20:]), rtol=0.2, atol=left)


@pytest.mark.parametrize(
    "name",
    [
        "xnor, wide",
        "xnor, odd sizes",
        "xnor, a word more than a chunk",
        "sign",
        "clipped",
        "dropout before sign",
        "virtual, of mixed images, dropout",
        "full precision, batch norm, dropout",
    ],
)
def test_layers_that_are_walked_by_two_launches(monkeypatch, name):
    """Large layers are; here, all are."""
    monkeypatch.setattr("cupybnn.backends.cuda.fused_walk._MOST_ROUNDS", 0)
    TestAgainstThePlainStep().test_gradients_loss_and_statistics(NETWORKS[name])


def test_the_head_of_whole_strips_in_two_launches(monkeypatch):
    """Of large layers; on a GPU of one multiprocessor, this one is large."""
    monkeypatch.setattr("cupybnn.backends.cuda.fused_walk._MOST_ROUNDS", 0)
    monkeypatch.setattr("cupybnn.backends.cuda.fused_walk.multiprocessors", lambda device: 1)
    settings = {**NETWORKS["xnor"], "n_hidden": 256, "batch_size": 512}
    TestAgainstThePlainStep().test_gradients_loss_and_statistics(settings)
    made = trainer(**settings)
    made.make_step(0)
    layer = made._step.buffers.hidden[-1].layer
    way = made._step.passes.launcher.walk.strips(layer, Sums(12, width=64))
    assert way.whole
    assert not way.clustered


@pytest.mark.parametrize("batch_size", [256, 2048])
def test_two_launches_give_the_same_for_packed_and_dense_products(monkeypatch, batch_size):
    monkeypatch.setattr("cupybnn.backends.cuda.fused_walk._MOST_ROUNDS", 0)
    settings = {"binary": True, "batch_norm": True, "dtype": "bfloat16", "max_steps": 10}
    settings |= {"batch_size": batch_size, "n_hidden": 256}
    a, with_xnor = run(**settings, xnor=True)
    b, with_matmul = run(**settings)
    assert with_xnor == with_matmul
    state = arrays(b)
    for name, array in arrays(a).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


@pytest.mark.parametrize("batch_size", [4500, 9000])
def test_xnor_and_dense_products_of_signs_train_alike_with_many_rows(batch_size):
    settings = {"binary": True, "batch_norm": True, "dtype": "bfloat16", "max_steps": 10}
    settings |= {"batch_size": batch_size, "n_hidden": 64}
    a, with_xnor = run(**settings, xnor=True)
    b, with_matmul = run(**settings)
    assert with_xnor == with_matmul
    state = arrays(b)
    for name, array in arrays(a).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("reg", [0.0, 1e-4])
def test_xnor_and_dense_products_of_signs_train_alike(dtype, reg):
    settings = {"binary": True, "batch_norm": True, "dtype": dtype, "max_steps": 40, "reg": reg}
    a, with_xnor = run(**settings, xnor=True)
    b, with_matmul = run(**settings)
    assert with_xnor == with_matmul
    state = arrays(b)
    for name, array in arrays(a).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_packed_weights_follow_the_latent_ones():
    import cupybnn

    made, _ = run(binary=True, xnor=True, batch_norm=True, max_steps=50, lr=0.05)
    for hidden in made._step.buffers.hidden[1:]:
        latent = hidden.plan.linear.weight.data
        fresh = cupybnn.pack(latent, axis=-2)
        assert bool((hidden.packed_weight.words == fresh.words).all())
        assert bool((hidden.packed_weight.popcounts == fresh.popcounts).all())
        assert bool((hidden.weight == cupybnn.sign(latent)).all())


def test_latent_weights_stay_within_their_limit():
    made, _ = run(binary=True, xnor=True, batch_norm=True, max_steps=60, lr=0.3)
    weight = made.model.fc2.weight.data
    assert float(abs(weight).max()) == 1.0
    assert float(abs(made.model.fc1.weight.data).max()) > 1.0


def test_restored_run_equals_an_uninterrupted_one(tmp_path):
    settings = {"binary": True, "xnor": True, "batch_norm": True, "keep_prob": 0.5}
    whole, _ = run(**settings, max_steps=50)
    first, _ = run(**settings, max_steps=20, log_dir=str(tmp_path), eval_every_n=19)
    second, _ = run(**settings, max_steps=50, restore=str(first.run_folder))
    state = arrays(whole)
    for name, array in arrays(second).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_a_learning_rate_set_between_steps_takes_effect():
    made = trainer(binary=True, xnor=True, batch_norm=True)
    for step in range(3):
        made.make_step(step)
    made.optimizer.set_lr(0.0)
    before = made.model.fc1.weight.data.copy()
    made.make_step(3)
    assert bool((made.model.fc1.weight.data == before).all())


def test_a_failed_capture_is_reported_once_and_training_continues(monkeypatch):
    from cupybnn.training.fast import step as module

    def refuse(stream, launch):
        raise RuntimeError("a CUDA graph cannot be captured: not today")

    settings = {"binary": True, "xnor": True, "batch_norm": True, "max_steps": 10}
    _, expected = run(**settings)
    monkeypatch.setattr(module, "capture", refuse)
    made, losses = run(**settings)
    assert losses == expected
    assert made.notices == [
        "Training steps run without a CUDA graph: a CUDA graph cannot be captured: not today."
    ]


def test_missing_nvmath_is_reported_once_and_training_continues(monkeypatch):
    from cupybnn.backends.cuda import blas

    settings = {"binary": True, "xnor": True, "batch_norm": True, "max_steps": 10}
    _, expected = run(**settings)
    monkeypatch.setattr(blas, "capturable", lambda: False)
    made, losses = run(**settings)
    np.testing.assert_allclose(losses[:2], expected[:2], rtol=1e-5)
    assert [n for n in made.notices if "nvmath-python" in n] == made.notices
    assert len(made.notices) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("xnor", [True, False])
@pytest.mark.parametrize("log_dir", [False, True])
def test_sparing_memory_changes_nothing(monkeypatch, tmp_path, dtype, xnor, log_dir):
    settings = {"binary": True, "batch_norm": True, "dtype": dtype, "xnor": xnor, "reg": 1e-4}
    settings |= {"max_steps": 30, "hidden_layers": 4, "n_hidden": 160}
    if log_dir:
        settings["log_dir"] = str(tmp_path)
    a, with_copies = run(**settings)
    monkeypatch.setattr("cupybnn.training.fast.plan._DENSE_COPY_BYTES", 0)
    b, spared = run(**settings)
    assert a._step.plan.keep_dense_copies
    assert not b._step.plan.keep_dense_copies
    assert b._step._graph is not None
    assert with_copies == spared
    state = arrays(b)
    for name, array in arrays(a).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)
    if log_dir:
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
            np.testing.assert_array_equal(p.grad.get(), q.grad.get())


@pytest.mark.parametrize("classes", [2, 10, 26])
def test_other_numbers_of_classes(classes):
    data = dataset(classes=classes)
    plain = trainer(data=data, batch_norm=True, fused=False)
    fused = trainer(data=data, batch_norm=True)
    expected, got = plain.make_step(0), fused.make_step(0)
    np.testing.assert_allclose(float(got.loss), float(expected.loss), rtol=1e-5)
    np.testing.assert_allclose(
        fused.model.fcout.weight.grad.get(), plain.model.fcout.weight.grad.get(), atol=1e-6
    )


def test_kernels_of_a_step_and_of_an_evaluation_are_compiled_side_by_side(monkeypatch):
    from cupybnn.backends.cuda import compiler

    compiled = []
    compile_one = compiler._compile

    def recording(source, *rest):
        compiled.append((threading.current_thread().name, source))
        return compile_one(source, *rest)

    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_compile", recording)
    # Shapes of their own: products of others are prepared already.
    config = TrainConfig(
        dataset="digits", binary=True, xnor=True, last=True, n_hidden=72, vat=0.5, mix="some",
        batch_size=24, device="cuda", reg=0.0,
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.make_step(0)
    alone = {source for thread, source in compiled if "cupybnn-compiler" not in thread}
    assert alone <= {"smxx_pack", "smxx_sign"}, "memory is made with them, before there is a step"
    together = {source for thread, source in compiled if "cupybnn-compiler" in thread}
    assert {"smxx_adam", "smxx_virtual", "smxx_head", "smxx_activation"} <= together
    compiled.clear()
    trainer.evaluate()
    trainer.make_step(1)
    assert compiled == []
