"""The notebooks, run as a reader runs them: each from a clean kernel, on the CPU, offline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install .[test]")
nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install .[test]")
pytest.importorskip("ipykernel", reason="needs ipykernel: pip install .[test]")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install .[test]")

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 600_000  # bytes of a file: what a browser shows without hesitation

# A path below a place where homes, checkouts and temporary files lie.
ABSOLUTE = re.compile(
    r"(?<![\w.:/])/(home|root|work|workspace|Users|tmp|opt|usr|var|mnt|srv)/|[A-Za-z]:\\\\?\w"
)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def text_of(output: Any) -> str:
    """Return what an output says in words."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}\n" + "\n".join(output.traceback)
    return "\n".join(v for k, v in output.data.items() if k.startswith("text/"))


def check_outputs(notebook: Any) -> None:
    """Fail on errors, warnings and machine paths among the outputs."""
    for output in outputs(notebook):
        text = text_of(output)
        assert output.output_type != "error", text
        assert output.get("name") != "stderr", f"written to stderr: {text}"
        assert not ABSOLUTE.search(text), f"an absolute path: {text}"
        assert str(ROOT) not in text
        assert str(Path.home()) + "/" not in text


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that executes a notebook without GPU and network and checks it."""
    # A new machine builds matplotlib's font cache at the first import, and says so on stderr.
    import matplotlib.font_manager  # noqa: F401

    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel
    for name, value in {
        "CUDA_VISIBLE_DEVICES": "",
        "CUPYBNN_DATA_DIR": str(tmp_path / "data"),
        "SCIKIT_LEARN_DATA": str(tmp_path / "sklearn"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        # A port where nobody listens: what asks for the network fails at once.
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
    }.items():
        monkeypatch.setenv(name, value)
        if name.endswith("_proxy"):
            monkeypatch.setenv(name.upper(), value)

    def execute(path: Path, first: str = "") -> Any:
        """Execute a notebook, after a cell of the tests' own."""
        notebook = read(path)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        watch = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        watch += "import legends\nlegends.watch()\n" + DRAWN_ONCE + first
        notebook.cells.insert(0, nbformat.v4.new_code_cell(watch))
        client = nbclient.NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            allow_errors=True,
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute()
        check_outputs(notebook)
        return notebook

    return execute


#: Do not draw a figure to find its margins, which the layout has found, before it is drawn.
DRAWN_ONCE = """
get_ipython().config.InlineBackend.print_figure_kwargs = {"bbox_inches": None}
"""
#: Measure the products that `cupybnn bench --quick` does, a few times each.
BRIEFLY = """
import gc
from cupybnn.benchmark import record
from measuring import briefly
brief = briefly()
brief.__enter__()
gc.freeze()  # garbage is collected before each measurement: what is there already is none
shapes = record.shapes
record.shapes = lambda gpu, quick: shapes(gpu, True)
"""
#: A twentieth of MNIST, so that evaluations, which take most of the time, are short.
FEWER_IMAGES = """
import dataclasses
import cupybnn.data
load = cupybnn.data.load

def fewer(*which):
    whole = load(*which)
    assert len(whole.train_labels) == 60_000
    parts = {"train_images": 3000, "train_labels": 3000, "test_images": 500, "test_labels": 500}
    kept = {name: getattr(whole, name)[:count] for name, count in parts.items()}
    return dataclasses.replace(whole, **kept)

cupybnn.data.load = fewer
"""
#: An eighth of the steps; all of them are made on the bundled digits.
FEWER_STEPS = """
import cupybnn
config = cupybnn.TrainConfig

def fewer_steps(**settings):
    counts = {name: settings[name] // 8 for name in ("max_steps", "eval_every_n")}
    return config(**settings | counts)

cupybnn.TrainConfig = fewer_steps
"""


def test_there_are_six():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_of_one_run_from_the_top(path):
    notebook = read(path)
    nbformat.validate(notebook)
    check_outputs(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    pictures = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 4
    assert path.stat().st_size <= LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_a_clean_kernel(path, run):
    notebook = run(path, BRIEFLY if path.name[:2] == "02" else "")
    committed = read(path)
    assert len(outputs(notebook)) >= len([c for c in committed.cells if "plt.subplots" in c.source])
    if path.name[:2] in ("04", "05", "06"):
        assert "digits on cpu" in "".join(map(text_of, outputs(notebook)))


@pytest.mark.slow
@pytest.mark.parametrize("number", ["04", "05"])
def test_runs_on_mnist(number, run, mnist_dir, tmp_path):
    from cupybnn import data

    mnist = data.load("mnist", mnist_dir)
    arrays = {
        f"{part}_{kind}": getattr(mnist, f"{part}_{kind}")
        for part in ("train", "test")
        for kind in ("images", "labels")
    }
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "mnist_784.npz", allow_pickle=False, **arrays)
    (path,) = FOLDER.glob(f"{number}_*.ipynb")
    notebook = run(path, FEWER_IMAGES + FEWER_STEPS)
    assert "mnist on cpu" in "".join(map(text_of, outputs(notebook)))


def test_a_legend_on_the_data_is_found():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from legends import covering

    def check(draw: Any, place: str) -> list[str]:
        figure, axes = plt.subplots()
        draw(axes)
        axes.axhline(0.5)
        axes.set(xlim=(0, 1), ylim=(0, 1), title="one")
        axes.legend(loc=place)
        figure.canvas.draw()
        found = covering(figure)
        plt.close(figure)
        return found

    def rising(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], label="rising")

    def point(axes: Any) -> None:
        axes.plot([0.1], [0.95], "o", label="point")

    def bar(axes: Any) -> None:
        axes.bar([0.1], [0.97], 0.1, label="bar")

    for draw, under, beside in (
        (rising, "center", "upper left"),
        (point, "upper left", "lower left"),
        (bar, "upper left", "upper right"),
    ):
        assert check(draw, under) == ["the legend of 'one' covers what is shown"]
        assert check(draw, beside) == []


def test_the_checks_can_fail():
    def notebook(output: Any) -> Any:
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])

    new = nbformat.v4.new_output
    check_outputs(notebook(new("stream", name="stdout", text="784 / 2, and/or, a/b, ../data")))
    for bad in (
        new("stream", name="stdout", text="Looked in /home/someone/.cache"),
        new("stream", name="stdout", text=r"C:\Users\someone"),
        new("stream", name="stderr", text="a warning"),
        new("display_data", data={"text/plain": f"'{ROOT}/x'"}),
        new("error", ename="ValueError", evalue="no", traceback=[]),
    ):
        with pytest.raises(AssertionError):
            check_outputs(notebook(bad))
