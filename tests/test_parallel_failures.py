"""Ranks that die, hang or do not come: the others end, and the run goes on from its checkpoint."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cupybnn.training.checkpoint import load

TRAIN = [sys.executable, "-m", "cupybnn", "train"]
RUN = ["--dataset", "digits", "--binary", "--n_hidden", "32", "--batch_size", "60"]
RUN += ["--eval_every_n", "7", "--max_steps", "60", "--rank_timeout", "3"]


def start(folder, *options):
    """Start a run of three ranks; its meeting is in `folder`, too."""
    folder.mkdir(exist_ok=True)
    variables = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TRAIN, "--ranks", "3", *RUN, "--log_dir", str(folder / "log"), *options],
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


def nothing_left(folder):
    return [p.name for p in folder.iterdir() if p.name != "log"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of a run that nobody killed, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    out, err = (process := start(folder)).communicate(timeout=100)
    assert process.returncode == 0, out + err
    assert nothing_left(folder) == []
    return newest(folder), time.monotonic() - began


def killed_once(folder, whole, seed):
    """Kill a rank of a run at a random moment; with a restart it must end as `whole` did."""
    checkpoint, seconds = whole
    draw = random.Random(seed)
    process = start(folder, "--restarts", "1")
    time.sleep(draw.uniform(0.1, seconds))
    victim = draw.randrange(3)
    try:
        os.kill(pids(process)[victim], signal.SIGKILL)
    except (IndexError, OSError):
        victim = None  # not started yet, or already at its end
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, out + err
    if "starting again" in err:
        assert f"Rank {victim} " in err, err
    same(newest(folder), checkpoint)
    assert nothing_left(folder) == []
    return "starting again" in err


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, whole, seed):
    killed_once(tmp_path / "run", whole, seed)
