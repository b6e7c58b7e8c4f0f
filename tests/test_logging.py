"""What a run leaves in its folder: the events are read back by TensorBoard's own reader."""

from __future__ import annotations

import builtins
import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from cupybnn.errors import CheckpointError
from cupybnn.training import TrainConfig, Trainer
from cupybnn.training import logs as logs_module
from cupybnn.training.checkpoint import BEST, NEWEST, load
from cupybnn.training.event_file import EventFile
from cupybnn.training.histogram import Histogram
from cupybnn.training.measures import FlipRecord
from cupybnn.training.runs import CONFIG_NAME

SETTINGS = {
    "dataset": "digits",
    "n_hidden": 32,
    "max_steps": 25,
    "eval_every_n": 10,
    "device": "cpu",
}
SCALARS = {
    "accuracy/test",
    "accuracy/train",
    "examples_per_second",
    "loss/test",
    "loss/train",
}
STEPS = [0, 10, 20, 24]


def events(folder):
    """Read the event files of a run folder: {tag: [(step, value or histogram)]}."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    scalars, histograms = {}, {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in loader.LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
                elif value.HasField("histo"):
                    histograms.setdefault(value.tag, []).append((event.step, value.histo))
    return scalars, histograms


@pytest.mark.parametrize("binary", [False, True])
def test_every_tag_with_the_right_steps(tmp_path, binary):
    config = TrainConfig(**SETTINGS, binary=binary, batch_norm=True, log_dir=str(tmp_path))
    trainer = Trainer(config)
    result = trainer.run()
    scalars, histograms = events(result.run_folder)
    layers = ["fc1", "fc2", "fc3", "fcout"]
    expected = {f"{n}/{what}" for n in layers for what in ("weight", "weight_gradient", "product")}
    expected |= {"logits", *(f"{n}/activation" for n in layers[:3])}
    if binary:
        expected |= {"fc2/weight_sign", "fc3/weight_sign"}
    measures = set()
    if binary:
        kinds = ("flips", "flips_at_step", "flips_since_start", "outside_window")
        measures = {f"{kind}/{name}" for kind in kinds for name in ("fc2", "fc3")}
        measures |= {"sign_entropy/fc1", "sign_entropy/fc2"}
    assert set(scalars) == SCALARS | measures
    assert set(histograms) == expected
    for tag, entries in {**scalars, **histograms}.items():
        assert [step for step, _ in entries] == STEPS, tag
    records = [*result.history, result.final]
    for tag, field in (
        ("loss/train", "train_loss"),
        ("loss/test", "test_loss"),
        ("accuracy/train", "train_accuracy"),
        ("accuracy/test", "test_accuracy"),
        ("examples_per_second", "examples_per_second"),
    ):
        written = [value for _, value in scalars[tag]]
        np.testing.assert_allclose(written, [getattr(e, field) for e in records], rtol=1e-6)


def test_histograms_are_those_of_the_arrays(tmp_path):
    config = TrainConfig(**SETTINGS, binary=True, log_dir=str(tmp_path))
    trainer = Trainer(config)
    result = trainer.run()
    _, histograms = events(result.run_folder)
    weight = trainer.model.fc2.weight.numpy().astype(np.float64)
    last = histograms["fc2/weight"][-1][1]
    assert (last.num, last.min, last.max) == (32 * 32, weight.min(), weight.max())
    assert last.sum == pytest.approx(weight.sum(), rel=1e-4, abs=1e-4)
    assert last.sum_squares == pytest.approx((weight**2).sum(), rel=1e-4)
    counts = np.histogram(weight, bins=[weight.min(), *last.bucket_limit])[0]
    # Values within rounding of an edge may fall to either side.
    assert np.abs(counts - np.array(last.bucket)).sum() <= 4
    signs = histograms["fc2/weight_sign"][-1][1]
    assert list(signs.bucket) == [0, (weight < 0).sum(), 0, (weight >= 0).sum()]
    gradient = trainer.model.fc2.weight.grad
    assert histograms["fc2/weight_gradient"][-1][1].max == gradient.max()
    activation = histograms["fc1/activation"][-1][1]
    assert (activation.min, activation.max, activation.num) == (-1, 1, 256 * 32)


def test_measures_are_those_of_the_weights(tmp_path):
    config = TrainConfig(**SETTINGS, binary=True, batch_norm=True, log_dir=str(tmp_path))
    trainer = Trainer(config)
    start = trainer.model.fc3.weight.numpy() >= 0
    result = trainer.run()
    scalars, _ = events(result.run_folder)
    end = trainer.model.fc3.weight.numpy() >= 0
    flipped = (start != end).mean()
    assert 0 < flipped < 0.5
    assert scalars["flips_since_start/fc3"][-1][1] == pytest.approx(flipped)
    assert scalars["flips/fc3"][-1][1] <= flipped
    assert scalars["outside_window/fc3"][-1][1] == 0
    assert 0.5 < scalars["sign_entropy/fc1"][-1][1] <= 1


@pytest.mark.parametrize("every", [1, 3, 10])
def test_flips_at_a_step_are_those_of_that_step(tmp_path, every):
    settings = {**SETTINGS, "max_steps": 12, "eval_every_n": every}
    record = FlipRecord()
    config = TrainConfig(**settings, binary=True, batch_norm=True, log_dir=str(tmp_path))
    result = Trainer(config, [record]).run()
    scalars, _ = events(result.run_folder)
    assert [step for step, _ in scalars["flips_at_step/fc2"]][-1] == 11
    for layer in ("fc2", "fc3"):
        each = [flips.since_last for flips in record.flips[f"{layer}.weight"]]
        assert any(each)
        for step, share in scalars[f"flips_at_step/{layer}"]:
            assert share == pytest.approx(each[step])


def test_flips_at_an_unplanned_record_are_left_out(tmp_path):
    config = TrainConfig(**SETTINGS, binary=True, batch_norm=True, log_dir=str(tmp_path))
    trainer = Trainer(config)
    step = trainer.make_step

    def step_and_stop(number):
        if number == 15:
            trainer.request_stop()
        return step(number)

    trainer.make_step = step_and_stop
    scalars, _ = events(trainer.run().run_folder)
    assert [step for step, _ in scalars["flips/fc2"]] == [0, 10, 15]
    assert [step for step, _ in scalars["flips_at_step/fc2"]] == [0, 10]


def test_files_of_a_run(tmp_path):
    config = TrainConfig(**SETTINGS, log_dir=str(tmp_path))
    result = Trainer(config).run()
    folder = tmp_path / "fp" / "hid_32" / "bs_128" / "reg_0.0001" / "1"
    assert result.run_folder == folder
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("events"))
    assert names == sorted([BEST, CONFIG_NAME, NEWEST])
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert TrainConfig.from_json((folder / CONFIG_NAME).read_text()) == config
    assert json.loads((folder / CONFIG_NAME).read_text())["n_hidden"] == 32
    assert load(folder).step == 25


def test_checkpoint_is_there_before_the_first_step(tmp_path):
    config = TrainConfig(**{**SETTINGS, "max_steps": 1}, log_dir=str(tmp_path))
    trainer = Trainer(config)

    def no_step(step):
        raise RuntimeError("died in the first step")

    trainer.make_step = no_step
    with pytest.raises(RuntimeError, match="first step"):
        trainer.run()
    assert load(trainer.run_folder).step == 0


def test_the_run_folder_appears_with_a_checkpoint_in_it(tmp_path, monkeypatch):
    """Killed at any moment of the start, a run leaves a folder that can be restored, or none."""
    found = []
    replace = os.replace

    def look(*names):
        replace(*names)
        for folder in tmp_path.glob("fp/hid_32/bs_128/reg_0.0001/[0-9]*"):
            found.append((load(folder).step, (folder / CONFIG_NAME).exists()))

    monkeypatch.setattr(os, "replace", look)
    monkeypatch.setattr(os, "rename", lambda *names: look(*names))
    Trainer(TrainConfig(**{**SETTINGS, "max_steps": 1}, log_dir=str(tmp_path))).run()
    assert found[0] == (0, True)


def test_missing_tensorboard_is_reported_once_and_training_continues(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "tensorboard":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    result = Trainer(TrainConfig(**SETTINGS, log_dir=str(tmp_path))).run()
    assert len(result.notices) == 1
    assert "pip install tensorboard (the extra tensorboard)" in result.notices[0]
    assert load(result.run_folder).step == 25
    assert not list(result.run_folder.glob("events*"))


def test_records_import_no_other_framework(tmp_path):
    """Where PyTorch or TensorFlow are installed, importing them takes seconds."""
    pytest.importorskip("tensorboard")
    for name in ("torch", "tensorflow"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported ' + __name__)")
    command = [sys.executable, "-m", "cupybnn", "train", "--dataset", "digits", "--max_steps", "3"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--log_dir", str(tmp_path / "runs")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("runs/**/events.out.tfevents.*")
    scalars, _ = events(path.parent)
    assert [step for step, _ in scalars["loss/test"]] == [0, 2]


def test_a_new_event_file_each_time(tmp_path):
    pytest.importorskip("tensorboard")
    for step in range(3):
        file = EventFile(tmp_path)
        file.add(step, [("a", step)], [])
        file.close()
    assert len(list(tmp_path.iterdir())) == 3
    assert sorted(events(tmp_path)[0]["a"]) == [(0, 0), (1, 1), (2, 2)]


def test_records_that_cannot_be_written_are_named(tmp_path):
    pytest.importorskip("tensorboard")
    file = EventFile(tmp_path)

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    file._records = Full()
    with pytest.raises(
        OSError, match=r"cannot be written to .*tfevents.*: No space left on device"
    ):
        file.add(0, [], [])


def test_a_failed_record_does_not_fail_again_at_the_end(tmp_path):
    """What the failed write left in a buffer must not fail again under another message."""
    pytest.importorskip("tensorboard")

    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(28, "No space left on device")

    writer = logs_module.TensorBoardWriter(tmp_path)
    writer._file = file = EventFile(tmp_path)
    file._records.close()
    file._records._writer = io.BufferedWriter(Full())
    with pytest.raises(OSError, match="TensorBoard records cannot be written to"):
        file.add(0, [("a", 1.0)], [])
    writer.close()
    assert file._records.closed


def test_unwritable_log_directory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file") as caught:
        Trainer(TrainConfig(**SETTINGS, log_dir=str(tmp_path / "file"))).run()
    folder = tmp_path / "file" / "fp" / "hid_32" / "bs_128" / "reg_0.0001"
    assert str(caught.value) == (
        f"The 'log_dir' must be a folder in which run folders can be made; {folder} cannot be "
        f"created or written: Not a directory. Choose another with --log_dir."
    )


def test_restored_run_that_is_stopped_at_once_writes_no_nan(tmp_path, capfd, caplog):
    first = Trainer(TrainConfig(**SETTINGS, log_dir=str(tmp_path))).run()
    longer = {**SETTINGS, "max_steps": SETTINGS["max_steps"] + 1}
    trainer = Trainer(TrainConfig(**longer, log_dir=str(tmp_path), restore=str(first.run_folder)))
    trainer.request_stop()
    result = trainer.run()
    assert np.isnan(result.final.train_loss)
    scalars, _ = events(result.run_folder)
    assert set(scalars) == {"loss/test", "accuracy/test"}
    assert "NaN or Inf" not in "".join(capfd.readouterr()) + caplog.text


def test_full_disk_ends_the_run_with_a_clear_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    name = r"reg_0\.0001/newest\.npz cannot be written: No space left"  # not of a temporary folder
    with pytest.raises(CheckpointError, match=name):
        Trainer(TrainConfig(**SETTINGS, log_dir=str(tmp_path))).run()
    assert list(tmp_path.glob("fp/hid_32/bs_128/reg_0.0001/*")) == []  # no half-made run


def test_logging_costs_little(tmp_path):
    """Writing records takes at most 5 % of the time of the 100 steps between them."""
    pytest.importorskip("tensorboard")
    config = TrainConfig(
        dataset="digits", binary=True, max_steps=101, log_dir=str(tmp_path), device="cpu"
    )
    spent, beside = [], []

    class Timed(logs_module.TensorBoardWriter):
        def on_step(self, trainer, step, output):
            start = time.perf_counter()
            super().on_step(trainer, step, output)
            beside.append(time.perf_counter() - start)

        def on_evaluate(self, trainer, evaluation):
            start = time.perf_counter()
            super().on_evaluate(trainer, evaluation)
            spent.append(time.perf_counter() - start)

    trainer = Trainer(config)
    original = logs_module.TensorBoardWriter
    try:
        logs_module.TensorBoardWriter = Timed
        trainer.run()
    finally:
        logs_module.TensorBoardWriter = original
    training = 100 * config.batch_size / trainer.timer.median()
    assert len(beside) == 101
    assert min(spent) + sum(beside) < 0.05 * training


class TestHistogram:
    def test_values(self, xp):
        values = np.concatenate([np.linspace(-1, 1, 1001), [0.5] * 50]).astype(np.float32)
        histogram = Histogram.of_values(xp.asarray(values))
        assert histogram is not None
        assert (histogram.minimum, histogram.maximum, histogram.count) == (-1, 1, 1051)
        assert sum(histogram.counts) == 1051
        assert len(histogram.counts) == len(histogram.limits) == 64
        assert histogram.total == pytest.approx(25, abs=1e-3)
        assert histogram.limits[-1] == 1
        peak = int(np.argmax(histogram.counts))
        assert histogram.limits[peak - 1] <= 0.5 <= histogram.limits[peak]

    @pytest.mark.parametrize("value", [0.0, -3.5, 1e-40, 3e38])
    def test_one_value(self, xp, value):
        histogram = Histogram.of_values(xp.full(7, value, dtype=np.float32))
        assert histogram is not None
        assert histogram.counts == [7]
        assert histogram.limits == [pytest.approx(value, rel=1e-2)]

    def test_extremes(self, xp):
        for extremes in ([-3e38, 3e38], [0.0, 1e-45], [-1e-44, 1e38]):
            histogram = Histogram.of_values(xp.asarray(extremes, dtype=np.float32))
            assert histogram is not None
            assert sum(histogram.counts) == 2

    def test_nan_and_infinity_are_left_out(self, xp):
        values = xp.asarray([np.nan, 1.0, np.inf, 2.0, -np.inf, 4.0], dtype=np.float32)
        histogram = Histogram.of_values(values)
        assert histogram is not None
        assert (histogram.count, histogram.minimum, histogram.maximum) == (3, 1, 4)
        assert sum(histogram.counts) == 3
        assert Histogram.of_values(xp.asarray([np.nan], dtype=np.float32)) is None
        assert Histogram.of_values(xp.zeros(0, dtype=np.float32)) is None

    def test_signs(self, xp):
        values = xp.asarray([-2.0, -0.0, 0.0, 3.0, np.nan], dtype=np.float32)
        histogram = Histogram.of_signs(values)
        assert histogram is not None
        assert histogram.counts == [0, 2, 0, 3]
        assert (histogram.total, histogram.squares) == (1, 5)
        only = Histogram.of_signs(xp.ones(3, dtype=np.float32))
        assert only is not None
        assert (only.minimum, only.maximum) == (1, 1)
