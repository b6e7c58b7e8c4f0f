"""``cupybnn evaluate``: a trained network's accuracy, and what it confuses."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.cli import models
from cupybnn.cli.outputs import check_chart
from cupybnn.errors import DataError, SettingError
from cupybnn.paths import user_path

if TYPE_CHECKING:
    from cupybnn.data import Dataset
    from cupybnn.deploy import PackedNetwork

__all__ = ["add_parser", "run"]

#: Data that a packed network, which knows no more than its inputs, is evaluated on.
_BY_FEATURES = {8 * 8: "digits", 28 * 28: "mnist"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of ``cupybnn evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a trained network on labeled images",
        description=(
            "Predict the test images of a data set and print accuracy, loss (mean cross-entropy), "
            "precision and recall of each class, and the confusion matrix."
        ),
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a run folder, a checkpoint, or a packed network (.npz)"
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        help="mnist, fashion, digits, or a folder with MNIST's four IDX files; default: the data "
        "of the run, or what the network's classes say, and mnist otherwise",
    )
    parser.add_argument(
        "--chart",
        metavar="FILE",
        type=user_path,
        help="draw FILE.svg and FILE.png: the confusion matrix and the worst mistakes (needs "
        "matplotlib)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    models.add_options(parser, "auto")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    if args.chart is not None:
        from cupybnn.benchmark.chart import needs_matplotlib

        check_chart(args.chart)
        needs_matplotlib()
    network = models.opened(args)
    data = _data(args, network)
    images = data.test_images
    if network.inputs.pixel_max is None and data.pixel_max is not None:
        images = np.multiply(images, np.float32(1 / data.pixel_max), dtype=np.float32)
    report = network.evaluate(images, network.classes[data.test_labels])
    if args.json:
        about = {"model": args.model, "data": data.name, "device": str(network.device)}
        print(json.dumps({**about, **report.to_dict()}, indent=1))
    else:
        print(f"Data: {data.name}, {len(data.test_labels):,} test images; {network!r}")
        print(report)
    if args.chart is not None:
        from cupybnn.cli import evaluation_chart

        for file in evaluation_chart.draw(report, data, args.chart):
            print(f"wrote {file}", file=sys.stderr)
    return 0


def _data(args: argparse.Namespace, network: PackedNetwork) -> Dataset:
    from cupybnn import data
    from cupybnn.data import fashion

    name, folder = _named(args) if args.data is None else _chosen(args.data)
    if name == "auto":
        name = _by_inputs(args, network)
    # The files of both have the same names; a packed network knows what it tells apart.
    named = args.data in data.DATASETS
    if not named and name == "mnist" and tuple(network.classes) == fashion.CLASS_NAMES:
        name = "fashion"
    found = data.load(name, folder, notify=_say)
    shape = network.inputs.image_shape or (network.inputs.features,)
    if network.inputs.features != found.features or len(network.classes) != found.classes:
        raise DataError(
            f"The network takes images of {'×'.join(map(str, shape))} pixels in "
            f"{len(network.classes)} classes; those of {found.name} have "
            f"{'×'.join(map(str, found.image_shape or (found.features,)))} in {found.classes}. "
            f"Name its data: cupybnn evaluate {args.model} DATA."
        )
    return found


def _by_inputs(args: argparse.Namespace, network: PackedNetwork) -> str:
    """Return the data whose images have as many pixels as a packed network takes."""
    features, classes = network.inputs.features, len(network.classes)
    if features not in _BY_FEATURES or classes != 10:
        raise SettingError(
            f"The data of a network with {features} inputs and {classes} classes must be named, "
            f"because neither mnist nor digits fits. For a folder with four IDX files: cupybnn "
            f"evaluate {args.model} FOLDER; for arrays, call PackedNetwork.evaluate from Python."
        )
    return _BY_FEATURES[features]


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _chosen(data: str) -> tuple[str, Any]:
    """Return name and folder of the data that the command line names."""
    from cupybnn.data import DATASETS

    return (data, None) if data in DATASETS else ("mnist", data)


def _named(args: argparse.Namespace) -> tuple[str, Any]:
    """Return name and folder of the data that the run names; "auto" where there is no run."""
    from cupybnn.data import DATASETS
    from cupybnn.deploy.opening import is_packed_file
    from cupybnn.training import checkpoint
    from cupybnn.training.restore import stored_config
    from cupybnn.training.saved import checkpoint_file

    if is_packed_file(args.model):
        return "auto", None
    info = checkpoint.load_info(checkpoint_file(args.model, args.which or "newest"))
    config, name = stored_config(info), info.get("dataset")
    folder = config.data_dir
    if folder is None and name not in DATASETS:
        raise SettingError(
            f"The run must have been trained on mnist, fashion, digits or a folder for its data "
            f"to be loaded; got {name!r}. Name the data: cupybnn evaluate {args.model} DATA, or "
            f"call PackedNetwork.evaluate from Python."
        )
    if folder is not None:
        return "fashion" if config.dataset == "fashion" else "mnist", folder
    return str(name), None
