"""``cupybnn bench train --gpus``: what it measures, its record, tables and chart."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest

from cupybnn.backends.devices import CPU
from cupybnn.benchmark import record as records
from cupybnn.benchmark.scaling import chart, record, tables
from cupybnn.benchmark.training.variants import Size
from cupybnn.cli.main import main

SMALL = Size(64, 24)


def figures(task):
    """Stand in for a measurement: two ranks take 0.6 of one's time, PyTorch twice as long."""
    seconds = 1e-3 * task["batch"] / 24 * (1.2 if task["ranks"] == 2 else 1.0) / task["ranks"]
    seconds *= 2 if task["library"] == "PyTorch" else 1
    return {
        "how": "plain",
        "step": {"median": seconds, "min": seconds, "p90": seconds},
        "alone": seconds / 2,
        "exposed": seconds / 2,
        "examples_per_second": task["batch"] / seconds,
        "state_bytes": 4096 // task["ranks"],
    }


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.setattr(record.importlib.util, "find_spec", lambda name: name)  # "torch" is there
    tasks = []
    monkeypatch.setattr(record, "measure", lambda some: tasks.append(some) or map(figures, some))
    made = record.run(CPU, [1, 2, 4], sizes=[SMALL])
    # On one rank, weak and strong scaling are the same; on several, processes measure both.
    assert list(map(len, tasks)) == [1, 2, 2] * 2
    return made


def test_speedup_efficiency_and_ratio(scaling):
    rows = {(r["library"], r["kind"], r["ranks"]): r for r in scaling["rows"]}
    assert len(rows) == 2 * 2 * 3
    for kind in ("weak", "strong"):
        two = rows["cupybnn", kind, 2]
        assert two["batch"] == (48 if kind == "weak" else 24)
        assert two["speedup"] == pytest.approx(2 / 1.2)
        assert two["efficiency"] == pytest.approx(1 / 1.2)
        assert two["over_pytorch"] == pytest.approx(2)
        assert rows["cupybnn", kind, 1]["speedup"] == 1
        assert "over_pytorch" not in rows["PyTorch", kind, 2]


def test_tables_record_and_chart(scaling, tmp_path, capsys):
    path = tmp_path / "scaling.json"
    records.save(scaling, path)
    assert records.load(path) == scaling
    assert main(["bench", "train", "--from", str(path), "--chart", str(tmp_path / "chart")]) == 0
    out = capsys.readouterr().out
    assert "weak scaling: 784-64-64-64-10, 24 images a rank" in out
    assert "strong scaling: 784-64-64-64-10, 24 images in all" in out
    assert re.search(r"cupybnn, plain, float32 +2 +1.20 ms +40,000 +1.67 x +83 %", out)
    assert (tmp_path / "chart.svg").read_text().count("PyTorch, strong") == 1
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_a_failure_is_in_the_record_and_in_the_exit_code(monkeypatch, capsys):
    def failing(task):
        return {"error": "out of memory", "failed": True} if task["ranks"] == 2 else figures(task)

    monkeypatch.setattr(record, "measure", lambda tasks: map(failing, tasks))
    assert main(["bench", "train", "--ranks", "1,2", "--sizes", "64x24"]) == 1
    assert "cupybnn, 2 ranks: out of memory" in capsys.readouterr().out


def test_nothing_to_draw(scaling, tmp_path):
    empty = {**copy.deepcopy(scaling), "rows": []}
    with pytest.raises(ValueError, match="no steps to draw"):
        chart.draw(empty, tmp_path / "x")
    assert list(tables.summary(empty)) == []


def test_a_record_that_is_interrupted_has_what_was_measured(monkeypatch, tmp_path, capsys):
    def measure(tasks):
        for task in tasks:
            if task["ranks"] == 2 and task["kind"] == "strong":
                raise KeyboardInterrupt
            yield figures(task)

    monkeypatch.setattr(record, "measure", measure)
    path = tmp_path / "scaling.json"
    options = ["--ranks", "1,2", "--sizes", "64x24", "--json", str(path)]
    with contextlib.suppress(KeyboardInterrupt):
        main(["bench", "train", *options])
    rows = records.load(path)["rows"]
    found = [(r["kind"], r["ranks"]) for r in rows if r["library"] == "cupybnn"]
    assert found == [("weak", 1), ("weak", 2), ("strong", 1)]
    assert next(r for r in rows if r["ranks"] == 2)["speedup"] == pytest.approx(2 / 1.2)
    assert "1.67 x" in capsys.readouterr().out  # the table


def test_ranks_are_really_started_and_timed():
    """Those of all cases at once; after a case that fails, others are started for the rest."""
    weak, strong = (
        {**task, "images": 200, "seconds": 0.001}
        for task in record.tasks_for(CPU, [2], [SMALL], quick=True)
        if task["library"] == "cupybnn"
    )
    failing, again, found = record.measure([{**weak, "batch": 1}, weak, strong])
    assert failing["failed"]
    assert "must be at least their number" in failing["error"]
    for each in (again, found):
        assert "error" not in each, each
        assert each["how"] == each["alone_how"] == "plain"
        assert each["step"]["min"] <= each["step"]["median"] <= each["step"]["p90"]
        # Two layers' latent weights, mean and square of half the weights, packed in lines of 64
        # bits.
        assert each["state_bytes"] == 2 * 3 * 4 * (64 * 64 // 2)
    assert again["examples_per_second"] == 48 / again["step"]["median"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train", "--gpus", "1,999"], "'--gpus' must be at most the number of GPUs"),
        (["train", "--gpus", "1", "--ranks", "1"], "must not be given together"),
        (["infer", "--ranks", "1,2"], "'--ranks' must be given to 'bench train' only"),
    ],
)
def test_wrong_arguments(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("counts", ["0", "2,1", "1,,2", "one", ""])
def test_numbers_of_ranks(counts, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "train", "--ranks", counts])
    assert "must be increasing numbers, such as 1,2,4" in capsys.readouterr().err
