"""The script that runs recipes with several seeds: its rows, records and comparisons."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from cupybnn.training import recipes, train


def bench_script():
    spec = importlib.util.spec_from_file_location("bench_recipes", ROOT / "bench/recipes.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_comparison_with_the_recipe_that_is_replaced(tmp_path):
    """Welch's test, against scipy's."""
    from scipy import stats

    script = bench_script()
    new, old = [0.9911, 0.9915, 0.9908], [0.9886, 0.9880, 0.9893, 0.9884, 0.9887]
    runs = [{"accuracy": a} for a in new]
    path = tmp_path / "old.json"
    path.write_text(
        json.dumps({"recipes": {"binarynet": {"runs": [{"accuracy": a} for a in old]}}})
    )
    expected = stats.ttest_ind(new, old, equal_var=False).pvalue
    assert script.p_value(new, old) == pytest.approx(expected, rel=1e-6)
    sentence = script.comparison("binarynet", runs, json.loads(path.read_text()))
    assert "0.9911 instead of 0.9886 (+0.0025)" in sentence
    assert f"p = {expected:.2g}" in sentence
    assert script.comparison("tiny", runs, json.loads(path.read_text())) == (
        "`tiny`: the earlier record does not have it"
    )
    assert script.p_value([0.5], old) != script.p_value([0.5], old)  # one run has no deviation
    assert script.p_value([0.5, 0.5], [0.5, 0.5]) == 1
    assert script.p_value([0.5, 0.5], [0.6, 0.6]) == 0


def test_row_of_a_recipe():
    script = bench_script()
    accuracies, seconds = (0.9859, 0.9831, 0.9746, 0.9803, 0.9775), (9.4, 9.0, 11.6, 10.0, 10.0)
    runs = [
        {"accuracy": accuracy, "seconds": time, "device": "cpu"}
        for accuracy, time in zip(accuracies, seconds, strict=True)
    ]
    # The sample standard deviation: 0.0040 would be that of these five as all there are.
    expected = "| `digits` | 0.9803 ± 0.0045 | 9 to 12 s a seed on cpu |"
    assert script.row("digits", runs) == expected
    assert "0.9859 ± nan" in script.row("digits", runs[:1])
    shared = [{**run, "at_a_time": 2} for run in runs]
    assert script.row("digits", shared).endswith("s a seed on cpu, 2 at a time |")


def test_what_the_output_of_a_run_says():
    text = """\
Teacher 1 of 2: recipe teacher, seed 0, test accuracy 0.9929, 3.1 s
Teacher 2 of 2: recipe teacher, seed 1, test accuracy 0.9927
Data: mnist, 60,000 training and 10,000 test images; device: cuda:0
step 0, loss = 4.0903, test accuracy 0.6555 (64.8 ex/s)
Final test accuracy 0.9919
Avg ex/s = 191700.7
Med ex/s = 494101.7
"""
    assert bench_script().outcome(text) == {
        "accuracy": 0.9919,
        "teachers": [0.9929, 0.9927],
        "examples_per_second": 494101.7,
        "device": "cuda:0",
    }
    assert bench_script().outcome(text.partition("Final")[0]) is None


def record_of(name: str, *seeds: int, settings: object = None, cpu: str = "a CPU") -> dict:
    runs = [{"seed": seed, "accuracy": seed / 10} for seed in seeds]
    found = {"settings": settings, "runs": runs}
    return {"machine": {"cpu": cpu, "devices": []}, "date": cpu, "recipes": {name: found}}


def test_runs_are_added_to_a_record():
    script = bench_script()
    earlier = record_of("tiny", 0, 1, 2)
    earlier["recipes"]["digits"] = {"settings": 1, "runs": []}
    both = script.add(record_of("tiny", 4, 1), earlier)
    assert [run["seed"] for run in both["recipes"]["tiny"]["runs"]] == [0, 1, 2, 4]
    assert both["recipes"]["digits"] == earlier["recipes"]["digits"]
    other = script.add(record_of("tiny", 4, settings={"lr": 1}), earlier)
    assert [run["seed"] for run in other["recipes"]["tiny"]["runs"]] == [4]
    assert script.described("binarynet")["teachers"]["settings"]["vat"] == 2.0


def test_a_record_of_another_machine_is_not_added_to(tmp_path):
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(record_of("tiny", 0, cpu="an abacus")))
    with pytest.raises(SystemExit, match=r"needs the machine of the record: .* is of an abacus"):
        bench_script().main(["digits", "--json", str(path), "--add"])


def test_bench_script_makes_a_row_and_a_record(tmp_path):
    path = tmp_path / "recipes.json"
    command = [sys.executable, str(ROOT / "bench/recipes.py"), "digits", "--seeds", "2"]
    command += ["--at_a_time", "2", "--first", "4", "--json", str(path), "--add"]
    command += ["--", "--max_steps", "3", "--n_hidden", "8", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    number = r"\d\.\d{4}"
    assert re.fullmatch(
        rf"\| `digits` \| {number} ± {number} \| \d+ to \d+ s a seed on cpu, 2 at a time \|\n",
        done.stdout,
    )
    record = json.loads(path.read_text(encoding="utf-8"))
    runs = record["recipes"]["digits"]["runs"]
    assert [run["seed"] for run in runs] == [4, 5]
    settings = {**recipes.load("digits").settings, "max_steps": 3, "n_hidden": 8, "device": "cpu"}
    assert runs[1]["accuracy"] == round(train(**settings, seed=5).final_accuracy, 4)
    assert record["machine"]["cpu"]
    assert record["options"][:2] == ["--max_steps", "3"]
