"""Options of the commands that open a trained network."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cupybnn.deploy import PackedNetwork

__all__ = ["add_options", "add_which", "opened"]


def add_which(parser: argparse.ArgumentParser) -> None:
    """Add ``--which``."""
    parser.add_argument(
        "--which",
        choices=("newest", "best"),
        help="checkpoint of a run folder (default newest)",
    )


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    """Add ``--which`` and ``--device``, whose default is `device`."""
    add_which(parser)
    parser.add_argument(
        "--device",
        metavar="D",
        default=device,
        help=f"auto, cpu, cuda or cuda:N (default {device})",
    )


def opened(args: argparse.Namespace) -> PackedNetwork:
    """Open the network that the options name."""
    from cupybnn.deploy import open_network

    return open_network(args.model, which=args.which, device=args.device)
