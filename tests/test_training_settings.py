"""Settings of training: optimizers, schedules, losses and regularization change what is learned."""

from __future__ import annotations

import numpy as np
import pytest

from cupybnn import nn
from cupybnn.autograd import Tensor
from cupybnn.cli.main import main
from cupybnn.training import TrainConfig, Trainer, train

QUICK = {
    "dataset": "digits",
    "device": "cpu",
    "n_hidden": 24,
    "max_steps": 30,
    "eval_every_n": 10,
}


def test_deformed_are_images_in_training_alone():
    plain = Trainer(TrainConfig(**QUICK))
    deforming = Trainer(TrainConfig(**QUICK, augment_shift=2.0))
    assert plain.evaluate() == deforming.evaluate()
    first, second = plain.make_step(0), deforming.make_step(0)
    assert (first.labels == second.labels).all()
    assert (first.logits != second.logits).any()
    again = Trainer(TrainConfig(**QUICK, augment_shift=2.0)).make_step(0)
    assert (again.logits == second.logits).all()


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            {"optimizer": "sgd", "lr": 0.1, "momentum": 0.5},
            {"optimizer": "adamw", "weight_decay": 0.1},
            {"schedule": "cosine", "warm_up": 5, "final_lr": 0.1},
            {"schedule": "exponential", "final_lr": 0.01},
            {"loss": "squared_hinge", "binary": True, "penalty": "bipolar", "reg": 1e-6},
            {"label_smoothing": 0.1, "input_keep_prob": 0.8},
            {"hidden_layers": 1},
            {"schedule": "step", "milestones": [10, 20], "milestone_factor": 0.2, "warm_up": 3},
            {"average": "ema", "average_decay": 0.9, "batch_norm": True, "binary": True},
            {"average": "swa", "average_from": 12, "augment_shift": 1.0},
            {"optimizer": "bop", "binary": True, "batch_norm": True, "bop_rate": 0.05},
            {"binary": True, "first": True, "last": True, "batch_norm": True, "latent_lr": 3.0},
            {"binary": True, "batch_norm": True, "sign_keep_prob": 0.8},
            {"binary": True, "batch_norm": True, "ste": "ede_sign"},
            {
                "augment_shift": 0.5,
                "augment_rotation": 10,
                "augment_scale": 0.1,
                "augment_shear": 0.1,
                "augment_elastic": 0.3,
            },
            {"hidden_layers": 5, "binary": True, "batch_norm": True, "lr_scale": "binarynet"},
        ],
        ids=lambda s: "-".join(map(str, s.values())),
    )
    def test_each_changes_the_run_and_restores_exactly(self, tmp_path, settings):
        settings = {**QUICK, **settings}
        plain = train(**QUICK)
        whole = Trainer(TrainConfig(**settings))
        result = whole.run()
        assert result.final.train_loss != plain.final.train_loss
        assert result.final.train_loss < 10

        config = TrainConfig(**settings, log_dir=str(tmp_path))
        half = Trainer(config)
        step = half.make_step

        def step_and_stop(number):
            if number == 16:
                half.request_stop()
            return step(number)

        half.make_step = step_and_stop
        folder = half.run().run_folder
        again = Trainer(TrainConfig(**settings, restore=str(folder)))
        again.run()
        for name, array in whole.state().arrays.items():
            assert (array == again.state().arrays[name]).all()

    def test_schedule_and_scale_reach_the_optimizer(self):
        config = TrainConfig(
            **QUICK, binary=True, schedule="cosine", warm_up=4, lr_scale="binarynet"
        )
        optimizer = Trainer(config).optimizer
        factors = [optimizer.schedule(step) for step in (0, 3, 4, 17, 30)]
        assert factors == pytest.approx([0.2, 0.8, 1, 0.5, 0])
        (group,) = optimizer.groups
        scales = sorted({group["lr_scale"](p) for p in group["params"]})
        assert scales == pytest.approx([1, (48 / 1.5) ** 0.5])

    def test_milestones_count_from_the_first_step(self):
        config = TrainConfig(
            **QUICK, schedule="step", milestones=(10, 20), milestone_factor=0.5, warm_up=4
        )
        schedule = Trainer(config).optimizer.schedule
        assert [schedule(step) for step in (4, 9, 10, 19, 20)] == [1, 1, 0.5, 0.5, 0.25]

    def test_latent_weights_have_a_factor_of_their_own(self):
        settings = {**QUICK, "binary": True, "latent_lr": 0.1}
        for scale, hidden in (("none", 0.1), ("binarynet", 0.1 * (48 / 1.5) ** 0.5)):
            trainer = Trainer(TrainConfig(**settings, lr_scale=scale))
            (group,) = trainer.optimizer.groups
            assert group["lr_scale"](trainer.model.fc2.weight) == pytest.approx(hidden)
            assert group["lr_scale"](trainer.model.fc1.weight) == 1

    def test_bop_flips_binary_weights_and_leaves_the_rest_to_adam(self):
        settings = {**QUICK, "binary": True, "optimizer": "bop", "bop_rate": 0.05}
        trainer = Trainer(TrainConfig(**settings, reg=1e-3))
        binary, real = trainer.model.fc2.weight, trainer.model.fc1.weight
        before, before_real = binary.numpy().copy(), real.numpy().copy()
        assert set(np.unique(before)) == {-1.0, 1.0}
        # The penalty is of the two real layers alone: the magnitudes of signs say nothing.
        magnitudes = sum(
            abs(m.weight.numpy()).sum() for m in (trainer.model.fc1, trainer.model.fcout)
        )
        assert trainer.objective.penalty().item() == pytest.approx(1e-3 * magnitudes, rel=1e-5)
        trainer.run()
        assert set(np.unique(binary.numpy())) == {-1.0, 1.0}
        assert 0 < (binary.numpy() != before).mean() < 0.9
        assert (real.numpy() != before_real).mean() > 0.9

    def test_bop_learns(self):
        settings = {**QUICK, "binary": True, "batch_norm": True, "reg": 0.0, "max_steps": 200}
        settings |= {"n_hidden": 64, "lr": 3e-3}
        still = train(**settings, optimizer="bop", bop_threshold=1e9)  # no weight ever flips
        result = train(**settings, optimizer="bop", bop_rate=1e-2, bop_threshold=1e-6)
        assert result.final.train_loss < still.final.train_loss
        assert result.final_accuracy > 0.8

    def test_sharpening_pseudo_gradient_gets_the_progress(self):
        trainer = Trainer(TrainConfig(**QUICK, binary=True, ste="ede_sign"))
        heard = []
        step = trainer.make_step

        def listen(number):
            output = step(number)
            heard.append(trainer.model.sign1.quantizer.progress)
            return output

        trainer.make_step = listen
        trainer.run()
        assert heard == [number / 30 for number in range(30)]
        assert trainer.model.fc2.quantizer.progress == heard[-1]

    def test_another_end_of_a_sharpening_pseudo_gradient_is_reported(self, tmp_path):
        settings = {**QUICK, "binary": True, "ste": "ede_sign"}
        first = train(**settings, log_dir=str(tmp_path))
        longer = {**settings, "max_steps": 40, "restore": str(first.run_folder)}
        assert "max_steps is 40 instead of 30" in train(**longer).notices[0]

    def test_sign_dropout_keeps_activations_two_valued(self):
        config = TrainConfig(
            **QUICK, binary=True, batch_norm=False, last=True, xnor=True, sign_keep_prob=0.5
        )
        model = Trainer(config).model
        x = Tensor(np.random.default_rng(0).random((50, 64), np.float32))
        kept = {}
        for training in (True, False):
            model.train(training)
            kept[training] = {n: t for n, t in nn.stages(model, x) if n.endswith("/activation")}
            assert len(kept[training]) == 3
            for activation in kept[training].values():
                assert activation.two_valued
                assert set(np.unique(activation.numpy())) == {-1.0, 1.0}
        changed = kept[True]["fc1/activation"].numpy() != kept[False]["fc1/activation"].numpy()
        assert 0.2 < changed.mean() < 0.3  # half of the coins show what was there

    def test_changed_max_steps_of_a_schedule_is_reported(self, tmp_path):
        settings = {**QUICK, "schedule": "cosine"}
        first = train(**settings, log_dir=str(tmp_path))
        longer = {**settings, "max_steps": 40, "restore": str(first.run_folder)}
        assert "max_steps is 40 instead of 30" in train(**longer).notices[0]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"schedule": "step"}, "The 'milestones', .* must be given for the schedule 'step'"),
            (
                {"schedule": "step", "milestones": [5, 5]},
                "must be increasing whole numbers.*got .5, 5",
            ),
            ({"milestones": "12"}, "must be increasing whole numbers, at least 1; got '12'"),
            ({"milestones": [0]}, "must be increasing whole numbers, at least 1; got .0"),
            ({"optimizer": "bop"}, "'bop' needs binary weights to flip; .*binary=False"),
            (
                {"optimizer": "bop", "binary": True, "hidden_layers": 1},
                "binary=True, hidden_layers=1",
            ),
            ({"average": "mean"}, "The 'average' must be one of none, ema, swa; got 'mean'"),
            ({"average_decay": 1.0}, r"'average_decay' must be a finite number, in \[0, 1\)"),
            ({"sign_keep_prob": 0}, r"'sign_keep_prob' must be a finite number, in \(0, 1\]"),
            ({"augment_shift": -1}, "'augment_shift' must be a finite number, at least 0; got -1"),
            ({"augment_scale": 1.0}, r"'augment_scale' must be a finite number, in \[0, 1\)"),
        ],
    )
    def test_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**settings)

    def test_settings_in_the_output(self, capsys):
        quick = ["train", "--dataset", "digits", "--device", "cpu", "--max_steps", "1"]
        assert main([*quick, "--binary", "--sign_keep_prob", "0.9", "--average", "ema"]) == 0
        out = capsys.readouterr().out
        assert "sign dropout (keep 0.9)\n" in out
        assert "averaged weights (exponential, decay 0.999), from step 0 on\n" in out
        assert main([*quick, "--sign_keep_prob", "0.9"]) == 0
        captured = capsys.readouterr()
        assert "--sign_keep_prob has no effect without --binary." in captured.err
        assert "sign dropout" not in captured.out

    def test_milestones_on_the_command_line(self, capsys):
        quick = ["train", "--dataset", "digits", "--device", "cpu", "--max_steps", "1"]
        assert main([*quick, "--schedule", "step", "--milestones", "5,9"]) == 0
        with pytest.raises(SystemExit):
            main([*quick, "--milestones", "5,x"])
        assert "must be comma-separated whole numbers; got '5,x'" in capsys.readouterr().err
        config = TrainConfig(schedule="step", milestones=[5, 9])
        assert TrainConfig.from_json(config.to_json()) == config

    def test_exponential_needs_an_end_above_zero(self):
        with pytest.raises(ValueError, match="'final_lr' must be greater than 0"):
            TrainConfig(schedule="exponential")
