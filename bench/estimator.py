"""Compare BinaryMLPClassifier with scikit-learn's MLPClassifier, and make the README's table.

    python bench/estimator.py digits
    python bench/estimator.py digits mnist --data FOLDER --json FILE

Each estimator has its defaults but for what its name in the table says. The data are split as
``cupybnn.data.load`` splits them. MLPClassifier gets pixels from 0 to 1, since it does not scale
its input; BinaryMLPClassifier gets them as they are. The time is that of ``fit``. Sizes are those
of the first seed: of ``pickle.dumps`` and, for a binarized network, of the file that
``to_packed().save`` writes. The deviation is the sample standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from cupybnn import BinaryMLPClassifier
from cupybnn.data import Dataset, load
from cupybnn.files import atomic_write
from cupybnn.machine import describe

ESTIMATORS: dict[str, Callable[..., Any]] = {
    "BinaryMLPClassifier()": BinaryMLPClassifier,
    'BinaryMLPClassifier(binarize="all", scaling="max")': lambda **seed: BinaryMLPClassifier(
        binarize="all", scaling="max", **seed
    ),
    "MLPClassifier()": MLPClassifier,
}


def measure(name: str, data: Dataset, seed: int) -> dict[str, Any]:
    """Fit one estimator, and return its accuracy, seconds, iterations and sizes."""
    estimator = ESTIMATORS[name](random_state=seed)
    x, test = data.train_images, data.test_images
    if isinstance(estimator, MLPClassifier):
        x, test = x / data.pixel_max, test / data.pixel_max
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(x, data.train_labels)
    seconds = time.perf_counter() - start
    packed = None
    if isinstance(estimator, BinaryMLPClassifier):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "net.npz"
            estimator.to_packed().save(file)
            packed = file.stat().st_size
    return {
        "seed": seed,
        "accuracy": float(estimator.score(test, data.test_labels)),
        "seconds": seconds,
        "iterations": estimator.n_iter_,
        "pickle_bytes": len(pickle.dumps(estimator)),
        "packed_bytes": packed,
    }


def row(data: str, name: str, runs: list[dict[str, Any]]) -> str:
    """Return a row of the table: mean and deviation of the accuracy, median time, sizes."""
    accuracies = [run["accuracy"] for run in runs]
    deviation = f" ± {statistics.stdev(accuracies):.4f}" if len(runs) > 1 else ""
    packed = runs[0]["packed_bytes"]
    sizes = [
        f"{size / 1000:,.0f} kB" if size else "–" for size in (runs[0]["pickle_bytes"], packed)
    ]
    return (
        f"| {data} | `{name}` | {statistics.fmean(accuracies):.4f}{deviation} | "
        f"{statistics.median(run['seconds'] for run in runs):.1f} s | {' | '.join(sizes)} |"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure the estimators on the given data sets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", nargs="+", choices=("digits", "mnist"), metavar="DATASET")
    parser.add_argument("--data", metavar="DIR", help="folder with MNIST's four IDX files")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (3)")
    parser.add_argument("--images", type=int, metavar="N", help="fit the first N images alone")
    parser.add_argument("--json", metavar="FILE", help="write every run and the machine")
    args = parser.parse_args(arguments)
    record: dict[str, Any] = {
        "kind": "estimator",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(),
        "images": args.images,
        "runs": {},
    }
    print("| data | estimator | accuracy | fit | pickle | packed file |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for dataset in args.dataset:
        data = load(dataset, args.data if dataset == "mnist" else None)
        if args.images is not None:
            images, labels = data.train_images[: args.images], data.train_labels[: args.images]
            data = dataclasses.replace(data, train_images=images, train_labels=labels)
        for name in ESTIMATORS:
            runs = record["runs"].setdefault(dataset, {})[name] = []
            for seed in range(args.seeds):
                runs.append(measure(name, data, seed))
                print(f"{dataset}, {name}: {runs[-1]}", file=sys.stderr, flush=True)
            print(row(dataset, name, runs), flush=True)
    if args.json:
        with atomic_write(args.json) as file:
            file.write((json.dumps(record, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
