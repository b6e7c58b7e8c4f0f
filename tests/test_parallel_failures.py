"""Ranks that die, hang or do not come: the others end, and the run goes on from its checkpoint."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks import need_gpus

from cupybnn.cli.main import main
from cupybnn.training import Trainer, restored_config
from cupybnn.training.checkpoint import load

pytestmark = pytest.mark.slow

TRAIN = [sys.executable, "-m", "cupybnn", "train"]
RUN = ["--dataset", "digits", "--binary", "--n_hidden", "32", "--batch_size", "60"]
RUN += ["--eval_every_n", "7"]


class Cpus:
    """Two ranks on CPUs: short steps, and patience to match."""

    options = ("--ranks", "2", *RUN, "--max_steps", "40", "--rank_timeout", "3")
    patience = 2  # seconds
    limit = 100  # seconds that a run may take


class Gpus:
    """Two GPUs. Until the first step, they load CUDA and NCCL and compile: some 20 seconds.

    Steps are so short that a run must have many, to be killed before its end.
    """

    options = ("--gpus", "2", "--xnor", *RUN, "--max_steps", "980", "--rank_timeout", "20")
    patience = 10
    limit = 300


class Reading(Gpus):
    """Two GPUs whose updates read each other's gradients, as in large networks."""

    #: Run by each process first, from a folder of `PYTHONPATH`.
    first = """
from cupybnn.training.fast import exchange, plan
plan._DENSE_COPY_BYTES = 0
allocate = exchange.Exchange.allocate
def allocate_and_look(self, *given):
    found = allocate(self, *given)
    assert self.distances
    return found
exchange.Exchange.allocate = allocate_and_look
"""


_GPUS = [pytest.param(kind, marks=pytest.mark.gpu) for kind in (Gpus, Reading)]


@pytest.fixture(scope="module", params=[Cpus, *_GPUS])
def kind(request):
    """What the ranks run on."""
    if issubclass(request.param, Gpus):
        need_gpus(2)
    return request.param


def start(folder, *options, kind=Cpus):
    """Start a run of two ranks; its meeting is in `folder`, too."""
    folder.mkdir(exist_ok=True)
    variables = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    if hasattr(kind, "first"):
        own = folder.parent / "first"
        own.mkdir(exist_ok=True)
        (own / "sitecustomize.py").write_text(kind.first)
        variables["PYTHONPATH"] = os.pathsep.join([str(own), variables.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*TRAIN, *kind.options, "--log_dir", str(folder / "log"), *options],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def pids(process):
    """Return the processes of a run's ranks, in their order."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return sorted(map(int, text.split()))


def newest(folder):
    """Return the newest checkpoint of the last run in a log directory."""
    runs = [p.parent for p in (folder / "log").rglob("newest.npz")]
    return load(max(runs, key=lambda run: int(run.name)))


def same(one, other):
    """Whether two checkpoints hold the same numbers, bit for bit."""
    assert one.step == other.step
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.tobytes() == other.arrays[name].tobytes(), name
    figures = [[{**e, "examples_per_second": 0} for e in c.info["history"]] for c in (one, other)]
    assert figures[0] == figures[1]


def shared_memory():
    """Return what NCCL shares between processes."""
    return [path.name for path in Path("/dev/shm").glob("nccl*")]


def nothing_left(folder):
    return [p.name for p in folder.iterdir() if p.name != "log"]


@pytest.fixture(scope="module")
def whole(kind, tmp_path_factory):
    """The last checkpoint of a run that nobody killed, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    out, err = (process := start(folder, kind=kind)).communicate(timeout=kind.limit)
    seconds = time.monotonic() - began
    assert process.returncode == 0, out + err
    assert nothing_left(folder) == []
    return SimpleNamespace(checkpoint=newest(folder), seconds=seconds)


def test_ranks_that_are_lost_cost_a_run_nothing_but_time(tmp_path, kind, whole):
    """One is killed, and after the restart one hangs."""
    shared = set(shared_memory())
    folder = tmp_path / "run"
    patience = str(kind.patience)
    process = start(folder, "--restarts", "2", "--rank_timeout", patience, kind=kind)
    until(process, "step 14,")
    os.kill(pids(process)[1], signal.SIGKILL)
    until(process, "step 28,")
    os.kill(pids(process)[0], signal.SIGSTOP)
    out, err = process.communicate(timeout=3 * kind.limit)
    assert process.returncode == 0, out + err
    # One sentence about each loss, by one of the others, and one about the restart.
    said = [
        r"cupybnn train \(rank 0\): Rank 1 \(process \d+ on .*\) has died\.",
        r"cupybnn train: starting again from .*/1 \(restart 1 of 2\)",
        # Which of the two is noticed first depends on how busy the machine is.
        r"cupybnn train \(rank 1\): Rank 0 \(process \d+ on .*\) has (given no sign of life|"
        rf"kept the others waiting) for {patience} seconds\.",
        r"cupybnn train: starting again from .*/2 \(restart 2 of 2\)",
    ]
    if issubclass(kind, Gpus):  # kernels that are compiled, and what NCCL has to say
        lines = [line for line in err.splitlines(True) if line.startswith("cupybnn train")]
        err = "".join(lines)
    assert re.fullmatch("\n".join(said) + "\n", err), err
    same(newest(folder), whole.checkpoint)
    assert nothing_left(folder) == []
    assert set(shared_memory()) <= shared


def test_kills_at_random_moments(tmp_path, kind, whole, pytestconfig):
    """From the start of the ranks until they end; ``pytest --kills 40`` makes more of them."""
    rng = np.random.default_rng(0)
    shared = set(shared_memory())
    done = 0
    while done < pytestconfig.getoption("kills"):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        process = start(folder, "--restarts", "1", kind=kind)
        time.sleep(rng.uniform(0, whole.seconds))
        victims = pids(process) if process.poll() is None else []
        for victim in rng.permutation(victims)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                done += 1
        out, err = process.communicate(timeout=2 * kind.limit)
        assert process.returncode == 0, out + err
        same(newest(folder), whole.checkpoint)
        assert nothing_left(folder) == []
        assert not any(map(alive, victims))
        assert set(shared_memory()) <= shared


def test_without_a_restart_the_checkpoint_is_whole_and_continues_on_one_rank(tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    until(process, "step 14,")
    ranks = pids(process)
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert re.search(r"Rank 1 \(process \d+ on .*\) has died", err)
    assert not any(alive(pid) for pid in ranks)
    assert nothing_left(folder) == []
    (path,) = (folder / "log").rglob("newest.npz")
    assert (load(path).step - 1) % 7 == 0
    config = restored_config(str(path), log_dir=None, device="cpu")
    assert Trainer(config).run().steps == 40


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_ranks_after_the_same_step_with_a_checkpoint(tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, "--max_steps", "100000", "--restarts", "1")
    until(process, "step 7,")
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number, out + err
    assert err.count("Stopping after this step") == 1
    assert "starting again" not in err
    steps = newest(folder).step
    assert steps >= 8
    assert f"Stopped before step {steps} of 100000" in out
    assert nothing_left(folder) == []


def test_ranks_end_when_their_starter_is_killed(tmp_path):
    process = start(tmp_path / "run", "--max_steps", "100000")
    until(process, "step 7,")
    ranks = pids(process)
    process.kill()
    process.communicate(timeout=100)  # until the ranks, too, have closed their output
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert nothing_left(tmp_path / "run") == []


def until(process, words):
    """Read a run's output until `words` come."""
    seen = ""
    while words not in seen:
        line = process.stdout.readline()
        assert line, seen + process.stderr.read()
        seen += line


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "'--ranks' must be at least 1; got 0"),
        (["--ranks", "1000000"], "'--ranks' must be at most"),
        (["--ranks", "2", "--gpus", "2"], "--gpus and --ranks must not be given together"),
        (["--ranks", "2", "--device", "cuda"], "must be left out; got --device cuda"),
        (["--gpus", "2", "--device", "cpu"], "must be left out; got --device cpu"),
        (["--gpus", "999"], "'--gpus' must be at most the number of GPUs"),
        (["--restarts", "2"], "'--restarts' must be given with --gpus or --ranks"),
        (["--ranks", "2", "--restarts", "-1"], "'--restarts' must be at least 0; got -1"),
        (["--ranks", "2", "--restarts", "2"], "they need a '--log_dir' to write them to"),
        (["--ranks", "2", "--lr", "-1"], "'lr' must be a finite number, greater than 0"),
    ],
)
def test_options_that_start_ranks(capsys, options, message):
    assert main(["train", "--dataset", "digits", *options]) == 2
    assert message in capsys.readouterr().err


def test_no_ranks_within_ranks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--dataset", "digits", "--ranks", "2"]) == 2
    assert "must be left out under torchrun, which has started 2" in capsys.readouterr().err
