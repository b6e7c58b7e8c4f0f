"""Averaged weights: what is evaluated, saved and restored with them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from test_training_settings import QUICK

from cupybnn import nn
from cupybnn.autograd import Tensor
from cupybnn.errors import CheckpointError
from cupybnn.training import Callback, TrainConfig, Trainer, train


class TestAverage:
    SETTINGS: ClassVar = {**QUICK, "binary": True, "batch_norm": True}

    @pytest.mark.parametrize(
        "images", [{}, {"neighbor_noise": 0.5, "augment_shift": 2.0, "mix": "uniform"}]
    )
    def test_what_is_evaluated(self, images):
        settings = {**self.SETTINGS, **images}
        trainer = Trainer(TrainConfig(**settings, average="swa", average_from=20))
        seen = []
        step = trainer.make_step

        def keep(number):
            output = step(number)
            seen.append(trainer.model.state_dict())
            return output

        trainer.make_step = keep
        result = trainer.run()
        model, last = trainer.model, seen[-1]
        for name, array in model.state_dict().items():  # outside, all is as training left it
            np.testing.assert_array_equal(array, last[name], err_msg=name)
        with trainer.averaged():
            inside = model.state_dict()
        for name, _ in model.named_parameters():
            mean = np.mean([state[name] for state in seen[20:]], axis=0)
            np.testing.assert_allclose(inside[name], mean, rtol=1e-4, atol=1e-6, err_msg=name)
        # Batch norm's statistics are those of the averaged weights on images as in training.
        alone = Trainer(TrainConfig(**settings))
        alone.make_step(0)
        steps = range(-(-1000 // alone.config.batch_size))
        indices = np.concatenate([alone.order.indices(step) for step in steps])
        inputs = alone._step._images.of(indices, 0)[0]
        alone.model.load_state_dict(inside)
        nn.refresh_statistics(alone.model, [Tensor(inputs)])
        for name, array in alone.model.named_buffers():
            np.testing.assert_allclose(inside[name], array, rtol=1e-5, err_msg=name)
        assert alone.evaluate() == pytest.approx(
            (result.final.test_loss, result.final.test_accuracy), rel=1e-5
        )

    def test_nothing_to_average_yet(self):
        plain = train(**self.SETTINGS)
        late = train(**self.SETTINGS, average="ema", average_from=1000)
        assert late.final.test_loss == plain.final.test_loss

    def test_training_goes_on_with_its_own_weights(self):
        plain = Trainer(TrainConfig(**self.SETTINGS))
        averaged = Trainer(TrainConfig(**self.SETTINGS, average="ema", average_decay=0.5))
        results = plain.run(), averaged.run()
        assert results[0].final.train_loss == results[1].final.train_loss
        assert results[0].final.test_loss != results[1].final.test_loss
        for name, array in plain.state().arrays.items():
            np.testing.assert_array_equal(averaged.state().arrays[name], array, err_msg=name)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("average", ["ema", "swa"])
    def test_methods_called_within(self, average, device):
        settings = {**self.SETTINGS, "average": average, "average_decay": 0.9, "device": device}
        trainer = Trainer(TrainConfig(**settings))
        trainer.run()
        outside, figures = trainer.state().arrays, trainer.evaluate()
        with trainer.averaged():
            inside = trainer.model.state_dict()
            with trainer.averaged():
                assert trainer.evaluate() == figures
            within = trainer.state().arrays
            with pytest.raises(RuntimeError, match=r"must be outside of Trainer.averaged\(\)"):
                trainer.make_step(trainer.step)
            for name, array in trainer.model.state_dict().items():
                np.testing.assert_array_equal(array, inside[name], err_msg=name)
        assert any((inside[name] != outside[f"model/{name}"]).any() for name in inside)
        after = trainer.state().arrays
        for name, array in outside.items():
            np.testing.assert_array_equal(within[name], array, err_msg=name)
            np.testing.assert_array_equal(after[name], array, err_msg=name)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_an_error_within_restores_the_weights(self, device, monkeypatch):
        trainer = Trainer(TrainConfig(**{**self.SETTINGS, "average": "ema", "device": device}))
        trainer.run()
        before = trainer.state().arrays

        def fail_within():
            with trainer.averaged():
                for parameter in trainer.model.parameters():
                    parameter.data *= 3
                raise KeyError

        def fail(*args):
            for parameter in trainer.model.parameters():
                parameter.data *= 3
            raise KeyError

        with pytest.raises(KeyError):
            fail_within()
        with monkeypatch.context() as patched:
            patched.setattr(nn, "refresh_statistics", fail)
            with pytest.raises(KeyError):
                trainer.evaluate()
        for name, array in trainer.state().arrays.items():
            np.testing.assert_array_equal(array, before[name], err_msg=name)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_callback_that_uses_the_average_changes_nothing(self, device):
        class Looks(Callback):
            def on_step(self, trainer, step, output):
                if step % 7 == 0:
                    with trainer.averaged():
                        trainer.evaluate()
                        trainer.state()

        settings = {**self.SETTINGS, "average": "ema", "device": device}
        plain = Trainer(TrainConfig(**settings))
        looking = Trainer(TrainConfig(**settings), [Looks()])
        for trainer in (plain, looking):
            trainer.run()
        expected = plain.state().arrays
        for name, array in looking.state().arrays.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)

    def test_other_average_is_not_restored(self, tmp_path):
        settings = {**self.SETTINGS, "average": "ema"}
        first = train(**settings, log_dir=str(tmp_path))
        with pytest.raises(CheckpointError, match="average: checkpoint 'ema', this run 'swa'"):
            train(**{**settings, "average": "swa", "restore": str(first.run_folder)})
