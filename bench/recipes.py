"""Run recipes with several seeds, each as ``cupybnn train``, and print a row for each.

    python bench/recipes.py digits
    python bench/recipes.py original tiny --json FILE -- FOLDER --device cuda
    python bench/recipes.py tiny --against EARLIER.json -- FOLDER
    python bench/recipes.py binarynet --at_a_time 2 -- FOLDER
    python bench/recipes.py binarynet --first 5 --seeds 3 --json FILE --add -- FOLDER

Arguments after ``--`` are passed to ``cupybnn train``: MNIST's folder, the device, ``--validation
N`` to choose settings. The accuracy is that after the last step; the time is that of the whole
command, including start-up, data, teachers and evaluations; with ``--at_a_time`` greater than 1,
of commands that share the machine. The deviation is the sample standard deviation over seeds.
``--against`` compares with an earlier record by Welch's test.

The record is written after each run, so that none is lost. With ``--add`` it keeps what it had:
other recipes, and other seeds with the same settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Any

from cupybnn.files import atomic_write
from cupybnn.machine import describe
from cupybnn.training import recipes

_FINAL = re.compile(r"^Final (?:test|validation) accuracy (\d\.\d+)", re.MULTILINE)
_TEACHER = re.compile(r"^Teacher .* accuracy (\d\.\d+)", re.MULTILINE)
_RATE = re.compile(r"^Med ex/s = ([\d.]+)", re.MULTILINE)
_DEVICE = re.compile(r"; device: (.+)$", re.MULTILINE)


def measure(recipe: str, seed: int, options: list[str], at_a_time: int = 1) -> dict[str, Any]:
    """Return accuracy, seconds and device of one run, and its teachers' accuracy."""
    command = [sys.executable, "-m", "cupybnn", "train", "--recipe", recipe, "--seed", str(seed)]
    start = time.perf_counter()
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    run = outcome(done.stdout)
    if done.returncode or run is None:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return {"seed": seed, **run, "seconds": seconds, "at_a_time": at_a_time}


def outcome(text: str) -> dict[str, Any] | None:
    """Return what the output of a run says of it; None if it did not come to its end."""
    accuracy, rate, device = (found.search(text) for found in (_FINAL, _RATE, _DEVICE))
    if accuracy is None or device is None:
        return None
    return {
        "accuracy": float(accuracy[1]),
        "teachers": [float(each) for each in _TEACHER.findall(text)],
        "examples_per_second": None if rate is None else float(rate[1]),
        "device": device[1],
    }


def add(record: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the runs of an earlier one that it does not replace.

    A recipe's earlier runs are dropped if its settings, or its teachers', have changed.
    """
    merged = dict(earlier["recipes"])
    for recipe, found in record["recipes"].items():
        before = merged.get(recipe, {"runs": []})
        kept = []
        if all(before.get(name) == found[name] for name in found if name != "runs"):
            seeds = {run["seed"] for run in found["runs"]}
            kept = [run for run in before["runs"] if run["seed"] not in seeds]
        runs = sorted(kept + found["runs"], key=lambda run: run["seed"])
        merged[recipe] = {**found, "runs": runs}
    return {**record, "recipes": merged}


def described(recipe: str) -> dict[str, Any]:
    """Return what a record says of a recipe, apart from its runs."""
    loaded = recipes.load(recipe)
    if loaded.teachers is None:
        return {"settings": loaded.settings}
    settings = recipes.load(loaded.teachers.recipe).settings
    return {
        "settings": loaded.settings,
        "teachers": {**asdict(loaded.teachers), "settings": settings},
    }


def read(path: str | None) -> dict[str, Any] | None:
    """Return the record in a file; None if there is no path, or no file."""
    if path is None or not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        record: dict[str, Any] = json.load(file)
    return record


def hardware(record: dict[str, Any]) -> tuple[str, ...]:
    """Return the machine of a record: the names of its processor and of its GPUs."""
    machine = record["machine"]
    return machine["cpu"], *(device["name"] for device in machine["devices"])


def write(path: str, record: dict[str, Any], adding: bool) -> None:
    """Write a record, or add it to the one that is there."""
    earlier = read(path) if adding else None
    if earlier is not None:
        record = add(record, earlier)
    with atomic_write(path) as out:
        out.write((json.dumps(record, indent=2) + "\n").encode())


def row(recipe: str, runs: list[dict[str, Any]]) -> str:
    """Return the recipe's row: mean and deviation of the accuracy, minimum and maximum time."""
    accuracies = [run["accuracy"] for run in runs]
    seconds = [run["seconds"] for run in runs]
    shared = max(run.get("at_a_time", 1) for run in runs)
    beside = f", {shared} at a time" if shared > 1 else ""
    mean = statistics.fmean(accuracies)
    deviation = statistics.stdev(accuracies) if len(runs) > 1 else math.nan
    return (
        f"| `{recipe}` | {mean:.4f} ± {deviation:.4f} | "
        f"{min(seconds):.0f} to {max(seconds):.0f} s a seed on {runs[0]['device']}{beside} |"
    )


def p_value(new: list[float], old: list[float]) -> float:
    """Return the probability of such a difference of means, or a greater one, by chance.

    Welch's two-sided test (The generalization of Student's problem, Biometrika 1947), which allows
    different deviations. NaN for a single run.
    """
    if min(len(new), len(old)) < 2:
        return math.nan
    errors = [statistics.variance(x) / len(x) for x in (new, old)]
    difference = statistics.fmean(new) - statistics.fmean(old)
    if sum(errors) == 0:
        return 1.0 if difference == 0 else 0.0
    t = abs(difference) / math.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / sum(
        e**2 / (len(x) - 1) for e, x in zip(errors, (new, old), strict=True)
    )
    # The integral of Student's density over angles, t = sqrt(freedom) tan(angle), is smooth.
    first, steps = math.atan(t / math.sqrt(freedom)), 2000
    width = (math.pi / 2 - first) / steps
    middles = (first + (i + 0.5) * width for i in range(steps))
    tail = width * sum(math.cos(angle) ** (freedom - 1) for angle in middles)
    gammas = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return min(1.0, 2 * tail * math.exp(gammas) / math.sqrt(math.pi))


def comparison(recipe: str, runs: list[dict[str, Any]], earlier: dict[str, Any]) -> str:
    """Return a sentence about a recipe and its runs in an earlier record."""
    if recipe not in earlier["recipes"]:
        return f"`{recipe}`: the earlier record does not have it"
    new = [run["accuracy"] for run in runs]
    old = [run["accuracy"] for run in earlier["recipes"][recipe]["runs"]]
    mean, before = statistics.fmean(new), statistics.fmean(old)
    return (
        f"`{recipe}`: {mean:.4f} instead of {before:.4f} ({mean - before:+.4f}), Welch's test of "
        f"{len(new)} and {len(old)} seeds: p = {p_value(new, old):.2g}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure the given recipes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", nargs="+", choices=recipes.names(), metavar="RECIPE")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of seeds (5)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first one (0)")
    parser.add_argument(
        "--at_a_time", type=int, default=1, metavar="N", help="run so many seeds side by side (1)"
    )
    parser.add_argument("--json", metavar="FILE", help="write every run and the machine")
    parser.add_argument("--add", action="store_true", help="keep the runs that FILE has")
    parser.add_argument("--against", metavar="FILE", help="compare with what --json wrote earlier")
    given = sys.argv[1:] if arguments is None else arguments
    at = given.index("--") if "--" in given else len(given)
    args, options = parser.parse_args(given[:at]), given[at + 1 :]
    earlier = None
    if args.against:
        with open(args.against, encoding="utf-8") as file:
            earlier = json.load(file)
    if args.add and args.json is None:
        parser.error("--add needs --json FILE, the record to add to")
    record: dict[str, Any] = {
        "kind": "recipes",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(),
        "options": ["FOLDER" if os.path.isdir(option) else option for option in options],
        "recipes": {},
    }
    there = read(args.json) if args.add else None
    if there is not None and hardware(there) != hardware(record):
        raise SystemExit(
            f"--add needs the machine of the record: {args.json} is of "
            f"{', '.join(hardware(there))}, and this is {', '.join(hardware(record))}."
        )
    for recipe in args.recipe:
        runs: list[dict[str, Any]] = []
        record["recipes"][recipe] = {**described(recipe), "runs": runs}
        seeds = range(args.first, args.first + args.seeds)
        with ThreadPoolExecutor(args.at_a_time) as pool:
            measured = partial(measure, options=options, at_a_time=args.at_a_time)
            for run in pool.map(partial(measured, recipe), seeds):
                runs.append(run)
                if args.json:
                    write(args.json, record, args.add)
                print(f"{recipe}, seed {run['seed']}: {run['accuracy']:.4f}", file=sys.stderr)
        print(row(recipe, runs), flush=True)
        if earlier is not None:
            print(comparison(recipe, runs, earlier), flush=True)


if __name__ == "__main__":
    main()
