"""``cupybnn train`` as a user runs it: a process, its output, its exit code, its signals."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from cupybnn.backends.devices import resolve
from cupybnn.cli import main as command_line
from cupybnn.cli.main import main
from cupybnn.data import Dataset, digits
from cupybnn.ops import Quantizer, get_quantizer, quantizer_names, quantizers
from cupybnn.training import TrainConfig, Trainer, restored_config
from cupybnn.training.checkpoint import NEWEST, load
from cupybnn.training.runs import CONFIG_NAME

COMMAND = [sys.executable, "-m", "cupybnn", "train"]
QUICK = ["--dataset", "digits", "--device", "cpu", "--n_hidden", "40", "--max_steps", "30"]
QUICK += ["--eval_every_n", "10"]
STEP = re.compile(r"step (\d+), loss = (\d+\.\d{4}), test accuracy (\d\.\d{4}) \(\d+\.\d ex/s\)")


def train(*options, check=0, **kwargs):
    done = subprocess.run(
        [*COMMAND, *map(str, options)], capture_output=True, text=True, timeout=120, **kwargs
    )
    assert done.returncode == check, done.stderr
    return done


@pytest.fixture
def here(capsys):
    """Return a function like `train`, which runs the command in this process: that takes less."""

    def run(*options, check=0):
        assert main(["train", *map(str, options)]) == check
        said = capsys.readouterr()
        return SimpleNamespace(stdout=said.out, stderr=said.err)

    return run


def trace(output):
    return STEP.findall(output)


class TestOutput:
    def test_lines_of_the_original(self):
        done = train(*QUICK)
        lines = done.stdout.splitlines()
        assert lines[0] == "Data: digits, 1,442 training and 355 test images; device: cpu"
        assert lines[1] == "Network: 64-40-40-40-10, full precision"
        assert [int(step) for step, _, _ in trace(done.stdout)] == [0, 10, 20]
        assert re.fullmatch(r"Final test accuracy \d\.\d{4}", lines[-3])
        assert re.fullmatch(r"Avg ex/s = \d+\.\d", lines[-2])
        assert re.fullmatch(r"Med ex/s = \d+\.\d", lines[-1])
        assert done.stderr == ""  # no bar where there is no terminal

    def test_layers_of_different_width(self, tmp_path, capsys):
        options = [*QUICK[:4], "--n-hidden", "40,30", "--log_dir", str(tmp_path)]
        assert main(["train", *options, "--max_steps", "3"]) == 0
        assert "Network: 64-40-30-10, full precision" in capsys.readouterr().out
        folder = tmp_path / "fp" / "hid_40-30" / "bs_128" / "reg_0.0001"
        shapes = {k: v.shape for k, v in load(folder / "1").arrays.items() if "weight" in k}
        assert shapes["model/fc2.weight"] == (40, 30)
        assert "model/fc3.weight" not in shapes
        assert main(["train", "--restore", str(folder / "1"), "--max_steps", "5"]) == 0
        assert load(folder / "2").step == 5
        assert main(["train", *options, "--restore", str(folder / "1"), "--max_steps", "4"]) == 0
        assert (
            main(["train", *options[:-4], "--n_hidden", "40,31", "--restore", str(folder / "1")])
            == 1
        )
        assert "n_hidden: checkpoint (40, 30), this run (40, 31)" in capsys.readouterr().err
        assert main(["train", *options, "--hidden_layers", "4"]) == 2
        assert "'hidden_layers' must be left out or agree" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["train", "--n_hidden", "40,x"])
        assert (
            "must be a whole number, or one for each layer with commas" in capsys.readouterr().err
        )

    def test_a_loss_that_is_not_finite_is_reported_once(self, here):
        done = train(*QUICK, "--lr", "1e30")
        assert [line.split()[1] for line in done.stdout.splitlines() if "loss = nan" in line] == [
            "10,",
            "20,",
        ]
        assert done.stderr.count("The loss is no longer finite. A smaller --lr") == 1
        assert done.stderr.count("\n") == 1  # and nothing of NumPy's beside it
        for steps in (1, 3):  # also where no evaluation of a step comes after it
            done = here(*QUICK[:-4], "--max_steps", steps, "--lr", "1e30")
            assert done.stderr.count("The loss is no longer finite.") == 1, steps
            assert done.stderr.count("\n") == 1
        assert "no longer finite" not in here(*QUICK).stderr

    def test_xnor_and_dense_print_the_same_trace(self, here):
        dense = here(*QUICK, "--binary", "--batch_norm")
        xnor = here(*QUICK, "--binary", "--batch_norm", "--xnor")
        assert trace(dense.stdout) == trace(xnor.stdout) != []
        assert "1-bit weights and activations (hidden layers), xnor_gemm, batch norm" in xnor.stdout

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ([], None),
            (["--no_binary"], None),
            (["--binary"], "batch norm, no penalty (change with --no_batch_norm, --reg R)"),
            (["--binary", "--reg", "1e-4"], "batch norm (change with --no_batch_norm)"),
            (["--binary", "--no-batch-norm"], "no penalty (change with --reg R)"),
            (["--binary", "--reg", "0", "--batch_norm"], None),
            (["--recipe", "digits"], None),
        ],
    )
    def test_defaults_of_a_binary_network_are_printed(self, options, line, capsys):
        assert main(["train", *QUICK[:-4], "--max_steps", "1", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        said = [each for each in lines if each.startswith("Binary network: ")]
        assert said == ([] if line is None else [f"Binary network: {line}"])

    def test_choice_of_the_best_checkpoint_is_printed(self, tmp_path, capsys):
        for options, line in (
            ([], "best.npz is chosen by test accuracy (by held-out images: --validation N)"),
            (["--validation", "100"], "best.npz is chosen by validation accuracy"),
        ):
            log = ["--log_dir", str(tmp_path)]
            assert main(["train", *QUICK[:-4], "--max_steps", "1", *log, *options]) == 0
            assert line in capsys.readouterr().out.splitlines()

    def test_nothing_to_train_makes_no_folder_and_no_figures(self, tmp_path, capsys):
        options = ["--log_dir", str(tmp_path / "log"), "--max_steps", "0"]
        assert main(["train", *QUICK[:-4], *options]) == 0
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == (
            "Nothing left to train: --max_steps, which includes the steps before a restore, is 0.\n"
        )
        assert not (tmp_path / "log").exists()

    def test_hyphens(self, here):
        underscores = here(*QUICK, "--keep_prob", "0.9", "--batch_norm")
        options = [o.replace("_", "-") for o in [*QUICK, "--keep_prob", "0.9", "--batch_norm"]]
        assert trace(here(*options).stdout) == trace(underscores.stdout) != []

    def test_data_directory(self, here, mnist_dir):
        done = here(mnist_dir, *QUICK[2:-4], "--max_steps", "1")
        assert "Data: mnist, 60,000 training and 10,000 test images" in done.stdout

    def test_auto_fallback_is_printed_at_the_start_and_with_the_accuracy(
        self, here, tmp_path, monkeypatch
    ):
        def refuse(*args, **kwargs):
            raise socket.gaierror(-3, "no names here")

        # Without a network name resolution fails, and nothing waits before it is tried again.
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr("sklearn.datasets._base.time.sleep", lambda seconds: None)
        monkeypatch.setenv("CUPYBNN_DATA_DIR", str(tmp_path / "d"))
        monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "s"))
        done = here(*QUICK[2:-4], "--max_steps", "1")
        loud = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
        assert len(loud) == 1
        assert "THE BUNDLED 8x8 DIGITS, NOT MNIST" in loud[0]
        assert "no names here" in loud[0]
        assert re.search(r"^Final test accuracy \d\.\d{4} \(.*NOT ON MNIST\)$", done.stdout, re.M)
        refused = here(*QUICK[2:], "--dataset", "mnist", check=1)
        assert refused.stderr.splitlines()[-1].startswith("cupybnn train: MNIST cannot be fetched")
        assert "Traceback" not in refused.stderr

    def test_data_directory_that_is_wrong_does_not_fall_back(self, here, tmp_path):
        done = here(tmp_path / "nowhere", *QUICK[2:], check=1)
        assert done.stdout == ""
        assert done.stderr == (
            f"cupybnn train: The data directory {tmp_path / 'nowhere'} does not exist.\n"
        )

    def test_options_without_effect_are_reported(self, here):
        done = here(*QUICK[:-4], "--max_steps", "1", "--xnor", "--last")
        assert "--xnor has no effect without --binary." in done.stderr
        assert "--last has no effect without --binary." in done.stderr

    def test_settings_of_another_choice_are_reported_as_without_effect(self, here):
        short = [*QUICK[:-4], "--max_steps", "1"]
        idle = ["--label_smoothing", "0.1", "--weight_decay", "0.1", "--milestones", "10"]
        done = here(*short, *idle, "--loss", "squared_hinge", "--penalty", "bipolar")
        assert "--label_smoothing has no effect without --loss cross_entropy." in done.stderr
        assert "--weight_decay has no effect without --optimizer adamw." in done.stderr
        assert "--milestones has no effect without --schedule step." in done.stderr
        assert "--penalty bipolar has no effect without --binary." in done.stderr
        used = ["--optimizer", "adamw", "--schedule", "step"]
        assert "no effect" not in here(*short, *idle, *used).stderr

    def test_settings_that_begin_after_the_last_step_are_reported(self, here):
        short = [*QUICK[:-4], "--max_steps", "2"]
        words = "--warm_up 2 does not end before the last step"
        assert words in here(*short, "--warm_up", "2").stderr
        done = here(*short, "--average", "swa", "--average_from", "2")
        assert "--average swa has no effect: --average_from 2 is after" in done.stderr
        useful = ["--warm_up", "1", "--average", "swa", "--average_from", "1"]
        assert here(*short, *useful).stderr == ""

    def test_batch_norm_of_single_images_is_reported(self, here):
        words = "Batch norm needs several images: it turns a batch of one image into zeros"
        short = [*QUICK[:-4], "--max_steps", "1", "--binary"]
        assert words in here(*short, "--batch_size", "1").stderr
        assert words not in here(*short, "--batch_size", "1", "--no_batch_norm").stderr
        assert words not in here(*short, "--batch_size", "2").stderr

    def test_bar_on_a_terminal(self):
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        process = subprocess.Popen([*COMMAND, *QUICK], stdout=slave, stderr=slave, stdin=slave)
        os.close(slave)
        output = read_all(master)
        assert process.wait() == 0
        assert "30/30" in output
        assert len(trace(output)) == 3

    def test_closed_pipe(self):
        done = subprocess.run(
            f"{sys.executable} -m cupybnn train {' '.join(QUICK)} | head -1",
            shell=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.startswith("Data: digits")
        assert "Traceback" not in done.stderr


def read_all(descriptor: int) -> str:
    chunks = []
    with contextlib.suppress(OSError):  # the other side is closed
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
    os.close(descriptor)
    return b"".join(chunks).decode()


class TestUsage:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--lr", "0"], "The 'lr' must be a finite number, greater than 0; got 0.0."),
            (["--reg", "nan"], "The 'reg' must be a finite number, at least 0; got nan."),
            (["--batch_size", "0"], "The 'batch_size' must be a whole number, at least 1; got 0."),
            (["--ste", "x"], "The 'ste' must be one of"),
            (["somewhere"], "'data_dir' must be None with the dataset 'digits'"),
            (["--gpu", "-1"], "--gpu must be a device number"),
            (
                ["--gpu", "1", "--device", "cpu"],
                "agree with --device; got --gpu 1 and --device cpu",
            ),
        ],
    )
    def test_bad_values_are_one_line(self, options, message, capsys):
        assert main(["train", "--dataset", "digits", *options]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert message in captured.err

    def test_gpu_names_a_cuda_device(self, monkeypatch, capsys):
        from cupybnn.cli import train as module

        assert module._config({"gpu": 1, "dataset": "digits"}).device == "cuda:1"
        assert module._config({"gpu": 1, "device": "cuda:1"}).device == "cuda:1"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--epochs", "3"], "unknown option --epochs; did you mean --max_steps?"),
            (["d", "--epochs=3"], "unknown option --epochs; did you mean --max_steps?"),
            (
                ["--hidden", "9"],
                "unknown option --hidden; did you mean --n_hidden or --hidden_layers?",
            ),
            (["--max-step", "9"], "unknown option --max-step; did you mean --max_steps?"),
            (
                ["--no-batchnorm"],
                "unknown option --no-batchnorm; did you mean --no_batch_norm?",
            ),
            (["--zzz"], "unknown option --zzz"),
            (["-q"], "unknown option -q"),
            (["a", "b"], "unexpected argument: 'b'"),
            (["--lr", "x"], "argument --lr: must be a finite number, greater than 0; got 'x'"),
            (
                ["--batch-size", "2.5"],
                "argument --batch_size: must be a whole number, at least 1; got '2.5'",
            ),
            (["--n-hidden"], "argument --n_hidden: expected one argument"),
        ],
    )
    def test_usage_errors_are_one_line(self, options, message, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["train", *options])
        assert caught.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        end = "" if message.endswith("?") else "."
        assert captured.err == f"cupybnn train: {message}{end} Options: cupybnn train --help\n"

    def test_a_value_keeps_its_hyphens(self):
        from cupybnn.cli.parser import Parser

        parser = Parser()
        parser.add_argument("--log_dir")
        parser.add_argument("rest", nargs="*")
        for words in (["--log-dir=a-b--c"], ["--log-dir", "a-b--c"], ["--log_dir", "a-b--c"]):
            assert parser.parse_args(words).log_dir == "a-b--c"
        assert parser.parse_args(["--", "--log-dir"]).rest == ["--log-dir"]

    def test_help_names_every_setting(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["train", "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for name in TrainConfig.__dataclass_fields__:
            assert (f"--{name} " in text or f"--{name}," in text) or name == "data_dir"
        for name, kind in vars(quantizers).items():
            if isinstance(kind, type) and issubclass(kind, Quantizer) and kind is not Quantizer:
                names = [n for n in quantizer_names() if type(get_quantizer(n)) is kind]
                assert names, name
                assert all(n in text for n in names)

    def test_defaults_are_the_configurations(self):
        from cupybnn.cli import train as module

        assert module._config({}) == TrainConfig()


#: What people, scripts and unset variables put behind an option.
ODD = ["", "--", "-1", "nan", "inf", "1e400", "9" * 25, "9" * 400, "9" * 5000, "٣", "a\0b"]
ODD += ["\udcff", "\ud800", "2,1", "x" * 5000, "cuda:" + "9" * 5000, "."]


@pytest.mark.parametrize("name", ["train", "verify", "bench"])
def test_odd_values_of_any_option_give_at_most_one_line(name, monkeypatch, tmp_path, capsys):
    """Each option with odd values, in one process; what would be measured is left out."""
    monkeypatch.chdir(tmp_path)
    nothing = {"products": [], "seconds": 0.0}
    monkeypatch.setattr("cupybnn.cli.bench._measure", lambda args: resolve(args.device) and nothing)
    monkeypatch.setattr("cupybnn.cli.verify.check", lambda *args, **options: ())
    monkeypatch.setattr("cupybnn.data.digits.load", functools.cache(digits.load))
    monkeypatch.setattr("cupybnn.training.trainer.Trainer.run", lambda trainer: None)
    monkeypatch.setattr("cupybnn.cli.spawn._run", lambda words, size: (0, None))
    parser = command_line._load(name, command_line._top_level_parser()[1])
    usual = [*QUICK, "--n_hidden", "2"] if name == "train" else []
    options = [a.option_strings[0] for a in parser._actions if a.option_strings and a.nargs != 0]
    assert "--device" in options
    odd = 0
    for number, option in enumerate(options):
        for value in ODD[number % 3 :: 3]:  # a third each: all take too long
            words = [name, *usual, f"{option}={value}"]
            try:
                code = main(words)
            except SystemExit as error:
                code = error.code
            error = capsys.readouterr().err
            assert code in (0, 1, 2), (words, code)
            assert "Traceback" not in error
            assert code == 0 or f"cupybnn {name}" in error.splitlines()[-1], (words, error)
            odd += code != 0
    assert odd > len(options)


class TestSignals:
    def test_sigterm_ends_as_cleanly(self, tmp_path):
        process = subprocess.Popen(
            [*COMMAND, *QUICK[:-4], "--max_steps", "1000000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_line(process, "step 100,")
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in errors
        assert "Test accuracy so far" in output

    def test_a_closed_terminal_loses_no_step(self, tmp_path):
        """A run that writes to it ends as cleanly, with nowhere to print."""

        def take_the_terminal():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

        ours, theirs = os.openpty()
        process = subprocess.Popen(
            [*COMMAND, *QUICK[:-4], "--max_steps", "1000000", "--log_dir", str(tmp_path)],
            stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=take_the_terminal,
        )  # fmt: skip
        os.close(theirs)
        shown, deadline = b"", time.monotonic() + 60
        while b"step 0," not in shown and time.monotonic() < deadline:
            shown += os.read(ours, 4096)
        time.sleep(0.2)  # no evaluation follows before step 1000
        os.close(ours)
        assert process.wait(60) == 128 + signal.SIGHUP, shown
        (newest,) = tmp_path.rglob(NEWEST)
        assert load(newest).step > 0

    def test_a_run_on_data_of_your_own_is_continued_from_python(self, here, tmp_path):
        data = digits.load()
        own = Dataset.from_arrays(
            data.train_images, data.train_labels, data.test_images, data.test_labels
        )
        config = TrainConfig(n_hidden=8, max_steps=1, device="cpu", log_dir=str(tmp_path))
        run = str(Trainer(config, data=own).run().run_folder)
        done = here("--restore", run, "--max_steps", "2", check=1)
        assert "was trained on a data set of your own, 'arrays'" in done.stderr
        assert f"restored_config({run!r}, max_steps=N)" in done.stderr
        assert Trainer(restored_config(run, max_steps=2), data=own).run().steps == 2

    def test_ctrl_c_ends_cleanly_and_restore_continues_exactly(self, here, tmp_path):
        options = ["--dataset", "digits", "--device", "cpu", "--n_hidden", "40", "--binary"]
        options += ["--keep_prob", "0.9", "--batch_norm", "--eval_every_n", "50"]
        process = subprocess.Popen(
            [*COMMAND, *options, "--max_steps", "1000000", "--log_dir", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_line(process, "step 100,")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in errors
        stopped = re.search(r"^Stopped before step (\d+) of 1000000$", output, re.M)
        assert stopped is not None
        assert re.search(r"^Test accuracy so far \d\.\d{4}$", output, re.M)
        assert re.search(r"^Avg ex/s = \d+\.\d$", output, re.M)
        assert re.search(r"^Med ex/s = \d+\.\d$", output, re.M)
        folder = re.search(r"^Continue with: cupybnn train --restore (.*)$", output, re.M)[1]
        step = int(stopped[1])
        stored = load(folder)
        assert stored.step == step > 100
        end = step + 70
        again = here("--restore", folder, "--max_steps", end)
        assert f"Continuing from step {step} of {folder}" in again.stdout
        whole = here(*options, "--max_steps", end, "--log_dir", tmp_path / "whole")
        after = trace(again.stdout)
        assert after == [line for line in trace(whole.stdout) if int(line[0]) >= step] != []
        run_again = re.search(r"^Logging to (.*)$", again.stdout, re.M)[1]
        run_whole = re.search(r"^Logging to (.*)$", whole.stdout, re.M)[1]
        a, b = load(run_again), load(run_whole)
        assert a.step == b.step == end
        for name, array in a.arrays.items():
            np.testing.assert_array_equal(array, b.arrays[name])
        at_the_end = here("--restore", run_again)
        assert at_the_end.stdout == ""
        assert at_the_end.stderr == (
            f"Nothing left to train: --max_steps, which includes the steps before a restore, is "
            f"{end}.\n"
        )
        assert not os.path.exists(os.path.join(os.path.dirname(run_again), "3"))

    def test_kill_leaves_a_checkpoint_that_restores(self, tmp_path):
        options = [*QUICK[:-4], "--max_steps", "100000", "--eval_every_n", "1"]
        rng = np.random.default_rng(1)
        for number in (1, 2):
            process = subprocess.Popen(
                [*COMMAND, *options, "--log_dir", str(tmp_path)],
                stdout=subprocess.PIPE,
                text=True,
            )
            wait_for_line(process, "step 3,")
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            process.communicate()
            folder = tmp_path / "fp" / "hid_40" / "bs_128" / "reg_0.0001" / str(number)
            assert load(folder / NEWEST).step > 3
            assert (folder / CONFIG_NAME).exists()
        step = load(folder).step
        done = train("--restore", folder, "--max_steps", step + 2)
        assert [int(s) for s, _, _ in trace(done.stdout)] == [step, step + 1]

    def test_interrupt_while_the_data_are_fetched(self, tmp_path):
        program = (
            "import sys, time\n"
            "from cupybnn.data import mnist\n"
            "def slow(folder):\n"
            "    print('fetching', flush=True)\n"
            "    time.sleep(60)\n"
            "mnist._fetch = slow\n"
            "from cupybnn.cli.main import main\n"
            "sys.exit(main(['train', '--device', 'cpu']))\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUPYBNN_DATA_DIR": str(tmp_path)},
        )
        wait_for_line(process, "fetching")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "Traceback" not in errors

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize(
        "moment",
        [
            "raise_here()",
            # Libraries may swallow an exception, or make another of it.
            "try: raise_here()\nexcept BaseException: pass",
            "try: raise_here()\nexcept BaseException as e: raise ImportError('half') from e",
        ],
        ids=["plain", "swallowed", "turned"],
    )
    @pytest.mark.parametrize("module", ["cupybnn.training", "digits", "console"])
    def test_signal_while_it_starts(self, tmp_path, number, moment, module):
        """A signal that comes while a module is imported."""
        module = {"console": "cupybnn.cli.console", "digits": "cupybnn.data"}.get(module, module)
        program = (
            "import os, sys, builtins\n"
            "real = builtins.__import__\n"
            "done = []\n"
            f"def raise_here(): os.kill(os.getpid(), {int(number)})\n"
            "def hook(name, *args, **kwargs):\n"
            f"    if name == {module!r} and not done:\n"
            "        done.append(1)\n"
            + "".join(f"        {line}\n" for line in moment.split("\n"))
            + "    return real(name, *args, **kwargs)\n"
            "builtins.__import__ = hook\n"
            "from cupybnn.cli.main import main\n"
            f"code = main({['train', *QUICK, '--log_dir', str(tmp_path / 'log')]!r})\n"
            "print('came', done, file=sys.stderr)\n"
            "sys.exit(code)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 128 + number
        word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
        assert done.stderr == f"cupybnn train: {word} before training began\ncame [1]\n"
        assert done.stdout == ""
        assert not (tmp_path / "log").exists()

    def test_signal_while_the_data_are_fetched_leaves_no_scratch_folder(self, tmp_path):
        program = (
            "import os, signal, sys\n"
            "import sklearn.datasets\n"
            "def slow(*args, **kwargs): os.kill(os.getpid(), signal.SIGTERM)\n"
            "sklearn.datasets.fetch_openml = slow\n"
            "from cupybnn.cli.main import main\n"
            "sys.exit(main(['train', '--device', 'cpu']))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "CUPYBNN_DATA_DIR": str(tmp_path / "data")},
        )
        assert done.returncode == 128 + signal.SIGTERM
        assert done.stderr.splitlines()[-1] == "cupybnn train: terminated before training began"
        assert list((tmp_path / "data").iterdir()) == []

    def test_signal_while_the_command_is_read(self, monkeypatch, capsys):
        from cupybnn.cli import main as module

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "_load", interrupted)
        assert main(["train"]) == 130
        assert capsys.readouterr().err == "cupybnn: interrupted\n"

    @pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_that_is_ignored_stays_ignored(self, ignored):
        """As SIGINT is under nohup and in the background of a script."""
        before = signal.signal(ignored, signal.SIG_IGN)
        seen = []

        def look(trainer, *args):
            os.kill(os.getpid(), ignored)
            seen.append(signal.getsignal(ignored))

        try:
            with mock.patch("cupybnn.cli.console.Console.on_step", look):
                assert main(["train", *QUICK[:-4], "--max_steps", "2"]) == 0
        finally:
            signal.signal(ignored, before)
        assert seen == [signal.SIG_IGN] * 2

    def test_handlers_are_restored(self):
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        assert main(["train", *QUICK[:-4], "--max_steps", "1"]) == 0
        assert main(["train", "--dataset", "nonsense"]) == 2
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def wait_for_line(process, start: str) -> None:
    deadline = time.monotonic() + 60
    assert process.stdout is not None
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if line.startswith(start):
            return
        assert line, process.stderr.read() if process.stderr else "the process ended"
    raise AssertionError(f"no line {start!r} in 60 s")


class TestDebug:
    OPTIONS = ("--lr", "1e38", "--debug", *QUICK)

    def test_message_and_exit_code(self):
        done = train(*self.OPTIONS, check=1, stdin=subprocess.DEVNULL)
        assert re.fullmatch(
            r"cupybnn train: not finite at step \d+: \d+ value\(s\) of the .* of \w+ in fc\w+, "
            r"shape \(.*\), are NaN or infinite\.\n",
            done.stderr,
        )
        assert "Traceback" not in done.stderr

    def test_debugger_opens_on_a_terminal(self):
        master, slave = os.openpty()
        process = subprocess.Popen(
            [*COMMAND, *self.OPTIONS], stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        seen = ""
        deadline = time.monotonic() + 60
        while "(Pdb)" not in seen and time.monotonic() < deadline:
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 65536).decode()
        assert "not finite at step" in seen
        assert "(Pdb)" in seen
        os.write(master, b"p error if 'error' in dir() else array.shape\nq\n")
        rest = read_all(master)
        assert process.wait(timeout=30) == 1
        assert re.search(r"\(\d+(, \d+)?,?\)", rest)
