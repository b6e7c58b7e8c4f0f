"""The log of a run as TensorBoard itself serves it, and as a browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest

from cupybnn import train

pytest.importorskip("tensorboard", reason="needs tensorboard: pip install .[tensorboard]")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SCALARS = {"accuracy/test", "loss/train", "examples_per_second", "flips/fc2", "sign_entropy/fc1"}
HISTOGRAMS = {"fc1/weight", "fc2/weight_sign", "fc3/weight_gradient", "fc2/activation", "logits"}
LAST = 49


def fetch(url: str) -> bytes:
    # A proxy that is set in the environment knows nothing of this machine's own ports.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=20) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """Train for 50 steps with a log and give TensorBoard's address and the name of the run."""
    folder = tmp_path_factory.mktemp("logs")
    result = train(
        dataset="digits",
        binary=True,
        batch_norm=True,
        n_hidden=16,
        max_steps=LAST + 1,
        eval_every_n=10,
        device="cpu",
        log_dir=str(folder),
    )
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
    log = folder.parent / "tensorboard.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder.parent)
    try:
        address, until = None, time.monotonic() + 90
        while address is None or not json.loads(fetch(f"{address}/data/runs")):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.3)
            found = re.search(r"http://localhost:\d+", log.read_text())
            address = found and found.group()
        yield address, str(result.run_folder.relative_to(folder))
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_tensorboard_serves_every_kind_of_record(board):
    address, run = board
    tags = json.loads(fetch(f"{address}/data/plugin/timeseries/tags"))
    assert set(tags["scalars"]["runTagInfo"][run]) >= SCALARS
    assert set(tags["histograms"]["runTagInfo"][run]) >= HISTOGRAMS
    points = json.loads(
        fetch(f"{address}/data/plugin/scalars/scalars?tag=accuracy%2Ftest&run={run}")
    )
    assert [step for _, step, _ in points] == [0, 10, 20, 30, 40, LAST]
    assert all(0 <= value <= 1 for _, _, value in points)


@pytest.mark.slow
def test_a_browser_shows_curves_and_histograms(board, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} was found")
    address, _ = board
    page = f"{address}/?forceSVG=true&tagFilter=accuracy%2Ftest%7Cfc2%2Fweight%24#timeseries"
    command = [browser, "--headless", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path}", "--no-proxy-server", "--window-size=1400,1200"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--no-sandbox")  # the sandbox refuses to run as root
    tags = ("accuracy/test", "fc2/weight")
    for seconds in (25, 25, 50, 100, 200):  # of the browser's own clock; the page may be slower
        timed = [*command, f"--virtual-time-budget={seconds}000", "--dump-dom", page]
        answer = subprocess.run(timed, capture_output=True, timeout=120, check=True)
        shown = answer.stdout.decode()
        if all(tag in shown for tag in tags):
            break
    for tag in tags:
        assert tag in shown
    number = r"-?\d[\d.]*"
    # Through the six points of accuracy/test; then a hill for each of the six histograms.
    assert re.search(rf'<path d="M{number},{number}(L{number},{number}){{5}}"', shown)
    hills = re.findall(rf'<path [^>]*d="M{number},{number}(?:L{number},{number}){{20,}}', shown)
    assert len(hills) >= 6
