"""Measure the predictions of every size and variant and keep what was found as one record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from cupybnn.backends.devices import Device
from cupybnn.benchmark.clock import make_clock
from cupybnn.benchmark.inference import ours
from cupybnn.benchmark.inference.network import CLASSES, FEATURES, Network, random_inputs
from cupybnn.benchmark.inference.variants import COMPARED, Variant, measure
from cupybnn.benchmark.methods import summarize_error
from cupybnn.benchmark.record import new_record
from cupybnn.benchmark.sizes import measure_sizes
from cupybnn.benchmark.training.variants import Size

__all__ = ["CLASSES", "FEATURES", "compare", "run", "sizes_for", "variants_for"]

GPU = (
    *(Size(512, b) for b in (1, 64, 1024)),
    *(Size(4096, b) for b in (1, 16, 64, 1024, 8192, 65_536)),
)
GPU_QUICK = tuple(Size(h, b) for h in (512, 4096) for b in (1, 64, 1024))
CPU = tuple(Size(h, b) for h in (512, 4096) for b in (1, 256))

METHOD = {
    "network": (
        "784-H-H-H-10, real first and last weights, binary hidden weights and activations, batch "
        "norm and sign after each hidden product; random parameters and inputs, chosen so that "
        "every order of summation gives the same logits. 'binary first': the same sizes with a "
        "binary first layer. The others multiply dense matrices in either case"
    ),
    "call": (
        "net(x) in a Python loop, results on the device: groups of at least 20 ms of calls "
        "between CUDA events (CPU: the clock) after a warm-up; the host never waits for the "
        "device, and where it lags its time counts; inputs are pixels, of a byte each, on the "
        "device, which each library scales. "
        "PyTorch's graphs are replayed alone: no input is copied to where they read"
    ),
    "device": "time of a call on the device while its queue is full, by CUDA events",
    "comparison": (
        f"the first {COMPARED} logits of what was timed with products in float64; ours must be "
        f"equal, of the others the share of equal classes is given"
    ),
    "disturbance": (
        "a CPU is measured up to three times while other programs use more than a fifth of a "
        "processor (others_processors), and not compared if they still do"
    ),
}


def sizes_for(device: Device, quick: bool) -> tuple[Size, ...]:
    """Return the sizes that are measured on a kind of device."""
    if device.kind == "cpu":
        return CPU[:2] if quick else CPU
    return GPU_QUICK if quick else GPU


def variants_for(device: Device, quick: bool) -> tuple[list[Variant], list[str]]:
    """Return what is measured on a kind of device, and a sentence for each peer left out."""
    found, notes = ours.variants(device), []
    # An installation that is broken counts as none.
    try:
        import torch

        from cupybnn.benchmark.inference import torch_peer

        if device.kind == "cuda" and not torch.cuda.is_available():
            notes.append(f"PyTorch {torch.__version__} is not measured: it sees no GPU.")
        else:
            found += torch_peer.variants(device, quick)
    except Exception as error:
        notes.append(f"PyTorch is not measured: {summarize_error(error)}")
    if device.kind == "cpu":
        try:
            from cupybnn.benchmark.inference import onnx_peer

            found += onnx_peer.variants(device)
        except Exception as error:
            notes.append(f"onnxruntime is not measured: {summarize_error(error)}")
    return found, notes


def run(
    device: Device,
    *,
    quick: bool = False,
    sizes: Sequence[Size] | None = None,
    starting: Callable[[str, int], None] | None = None,
    progress: Callable[[dict[str, Any], str], None] | None = None,
) -> dict[str, Any]:
    """Measure and return the record.

    Parameters
    ----------
    device : Device
    quick : bool
        Fewer sizes and variants, shorter timing.
    sizes : sequence of Size, optional
        Instead of those of `sizes_for`.
    starting : callable(name, total), optional
        Called with each variant's name before it is measured, and with how many there are in all.
    progress : callable(record, done), optional
        Called when the record was begun ("begun") and when a size was added to it ("size").

    Returns
    -------
    dict
        Plain JSON values; times in seconds.
    """
    report = progress or (lambda record, done: None)
    with device.scope():
        began = time.perf_counter()
        variants, notes = variants_for(device, quick)
        record = new_record("infer", device, quick, notes)
        record |= {"method": METHOD, "sizes": []}
        report(record, "begun")
        clock = make_clock(device)
        chosen = sizes_for(device, quick) if sizes is None else sizes
        budget = 0.05 if quick else 0.2
        if device.kind == "cpu":  # other programs disturb more there
            budget *= 5

        @lru_cache(maxsize=2)  # sizes of one width follow each other
        def network_of(hidden: int, binary_first: bool) -> Network:
            return Network.random(hidden, binary_first=binary_first)

        @lru_cache(maxsize=2)
        def expected_of(size: Size, binary_first: bool) -> tuple[Any, Any]:
            x = random_inputs(size.batch)
            return x, network_of(size.hidden, binary_first).logits(x[:COMPARED])

        def one(variant: Variant, size: Size) -> dict[str, Any]:
            network = network_of(size.hidden, variant.binary_first)
            x, expected = expected_of(size, variant.binary_first)
            return measure(variant, network, x, expected, device, clock, budget)

        def compared(rows: Sequence[dict[str, Any]], is_disturbed: bool) -> dict[str, Any]:
            return {
                "over": {} if is_disturbed else compare(rows),
                "over_binary_first": {} if is_disturbed else compare(rows, True),
            }

        measure_sizes(
            record, device, chosen, variants, one, compared,
            began=began, starting=starting, report=report,
        )  # fmt: skip
    return record


def compare(rows: Sequence[dict[str, Any]], binary_first: bool = False) -> dict[str, float]:
    """Return how many times as fast as each other library ours is, by the fastest median calls.

    Parameters
    ----------
    rows : sequence of dict
    binary_first : bool
        Which network of ours is compared.
    """
    fastest: dict[str, float] = {}
    for row in rows:
        ours = row["library"] == "cupybnn"
        if "error" not in row and not (ours and row.get("binary_first", False) != binary_first):
            median = row["call"]["median"]
            fastest[row["library"]] = min(median, fastest.get(row["library"], median))
    mine = fastest.pop("cupybnn", None)
    return {} if mine is None else {name: other / mine for name, other in fastest.items()}
