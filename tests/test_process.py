"""Products and training wherever in a process they run: at its end, in a child, in any thread."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

import cupybnn

PRODUCTS_AND_TRAINING = """
import atexit, os, sys, threading
import numpy as np
import cupybnn
from cupybnn import settings

settings.cpu_threads = lambda: 3

def work():
    random = np.random.default_rng(0)
    a = random.standard_normal((700, 1100), np.float32)
    b = random.standard_normal((1100, 900), np.float32)
    signs = np.where(a < 0, -1, 1).astype(np.float32)
    expected = signs @ np.where(b < 0, -1, 1).astype(np.float32)
    assert (cupybnn.xnor_gemm(a, b) == expected).all()
    packed = cupybnn.pack(np.asfortranarray(a)), cupybnn.pack(b, axis=-2)
    assert (cupybnn.xnor_gemm(*packed) == expected).all()
    assert (cupybnn.sign(a) == signs).all()
    result = cupybnn.train(
        dataset="digits", max_steps=2, device="cpu", binary=True, batch_norm=True, batch_size=1200
    )
    assert result.steps == 2
    os.write(1, b"done\\n")  # at once: several processes write here
"""

#: How the work is started, and how often it is done.
MOMENTS = {
    "atexit": (1, "atexit.register(work)"),
    "atexit, after others": (2, "work()\natexit.register(work)"),
    "a thread that outlives the main one": (
        1,
        """
def wait_and_work():
    threading.main_thread().join()
    work()
threading.Thread(target=wait_and_work).start()
""",
    ),
    "a forked child": (
        3,
        """
import warnings
# Python 3.12 and later warn of any fork of a process with threads, those of BLAS among them.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
work()
child = os.fork()
work()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""",
    ),
    "a daemon thread": (
        1,
        """
thread = threading.Thread(target=work, daemon=True)
thread.start()
thread.join()
""",
    ),
}


@pytest.mark.parametrize("moment", sorted(MOMENTS))
def test_products_and_training_work_in(moment):
    times, start = MOMENTS[moment]
    if "fork" in start and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS_AND_TRAINING + start],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.split() == ["done"] * times


@pytest.mark.parametrize("options", [{}, {"optimizer": "bop"}, {"average": "swa"}])
def test_training_where_numpy_raises_at_every_flag(options):
    settings = {"dataset": "digits", "device": "cpu", "binary": True, "batch_norm": True, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with np.errstate(all="raise"):
            result = cupybnn.train(**settings, max_steps=20, batch_size=512)
    assert result.final_accuracy > 0.5
