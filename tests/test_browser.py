"""What Python in a browser (Pyodide) lacks is not needed: threads, sockets, locks of files."""

import subprocess
import sys

import pytest

PRELUDE = """
import _thread, socket, sys, threading

def refused(*args, **kwargs):
    raise RuntimeError("can't start new thread")

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "msvcrt", "resource", "_multiprocessing", "_posixshmem"):
            raise ModuleNotFoundError(name)

class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs):
        raise OSError("no sockets")

for name in ("_start_new_thread", "_start_joinable_thread"):
    setattr(threading, name, refused)
_thread.start_new_thread = refused
socket.socket = NoSocket
sys.meta_path.insert(0, Missing())
for name in ("fcntl", "resource", "_multiprocessing"):
    sys.modules.pop(name, None)
"""

PROGRAM = """
import numpy as np
import cupybnn

product = cupybnn.xnor_gemm(np.ones((300, 400)), np.ones((400, 300)))
assert (product == 400).all()
# MNIST cannot be downloaded: the bundled digits, with the reason.
result = cupybnn.train(binary=True, xnor=True, max_steps=30, log_dir="runs")
assert result.dataset == "digits" and "OpenML" in result.fallback_reason
assert result.final_accuracy > 0.85
net = cupybnn.PackedNetwork.from_run(result.run_folder)
net.save("net.npz")
images = cupybnn.data.load("digits").test_images
assert (cupybnn.PackedNetwork.load("net.npz").predict(images) == net.predict(images)).all()
"""


@pytest.mark.slow
def test_it_trains_without_threads_sockets_and_locks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={
            "PYTHONPATH": ":".join(sys.path),
            "HOME": str(tmp_path),
            "CUPYBNN_DATA_DIR": str(tmp_path / "data"),
            "SCIKIT_LEARN_DATA": str(tmp_path / "sklearn"),
        },
    )
    assert done.returncode == 0, done.stderr
