"""The loop as a library call: what it computes, what it reports, what it restores."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import cupybnn
from cupybnn import nn
from cupybnn.backends.devices import CPU
from cupybnn.errors import CheckpointError, NonFiniteError
from cupybnn.training import Callback, TrainConfig, Trainer, restored_config, train
from cupybnn.training.checkpoint import BEST, load
from cupybnn.training.timing import StepTimer

QUICK = {
    "dataset": "digits",
    "n_hidden": 48,
    "batch_size": 50,
    "max_steps": 40,
    "eval_every_n": 8,
    "device": "cpu",
}
#: Every kind of network, each with everything that has a state of its own.
NETWORKS = {
    "fp": {},
    "fp-bn-dropout": {"batch_norm": True, "keep_prob": 0.8},
    "binary": {"binary": True, "batch_norm": False, "reg": 1e-4},
    "binary-bn-dropout": {"binary": True, "batch_norm": True, "keep_prob": 0.8},
    "all-binary": {"binary": True, "first": True, "last": True, "batch_norm": True, "reg": 0.0},
    "clipped": {"binary": True, "batch_norm": False, "ste": "clipped_grad", "dtype": "float64"},
    "stochastic": {"binary": True, "reg": 1e-4, "ste": "stochastic_sign"},
}


class Recorder(Callback):
    """Keeps the loss of every step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.calls: list[str] = []
        self.stop_after = stop_after

    def on_start(self, trainer):
        self.calls.append("start")

    def on_step(self, trainer, step, output):
        self.losses[step] = float(output.loss)
        if self.stop_after is not None and step + 1 == self.stop_after:
            trainer.request_stop()

    def on_evaluate(self, trainer, evaluation):
        self.calls.append(f"evaluate {evaluation.step}")

    def on_end(self, trainer, result):
        self.calls.append("end")

    def close(self):
        self.calls.append("close")


def figures(history):
    """Evaluations without their speed, which no two runs share."""
    return [dataclasses.replace(e, examples_per_second=0.0) for e in history]


def run(stop_after=None, **settings):
    recorder = Recorder(stop_after)
    trainer = Trainer(TrainConfig(**{**QUICK, **settings}), [recorder])
    return trainer, trainer.run(), recorder


class TestRun:
    def test_history_and_result(self, capfd):
        trainer, result, recorder = run(max_steps=20)
        assert [e.step for e in result.history] == [0, 8, 16]
        assert result.final.step == 19
        assert result.steps == trainer.step == 20
        assert not result.stopped
        assert sorted(recorder.losses) == list(range(20))
        assert [e.train_loss for e in result.history] == [recorder.losses[s] for s in (0, 8, 16)]
        assert recorder.calls == [
            "start",
            "evaluate 0",
            "evaluate 8",
            "evaluate 16",
            "end",
            "close",
        ]
        assert result.average_examples_per_second > 0
        assert result.median_examples_per_second > 0
        assert result.dataset == "digits"
        assert result.run_folder is None
        assert capfd.readouterr() == ("", "")

    def test_public_call(self):
        result = cupybnn.train(**QUICK)
        assert result.final_accuracy == train(TrainConfig(**QUICK)).final_accuracy > 0.5
        with pytest.raises(ValueError, match="not both"):
            cupybnn.train(TrainConfig(), max_steps=3)
        with pytest.raises(ValueError, match="got steps"):
            cupybnn.train(steps=3)
        with pytest.raises(TypeError, match=r"must be a TrainConfig; got dict\. .*from_mapping"):
            cupybnn.train(QUICK)

    def test_learns(self):
        _, result, _ = run(max_steps=200, n_hidden=128)
        assert result.final_accuracy > 0.93
        _, result, _ = run(max_steps=300, n_hidden=128, binary=True, batch_norm=True)
        assert result.final_accuracy > 0.88

    def test_first_loss_is_that_of_the_initial_weights_on_the_first_batch(self):
        trainer = Trainer(TrainConfig(**QUICK))
        weights = {k: np.array(v) for k, v in trainer.model.state_dict().items()}
        images, labels = trainer.data.batch(trainer.order.indices(0))
        hidden = images.astype(np.float64)
        names = ["fc1.weight", "fc2.weight", "fc3.weight"]
        for name in names:
            hidden = np.maximum(hidden @ weights[name], 0)
        logits = hidden @ weights["fcout.weight"]
        logits -= logits.max(axis=1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = -logp[np.arange(len(labels)), labels].mean()
        expected += 1e-4 * sum(np.abs(weights[n]).sum() for n in [*names, "fcout.weight"])
        assert trainer.run().history[0].train_loss == pytest.approx(expected, rel=1e-5)

    def test_binary_network_is_the_originals(self):
        trainer = Trainer(TrainConfig(**QUICK, binary=True, batch_norm=False))
        weights = {k: np.array(v) for k, v in trainer.model.state_dict().items()}
        images, _ = trainer.data.batch(trainer.order.indices(0))

        def sign(x):
            return np.where(x >= 0, 1, -1)

        hidden = sign(images @ weights["fc1.weight"])
        hidden = sign(hidden @ sign(weights["fc2.weight"]))
        hidden = hidden @ sign(weights["fc3.weight"])  # not binarized, no non-linearity
        expected = hidden @ weights["fcout.weight"]
        output = trainer.make_step(0)
        np.testing.assert_allclose(output.logits, expected, rtol=2e-5, atol=2e-5)

    def test_accuracy_is_over_the_whole_test_set(self):
        for xnor in (False, True):
            trainer, result, _ = run(binary=True, xnor=xnor, max_steps=10)
            trainer.model.eval()
            logits = trainer.model(
                cupybnn.autograd.Tensor(trainer.data.scale(trainer.dataset.test_images))
            ).numpy()
            right = int((logits.argmax(axis=1) == trainer.dataset.test_labels).sum())
            assert result.final_accuracy == right / 355

    def test_evaluation_changes_nothing(self):
        settings = NETWORKS["binary-bn-dropout"]
        _, _, often = run(eval_every_n=1, **settings)
        _, _, seldom = run(eval_every_n=1000, **settings)
        assert often.losses == seldom.losses

    @pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
    def test_same_seed_same_run(self, settings):
        _, a, first = run(max_steps=12, **settings)
        _, b, second = run(max_steps=12, **settings)
        assert first.losses == second.losses
        assert figures(a.history) == figures(b.history)
        _, _, other = run(max_steps=12, seed=1, **settings)
        assert other.losses[0] != first.losses[0]

    @pytest.mark.parametrize(
        "settings",
        [s for s in NETWORKS.values() if s.get("binary")],
        ids=[n for n, s in NETWORKS.items() if s.get("binary")],
    )
    def test_xnor_and_dense_traces_are_identical(self, settings):
        dense, a, dense_losses = run(**settings)
        xnor, b, xnor_losses = run(**settings, xnor=True)
        assert dense_losses.losses == xnor_losses.losses
        assert figures(a.history) == figures(b.history)
        assert dense.evaluate() == xnor.evaluate()
        state = xnor.state().arrays
        for name, array in dense.state().arrays.items():
            np.testing.assert_array_equal(array, state[name])

    @pytest.mark.gpu
    @pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
    def test_on_a_gpu(self, settings):
        _, cpu, _ = run(max_steps=100, **settings)
        _, a, first = run(max_steps=100, **{**settings, "device": "cuda"})
        _, b, second = run(max_steps=100, **{**settings, "device": "cuda", "xnor": True})
        assert first.losses == second.losses
        assert figures(a.history) == figures(b.history)
        assert a.history[0].train_loss == pytest.approx(cpu.history[0].train_loss, rel=1e-4)
        assert abs(a.final_accuracy - cpu.final_accuracy) < 0.1

    def test_validation_part(self):
        trainer, result, _ = run(validation=142)
        assert len(trainer.dataset.train_labels) == 1300
        assert len(trainer.dataset.test_labels) == 142
        assert round(result.final_accuracy * 142) == pytest.approx(result.final_accuracy * 142)

    def test_no_steps_at_all(self):
        _, result, _ = run(max_steps=0)
        assert result.history == ()
        assert result.steps == 0
        assert 0 <= result.final_accuracy < 0.5
        assert np.isnan(result.average_examples_per_second)

    def test_batch_larger_than_the_data(self):
        _, result, _ = run(batch_size=2000, max_steps=2)
        assert result.steps == 2

    def test_request_stop(self):
        trainer, result, recorder = run(stop_after=11)
        assert result.stopped
        assert result.steps == trainer.step == len(recorder.losses) == 11
        assert result.final.step == 10
        assert recorder.calls[-2:] == ["end", "close"]

    def test_runs_once(self):
        trainer, _, _ = run(max_steps=1)
        with pytest.raises(RuntimeError, match="A Trainer runs once"):
            trainer.run()

    def test_callback_that_raises_ends_the_run_and_all_are_closed(self):
        class Raises(Callback):
            def on_step(self, trainer, step, output):
                raise RuntimeError("enough")

        recorder = Recorder()
        with pytest.raises(RuntimeError, match="enough"):
            Trainer(TrainConfig(**QUICK), [Raises(), recorder]).run()
        assert recorder.calls == ["start", "close"]

    def test_all_callbacks_are_closed_even_if_one_fails(self):
        class FailsToClose(Recorder):
            def close(self):
                super().close()
                raise OSError("cannot be closed")

        class Raises(Callback):
            def on_step(self, trainer, step, output):
                raise RuntimeError("enough")

        def tried(*first):
            recorders = [FailsToClose(), Recorder(), FailsToClose(), Recorder()]
            trainer = Trainer(TrainConfig(**{**QUICK, "max_steps": 1}), [*first, *recorders])
            with pytest.raises(Exception, match=r".") as caught:
                trainer.run()
            assert [recorder.calls[-1] for recorder in recorders] == ["close"] * 4
            return caught.value

        assert str(tried()) == "cannot be closed"
        assert str(tried(Raises())) == "enough"  # the first error is the one to be seen

    def test_callbacks_are_closed_where_no_run_folder_can_be_made(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        recorder = Recorder()
        config = TrainConfig(**QUICK, log_dir=str(tmp_path / "file"))
        with pytest.raises(OSError, match="log_dir"):
            Trainer(config, [recorder]).run()
        assert recorder.calls == ["close"]

    @pytest.mark.gpu
    def test_every_method_enters_its_device(self):
        """Called while another device is the current one, as far as this machine has several."""
        import cupy

        last = cupy.cuda.runtime.getDeviceCount() - 1
        settings = {**QUICK, "batch_norm": True, "average": "ema", "device": f"cuda:{last}"}
        trainer = Trainer(TrainConfig(**settings))
        with cupy.cuda.Device(0):
            trainer.make_step(0)
            trainer._averaging.update(0)
            trainer.evaluate()
            with trainer.averaged():
                assert cupy.cuda.Device().id == last
            assert cupy.cuda.Device().id == 0
            trainer.state()
            again = Trainer(TrainConfig(**{**settings, "max_steps": 3}))
            assert again.run().steps == 3


class TestFallback:
    def test_auto_without_mnist(self, tmp_path, monkeypatch):
        from cupybnn.data import mnist

        def refuse(folder):
            raise OSError("no network in this test")

        monkeypatch.setenv("CUPYBNN_DATA_DIR", str(tmp_path))
        monkeypatch.setattr(mnist, "_fetch", refuse)
        _, result, _ = run(dataset="auto", max_steps=1)
        assert result.dataset == "digits"
        assert "no network in this test" in result.fallback_reason
        assert any("Fetching MNIST" in notice for notice in result.notices)


def test_a_step_gets_ready_once_and_may_say_that_it_takes_long(monkeypatch):
    from cupybnn.training.step import PlainStep

    said, evaluated = [], []

    class Listener(Callback):
        def on_notice(self, trainer, sentence):
            said.append(sentence)

    def prepare(self, evaluate, mention):
        evaluated.append(evaluate())
        mention("This takes long.")

    monkeypatch.setattr(PlainStep, "prepare", prepare)
    result = Trainer(TrainConfig(**{**QUICK, "max_steps": 3}), [Listener()]).run()
    assert said == ["This takes long."]
    assert result.notices == ()  # it is about this machine, not about the result
    assert len(evaluated) == 1
    monkeypatch.undo()
    again = Trainer(TrainConfig(**{**QUICK, "max_steps": 3})).run()
    assert again.final.test_loss == result.final.test_loss


class TestRestore:
    @pytest.mark.parametrize("xnor", [False, True])
    @pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
    def test_interrupted_and_restored_equals_uninterrupted(self, tmp_path, settings, xnor):
        settings = {**settings, "xnor": xnor}
        whole, a, straight = run(**settings)
        _, half, before = run(stop_after=13, log_dir=tmp_path, **settings)
        again, b, after = run(log_dir=tmp_path, restore=half.run_folder, **settings)
        assert {**before.losses, **after.losses} == straight.losses
        assert min(after.losses) == 13
        assert figures(a.history) == figures(b.history)
        assert figures([a.final]) == figures([b.final])
        assert (half.run_folder.name, b.run_folder.name) == ("1", "2")
        state = again.state().arrays
        for name, array in whole.state().arrays.items():
            np.testing.assert_array_equal(array, state[name])

    def test_more_steps_than_before(self, tmp_path):
        _, first, _ = run(max_steps=15, log_dir=tmp_path)
        _, longer, recorder = run(max_steps=40, restore=first.run_folder)
        _, straight, _ = run(max_steps=40)
        assert figures(longer.history) == figures(straight.history)
        assert len(recorder.losses) == 25

    def test_nothing_left_to_do(self, tmp_path):
        _, first, _ = run(log_dir=tmp_path)
        _, again, recorder = run(restore=first.run_folder, log_dir=tmp_path)
        assert recorder.losses == {}
        assert again.run_folder is None
        assert [p.name for p in first.run_folder.parent.iterdir()] == ["1"]
        assert again.final_accuracy == first.final_accuracy
        assert not again.stopped

    def test_best_checkpoint(self, tmp_path):
        _, result, _ = run(log_dir=tmp_path)
        best = max([*result.history, result.final], key=lambda e: (e.test_accuracy, -e.step))
        stored = load(result.run_folder / BEST)
        assert stored.step == best.step + 1
        trainer = Trainer(TrainConfig(**QUICK, restore=str(result.run_folder / BEST)))
        assert trainer.evaluate()[1] == best.test_accuracy

    def test_settings_are_taken_from_the_checkpoint(self, tmp_path):
        _, first, _ = run(log_dir=tmp_path, binary=True, seed=9)
        config = restored_config(str(first.run_folder), max_steps=50)
        assert (config.binary, config.seed, config.max_steps) == (True, 9, 50)
        assert Trainer(config).run().steps == 50

    def test_conflicting_settings(self, tmp_path):
        _, first, _ = run(log_dir=tmp_path)
        with pytest.raises(CheckpointError) as caught:
            run(restore=first.run_folder, n_hidden=64, binary=True)
        message = str(caught.value)
        assert "n_hidden: checkpoint 48, this run 64" in message
        assert "binary: checkpoint False, this run True" in message
        assert str(first.run_folder) in message

    def test_another_learning_rate_is_used_and_reported(self, tmp_path):
        _, first, _ = run(log_dir=tmp_path, max_steps=10)
        trainer, result, _ = run(restore=first.run_folder, lr=1e-5, xnor=True)
        assert trainer.optimizer.groups[0]["lr"] == 1e-5
        assert result.notices == (
            "From step 10 on, lr is 1e-05 instead of 0.001: the results will differ from those of "
            "an uninterrupted run.",
        )

    def test_other_data(self, tmp_path, mnist_dir):
        _, first, _ = run(log_dir=tmp_path, max_steps=1)
        with pytest.raises(CheckpointError, match="must be the checkpoint's, digits; got mnist"):
            run(restore=first.run_folder, dataset="mnist", data_dir=mnist_dir)

    def test_other_data_are_not_fetched_first(self, tmp_path, monkeypatch):
        _, first, _ = run(log_dir=tmp_path, max_steps=1)
        monkeypatch.setattr("cupybnn.training.setup.load", lambda *_, **__: pytest.fail("loads"))
        with pytest.raises(CheckpointError, match="must be the checkpoint's, digits; got fashion"):
            run(restore=first.run_folder, dataset="fashion")

    def test_auto_continues_with_its_earlier_choice(self, tmp_path, monkeypatch):
        from cupybnn.data import mnist

        monkeypatch.setenv("CUPYBNN_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setattr(mnist, "_fetch", lambda folder: (_ for _ in ()).throw(OSError("off")))
        _, first, _ = run(dataset="auto", log_dir=tmp_path, max_steps=3)
        monkeypatch.setattr(mnist, "_fetch", lambda folder: pytest.fail("fetched"))
        data = Trainer(restored_config(str(first.run_folder))).dataset
        assert data.name == "digits"
        assert data.fallback_reason == f"The run in {first.run_folder} fell back to them."
        # Who asked for the digits is not told of MNIST.
        _, asked, _ = run(dataset="digits", log_dir=tmp_path, max_steps=1)
        assert Trainer(restored_config(str(asked.run_folder))).dataset.fallback_reason is None

    def test_bad_checkpoints(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            run(restore=tmp_path / "nowhere")
        (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 nonsense")
        with pytest.raises(CheckpointError, match=r"x\.npz is damaged"):
            run(restore=tmp_path / "x.npz")


class TestDebug:
    def test_error_names_layer_op_shape_and_step(self):
        class Poison(Callback):
            def on_step(self, trainer, step, output):
                if step == 4:
                    trainer.model.fc2.weight.data[3, 5] = np.nan

        config = TrainConfig(**QUICK, debug=True)
        with pytest.raises(NonFiniteError) as caught:
            Trainer(config, [Poison()]).run()
        error = caught.value
        assert (error.step, error.place, error.op) == (5, "fc2", "matmul")
        assert error.shape == (50, 48)

    def test_same_numbers_with_and_without(self):
        _, _, plain = run(**NETWORKS["binary-bn-dropout"])
        _, _, checked = run(**NETWORKS["binary-bn-dropout"], debug=True)
        assert plain.losses == checked.losses


class TestTimer:
    def test_evaluation_between_steps_is_not_counted(self, monkeypatch):
        now = [100.0]  # a clock that only the test moves: a busy machine cannot
        clock = SimpleNamespace(perf_counter=lambda: now[0])
        monkeypatch.setattr("cupybnn.training.timing.time", clock)
        timer = StepTimer(CPU, batch_size=10)
        for seconds in (0.05, 0.01, 0.01, 0.03):
            timer.start()
            now[0] += seconds
            timer.stop()
            now[0] += 0.02  # the evaluation
        # The first step is left out of average and median.
        assert timer.average() == pytest.approx(10 / np.mean([0.01, 0.01, 0.03]))
        assert timer.median() == pytest.approx(10 / 0.01)
        assert timer.interval() == pytest.approx(10 / np.mean([0.05, 0.01, 0.01, 0.03]))
        assert np.isnan(timer.interval())

    @pytest.mark.gpu
    def test_cuda_events(self):
        import cupy

        from cupybnn.backends.devices import resolve

        timer = StepTimer(resolve("cuda"), batch_size=4)
        x = cupy.ones((2048, 2048), cupy.float32)
        for _ in range(StepTimer._PENDING + 10):
            timer.start()
            x = x @ x * 0
            timer.stop()
        assert 0 < timer.median() < 4 / 1e-6
        assert timer.average() > 0


def test_dropout_is_on_in_training_and_off_in_evaluation():
    trainer = Trainer(TrainConfig(**QUICK, keep_prob=0.5))
    assert any(isinstance(m, nn.Dropout) for _, m in trainer.model.named_modules())
    assert trainer.evaluate() == trainer.evaluate()
    images = cupybnn.autograd.Tensor(trainer.data.scale(trainer.dataset.test_images[:50]))
    trainer.model.train()
    assert not np.array_equal(trainer.model(images).numpy(), trainer.model(images).numpy())


def test_penalty_covers_every_weight():
    trainer = Trainer(TrainConfig(**QUICK, reg=0.5, binary=True, batch_norm=True))
    weights = [v for k, v in trainer.model.state_dict().items() if k.endswith(".weight")]
    linear = [np.abs(w).sum(dtype=np.float64) for w in weights if w.ndim == 2]
    assert len(linear) == 4
    assert trainer.objective.penalty().item() == pytest.approx(0.5 * sum(linear), rel=1e-5)
    assert Trainer(TrainConfig(**QUICK, reg=0.0)).objective.penalty() is None
