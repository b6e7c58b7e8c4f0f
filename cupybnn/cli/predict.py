"""``cupybnn predict``: the classes of pictures, by a trained network."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.backends.devices import CPU, to_device
from cupybnn.cli import models
from cupybnn.cli.streams import complain
from cupybnn.errors import DataError, SettingError

if TYPE_CHECKING:
    from cupybnn.deploy import PackedNetwork
    from cupybnn.deploy.reading import Images

__all__ = ["add_parser", "run"]

_NAMED = 3  # files that a line names; of others it says how many


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of ``cupybnn predict``."""
    parser = subparsers.add_parser(
        "predict",
        help="say which class a picture shows",
        description=(
            "Print a line for each image: its file, the most probable class and its probability. "
            "Pictures may be gray or color, of any size, dark on light or light on dark. They are "
            "made like MNIST's images: the ink is cut out, scaled to a box of 20x20 pixels and "
            "centred. Arrays (.npy, IDX) of the network's own shape are taken as they are. The "
            "exit code is 1 if a file cannot be read; the others are predicted all the same."
        ),
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a run folder, a checkpoint, or a packed network (.npz)"
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="PNG, JPEG, .npy, IDX (also .gz), or - for an image on standard input",
    )
    parser.add_argument(
        "--invert",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether pictures are dark on light; auto: their borders decide (default)",
    )
    parser.add_argument(
        "--top", type=int, default=1, metavar="N", help="print the N most probable classes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    models.add_options(parser, "cpu")


def run(args: argparse.Namespace) -> int:
    """Print the predictions; return 1 if a file could not be read."""
    from cupybnn.deploy.reading import read_images

    if args.top < 1:
        raise SettingError(f"The '--top' must be 1 or more; got {args.top}.")
    if not args.files:  # argparse takes "--" out of them
        raise SettingError("At least one file must be named; one that is called -- is ./--.")
    if args.files.count("-") > 1:
        raise SettingError("Standard input, '-', must be among the files once at most.")
    network = models.opened(args)
    assumed: dict[bool, list[str]] = {True: [], False: []}
    failed = False
    separator = "["
    for file in args.files:
        name = "standard input" if file == "-" else file
        source = sys.stdin.buffer if file == "-" else file
        try:
            images = read_images(source, network.inputs, args.invert)
        except DataError as error:
            complain(f"cupybnn predict: {error}".replace("<stdin>", name))
            failed = True
            continue
        for picture in images.pictures:
            assumed[picture.inverted].append(name)
        for record in _predicted(network, images, name, args.top):
            if args.json:
                print(f"{separator}{json.dumps(record)}", end="")
                separator = ",\n "
            else:
                print(_line(record))
    if args.json:
        print("]" if separator != "[" else "[]")
    if args.invert == "auto":
        _tell(assumed)
    return int(failed)


def _predicted(
    network: PackedNetwork, images: Images, name: str, top: int
) -> Iterator[dict[str, Any]]:
    """Yield a record for each image: its name and the most probable classes."""
    inputs = to_device(images.inputs, network.device)
    logits = np.asarray(to_device(network(inputs), CPU), np.float64)
    with np.errstate(all="ignore"):  # a network may have learned NaN
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
    classes = network.classes.tolist()
    # Of equal logits the first one counts, as in `predict`.
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    for i, best in enumerate(order):
        record: dict[str, Any] = {"file": name}
        if not images.single:
            record["image"] = i
        if images.pictures:
            record["inverted"] = images.pictures[i].inverted
        record["classes"] = [
            {"class": classes[j], "probability": float(p) if math.isfinite(p) else None}
            for j, p in zip(best, shares[i, best], strict=True)
        ]
        yield record


def _line(record: dict[str, Any]) -> str:
    name = record["file"] + (f"[{record['image']}]" if "image" in record else "")
    cells = [name]
    for found in record["classes"]:
        probability = found["probability"]
        cells.append(f"{found['class']} {'nan' if probability is None else f'{probability:.4f}'}")
    return "  ".join(cells)


def _tell(assumed: dict[bool, list[str]]) -> None:
    """Say on standard error which pictures were taken for dark on light, which for the contrary."""
    parts = []
    for inverted, what in ((True, "dark on light"), (False, "light on dark")):
        names = list(dict.fromkeys(assumed[inverted]))
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{what}: {', '.join(names[:_NAMED])}{more}")
    if parts:
        complain(f"Assumed {'; '.join(parts)}. Decide with --invert yes or no.")
