"""Runs of several GPUs, as they are started; skipped where there are fewer."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from ranks import need_gpus
from test_parallel_training import STUDENT, TEACHER

from cupybnn.backends.cuda import blas

pytestmark = pytest.mark.gpu

RUN = ["--dataset", "digits", "--binary", "--xnor", "--n_hidden", "128", "--batch_size", "90"]
RUN += ["--max_steps", "40", "--eval_every_n", "5", "--sync_batch_norm"]


@pytest.fixture(scope="module", autouse=True)
def two():
    need_gpus(2)


def train(*options):
    """Return what ``cupybnn train`` prints, on standard output and standard error."""
    command = [sys.executable, "-m", "cupybnn", "train", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training runs operation by operation" not in done.stderr
    return done.stdout, done.stderr


def losses(text):
    return [float(number) for number in re.findall(r"^step .*, loss = (\S+),", text, re.MULTILINE)]


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize(
    ("options", "tolerance"), [([], 2e-3), (["--vat", "1"], 2e-3), (["--grad_bits", "4"], 0.15)]
)
def test_several_gpus_learn_what_one_learns(options, tolerance, gpus):
    """And `--debug` compares their weights after each fused step.

    Sums are rounded otherwise, and then so is an element of a gradient now and then.
    """
    need_gpus(gpus)
    alone = losses(train(*RUN, *options)[0])
    out, err = train(*RUN, *options, "--gpus", str(gpus), "--debug")
    assert f", {gpus} ranks" in out
    assert not blas.capturable() or "without a CUDA graph" not in err
    found = losses(out)
    assert len(found) == 8
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-4)  # before the first update
    np.testing.assert_allclose(found[:4], alone[:4], rtol=tolerance)
    np.testing.assert_allclose(found, alone, rtol=0.2)  # later, signs of numbers near 0 differ


def test_a_recipe_trains_its_teachers_on_both(tmp_path):
    (tmp_path / "wise.toml").write_text(TEACHER)
    recipe = tmp_path / "student.toml"
    recipe.write_text(STUDENT.format((tmp_path / "wise.toml").as_posix()))
    out, _ = train("--gpus", "2", "--recipe", str(recipe), "--log_dir", str(tmp_path / "log"))
    assert re.findall(r"^Teacher (\d) of 2", out, re.MULTILINE) == ["1", "2"]
    assert "Final test accuracy" in out
    assert len(list((tmp_path / "log/teachers").iterdir())) == 2


def test_rounded_gradients_by_hopper_s_kernels():
    """Large layers in bfloat16: each rank stores its products, and the scales are exchanged."""
    options = ["--dataset", "digits", "--binary", "--xnor", "--n_hidden", "2048"]
    options += ["--batch_size", "4608", "--dtype", "bfloat16", "--grad_bits", "4"]
    options += ["--max_steps", "6", "--eval_every_n", "1", "--sync_batch_norm"]
    both, _ = train(*options, "--gpus", "2", "--debug")
    np.testing.assert_allclose(losses(both), losses(train(*options)[0]), rtol=0.1, atol=0.02)
