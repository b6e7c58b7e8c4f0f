"""One rank of several measurements: ``python -m cupybnn.benchmark.scaling.worker TASKS``."""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import numpy as np

from cupybnn import parallel
from cupybnn.backends.devices import Device, resolve
from cupybnn.benchmark.scaling import ours
from cupybnn.parallel import Ranks

__all__ = ["main"]


def main(text: str) -> None:
    """Measure what the JSON list `text` describes; rank 0 prints a JSON object for each.

    All tasks are of the same library, device and number of ranks.
    """
    tasks = json.loads(text)
    first = tasks[0]
    with parallel.connect(first["device"], seconds=first.get("timeout", 60.0)) as ranks:
        device = resolve(ranks.device if ranks.size > 1 else first["device"])
        with device.scope(), np.errstate(all="ignore"):
            if first["library"] == "PyTorch":
                from cupybnn.benchmark.scaling import peer

                with peer.connected(ranks, device):
                    _measure_all(ranks, tasks, device, peer.measure)
            else:
                _measure_all(ranks, tasks, device, ours.measure)


def _measure_all(ranks: Ranks, tasks: list[dict[str, Any]], device: Device, measure: Any) -> None:
    for task in tasks:
        began = time.perf_counter()
        row = measure(ranks, task, device)
        gc.collect()  # what this one held on the device
        if ranks.rank == 0:
            row["took"] = time.perf_counter() - began
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
