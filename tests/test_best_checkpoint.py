"""``best.npz`` agrees with the history, wherever a run is stopped or killed and then restored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from cupybnn.training import Callback, TrainConfig, Trainer
from cupybnn.training.checkpoint import BEST, NEWEST, load

STEPS = 14
SETTINGS = {
    "dataset": "digits",
    "n_hidden": 12,
    "batch_size": 32,
    "max_steps": STEPS,
    "eval_every_n": 3,
    "lr": 0.1,  # so that the accuracy rises and falls
    "device": "cpu",
}


class Killed(BaseException):
    """Ends a run as a signal does that cannot be caught."""


class StopAfter(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_step(self, trainer, step, output):
        if step + 1 == self.steps:
            trainer.request_stop()


def accuracies(checkpoint):
    return {e["step"]: e["test_accuracy"] for e in checkpoint.info["history"]}


def assert_agrees(folder):
    """Of a run that was stopped early, the best is the first maximum of the history."""
    found = accuracies(load(folder / NEWEST))
    step = max(found, key=lambda step: (found[step], -step))
    assert load(folder / BEST).step == step + 1


def assert_same(folder, expected):
    best, other = load(folder / BEST), load(expected / BEST)
    assert best.step == other.step
    assert accuracies(best) == accuracies(other)
    for name, array in other.arrays.items():
        np.testing.assert_array_equal(best.arrays[name], array, err_msg=name)


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    """Leave out what takes most of the time and is no matter here."""

    def refuse(folder):
        raise ImportError

    monkeypatch.setattr("cupybnn.training.logs.EventFile", refuse)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted: its settings and its folder."""
    config = TrainConfig(**SETTINGS, log_dir=str(tmp_path_factory.mktemp("whole")))
    return SETTINGS, Trainer(config).run().run_folder


def restored(settings, folder, log_dir):
    config = TrainConfig(**settings, log_dir=str(log_dir), restore=str(folder))
    return Trainer(config).run().run_folder


def test_the_best_is_not_always_the_last(whole):
    _, folder = whole
    assert load(folder / BEST).step < STEPS


def test_stopped_after_any_step(whole, tmp_path):
    settings, expected = whole
    for steps in range(1, STEPS):
        config = TrainConfig(**settings, log_dir=str(tmp_path / str(steps)))
        first = Trainer(config, [StopAfter(steps)]).run().run_folder
        assert_agrees(first)
        assert_same(restored(settings, first, tmp_path / str(steps)), expected)


def test_killed_before_any_write(whole, tmp_path, monkeypatch):
    """Each file is written by one move: the process ends before the first, the second, ..."""
    settings, expected = whole
    replace = os.replace
    for number in range(1, 100):
        left = number

        def count(*names):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            replace(*names)

        log_dir = tmp_path / str(number)
        trainer = Trainer(TrainConfig(**settings, log_dir=str(log_dir)))
        monkeypatch.setattr(os, "replace", count)
        try:
            trainer.run()
        except Killed:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", replace)
        if trainer.run_folder is not None:
            assert_same(restored(settings, trainer.run_folder, log_dir), expected)
    assert number > 8


def test_restored_twice_and_extended(whole, tmp_path):
    """A chain of runs hands the best on; that of a complete one stays in longer ones."""
    settings, expected = whole
    folder = expected
    for more in (1, 3):
        longer = {**settings, "max_steps": STEPS + more, "lr": 1e-9}
        config = TrainConfig(**longer, log_dir=str(tmp_path), restore=str(folder))
        folder = Trainer(config).run().run_folder
        assert_same(folder, expected)


def test_restored_from_the_best(whole, tmp_path):
    settings, expected = whole
    assert_same(restored(settings, expected / BEST, tmp_path), expected)


def test_best_that_cannot_be_found_is_said(whole, tmp_path):
    settings, expected = whole
    alone = tmp_path / NEWEST
    alone.write_bytes((expected / NEWEST).read_bytes())
    settings = {**settings, "max_steps": STEPS + 1}
    config = TrainConfig(**settings, log_dir=str(tmp_path / "log"), restore=str(alone))
    result = Trainer(config).run()
    assert "The best checkpoint so far" in result.notices[0]
    # One of another run is not taken for it.
    other = {**settings, "seed": 7, "log_dir": str(tmp_path / "other")}
    foreign = Trainer(TrainConfig(**other)).run().run_folder
    (tmp_path / BEST).write_bytes((foreign / BEST).read_bytes())
    assert "The best checkpoint so far" in Trainer(config).run().notices[0]


def test_real_processes(tmp_path):
    """SIGTERM and then SIGKILL, each at some moment of a run that evaluates all along."""
    command = [sys.executable, "-m", "cupybnn", "train", "--log_dir", str(tmp_path)]
    options = ["--dataset", "digits", "--device", "cpu", "--n_hidden", "16", "--lr", "0.05"]
    options += ["--eval_every_n", "2", "--max_steps", "100000", "--seed", "3"]
    rng = np.random.default_rng(0)
    folder = None
    for number in (signal.SIGTERM, signal.SIGKILL):
        more = options if folder is None else ["--restore", str(folder)]
        process = subprocess.Popen(
            [*command, *more],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            if "step" in line.lower() and "accuracy" in line.lower():
                break  # evaluations have begun
        time.sleep(rng.uniform(0.02, 0.3))
        process.send_signal(number)
        process.communicate(timeout=60)
        runs = [p for p in tmp_path.glob("**/*") if p.name.isdecimal() and p.parent.name[0] != "b"]
        folder = max(runs, key=lambda p: int(p.name))
        if number == signal.SIGTERM:
            assert_agrees(folder)
    config = TrainConfig(**load(folder).info["config"])
    steps = load(folder).step + 1
    settings = {**vars(config), "max_steps": steps, "log_dir": str(tmp_path / "end")}
    end = Trainer(TrainConfig(**{**settings, "restore": str(folder)}), [StopAfter(steps)]).run()
    best = load(end.run_folder / BEST)
    every = [*accuracies(load(end.run_folder)).values(), end.final_accuracy]
    trainer = Trainer(
        TrainConfig(**{**settings, "log_dir": None, "restore": str(end.run_folder / BEST)})
    )
    assert trainer.evaluate()[1] == max(every)
    assert best.step == trainer.step
