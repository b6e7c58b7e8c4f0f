"""Measure the training steps of every size and variant and collect the results in one record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupybnn.backends.devices import Device
from cupybnn.benchmark.clock import Clock, make_clock
from cupybnn.benchmark.methods import summarize_error
from cupybnn.benchmark.record import new_record
from cupybnn.benchmark.sizes import measure_sizes
from cupybnn.benchmark.training import ours
from cupybnn.benchmark.training.variants import Size, Variant, measure
from cupybnn.data import Dataset

__all__ = [
    "CLASSES",
    "FEATURES",
    "compare",
    "random_images",
    "run",
    "sizes_for",
    "variants_for",
]

#: The data have MNIST's shape.
FEATURES, CLASSES = 784, 10
#: The original program's table: 512 units in each hidden layer.
TABLE = tuple(Size(512, batch) for batch in (512, 1024, 2048, 4096, 8192))
WIDE = (Size(1024, 1024), Size(4096, 4096), Size(8192, 8192))
QUICK = (Size(512, 1024), Size(4096, 4096))
CPU = (Size(512, 128), Size(1024, 1024))

METHOD = {
    "network": (
        "784-H-H-H-10, weights of layers 2 and 3 and activations of layers 1 and 2 binary "
        "(hard-tanh straight-through gradient), batch norm after each hidden product, softmax "
        "cross-entropy, Adam, latent weights clipped to [-1, 1]; same loss and gradients in PyTorch"
    ),
    "data": "random bytes and labels of MNIST's shape, 60000 x 784, on the device",
    "timing": (
        "consecutive groups of at least 20 ms of steps (CPU: at least one step) between CUDA "
        "events (CPU: the clock), after a warm-up; the host never waits for the device, and its "
        "time counts if it is slower; median and average over groups; on a CPU, measured up to "
        "three times while other programs use more than a fifth of a processor "
        "(others_processors), and not compared if they still do, because they slow down threads "
        "that wait for each other far more than in proportion"
    ),
    "memory": (
        "decrease in the driver's free memory since before the variant was set up, the maximum "
        "after setup, warm-up and timing, including libraries' pools, which are emptied first; "
        "pool_bytes is the library's own figure: the growth of CuPy's pool, PyTorch's "
        "max_memory_allocated"
    ),
    "kernels": (
        "medians, by CUDA events around each launch of a step without the graph, behind a backlog "
        "that also flushes the L2 cache; unlike in the graph, nothing runs concurrently, and an "
        "event costs about a microsecond"
    ),
}


def sizes_for(device: Device, quick: bool) -> tuple[Size, ...]:
    """Return the sizes that are measured on a kind of device."""
    if device.kind == "cpu":
        return CPU[:1] if quick else CPU
    return QUICK if quick else (*TABLE, *WIDE)


def variants_for(device: Device, quick: bool) -> tuple[list[Variant], list[str]]:
    """Return the variants for a kind of device, and a sentence if the peer is not measured."""
    mine = ours.variants(device, quick)
    try:
        import torch

        from cupybnn.benchmark.training import peer
    except Exception as error:  # a broken installation counts as missing
        return mine, [f"PyTorch is not measured: {summarize_error(error)}"]
    if device.kind == "cuda" and not torch.cuda.is_available():
        return mine, [f"PyTorch {torch.__version__} is not measured: it sees no GPU."]
    return mine + peer.variants(device, quick), []


def random_images(images: int = 60000) -> Dataset:
    """Return random bytes in the shape of MNIST, with random labels."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, FEATURES), dtype=np.uint8)
    labels = random.integers(0, CLASSES, images, dtype=np.uint8)
    return Dataset("mnist", pixels, labels, pixels[:100], labels[:100], (28, 28), 255)


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
        Called before each variant is measured, with its name and the total number of variants.
    progress : callable(record, done), optional
        Called after the record is started ("begun") and after a size is added to it ("size").

    Returns
    -------
    dict
        JSON values; times in seconds.
    """
    report = progress or (lambda record, done: None)
    with device.scope():
        began = time.perf_counter()
        variants, notes = variants_for(device, quick)
        record = new_record("train", device, quick, notes)
        record |= {"method": METHOD, "sizes": []}
        report(record, "begun")
        clock = make_clock(device)
        data = random_images()
        if device.kind == "cuda":
            _first_uses(variants, device, data, clock)
        chosen = sizes_for(device, quick) if sizes is None else sizes
        budget = 0.1 if quick else 0.3
        if device.kind == "cpu":  # noisier, and steps are long
            budget *= 10

        def one(variant: Variant, size: Size) -> dict[str, Any]:
            return measure(variant, size, device, data, clock, budget)

        def compared(rows: Sequence[dict[str, Any]], is_disturbed: bool) -> dict[str, Any]:
            found = compare(rows)
            if is_disturbed:
                found |= {"xnor_over_matmul": {}, "over_pytorch": None}
            return found

        measure_sizes(
            record, device, chosen, variants, one, compared,
            began=began, starting=starting, report=report,
        )  # fmt: skip
    return record


def _first_uses(variants: Sequence[Variant], device: Device, data: Dataset, clock: Clock) -> None:
    """Let each library load and allocate what it keeps, so that no variant is charged for it."""
    for variant in variants:
        if "graph" not in variant.how:
            measure(variant, Size(64, 64), device, data, clock, 0)


def compare(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest row of each kind and their ratios.

    Returns
    -------
    dict
        "best": the index of the fastest row, by median, of "xnor", "matmul" (both ours) and
        "PyTorch", if there is one; "xnor_over_matmul": ratio of ex/s by precision, for captured
        fused steps if there are any, and, as "best", of the fastest rows; "over_pytorch" and
        "memory_of_pytorch": ratios of our fastest row to PyTorch's fastest, None without one;
        "rounded_over_pytorch": the ratio by product of rows with rounded gradients, which the
        others do not include.
    """
    done = [(i, row) for i, row in enumerate(rows) if "error" not in row]

    def rate(i: int) -> float:
        return float(rows[i]["examples_per_second"]["median"])

    def best(wanted: Callable[[dict[str, Any]], bool]) -> int | None:
        return max((i for i, row in done if wanted(row)), key=rate, default=None)

    found = {
        "xnor": best(lambda r: r["library"] == "cupybnn" and r["product"] == "xnor"),
        "matmul": best(lambda r: r["library"] == "cupybnn" and r["product"] == "matmul"),
        "PyTorch": best(lambda r: r["library"] == "PyTorch"),
    }
    ratios: dict[str, float] = {}
    pairs = {
        (r["product"], r["how"], r["precision"]): i for i, r in done if r["library"] != "PyTorch"
    }
    for (product, how, precision), i in pairs.items():
        other = pairs.get(("xnor", how, precision))
        if product == "matmul" and other is not None and precision not in ratios:
            ratios[precision] = rate(other) / rate(i)
    xnor, matmul, torch = found["xnor"], found["matmul"], found["PyTorch"]
    if xnor is not None and matmul is not None:
        ratios["best"] = rate(xnor) / rate(matmul)
    mine = max((i for i in (xnor, matmul) if i is not None), key=rate, default=None)
    over = memory = None
    if mine is not None and torch is not None:
        over = rate(mine) / rate(torch)
        if rows[torch]["memory_bytes"]:
            memory = rows[mine]["memory_bytes"] / rows[torch]["memory_bytes"]
    return {
        "best": {name: i for name, i in found.items() if i is not None},
        "xnor_over_matmul": ratios,
        "over_pytorch": over,
        "memory_of_pytorch": memory,
        "rounded_over_pytorch": {
            row["product"]: rate(i) / rate(torch)
            for i, row in done
            if torch is not None and row["product"] in ours.ROUNDED
        },
    }
