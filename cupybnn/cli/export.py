"""``cupybnn export``: a trained network as a file for another program."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupybnn.cli import models
from cupybnn.errors import CheckpointError, SettingError
from cupybnn.extras import to_install
from cupybnn.files import is_stream
from cupybnn.paths import user_path

if TYPE_CHECKING:
    from cupybnn import nn
    from cupybnn.data import Dataset
    from cupybnn.deploy import PackedNetwork

__all__ = ["ENDINGS", "FORMATS", "Export", "add_parser", "open_network", "packed", "run"]

#: Formats that the name of a file decides, by its ending.
ENDINGS = {".npz": "npz", ".onnx": "onnx", ".h": "c"}
FORMATS = (*ENDINGS.values(), "qonnx")
_LONGEST_CLASS = 200  # characters

_DESCRIPTION = f"""\
Write a trained network to a file; in all formats but the last a binary weight
takes one bit.

  npz   for cupybnn.PackedNetwork.load
  onnx  for onnxruntime and other programs that read ONNX (needs onnx:
        {to_install("onnx")})
  c     a C99 header that needs no library
  qonnx for FINN and hls4ml, with weights as numbers; needs onnx, too"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``cupybnn export``."""
    parser = subparsers.add_parser(
        "export",
        help="write a trained network as .npz, ONNX or a C header",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
    )
    parser.add_argument("model", help="a run folder, a checkpoint or a packed network (.npz)")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the file to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="format of the file (by its name: .npz, .onnx or .h)",
    )
    models.add_which(parser)
    parser.add_argument(
        "--classes", metavar="A,B,...", type=_classes, help="names of the classes, in their order"
    )
    parser.add_argument(
        "--onnx_target",
        metavar="T",
        choices=("cpu", "cuda"),
        help="onnxruntime's provider that the ONNX file is for: cpu or cuda (cpu)",
    )
    parser.add_argument(
        "--onnx_input",
        metavar="I",
        choices=("pixels", "numbers"),
        help="what the ONNX file takes: pixels (uint8) or numbers (float32), scaled as in training "
        "(pixels if the network scales them)",
    )
    parser.add_argument(
        "--opset", metavar="N", type=int, help="version of ONNX's operators, 13 or newer (13)"
    )
    parser.add_argument(
        "--name", metavar="NAME", help="what names in the C header begin with (net)"
    )


def _classes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name.isprintable() or not 0 < len(name) <= _LONGEST_CLASS:
            raise argparse.ArgumentTypeError(
                f"must be names of 1 to {_LONGEST_CLASS} characters with commas between; got "
                f"{name!r}"
            )
    return names


#: Options that a single format has, and the names of their arguments.
_OF_FORMAT = {
    "onnx_target": ("onnx", "target"),
    "onnx_input": ("onnx", "inputs"),
    "opset": ("onnx", "opset"),
    "name": ("c", "name"),
}


@dataclass(frozen=True)
class Export:
    """A file that is to be written.

    Attributes
    ----------
    path : Path
    format : str
        One of `FORMATS`.
    options : dict
        Arguments of the format's method of `PackedNetwork`.
    """

    path: Path
    format: str
    options: dict[str, Any]

    @classmethod
    def of(cls, file: str, form: str | None = None, **given: Any) -> Export:
        """Check what was asked for, before there is a network.

        Parameters
        ----------
        file : str
        form : str, optional
            One of `FORMATS`; by default, what the name ends with decides.
        **given
            Options of `_OF_FORMAT`; None stands for one that was not given.

        Raises
        ------
        SettingError
            If the format is not known, an option does not go with it, or a package is missing.
        OSError
            If the file's folder does not exist.
        """
        path = user_path(file)
        if form is None:
            form = ENDINGS.get(path.suffix.lower())
        if form is None:
            *others, last = ENDINGS
            raise SettingError(
                f"The name of an exported file must end with {', '.join(others)} or {last}, which "
                f"decides its format, unless --format does; got {str(path)!r}."
            )
        options = {}
        for option, (owner, argument) in _OF_FORMAT.items():
            if (value := given.get(option)) is None:
                continue
            if owner != form:
                raise SettingError(
                    f"The option --{option} is for the format {owner}; got the format {form}."
                )
            options[argument] = value
        if not path.parent.is_dir():
            raise FileNotFoundError(f"The folder of the file to export, {path}, does not exist.")
        if form in ("onnx", "qonnx"):
            from cupybnn.deploy.onnx_graph import onnx_module

            onnx_module()
        return cls(path, form, options)

    def write(self, net: PackedNetwork) -> str:
        """Write a network, and return a line about the file.

        Raises
        ------
        SettingError
            If the format cannot hold the network.
        OSError
            If the file cannot be written.
        """
        from cupybnn.deploy import c_header, onnx_file, qonnx_file

        summary = net.summary()
        weights = sum(layer.inputs * layer.units for layer in net.layers)
        what, size = "packed network", None
        if self.format == "onnx":
            onnx_file.write(self.path, net, **self.options)
            what = f"ONNX for {self.options.get('target', 'cpu')}"
        elif self.format == "qonnx":
            qonnx_file.write(self.path, net)
            what = "QONNX"
        elif self.format == "c":
            size = c_header.write(self.path, net, **self.options)
            what = "C header"
        else:
            net.save(self.path)
        if size is not None:
            count = f"{size:,} bytes of tables"
        elif is_stream(self.path):
            return f"Wrote {self.path}: {what}"
        else:
            size = os.path.getsize(self.path)
            count = f"{size:,} bytes"
        return (
            f"Wrote {self.path}: {what}, {count}, {8 * size / weights:.3f} bits a weight "
            f"({summary.total('one_bit'):,} of {weights:,} weights are binary)"
        )


def run(args: argparse.Namespace) -> int:
    """Read the network, write the file, say so in a line; return the exit code."""
    options = {name: getattr(args, name) for name in _OF_FORMAT}
    export = Export.of(args.output, args.format, **options)
    net = open_network(args.model, args.which, args.classes)
    line = export.write(net)
    # Who exports into a pipe wants the file alone in it.
    print(line, file=sys.stderr if is_stream(export.path) else sys.stdout)
    return 0


def open_network(
    model: str, which: str | None = None, classes: list[str] | None = None
) -> PackedNetwork:
    """Open a run folder, a checkpoint or a packed network, on the CPU.

    Raises
    ------
    CheckpointError
        If it cannot be read or packed.
    SettingError
        If there are not as many classes as outputs.
    """
    from cupybnn import deploy

    net = deploy.open_network(model, which=which, device="cpu")
    if classes is None:
        return net
    try:
        return deploy.PackedNetwork(net.layers, net.inputs, classes)
    except ValueError as error:
        raise SettingError(str(error)) from error


def packed(model: nn.Module, dataset: Dataset) -> PackedNetwork:
    """Pack a model that takes the images of a data set.

    Raises
    ------
    CheckpointError
        If it cannot be packed.
    """
    from cupybnn.deploy import PackedNetwork

    with _one_kind_of_error():
        return PackedNetwork.from_model(
            model,
            pixel_max=dataset.pixel_max,
            image_shape=dataset.image_shape,
            classes=dataset.class_names,
        )


@contextlib.contextmanager
def _one_kind_of_error() -> Iterator[None]:
    """Raise what a model or a file makes impossible as errors that need no traceback."""
    try:
        yield
    except SettingError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
