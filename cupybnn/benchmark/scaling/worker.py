"""One rank of one measurement: ``python -m cupybnn.benchmark.scaling.worker TASK``."""

from __future__ import annotations

import json
import sys

import numpy as np

from cupybnn import parallel
from cupybnn.backends.devices import resolve
from cupybnn.benchmark.scaling import ours

__all__ = ["main"]


def main(text: str) -> None:
    """Measure what the JSON object `text` describes; rank 0 prints the result as JSON."""
    task = json.loads(text)
    with parallel.connect(task["device"], seconds=task.get("timeout", 60.0)) as ranks:
        device = resolve(ranks.device if ranks.size > 1 else task["device"])
        with device.scope(), np.errstate(all="ignore"):
            if task["library"] == "PyTorch":
                from cupybnn.benchmark.scaling import peer

                row = peer.measure(ranks, task, device)
            else:
                row = ours.measure(ranks, task)
        if ranks.rank == 0:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
